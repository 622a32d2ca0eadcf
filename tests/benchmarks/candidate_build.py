"""Random mixed candidates built by the engine and by onnxruntime's `quantize_static`. Keys:

- `MODEL.speedup_plain`: `quantize_static` with 100 calibration images over ours, the median over
  the candidates (on the large models some of them, evenly spread; the interval says how many);
  at least 30. `MODEL.speedup_cached`: the same with its calibration cache
  (`calibration_cache_path`: calibrated once, the ranges read from a file); at least 8;
- `MODEL.build_ms`: ours; from the candidate's precisions to the file's bytes, on a base that is
  calibrated. Every candidate is new, and quantized weights are kept from one to the next, so
  that the first ones pay for most layers;
- `resnet18.one_group_ms`: a candidate that differs in one group from the one before, that
  group's weights quantized for the first time; at most 20;
- `MODEL.peak_memory_ratio`: what a fresh process that loads the FP32 file and builds all the
  candidates needs at its peak beyond what it needs with everything imported, over the FP32
  file's size; at most 2.5. The peak is the kernel's (`VmHWM`), so nothing escapes it.

A candidate leaves each group in FP32 or takes it to 8 bits; both sides get the same plan
(`nodes_to_quantize`), u8s8, per channel. The three builders take turns, one candidate at a
time, in one process. `quantize_static` writes a file, ours bytes: on a file system in memory
where there is one. Neither side's proof is timed: `quantize_static` has none, ours (the graph that
onnxruntime executes, held against the plan) is in `raw` as `checked_ms`, the file's sha256 as
`sha256_ms`, the base's one calibration as `calibrate_s`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from search_spaces import FP32, INT8, Precision
from tests.benchmarks.harness import ROOT, Benchmark, Figure, described, median_figure, start
from tests.benchmarks.models import fp32_model, images

if TYPE_CHECKING:
    from autotune.compression.calibration import Calibration
    from autotune.compression.quantization import QuantizableGraph

MODELS = ("mobilenet_v3_small", "mobilenet_v2", "resnet50", "vit_b_16")
QUICK_MODELS = ("mobilenet_v3_small",)
ONE_GROUP_MODEL = "resnet18"
SIZE, QUICK_SIZE = 224, 64
CANDIDATES, QUICK_CANDIDATES = 30, 6
PLAIN_CANDIDATES = {"resnet50": 10, "vit_b_16": 5}
"""Every third and every sixth of the candidates: one plain call on these takes minutes, nearly all
of it the calibration that is the same for each."""
CALIBRATION_IMAGES = 100
CHECKED = 3
_SHARED_MEMORY = Path("/dev/shm")


def main() -> int:
    benchmark = start("candidate_build", "Building a candidate, against quantize_static.")
    logging.getLogger().setLevel(logging.ERROR)  # two lines of advice per quantize_static
    size = QUICK_SIZE if benchmark.quick else SIZE
    one_group(benchmark, size)
    for name in QUICK_MODELS if benchmark.quick else MODELS:
        measure_model(benchmark, name, size)
        benchmark.save()
        keys = [key for key in benchmark.figures if key.startswith(f"{name}.")]
        benchmark.say(", ".join(f"{key} {described(benchmark.figures[key])}" for key in keys))
    benchmark.report()
    return 0


def measure_model(benchmark: Benchmark, name: str, size: int) -> None:
    """All keys of one model."""
    from autotune.compression.calibration import calibrate
    from autotune.compression.effective import effective_precisions
    from autotune.compression.quantization import QuantizableGraph

    path = fp32_model(name, size)
    benchmark.say(f"{name}: calibrating on {CALIBRATION_IMAGES} images of {size}x{size}")
    model, x = onnx.load(path), images(CALIBRATION_IMAGES, size)
    started = time.perf_counter()
    calibration = calibrate(model, x)
    calibrate_s = time.perf_counter() - started
    graph = QuantizableGraph(path.read_bytes(), calibration)
    plans = mixed_plans(list(graph.units), QUICK_CANDIDATES if benchmark.quick else CANDIDATES)
    with tempfile.TemporaryDirectory(
        prefix="candidate-build-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    ) as folder:
        oracle = Oracle(path, model.graph.input[0].name, x, Path(folder))
        oracle.cached(nodes_of(graph, plans[0]))  # fills the cache
        builders: dict[str, Callable[[Mapping[str, Precision]], object]] = {
            "ours": graph.emit,
            "cached": lambda plan: oracle.cached(nodes_of(graph, plan)),
            "plain": lambda plan: oracle.plain(nodes_of(graph, plan)),
        }
        rows: list[dict[str, float]] = []
        benchmark.raw[name] = {"seconds": rows, "size": size}
        step = len(plans) // min(PLAIN_CANDIDATES.get(name, len(plans)), len(plans))
        for index, plan in enumerate(plans):
            turns = [key for key in builders if key != "plain" or index % step == 0]
            rows.append(take_turns({key: builders[key] for key in turns}, plan, first=index))
            benchmark.save()
            benchmark.say(f"{name}: " + ", ".join(f"{k} {v:.3f} s" for k, v in rows[-1].items()))
    checked = [
        timed(lambda plan=plan: effective_precisions(graph.emit(plan), graph.units.values(), plan))
        for plan in plans[:CHECKED]
    ]
    files = [graph.emit(plan) for plan in plans[:CHECKED]]
    hashed = [timed(partial(hashlib.sha256, data)) for data in files]
    for key, figure in speedups(rows).items():
        benchmark.add(f"{name}.{key}", figure)
    peak = peak_memory(path, calibration, plans)
    benchmark.add(
        f"{name}.peak_memory_ratio", Figure(value=peak["extra_bytes"] / path.stat().st_size, n=1)
    )
    benchmark.raw[name] |= {
        "calibrate_s": calibrate_s,
        "checked_ms": 1e3 * statistics.median(checked),
        "sha256_ms": 1e3 * statistics.median(hashed),
        "memory": {**peak, "fp32_file_bytes": path.stat().st_size},
    }


def take_turns(
    builders: Mapping[str, Callable[[Mapping[str, Precision]], object]],
    plan: Mapping[str, Precision],
    *,
    first: int,
) -> dict[str, float]:
    """Seconds of each builder for one plan; who begins changes from plan to plan."""
    names = list(builders)
    shift = first % len(names)
    return {
        name: timed(lambda name=name: builders[name](plan))
        for name in (*names[shift:], *names[:shift])
    }


def speedups(rows: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """The medians over candidates: both speedups and our own time."""
    return {
        "speedup_plain": median_figure(
            [row["plain"] / row["ours"] for row in rows if "plain" in row]
        ),
        "speedup_cached": median_figure([row["cached"] / row["ours"] for row in rows]),
        "build_ms": median_figure([1e3 * row["ours"] for row in rows]),
    }


def mixed_plans(groups: Sequence[str], n: int, *, seed: int = 0) -> list[dict[str, Precision]]:
    """`n` different plans; each group is FP32 or 8-bit with equal chance."""
    rng = random.Random(seed)
    found: dict[tuple[str, ...], dict[str, Precision]] = {}
    while len(found) < n:
        plan = {group: INT8 for group in groups if rng.random() < 0.5}
        if plan:
            found[tuple(plan)] = plan
    return list(found.values())


def nodes_of(graph: QuantizableGraph, plan: Mapping[str, Precision]) -> list[str]:
    """The names of the nodes in the 8-bit groups."""
    return [node for name in plan for node in graph.units[name].nodes]


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Oracle:
    """`quantize_static` on one model, writing into `folder`."""

    def __init__(self, model: Path, input_name: str, x: np.ndarray, folder: Path) -> None:
        self._model, self._input, self._x, self._folder = model, input_name, x, folder

    def plain(self, nodes: list[str]) -> None:
        """Calibrates, then quantizes: what it does unless told otherwise."""
        self._quantize(nodes, None)

    def cached(self, nodes: list[str]) -> None:
        """Takes the ranges of an earlier call from its calibration cache."""
        self._quantize(nodes, self._folder / "ranges.json")

    def _quantize(self, nodes: list[str], cache: Path | None) -> None:
        from onnxruntime.quantization import QuantType, quantize_static

        quantize_static(
            self._model,
            self._folder / "int8.onnx",
            _Reader(self._input, self._x),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            calibration_cache_path=cache,
        )


class _Reader:
    """One image at a time, as onnxruntime's own examples feed them."""

    def __init__(self, name: str, x: np.ndarray) -> None:
        self._rest = iter([{name: sample[None]} for sample in x])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rest, None)


# -- one group -----------------------------------------------------------------------------


def one_group(benchmark: Benchmark, size: int) -> None:
    """Flip the groups of a candidate one after the other; adds `resnet18.one_group_ms`."""
    from autotune.compression.calibration import calibrate
    from autotune.compression.quantization import QuantizableGraph

    path = fp32_model(ONE_GROUP_MODEL, size)
    calibration = calibrate(onnx.load(path), images(8, size))
    first, again = [], []
    for seed in range(2 if benchmark.quick else 10):
        graph = QuantizableGraph(path.read_bytes(), calibration)
        groups = list(graph.units)
        random.Random(seed).shuffle(groups)
        plan: dict[str, Precision] = dict.fromkeys(groups, FP32)
        graph.emit(plan)
        for times, precision in ((first, INT8), (again, FP32)):
            for group in groups:
                plan[group] = precision
                times.append(1e3 * timed(partial(graph.emit, plan)))
    benchmark.raw[f"{ONE_GROUP_MODEL}.one_group"] = {"first_ms": first, "again_ms": again}
    benchmark.add(f"{ONE_GROUP_MODEL}.one_group_ms", median_figure(first))


# -- memory --------------------------------------------------------------------------------


def peak_memory(
    path: Path, calibration: Calibration, plans: Sequence[Mapping[str, Precision]]
) -> dict[str, Any]:
    """Build the plans in a fresh process; its memory before and at the peak, in bytes."""
    request = {
        "model": str(path),
        "calibration": calibration.to_text(),
        "plans": [list(plan) for plan in plans],
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.candidate_build", "--build-alone"],
        cwd=ROOT,
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def build_alone() -> int:
    """What the fresh process does; a file is gone before the next one is built, as in a worker."""
    from autotune.compression.calibration import Calibration
    from autotune.compression.quantization import QuantizableGraph

    request = json.load(sys.stdin)
    calibration = Calibration.from_text(request["calibration"])
    # What reading the request left free must not serve the build that is measured.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of the imports
    before = _memory_bytes("VmRSS")
    graph = QuantizableGraph(Path(request["model"]).read_bytes(), calibration)
    loaded = _memory_bytes("VmRSS")
    sizes = [len(graph.emit(dict.fromkeys(groups, INT8))) for groups in request["plans"]]
    document = {
        "before_bytes": before,
        "loaded_bytes": loaded,
        "held_bytes": _memory_bytes("VmRSS"),
        "extra_bytes": _memory_bytes("VmHWM") - before,
        "largest_candidate_bytes": max(sizes),
    }
    print(json.dumps(document))
    return 0


def _memory_bytes(key: str) -> int:
    """A figure of /proc/self/status (proc(5)), which counts in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    sys.exit(build_alone() if "--build-alone" in sys.argv else main())
