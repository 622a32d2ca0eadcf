"""Measures the tables that the search benchmark replays: `tests.benchmarks.search_tables MODEL`.

A table is one model, trained on noisy digits (64x64), with ten groups of layers and every
combination of their choices: latency by onnxruntime on one thread as a ratio to FP32's in the
same process, accuracy on images that neither training nor calibration saw. All points come from
one graph in memory. Uniform INT8 loses nothing on digits, so accuracy is given something to say:
channels are spread (`post_training.spread`) and quantized with plain least-to-largest ranges;
one group of mobilenet_v2 can be pruned too, mobilenet_v3_small's last take weights of 4 bits.

A single short measurement makes a front of lucky outliers. So every point is measured in as many
rounds as its recipe says, each in a new random order and in a new session, and points near the
front again until the interval of their mean is narrow. All replicates are kept: replaying draws its
noise from them.

Without an option all steps are taken in turn; each goes on where it was interrupted.
`--latency` and `--replicate` want a core of their own, `--accuracy` may run beside `--latency`
on another; `--replicate` needs both, `--pack` writes the table that `tables.py` reads.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime

from autotune.compression.accuracy import log_probabilities
from autotune.compression.calibration import Calibration, calibrate
from autotune.compression.compressor import Compressor
from autotune.compression.data import DataSplits, LabelledData
from autotune.compression.graph import model_bytes
from autotune.compression.inventory import build_inventory
from autotune.compression.layer_times import with_groups
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.racing import label_margins
from autotune.compression.source import SourceModel
from autotune.export.provenance import tool_versions
from autotune.spec import RecoverySpec
from device_agents.profile import profile
from device_agents.protocol import Profile
from device_agents.runtimes import RuntimeOptions
from device_agents.runtimes.onnxruntime import OnnxRuntime
from search_spaces import Candidate, LayerGroup, LayerInventory, Precision
from tests.benchmarks.harness import CACHE, commit, machine, momentary_conditions
from tests.benchmarks.post_training import Images, load_images, outputs, spread, trained
from tests.benchmarks.tables import Table, distance_to_front

N_GROUPS, SIZE = 10, 64
TEST_IMAGES, EARLY_IMAGES = 300, 64
MOST_ROUNDS = 12
NARROW, MOST_REPLICATES = 0.006, 30
"""Points near the front are measured until twice their mean's standard error is below this."""
NEAR_FRONT = 0.03
"""Further from the front than this, plus twice the standard error, luck brings no point there."""

PAIRS, BLOCK_NS = 8, 3e6
SAME_STATE = 0.12
"""How far FP32's time may be from the middle of the state that holds most replicates. A neighbour
that computes slows FP32 by half and INT8 by less: both states are not those of one device."""

REFERENCES = 4
"""Sessions of FP32 that pairs take turns with: each is faster or slower for as long as it lives."""

PRUNED = "pruned w8a8"
_RATIO = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is special about a model's table: more choices for one of its groups, more rounds.

    Two replicates make a point whose replicates scatter by 2 to 4 % known to 3 % at worst; those of
    efficientnet_b0 scatter by 8 %, and take eight.
    """

    column: int = -1
    extra: str = ""
    rounds: int = 2


RECIPES = {
    "resnet18": Recipe(),
    "mobilenet_v2": Recipe(column=8, extra=PRUNED),
    "mobilenet_v3_small": Recipe(column=9, extra="w4"),
    "efficientnet_b0": Recipe(rounds=8),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.search_tables")
    parser.add_argument("model", choices=list(RECIPES))
    steps: dict[str, Callable[[Bench], object]] = {
        "accuracy": judge,
        "accuracy-from-end": judge_from_end,
        "latency": first_rounds,
        "replicate": replicate,
        "pack": pack,
    }
    for step in steps:
        parser.add_argument(f"--{step}", action="store_true")
    options = parser.parse_args()
    wanted = [step for step in steps if getattr(options, step.replace("-", "_"))]
    bench = Bench(options.model, CACHE / "search_tables" / options.model)
    for step in wanted or ["accuracy", "latency", "replicate", "pack"]:
        say(f"{options.model}: {step}")
        steps[step](bench)
    return 0


def say(text: str) -> None:
    print(f"[{datetime.now(UTC):%H:%M:%S}] {text}", file=sys.stderr, flush=True)


class Bench:
    """One model's points and how their files are made; keeps what took long in `folder`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.recipe = name, folder, RECIPES[name]
        folder.mkdir(parents=True, exist_ok=True)
        self._bases: dict[bool, QuantizableGraph] = {}

    @cached_property
    def images(self) -> Images:
        """Calibration images and those that accuracy is judged on."""
        return load_images(CACHE / "post_training", quick=False)

    @cached_property
    def source(self) -> SourceModel:
        """The trained model as it is."""
        return trained(self.name, CACHE / "post_training", self.images, quick=False)

    @cached_property
    def inventory(self) -> LayerInventory:
        """Of the trained model; kept, because measuring needs no torch."""
        path = self.folder / "inventory.json"
        if not path.exists():
            text = json.dumps(build_inventory(self.source).to_json())
            path.write_text(text, encoding="utf-8")
        return LayerInventory.from_json(json.loads(path.read_text(encoding="utf-8")))

    @cached_property
    def groups(self) -> list[list[LayerGroup]]:
        """Neighbouring layer groups merged to ten, in graph order, of about equal weight.

        Half of a weight is work, half is the number of layers: what is small costs launches.
        """
        units = self.inventory.groups
        total = sum(unit.macs for unit in units) or 1
        n_layers = sum(len(unit.layers) for unit in units)
        weights = [u.macs / total + len(u.layers) / n_layers for u in units]
        ends = np.cumsum(weights) / sum(weights)
        found: list[list[LayerGroup]] = [[] for _ in range(N_GROUPS)]
        column = 0
        for index, (unit, end) in enumerate(zip(units, ends, strict=True)):
            found[column].append(unit)
            left = len(units) - index - 1
            is_full = end >= (column + 1) / N_GROUPS - 1e-9
            if column < N_GROUPS - 1 and (is_full or left == N_GROUPS - 1 - column):
                column += 1
        return found

    @cached_property
    def options(self) -> tuple[tuple[str, ...], ...]:
        """Per group the names of its choices."""
        plain = [["fp32", "w8a8"] for _ in range(N_GROUPS)]
        if self.recipe.extra:
            plain[self.recipe.column].append(self.recipe.extra)
        return tuple(tuple(names) for names in plain)

    @cached_property
    def points(self) -> list[tuple[int, ...]]:
        """All of them, FP32 first."""
        return list(itertools.product(*(range(len(names)) for names in self.options)))

    def emit(self, point: Sequence[int]) -> bytes:
        """A point's file."""
        chosen = [names[option] for names, option in zip(self.options, point, strict=True)]
        precisions = {
            unit.name: Precision.parse(name.removeprefix("pruned "))
            for name, units in zip(chosen, self.groups, strict=True)
            for unit in units
            if name.removeprefix("pruned ") in unit.precisions
        }
        return self._base(PRUNED in chosen).emit(precisions)

    def _base(self, is_pruned: bool) -> QuantizableGraph:
        if is_pruned not in self._bases:
            self._bases[is_pruned] = self._make_base(is_pruned)
        return self._bases[is_pruned]

    def _make_base(self, is_pruned: bool) -> QuantizableGraph:
        kept = self.folder / ("pruned" if is_pruned else "base")
        model, ranges = kept.with_suffix(".onnx"), kept.with_suffix(".json")
        if not ranges.exists():
            source = self.source
            if is_pruned:
                # A candidate's file has no shapes, which calibrating goes by.
                graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(self._pruned()))
                source = replace(source, graph=graph)
            graph = spread(source, self.images).graph
            model.write_bytes(model_bytes(graph))
            plain = replace(calibrate(graph, self.images.calibration).min_max(), channels={})
            ranges.write_text(plain.to_text(), encoding="utf-8")
        calibration = Calibration.from_text(ranges.read_text(encoding="utf-8"))
        return QuantizableGraph(model.read_bytes(), calibration, equalize=False)

    def _pruned(self) -> bytes:
        """FP32 with half of the inner channels of one group gone, after one epoch of recovery."""
        from examples.digits.images import make_images
        from examples.digits.recipes import ImageRecipe

        training, _ = make_images(ImageRecipe())
        splits = DataSplits(
            calibration=self.images.calibration,
            training=LabelledData(x=training.x, y=training.y),
            search=self.images.held_out,
            held_out=self.images.held_out,
        )
        own = {layer.name for unit in self.groups[self.recipe.column] for layer in unit.layers}
        ratios = {
            group.name: _RATIO for group in self.inventory.prunable_groups if group.name in own
        }
        say(f"pruning {', '.join(ratios)}")
        with TemporaryDirectory(prefix="autotune-") as folder:
            compressor = Compressor(
                self.source, splits, recovery=RecoverySpec(epochs=1), cache_dir=Path(folder)
            )
            return compressor.emit(Candidate(prune_ratios=ratios))


# -- accuracy ------------------------------------------------------------------------------


def judge(bench: Bench) -> None:
    """Answers of every point to the test images."""
    judge_in_order(bench, range(len(bench.points)))


def judge_from_end(bench: Bench) -> None:
    """The same, last point first: two processes share the work."""
    judge_in_order(bench, range(len(bench.points) - 1, -1, -1))


def judge_in_order(bench: Bench, order: Sequence[int]) -> None:
    """Answers of these points, as far as nobody has noted them; one line each."""
    x, y = bench.images.held_out.x, bench.images.held_out.y
    chosen = np.random.default_rng(0).permutation(len(y))[:TEST_IMAGES]
    x, y = x[chosen], y[chosen]
    fp32 = log_probabilities(outputs(bench.emit(bench.points[0]), x))
    done: set[int] = set()
    with (bench.folder / "accuracy.csv").open("a", newline="", encoding="utf-8") as file:
        for step, index in enumerate(order):
            if step % 32 == 0:
                done = {int(row[0]) for row in _answered(bench)}
                say(f"{bench.name}: accuracy of {len(done)} of {len(order)}")
            if index in done:
                continue
            answers = log_probabilities(outputs(bench.emit(bench.points[index]), x))
            kl = (np.exp(fp32) * (fp32 - answers)).sum(axis=1)
            nll = -answers[np.arange(len(y)), y]
            right = np.packbits(answers.argmax(axis=1) == y).tobytes().hex()
            margins = label_margins(answers, y).astype("<f2").tobytes().hex()
            numbers = (kl.mean(), kl[:EARLY_IMAGES].mean(), nll.mean())
            row = [index, *(f"{number:.6g}" for number in numbers), right, margins]
            csv.writer(file).writerow(row)
            file.flush()


def judged(bench: Bench) -> dict[str, np.ndarray]:
    """`kl`, `early_kl`, `nll`, `(n_points,)`; `right`, `margins`, `(n_points, TEST_IMAGES)`.

    Raises:
        ValueError: a point was not judged yet.
    """
    rows = {int(row[0]): row for row in _answered(bench)}
    missing = len(bench.points) - len(rows)
    if missing:
        raise ValueError(f"{missing} of {len(bench.points)} points have no accuracy: --accuracy")
    ordered = [rows[index] for index in range(len(bench.points))]
    found = {
        key: np.array([float(row[column]) for row in ordered])
        for column, key in enumerate(("kl", "early_kl", "nll"), start=1)
    }
    bits = np.array([list(bytes.fromhex(row[4])) for row in ordered], dtype=np.uint8)
    found["right"] = np.unpackbits(bits, axis=1, count=TEST_IMAGES).astype(bool)
    halves = [np.frombuffer(bytes.fromhex(row[5]), "<f2") for row in ordered]
    found["margins"] = np.array(halves, dtype=float)
    return found


def _answered(bench: Bench) -> list[list[str]]:
    """The points' answers; those noted before margins were have to be judged again."""
    return [row for row in _rows(bench, "accuracy") if len(row) == 6]


def _rows(bench: Bench, what: str) -> list[list[str]]:
    """The whole lines of a file of this table; one cut short by an interruption is left out."""
    path = bench.folder / f"{what}.csv"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(csv.reader(line for line in lines if line.endswith("\n")))


# -- latency -------------------------------------------------------------------------------


class Stopwatch:
    """Ratios to FP32 in this process: pairs of short blocks in random order, FP32's sessions in
    turns."""

    def __init__(self, fp32: bytes, *, seed: int) -> None:
        self._fp32, self._rng = fp32, random.Random(seed)
        shape = [1, 3, SIZE, SIZE]
        self._image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        self._references = [self._load(fp32) for _ in range(REFERENCES)]

    def ratio(self, model: bytes) -> tuple[float, float]:
        """The median of `PAIRS` ratios, and the reference's median time in ns."""
        self._references.pop(0)
        self._references.append(self._load(self._fp32))
        candidate = self._load(model)
        ratios, references = [], []
        for pair in range(PAIRS):
            blocks = [("candidate", candidate), ("reference", self._references[pair % REFERENCES])]
            self._rng.shuffle(blocks)
            taken = {name: _block(call) for name, call in blocks}
            ratios.append(math.log(taken["candidate"] / taken["reference"]))
            references.append(taken["reference"])
        return math.exp(float(np.median(ratios))), float(np.median(references))

    def _load(self, model: bytes) -> Callable[[], object]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        call = partial(session.run, None, {session.get_inputs()[0].name: self._image})
        start = time.perf_counter_ns()
        for _ in range(3):
            call()
        while time.perf_counter_ns() - start < BLOCK_NS:
            call()
        return call


def _block(call: Callable[[], object]) -> float:
    """The median duration of calls for `BLOCK_NS`, three at least; the first is not looked at."""
    call()
    durations: list[int] = []
    while len(durations) < 3 or sum(durations) < BLOCK_NS:
        start = time.perf_counter_ns()
        call()
        durations.append(time.perf_counter_ns() - start)
    return float(np.median(durations))


def first_rounds(bench: Bench) -> None:
    """The recipe's replicates of every point; those taken in another state are taken again."""
    onnxruntime.set_default_logger_severity(3)
    rounds = bench.recipe.rounds
    for number in range(MOST_ROUNDS):
        counts = np.bincount(_read(bench)[0], minlength=len(bench.points))
        say(f"{bench.name}: {(counts >= rounds).sum()} of {len(counts)} have {rounds} replicates")
        order = np.random.default_rng(number).permutation(len(bench.points))
        measure(bench, [int(i) for i in order if counts[i] <= min(number, rounds - 1)])


def replicate(bench: Bench) -> None:
    """More of the points near the front, until none of them is uncertain."""
    onnxruntime.set_default_logger_severity(3)
    right = judged(bench)["right"]
    drop = right[0].mean() - right.mean(axis=1)
    rng = np.random.default_rng(2)
    while True:
        index, ratios = _read(bench)
        logs = [np.log(ratios[index == i]) for i in range(len(bench.points))]
        counts = np.array([len(own) for own in logs])
        if counts.min() < 2:
            first_rounds(bench)  # the usual state is now another one
            continue
        latency = np.exp([own.mean() for own in logs])
        own_spread = np.array([own.std(ddof=1) for own in logs])
        error = np.maximum(own_spread, np.sqrt((own_spread**2).mean())) / np.sqrt(counts)
        is_near = distance_to_front(latency * (1 - 2 * error), drop) < NEAR_FRONT
        open_ones = np.flatnonzero(is_near & (2 * error > NARROW) & (counts < MOST_REPLICATES))
        say(f"{bench.name}: {is_near.sum()} near the front, {len(open_ones)} uncertain")
        if not len(open_ones):
            return
        measure(bench, [int(i) for i in rng.permutation(open_ones)])


def measure(bench: Bench, indices: Sequence[int]) -> None:
    """One more replicate of each of these points."""
    if not indices:
        return
    stopwatch = Stopwatch(bench.emit(bench.points[0]), seed=indices[0])
    with (bench.folder / "latency.csv").open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        for index in indices:
            ratio, reference_ns = stopwatch.ratio(bench.emit(bench.points[index]))
            rows.writerow([index, f"{ratio:.6f}", round(reference_ns)])
            file.flush()


def _read(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """Points' numbers and ratios, in the order in which they were measured.

    Only those that were measured in the device's usual state, which FP32's time tells.
    """
    rows = _rows(bench, "latency")
    index = np.array([int(row[0]) for row in rows], dtype=int)
    ratios, reference_ns = (np.array([float(row[c]) for row in rows]) for c in (1, 2))
    if not len(rows):
        return index, ratios
    ordered = np.sort(reference_ns)
    within = np.searchsorted(ordered, ordered * (1 + SAME_STATE) ** 2, side="right")
    first = int(np.argmax(within - np.arange(len(ordered))))
    low, high = ordered[first], ordered[within[first] - 1]
    is_usual = (reference_ns >= low) & (reference_ns <= high)
    return index[is_usual], ratios[is_usual]


# -- the table -----------------------------------------------------------------------------


def pack(bench: Bench) -> None:
    """Write the table."""
    answers = judged(bench)
    index, ratios = _read(bench)
    order = np.argsort(index, kind="stable")
    table = Table(
        name=bench.name,
        options=bench.options,
        ratios=ratios[order],
        counts=np.bincount(index, minlength=len(bench.points)),
        right=answers["right"],
        margins=answers["margins"],
        kl=answers["kl"],
        nll=answers["nll"],
        early_kl=answers["early_kl"],
        kernel_ns=np.array(list(kernel_times(bench))),
        tensor_bytes=np.array(
            [4.0 * math.prod(group[-1].layers[-1].output_shape) for group in bench.groups[:-1]]
        ),
        conditions={
            "machine": machine(),
            "versions": tool_versions(),
            "commit": commit(),
            "packed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "at_packing": momentary_conditions(),
            "runtime": "onnxruntime, CPU, 1 thread, batch 1, 64x64",
            "reference_ns": float(np.median([float(row[2]) for row in _rows(bench, "latency")])),
            "fp32_accuracy": float(answers["right"][0].mean()),
            "early_images": EARLY_IMAGES,
            "rounds": bench.recipe.rounds,
            "pairs": PAIRS,
            "groups": [[unit.name for unit in group] for group in bench.groups],
        },
    )
    path = table.save()
    say(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {len(table.ratios)} replicates")


def kernel_times(bench: Bench) -> Iterator[list[float]]:
    """Kernel time per group of each uniform file, as the baselines' profiles tell it."""
    runtime = OnnxRuntime()
    for option in range(max(len(names) for names in bench.options)):
        point = [min(option, len(names) - 1) for names in bench.options]
        with TemporaryDirectory(prefix="autotune-") as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(bench.emit(point))
            taken = profile(
                runtime, path, RuntimeOptions(provider="CPUExecutionProvider", threads=1), seed=0
            )
            told = with_groups(
                Profile.model_validate(taken), path.read_bytes(), bench.inventory.groups
            ).group_ns()
        yield [sum(told.get(unit.name, 0.0) for unit in group) for group in bench.groups]


if __name__ == "__main__":
    sys.exit(main())
