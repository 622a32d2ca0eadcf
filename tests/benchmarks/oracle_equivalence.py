"""Our files against `quantize_static`'s on the same ranges and settings. Keys, per model:

- `MODEL.max_error_steps`: the largest difference between the outputs of both files in a plain
  session, in quantization steps of the output (its calibrated range / 255); at most 1;
- `MODEL.placement_differences`: tensors with a Q/DQ pair in one file alone, or with another
  scale or zero point; `MODEL.code_differences`: weights and biases whose codes differ.

`identical_bytes` and `valid_files` count the models whose file is the same in two builds and
in another process, and passes onnx.checker with its source's opset and standard operators.

What is aligned, so that arithmetic is compared with arithmetic: `quantize_static` gets

- the float graph in which we place Q/DQ: ours with the pairs taken out and the FP32 weights put
  back. Activations that an output range replaces (Relu, Clip) are gone, HardSwish is the Add and
  Mul that we write, and where codes are read on another scale than they were written on
  (HardSigmoid's gate), our Q and DQ stay;
- our calibrated ranges as its calibration cache; scale and zero point themselves only for
  tensors whose meaning is no calibrated range (Sigmoid's [0, 1], HardSwish's [-3, ...], shared
  Concat scales): `raw` counts them;
- the nodes that compute on codes (`nodes_to_quantize`); u8s8, asymmetric activations, symmetric
  weights per channel. It quantizes the output of every matrix product, which we leave float
  where nobody reads codes, and gives quantized data to float nodes too, which in our files
  read what was there before: those pairs and edges are taken out again.

Its own are every scale, zero point and code of weights and biases. Cross-layer equalization is
off: it changes the weights that are quantized. A model's plan is 8 bits for all of its groups.

One difference is meant: a bias of more than 2**30 steps gets its layer a larger weight scale in
our files, where `quantize_static` waits until 2**31, which leaves the accumulator that it is
added to no room. It takes layers whose input has all but vanished; these models have none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from search_spaces import INT8
from tests.benchmarks.harness import CACHE, ROOT, Figure, start
from tests.benchmarks.models import MODELS, fp32_model, images
from tests.unit.keras_style_model import SHAPE as KERAS_STYLE_SHAPE
from tests.unit.keras_style_model import keras_style_source

if TYPE_CHECKING:
    from autotune.compression.calibration import Calibration
    from autotune.compression.quantization import QuantizableGraph

KERAS_STYLE = "keras_style"
"""A small file that torch did not make, in its own size."""
QUICK_MODELS = ("resnet18", "mobilenet_v3_small", "squeezenet1_1", KERAS_STYLE)
SIZE, QUICK_SIZE = 224, 64
CALIBRATION_IMAGES = 8
TEST_IMAGES = 16
STANDARD_DOMAINS = {"", "ai.onnx"}
_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


def main() -> int:
    benchmark = start("oracle_equivalence", "The arithmetic, against quantize_static's.")
    names = QUICK_MODELS if benchmark.quick else (*MODELS, KERAS_STYLE)
    same = valid = 0
    for name in names:
        if name == KERAS_STYLE:
            path, size = keras_style_model(), KERAS_STYLE_SHAPE[-1]
        else:
            size = QUICK_SIZE if benchmark.quick else SIZE
            path = fp32_model(name, size)
        model = onnx.load(path)
        graph = uniform_graph(model, images(CALIBRATION_IMAGES, size))
        data = emit_uniform(graph)
        same += is_reproducible(graph, data, path)
        valid += is_valid(data, model)
        found = compare(graph, data, images(TEST_IMAGES, size, seed=1))
        benchmark.raw[name] = found
        for key in ("max_error_steps", "placement_differences", "code_differences"):
            count = len(found[key]) if isinstance(found[key], list) else found[key]
            n = TEST_IMAGES if key == "max_error_steps" else found["tensors"]
            benchmark.add(f"{name}.{key}", Figure(value=count, n=n))
        benchmark.say(f"{name}: {found['max_error_steps']:.4f} steps")
    benchmark.add("identical_bytes", Figure(value=same, n=len(names)))
    benchmark.add("valid_files", Figure(value=valid, n=len(names)))
    benchmark.report()
    return 0


def keras_style_model() -> Path:
    """That file as the engine holds it: in its normal form, from which candidates are written."""
    path = CACHE / "onnx" / f"{KERAS_STYLE}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(keras_style_source().fp32_bytes)
    return path


def uniform_graph(model: onnx.ModelProto, x: np.ndarray) -> QuantizableGraph:
    """The graph with least and greatest values as ranges, as `quantize_static` takes them."""
    from autotune.compression.calibration import Calibration, calibrate
    from autotune.compression.quantization import QuantizableGraph

    ranges = calibrate(model, x).min_max().ranges
    return QuantizableGraph(model, Calibration(ranges=ranges, n_samples=len(x)))


def emit_uniform(graph: QuantizableGraph) -> bytes:
    """The file with 8 bits for every group that can take them."""
    return graph.emit(uniform_plan(graph))


def uniform_plan(graph: QuantizableGraph) -> dict[str, Any]:
    """8 bits for every group that can take them."""
    from autotune.compression.inventory import precisions_of

    return {name: INT8 for name, unit in graph.units.items() if INT8 in precisions_of(unit)}


# -- the file itself -----------------------------------------------------------------------


def is_reproducible(graph: QuantizableGraph, data: bytes, model: Path) -> bool:
    """The same bytes from a second build here and from one in another process."""
    again = emit_uniform(type(graph)(graph.fp32, graph.calibration))
    script = "from tests.benchmarks.oracle_equivalence import emit_elsewhere; emit_elsewhere()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        input=json.dumps({"model": str(model), "calibration": graph.calibration.to_text()}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return again == data and done.stdout.strip() == hashlib.sha256(data).hexdigest()


def emit_elsewhere() -> None:
    """Print the sha256 of the uniform candidate of the model on stdin."""
    from autotune.compression.calibration import Calibration
    from autotune.compression.quantization import QuantizableGraph

    request = json.load(sys.stdin)
    calibration = Calibration.from_text(request["calibration"])
    graph = QuantizableGraph(onnx.load(request["model"]), calibration)
    print(hashlib.sha256(emit_uniform(graph)).hexdigest())


def is_valid(data: bytes, source: onnx.ModelProto) -> bool:
    """The checker has nothing to say, the opset is the source's, no operator is onnxruntime's own.

    Raises:
        onnx.checker.ValidationError: it has.
    """
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    opsets = {o.domain: o.version for o in model.opset_import}
    return opsets == {o.domain: o.version for o in source.opset_import} and all(
        node.domain in STANDARD_DOMAINS for node in model.graph.node
    )


# -- the comparison ------------------------------------------------------------------------


def compare(graph: QuantizableGraph, data: bytes, x: np.ndarray) -> dict[str, Any]:
    """How our file differs from the oracle's: outputs, placement, codes."""
    ours = onnx.load_from_string(data)
    placed = taken_apart(ours, graph)
    theirs = quantize_alike(placed, graph.calibration)
    step = _output_step(graph, x)
    mine, other = run(data, x), run(theirs.SerializeToString(), x)
    n_overridden = sum(p.overridden(graph.calibration) for p in placed.pairs.values())
    return {
        "max_error_steps": float(np.abs(mine - other).max() / step),
        "mean_error_steps": float(np.abs(mine - other).mean() / step),
        "output_spread_steps": float(mine.std(axis=0).mean() / step),
        "placement_differences": placement_differences(placed, theirs),
        "code_differences": code_differences(ours, placed, theirs),
        "tensors": len(placed.pairs),
        "overridden_tensors": n_overridden,
        "nodes_on_codes": len(placed.int8_nodes),
    }


def _output_step(graph: QuantizableGraph, x: np.ndarray) -> float:
    """One quantization step of the output; a float one (Softmax) has FP32's range on `x`."""
    from autotune.compression.calibration import Range

    held = graph.calibration.ranges.get(graph.view.output_name)
    if held is None:
        outputs = run(graph.fp32, x)
        held = Range(low=min(0.0, float(outputs.min())), high=max(0.0, float(outputs.max())))
    return held.scale


def run(model: bytes, x: np.ndarray) -> np.ndarray:
    """The outputs in a plain CPU session, one image at a time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a line for every scale that fusing left without a reader
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0] for image in x])


@dataclass(frozen=True, slots=True)
class Pair:
    """A Q/DQ pair: the tensor as our calibration knows it, its scale and zero point."""

    tensor: str
    scale: float
    zero_point: int

    def overridden(self, calibration: Calibration) -> bool:
        """No calibrated range stands for it."""
        held = calibration.ranges.get(self.tensor)
        return held is None or (held.scale, held.zero_point) != (self.scale, self.zero_point)


@dataclass(slots=True)
class Placed:
    """A file of ours without its Q/DQ pairs, and what they were.

    `pairs` is by the float graph's tensor names, `weights` maps a quantized constant of the
    float graph to the codes in our file; `float_outputs` are outputs of integer products that
    our file leaves float, `float_readers` (node, tensor) where a node reads a float producer's
    tensor as it was before others had it quantized.
    """

    float_graph: onnx.ModelProto
    pairs: dict[str, Pair] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    int8_nodes: list[str] = field(default_factory=list)
    float_outputs: list[str] = field(default_factory=list)
    float_readers: list[tuple[str, str]] = field(default_factory=list)


def taken_apart(ours: onnx.ModelProto, graph: QuantizableGraph) -> Placed:
    """The float graph that our file quantizes, and how."""
    return _Apart(ours, graph).take()


class _Apart:
    def __init__(self, ours: onnx.ModelProto, graph: QuantizableGraph) -> None:
        self.graph = graph
        self.constants = {i.name: i for i in ours.graph.initializer}
        self.made_by = {o: n for n in ours.graph.node for o in n.output}
        self.placed = Placed(onnx.ModelProto())
        self.placed.float_graph.CopyFrom(ours)
        self.output = ours.graph.output[0].name
        self.renamed: dict[str, str] = {}
        self.dropped: set[str] = set()
        self.restored: dict[str, np.ndarray] = {}
        self.read_codes: set[str] = set()
        self.reread = set(self._read_on_another_scale(ours))

    def _read_on_another_scale(self, ours: onnx.ModelProto) -> Iterator[str]:
        for node in ours.graph.node:
            if node.op_type == _DQ and node.input[0] not in self.constants:
                quantize = self.made_by[node.input[0]]
                if self._parameters(quantize) != self._parameters(node):
                    yield quantize.input[0]

    def take(self) -> Placed:
        nodes = list(self.placed.float_graph.graph.node)
        for node in nodes:
            if node.op_type == _DQ:
                self._dequantize(node, nodes)
        kept = [node for node in nodes if node.name not in self.dropped]
        for node in kept:
            node.input[:] = [self.renamed.get(name, name) for name in node.input]
            node.output[:] = [self.renamed.get(name, name) for name in node.output]
        self._classify(kept)
        inner = self.placed.float_graph.graph
        del inner.node[:]
        inner.node.extend(kept)
        used = {name for node in kept for name in node.input}
        constants = [i for i in inner.initializer if i.name in used]
        constants += [numpy_helper.from_array(a, n) for n, a in self.restored.items()]
        del inner.initializer[:]
        inner.initializer.extend(constants)
        return self.placed

    def _dequantize(self, node: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> None:
        codes, out = node.input[0], node.output[0]
        if codes in self.constants:
            takers = [n for n in nodes if out in n.input]
            if all(n.op_type in _WEIGHTED and list(n.input).index(out) > 0 for n in takers):
                self._restore(node, takers[0])
            return
        quantize = self.made_by[codes]
        scale, zero_point = self._parameters(quantize)
        raw, tensor = quantize.input[0], codes.removesuffix("/q")
        self.read_codes.add(out)
        self.placed.float_readers += [
            (taker.name, raw) for taker in nodes if raw in taker.input and taker.op_type != _Q
        ]
        self.placed.pairs[raw] = Pair(tensor, scale, zero_point)
        if raw in self.reread:
            return
        self.dropped |= {node.name, quantize.name}
        if out == self.output:
            self.renamed[raw] = out
            self.placed.pairs[out] = self.placed.pairs.pop(raw)
        else:
            self.renamed[out] = raw

    def _restore(self, node: onnx.NodeProto, taker: onnx.NodeProto) -> None:
        """Put the FP32 weights back, or what the codes mean where they are not the source's."""
        codes = numpy_helper.to_array(self.constants[node.input[0]]).astype(np.float64)
        scale = numpy_helper.to_array(self.constants[node.input[1]]).astype(np.float64)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if scale.ndim:
            scale = scale.reshape([-1 if a == axis else 1 for a in range(codes.ndim)])
        meant = (codes * scale).astype(np.float32)
        layer = self.graph.layers.get(taker.name)
        is_weight = list(taker.input).index(node.output[0]) == 1
        source = layer and (layer.weight if is_weight else layer.bias)
        # A gate's bias makes up for a zero point that is a whole number: it is not the source's.
        if source and (is_weight or taker.output[0] not in self.reread):
            meant = self.graph.view.array(source)
        self.restored[node.output[0]] = meant
        self.placed.weights[node.output[0]] = node.input[0]
        self.dropped.add(node.name)

    def _classify(self, nodes: Sequence[onnx.NodeProto]) -> None:
        from autotune.compression.operators import INT8_OPERATORS

        pairs = self.placed.pairs
        read = {self.renamed.get(name, name) for name in self.read_codes}
        for node in nodes:
            data = [
                n for n in node.input if n and n not in self.constants and n not in self.restored
            ]
            if node.op_type in (_Q, _DQ) or not data:
                continue
            is_layer = any(name in self.restored for name in node.input)
            reads = all(name in read or self._is_constant_dq(name) for name in data)
            # It would give an AveragePool's output the scale of its input. Not named, the pool
            # still stands between both tensors' pairs, which its neighbours ask for.
            is_operator = node.op_type in (INT8_OPERATORS | {"MatMul"}) - {"AveragePool"}
            if is_layer or (is_operator and reads and node.output[0] in pairs):
                self.placed.int8_nodes.append(node.name)
            if is_layer and node.output[0] not in pairs:
                self.placed.float_outputs.append(node.output[0])

    def _is_constant_dq(self, name: str) -> bool:
        made = self.made_by.get(name)
        return made is not None and made.op_type == _DQ and made.input[0] in self.constants

    def _parameters(self, node: onnx.NodeProto) -> tuple[float, int]:
        scale, zero_point = (numpy_helper.to_array(self.constants[n]) for n in node.input[1:3])
        return float(scale), int(zero_point)


def quantize_alike(placed: Placed, calibration: Calibration) -> onnx.ModelProto:
    """What `quantize_static` makes of the float graph with our ranges and settings."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.calibrate import (
        CalibrationMethod,
        TensorsData,
        save_tensors_data,
    )

    ranges: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    overrides: dict[str, list[dict[str, Any]]] = {}
    for name, pair in placed.pairs.items():
        low, high = _bounds(pair, calibration)
        ranges[name] = np.float32(low).reshape(()), np.float32(high).reshape(())
        if pair.overridden(calibration):
            overrides[name] = [
                {
                    "scale": np.array(pair.scale, np.float32),
                    "zero_point": np.array(pair.zero_point, np.uint8),
                }
            ]
    for name in placed.float_outputs:  # it insists on a range; the pair is taken out again
        ranges[name] = np.zeros((), np.float32), np.ones((), np.float32)
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        source, target, cache = (Path(folder) / n for n in ("f.onnx", "q.onnx", "ranges.json"))
        onnx.save(placed.float_graph, source)
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, dict(ranges)), cache)
        quantize_static(
            source,
            target,
            None,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=placed.int8_nodes,
            calibration_cache_path=cache,
            extra_options={
                "ActivationSymmetric": False,
                "WeightSymmetric": True,
                "ForceQuantizeNoInputCheck": True,  # the nodes named, whoever made their input
                "TensorQuantOverrides": overrides,
            },
        )
        theirs = onnx.load(target)
    for name in placed.float_outputs:
        _take_out(theirs.graph, name)
    by_name = {node.name: node for node in theirs.graph.node}
    for reader, tensor in placed.float_readers:
        node = by_name[reader]
        read = f"{tensor}_{_DQ}_Output"
        node.input[:] = [tensor if name == read else name for name in node.input]
    return theirs


def _bounds(pair: Pair, calibration: Calibration) -> tuple[float, float]:
    held = calibration.ranges.get(pair.tensor)
    if held is not None and not pair.overridden(calibration):
        return held.low, held.high
    return -pair.zero_point * pair.scale, (255 - pair.zero_point) * pair.scale


def _take_out(graph: onnx.GraphProto, tensor: str) -> None:
    """Remove the pair behind a tensor, which becomes float again."""
    quantize = next(n for n in graph.node if n.name == f"{tensor}_{_Q}")
    dequantize = next(n for n in graph.node if n.name == f"{tensor}_{_DQ}")
    raw, out = quantize.input[0], dequantize.output[0]
    for node in (quantize, dequantize):
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [tensor if n in (raw, out) else n for n in node.input]
        node.output[:] = [tensor if n == raw else n for n in node.output]


def activation_pairs(model: onnx.ModelProto) -> Iterator[tuple[str, float, int]]:
    """(tensor, scale, zero point) of the oracle's own pairs."""
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == _Q and node.name.endswith(f"_{_Q}"):
            scale, zero_point = (numpy_helper.to_array(constants[n]) for n in node.input[1:3])
            yield node.name.removesuffix(f"_{_Q}"), float(scale), int(zero_point)


def placement_differences(placed: Placed, theirs: onnx.ModelProto) -> list[str]:
    """Tensors that one side alone quantizes, or that both quantize differently."""
    other = {name: (scale, zero) for name, scale, zero in activation_pairs(theirs)}
    mine = {name: (pair.scale, pair.zero_point) for name, pair in placed.pairs.items()}
    return [
        f"{name}: ours {mine.get(name)}, quantize_static's {other.get(name)}"
        for name in sorted({*mine, *other})
        if mine.get(name) != other.get(name)
    ]


def code_differences(ours: onnx.ModelProto, placed: Placed, theirs: onnx.ModelProto) -> list[str]:
    """Weights and biases whose codes are not the same in both files."""
    mine = {i.name: i for i in ours.graph.initializer}
    other = {i.name: i for i in theirs.graph.initializer}
    found = []
    for name, codes in placed.weights.items():
        held = other.get(f"{name}_quantized")
        if held is None:
            found.append(f"{name}: not quantized by quantize_static")
            continue
        left, right = numpy_helper.to_array(mine[codes]), numpy_helper.to_array(held)
        n = int((left.astype(np.int64) != right.astype(np.int64)).sum())
        if n:
            found.append(f"{name}: {n} of {left.size} codes differ")
    return found


if __name__ == "__main__":
    sys.exit(main())
