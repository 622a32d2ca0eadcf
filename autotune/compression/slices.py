"""Pieces of an artifact: the nodes behind a cut, as a model of their own.

An artifact with one group quantized is the FP32 graph but for a few nodes. Owns finding them
(by comparing the two files node by node, whatever wrote them) and cutting out the part that
has to run; nothing is written anew, so a piece computes what the whole file computes. The
FP32 tensors that flow into a piece are `prefix.py`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from autotune.compression.graph import BATCH_AXIS
from autotune.compression.wire import Part, assemble, field
from autotune.errors import CompressionError
from storage.protobuf import fields

# Field numbers of onnx.proto: ModelProto.graph; GraphProto.node, .initializer; TensorProto.name.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 2, 5, 11, 12
_TENSOR_NAME = 8


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a file: its serialized form, and what it takes and makes."""

    encoded: bytes
    name: str
    op_type: str
    inputs: tuple[str, ...]
    taken: frozenset[str]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileGraph:
    """A model file taken apart; its constants stay views of the file's bytes.

    `shell` is the model without its graph (opsets, functions). Nodes keep their order.
    """

    shell: bytes
    nodes: tuple[Node, ...]
    constants: Mapping[str, memoryview]
    input: str
    output: str

    @classmethod
    def read(cls, file: bytes) -> FileGraph:
        """The parts of the file; weights are not copied.

        Raises:
            CompressionError: it is no ONNX model, or has several inputs or outputs.
        """
        try:
            return cls._read(file)
        except ValueError as error:
            raise CompressionError(f"this is no ONNX file: {error}") from error

    @classmethod
    def _read(cls, file: bytes) -> FileGraph:
        shell: list[memoryview] = []
        graphs = []
        for number, whole, payload in fields(memoryview(file)):
            if number == _MODEL_GRAPH:
                graphs.append(payload)
            else:
                shell.append(whole)
        if len(graphs) != 1:
            raise CompressionError(f"a model file has one graph, this one {len(graphs)}")
        nodes: list[Node] = []
        constants: dict[str, memoryview] = {}
        ends: dict[int, list[str]] = {_GRAPH_INPUT: [], _GRAPH_OUTPUT: []}
        for number, whole, payload in fields(graphs[0]):
            if number == _GRAPH_NODE:
                nodes.append(_node(bytes(payload)))
            elif number == _GRAPH_INITIALIZER:
                constants[_tensor_name(payload)] = whole
            elif number in ends:
                ends[number].append(onnx.ValueInfoProto.FromString(bytes(payload)).name)
        data_inputs = [name for name in ends[_GRAPH_INPUT] if name not in constants]
        if len(data_inputs) != 1 or len(ends[_GRAPH_OUTPUT]) != 1:
            raise CompressionError(
                f"a model with one input and one output is needed, not {len(data_inputs)} and "
                f"{len(ends[_GRAPH_OUTPUT])}"
            )
        return cls(
            shell=b"".join(shell),
            nodes=tuple(nodes),
            constants=constants,
            input=data_inputs[0],
            output=ends[_GRAPH_OUTPUT][0],
        )

    def live_at(self, cut: int) -> set[str]:
        """The tensors that exist after the first `cut` nodes and are needed behind them."""
        made = {self.input, *(o for node in self.nodes[:cut] for o in node.outputs)}
        needed = {name for node in self.nodes[cut:] for name in node.taken} | {self.output}
        return made & needed

    def model(
        self,
        nodes: Iterable[Node],
        *,
        inputs: Mapping[str, np.ndarray],
        outputs: Iterable[str],
        batch: int,
    ) -> bytes:
        """The nodes as a file that takes tensors like `inputs` and answers with `outputs`.

        `batch` is the number of samples in `inputs`; another call may have more or fewer.
        """
        kept = list(nodes)
        graph = onnx.GraphProto(name="piece")
        for name, example in inputs.items():
            element = helper.np_dtype_to_tensor_dtype(example.dtype)
            shape = _symbolic(example.shape, batch)
            graph.input.append(helper.make_tensor_value_info(name, element, shape))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        taken = {name for node in kept for name in node.taken}
        parts: list[Part] = [field(_GRAPH_NODE, node.encoded) for node in kept]
        parts += [whole for name, whole in self.constants.items() if name in taken]
        return assemble(self.shell, graph.SerializeToString(deterministic=True), parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What of an artifact must run when the FP32 tensors at `cut` are known.

    `cut` counts FP32 nodes: all before it are in the artifact unchanged. `nodes` are the
    artifact's nodes behind it, `changed` the outputs of those that are not FP32's.
    """

    cut: int
    nodes: tuple[Node, ...]
    changed: frozenset[str]


def difference(fp32: FileGraph, artifact: FileGraph) -> Difference:
    """Compare two files of the same model.

    A node is unchanged when FP32 has it byte for byte, its constants are the same bytes and
    all that flows into it is unchanged. `cut` is the number of nodes for equal files.
    """
    known = {node.encoded for node in fp32.nodes}
    changed: set[str] = set()
    unchanged: set[bytes] = set()
    for node in artifact.nodes:
        if (
            node.encoded in known
            and not node.taken & changed
            and all(
                _same_bytes(fp32.constants.get(name), artifact.constants[name])
                for name in node.taken
                if name in artifact.constants
            )
        ):
            unchanged.add(node.encoded)
        else:
            changed.update(node.outputs)
    cut = next(
        (i for i, node in enumerate(fp32.nodes) if node.encoded not in unchanged),
        len(fp32.nodes),
    )
    before = {node.encoded for node in fp32.nodes[:cut]}
    return Difference(
        cut=cut,
        nodes=tuple(node for node in artifact.nodes if node.encoded not in before),
        changed=frozenset(changed),
    )


def needed_for(nodes: Sequence[Node], outputs: Collection[str]) -> tuple[list[Node], set[str]]:
    """The nodes that the outputs need, in order, and the tensors that flow in from elsewhere.

    The tensors include the constants.
    """
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.difference_update(node.outputs)
            wanted |= node.taken
    return kept[::-1], wanted


def counterparts(fp32: FileGraph, artifact: FileGraph, tensors: Iterable[str]) -> dict[str, str]:
    """For FP32 tensors, what stands in their place in the artifact.

    That is the tensor that the same consumer (by name, operator and position) takes there. A
    tensor whose consumers were all rewritten is replaced by what they make, and so on down to
    the output, which every file of the model has.
    """
    takers: dict[str, list[tuple[Node, int]]] = {}
    for node in fp32.nodes:
        for position, name in enumerate(node.inputs):
            takers.setdefault(name, []).append((node, position))
    there = {(node.name, node.op_type): node for node in artifact.nodes}
    found: dict[str, str] = {}
    waiting, seen = list(tensors), set()
    while waiting:
        tensor = waiting.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        if tensor == fp32.output:
            found[tensor] = artifact.output
            continue
        for node, position in takers.get(tensor, ()):
            twin = there.get((node.name, node.op_type))
            if twin is not None and len(twin.inputs) > position:
                found[tensor] = twin.inputs[position]
                break
        else:
            waiting += [name for node, _ in takers.get(tensor, ()) for name in node.outputs]
    return found


def _same_bytes(left: memoryview | None, right: memoryview) -> bool:
    """Compared by numpy, ten times faster than memoryviews compare themselves."""
    if left is None or len(left) != len(right):
        return False
    return np.array_equal(np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8))


def _symbolic(shape: tuple[int, ...], batch: int) -> list[str | int | None]:
    """The shape with the batch axis by its name, an axis that may hold the batch open.

    The name matters: onnxruntime fuses an Add into the convolution before it only where it can
    see that both shapes are the same.
    """
    if not shape:
        return []
    first = BATCH_AXIS if len(shape) > 1 and shape[0] == batch else None
    return [first, *shape[1:]]


def _node(encoded: bytes) -> Node:
    node = onnx.NodeProto.FromString(encoded)
    return Node(
        encoded=encoded,
        name=node.name,
        op_type=node.op_type,
        inputs=tuple(node.input),
        taken=frozenset(_taken(node)) - {""},
        outputs=tuple(name for name in node.output if name),
    )


def _taken(node: onnx.NodeProto) -> Iterator[str]:
    """What the node takes; the body of a control flow node may take any tensor around it."""
    yield from node.input
    for attribute in node.attribute:
        for body in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
            for inner in body.node:
                yield from _taken(inner)


def _tensor_name(payload: memoryview) -> str:
    for number, _, value in fields(payload):
        if number == _TENSOR_NAME:
            return bytes(value).decode()
    return ""
