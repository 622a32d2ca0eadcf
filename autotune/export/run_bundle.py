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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WARM_UP_RUNS = 10

# As the model was measured: what providers want to be told beside their names. Those with threads
# of their own get all of them; CUDA takes what TensorRT leaves.
OWN_THREADS = {
    "XnnpackExecutionProvider": "intra_op_num_threads",
    "OpenVINOExecutionProvider": "num_of_threads",
}
BEHIND = {
    "TensorrtExecutionProvider": ("CUDAExecutionProvider",),
    "NvTensorRTRTXExecutionProvider": ("CUDAExecutionProvider",),
}


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


def open_session(model: bytes, chosen: Mapping[str, Any]) -> Session:
    """A session with the runtime and the options that the search chose, and else its defaults."""
    openers = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}
    runtime = chosen["runtime"]
    if runtime not in openers:
        raise Unusable(
            f"the model was tuned for {runtime}, which this script cannot start; load model.onnx "
            "with it, at batch 1"
        )
    try:
        return openers[runtime](model, chosen)
    except ImportError as error:
        raise Unusable(f"the model was tuned for {runtime}: pip install {runtime}") from error


def _open_onnxruntime(model: bytes, chosen: Mapping[str, Any]) -> Session:
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    by_name = {
        "layout": levels.ORT_ENABLE_LAYOUT,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "disabled": levels.ORT_DISABLE_ALL,
    }
    provider, threads = chosen["provider"], chosen["threads"]
    own_threads = OWN_THREADS.get(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1 if own_threads else threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = by_name.get(
        chosen.get("graph_level", "all"), levels.ORT_ENABLE_ALL
    )
    options.enable_cpu_mem_arena = chosen.get("memory_arena", True)
    if not chosen.get("spinning", True):
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    offered = onnxruntime.get_available_providers()
    if provider not in offered:
        raise Unusable(
            f"the model was tuned for {provider}, and this build of onnxruntime has "
            f"{', '.join(offered)}"
        )
    behind = [name for name in BEHIND.get(provider, ()) if name in offered]
    session = onnxruntime.InferenceSession(
        model,
        options,
        providers=[(provider, {own_threads: str(threads)} if own_threads else {}), *behind],
    )
    if provider not in session.get_providers():
        raise Unusable(f"the model was tuned for {provider}, which does not start on this machine")
    name = session.get_inputs()[0].name
    return Session(
        run=lambda x: session.run(None, {name: x})[0],
        runtime=f"onnxruntime {onnxruntime.__version__}",
    )


def _open_openvino(model: bytes, chosen: Mapping[str, Any]) -> Session:
    """Compiled as it was measured: one sample, for latency, in FP32 where it is not quantized."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(model)
    for port in graph.inputs:
        shape = port.partial_shape
        shape[0] = 1
        graph.reshape({port: shape})
    device = chosen["provider"].removesuffix("ExecutionProvider")
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if device == "CPU":
        options["INFERENCE_NUM_THREADS"] = chosen["threads"]
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
    chosen = {**facts["runtime"], "threads": options.threads or facts["runtime"]["threads"]}
    session = open_session(model, chosen)
    shape = facts["input_shape"]
    if options.input is not None:
        print_classes(session, read_samples(options.input, shape), facts["class_names"])
        return
    print(f"model.onnx    sha256 {facts['sha256'][:16]}… is the exported file")
    x = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
    here = f"{chosen['threads']} thread(s), {session.runtime}{unusual(chosen)}"
    print_benchmark(benchmark_ns(session, x, runs=options.runs), here, reports)


def unusual(chosen: Mapping[str, Any]) -> str:
    """The options that a plain session has not, to be shown behind the runtime."""
    words = [f"graph level {chosen['graph_level']}"] if "graph_level" in chosen else []
    words += ["no memory arena"] if not chosen.get("memory_arena", True) else []
    words += ["no spinning"] if not chosen.get("spinning", True) else []
    return "".join(f", {word}" for word in words)


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
