"""Run the model of a bundle: this file is copied into every bundle as `run.py`.

It needs numpy and the runtime that the model was tuned for (onnxruntime or openvino), nothing
else, and no flag to be right or fast:
`python run.py` checks the model's digest and measures it on this machine;
`python run.py --input x.npy` prints the class of every sample in the file.
"""
# ruff: noqa: T201 - this file is a program of its own, run by the bundle's user

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WARM_UP_RUNS = 10


class Unusable(Exception):
    """The bundle is damaged or the input does not fit; the message says what to do."""


def read_reports(folder: Path) -> dict[str, Any]:
    """The measured figures and the model's description."""
    try:
        reports: dict[str, Any] = json.loads((folder / "reports.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unusable(f"cannot read {folder / 'reports.json'}: {error}") from error
    return reports


def verified_model(folder: Path, sha256: str) -> bytes:
    """The bytes of model.onnx, whose digest is the exported one."""
    try:
        model = (folder / "model.onnx").read_bytes()
    except OSError as error:
        raise Unusable(f"cannot read {folder / 'model.onnx'}: {error}") from error
    found = hashlib.sha256(model).hexdigest()
    if found != sha256:
        raise Unusable(
            f"model.onnx has sha256 {found}, the exported one had {sha256}: "
            "the file was altered or damaged; copy the bundle again"
        )
    return model


class Session(NamedTuple):
    """A loaded model: `run` takes one sample (1, ...) and returns its scores (1, classes)."""

    run: Callable[[np.ndarray], np.ndarray]
    runtime: str


def open_session(model: bytes, runtime: str, *, provider: str, threads: int) -> Session:
    """A session with the runtime's defaults and the threads that the search chose."""
    openers = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}
    if runtime not in openers:
        raise Unusable(
            f"the model was tuned for {runtime}, which this script cannot start; load model.onnx "
            "with it, at batch 1"
        )
    try:
        return openers[runtime](model, provider, threads)
    except ImportError as error:
        raise Unusable(f"the model was tuned for {runtime}: pip install {runtime}") from error


def _open_onnxruntime(model: bytes, provider: str, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    name = session.get_inputs()[0].name
    return Session(
        run=lambda x: session.run(None, {name: x})[0],
        runtime=f"onnxruntime {onnxruntime.__version__}",
    )


def _open_openvino(model: bytes, provider: str, threads: int) -> Session:
    """Compiled as it was measured: one sample, for latency, in FP32 where it is not quantized."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(model)
    for port in graph.inputs:
        shape = port.partial_shape
        shape[0] = 1
        graph.reshape({port: shape})
    device = provider.removesuffix("ExecutionProvider")
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if device == "CPU":
        options["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(graph, device, options).create_infer_request()
    return Session(
        run=lambda x: np.asarray(request.infer({0: x}, share_inputs=True)[0]),
        runtime=f"openvino {str(openvino.__version__).partition('-')[0]}",
    )


def benchmark_ns(session: Session, x: np.ndarray, *, runs: int) -> np.ndarray:
    """Durations of `runs` inferences in ns, after a warm-up; shape (runs,)."""
    for _ in range(WARM_UP_RUNS):
        session.run(x)
    durations = np.empty(runs, dtype=np.int64)
    for i in range(runs):
        start = time.perf_counter_ns()
        session.run(x)
        durations[i] = time.perf_counter_ns() - start
    return durations


def classify(session: Session, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most probable class of each sample, and its probability; shapes (n_samples,)."""
    logits = np.concatenate([session.run(x[i : i + 1]) for i in range(len(x))]).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    classes = probabilities.argmax(axis=1)
    return classes, probabilities[np.arange(len(classes)), classes]


def read_samples(path: Path, shape: Sequence[int]) -> np.ndarray:
    """The samples of an .npy file as float32, shape (n_samples, *shape); one sample may be bare."""
    try:
        x = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise Unusable(f"cannot read {path} as an .npy file: {error}") from error
    wanted = tuple(shape)
    if x.shape == wanted:
        x = x[np.newaxis]
    if x.shape[1:] != wanted or len(x) == 0:
        axes = ", ".join(map(str, ("n", *wanted)))
        raise Unusable(f"{path} has shape {x.shape}; the model takes ({axes})")
    return np.ascontiguousarray(x, dtype=np.float32)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, every part of it optional."""
    parser = argparse.ArgumentParser(
        description="Check this bundle's model, measure it on this machine, classify samples."
    )
    parser.add_argument("--input", type=Path, metavar="X.npy", help="print the classes of samples")
    parser.add_argument("--runs", type=int, default=200, help="inferences to time (200)")
    parser.add_argument("--threads", type=int, help="instead of the number that was tuned for")
    parsed = parser.parse_args(argv)
    if parsed.runs < 1 or (parsed.threads is not None and parsed.threads < 1):
        parser.error("--runs and --threads must be 1 or more")
    return parsed


def main(argv: Sequence[str] | None = None, *, folder: Path | None = None) -> int:
    """The program; returns the exit status."""
    options = arguments(argv)
    try:
        run(options, folder or Path(__file__).resolve().parent)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace, folder: Path) -> None:
    """Check the digest, then classify the samples given or measure the model here."""
    reports = read_reports(folder)
    facts = reports["model"]
    model = verified_model(folder, facts["sha256"])
    runtime = facts["runtime"]
    threads = options.threads or runtime["threads"]
    session = open_session(model, runtime["runtime"], provider=runtime["provider"], threads=threads)
    shape = facts["input_shape"]
    if options.input is not None:
        print_classes(session, read_samples(options.input, shape), facts["class_names"])
        return
    print(f"model.onnx    sha256 {facts['sha256'][:16]}… is the exported file")
    x = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
    here = f"{threads} thread(s), {session.runtime}"
    print_benchmark(benchmark_ns(session, x, runs=options.runs), here, reports)


def print_classes(session: Session, x: np.ndarray, class_names: Sequence[str] | None) -> None:
    """One line per sample: its index, class and probability, separated by tabs."""
    for i, (label, probability) in enumerate(zip(*classify(session, x), strict=True)):
        name = class_names[label] if class_names else label
        print(f"{i}\t{name}\t{probability:.4f}")


def print_benchmark(durations: np.ndarray, here: str, reports: dict[str, Any]) -> None:
    """The median here with its spread, beside the one on the device it was tuned for."""
    low, median, high = np.percentile(durations, [10, 50, 90]) / 1e6
    print(
        f"this machine  p50 {median:.3f} ms, p10 to p90 {low:.3f} to {high:.3f} ms, "
        f"n={len(durations)}, batch 1, {here}"
    )
    winner = reports["figures"]["winner"]["latency"]
    tuned = winner["confirmed"] or winner["screening"]
    if tuned is not None:
        device = (reports["provenance"]["device"] or {}).get("name", "the device")
        print(
            f"tuned on      p50 {tuned['p50_ns'] / 1e6:.3f} ms "
            f"[{tuned['p50_low_ns'] / 1e6:.3f}, {tuned['p50_high_ns'] / 1e6:.3f}], "
            f"n={tuned['n_samples']}, on {device}"
        )


if __name__ == "__main__":
    sys.exit(main())
