"""Run the model of a bundle: this file is copied into every bundle as `run.py`.

It needs numpy and onnxruntime, nothing else, and no flag to be right or fast:
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

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


def open_session(model: bytes, *, provider: str, threads: int) -> ort.InferenceSession:
    """A session with the runtime's defaults and the threads that the search chose."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=[provider])


def benchmark_ns(session: ort.InferenceSession, x: np.ndarray, *, runs: int) -> np.ndarray:
    """Durations of `runs` inferences in ns, after a warm-up; shape (runs,)."""
    feed = {session.get_inputs()[0].name: x}
    for _ in range(WARM_UP_RUNS):
        session.run(None, feed)
    durations = np.empty(runs, dtype=np.int64)
    for i in range(runs):
        start = time.perf_counter_ns()
        session.run(None, feed)
        durations[i] = time.perf_counter_ns() - start
    return durations


def classify(
    session: ort.InferenceSession, x: np.ndarray, *, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable class of each sample, and its probability; shapes (n_samples,)."""
    name = session.get_inputs()[0].name
    parts = [
        session.run(None, {name: x[i : i + batch_size]})[0] for i in range(0, len(x), batch_size)
    ]
    logits = np.concatenate(parts).astype(np.float64)
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
    session = open_session(model, provider=runtime["provider"], threads=threads)
    shape = facts["input_shape"]
    if options.input is not None:
        print_classes(session, read_samples(options.input, shape), facts["class_names"])
        return
    print(f"model.onnx    sha256 {facts['sha256'][:16]}… is the exported file")
    x = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
    print_benchmark(benchmark_ns(session, x, runs=options.runs), threads, reports)


def print_classes(
    session: ort.InferenceSession, x: np.ndarray, class_names: Sequence[str] | None
) -> None:
    """One line per sample: its index, class and probability, separated by tabs."""
    for i, (label, probability) in enumerate(zip(*classify(session, x), strict=True)):
        name = class_names[label] if class_names else label
        print(f"{i}\t{name}\t{probability:.4f}")


def print_benchmark(durations: np.ndarray, threads: int, reports: dict[str, Any]) -> None:
    """The median here with its spread, beside the one on the device it was tuned for."""
    low, median, high = np.percentile(durations, [10, 50, 90]) / 1e6
    print(
        f"this machine  p50 {median:.3f} ms, p10 to p90 {low:.3f} to {high:.3f} ms, "
        f"n={len(durations)}, batch 1, {threads} thread(s), onnxruntime {ort.__version__}"
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
