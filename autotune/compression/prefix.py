"""FP32 activations kept at one cut of the graph, moved forward as the cut moves.

Sensitivity looks at the layer groups in graph order, and what lies before a group is FP32 for
all its precisions. Owns the tensors that are live at the current cut: the whole way costs one
FP32 pass, however many groups stop on it. Which part of an artifact runs behind the cut is
`slices.py`'s to say, what is measured there `sensitivity.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from autotune.compression.session import BATCH, Session
from autotune.compression.slices import Difference, FileGraph, Node, needed_for

MEMORY_BYTES = 256 * 1024 * 1024
"""Kept activations, at most, per worker."""

_Tensors = Mapping[str, np.ndarray]


class PrefixActivations:
    """The FP32 tensors at a cut, batch by batch of `BATCH` samples.

    Where those of all batches exceed `memory_bytes`, the last batches are not kept and run
    from the model's input: wide tensors lie near the input, where that costs little. Going
    back to an earlier cut starts again from the input. `x` may be read-only.
    """

    def __init__(
        self, fp32: FileGraph, x: np.ndarray, *, threads: int = 1, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self.fp32 = fp32
        self.nodes_run = 0
        """FP32 nodes run so far to move the cut, times the batches they ran on."""
        self._threads = threads
        self._memory_bytes = memory_bytes
        self._inputs: list[_Tensors] = [
            {fp32.input: np.ascontiguousarray(x[i : i + BATCH])} for i in range(0, len(x), BATCH)
        ]
        self._cut = 0
        self._live = {fp32.input}
        self._kept: list[_Tensors] = list(self._inputs)

    @property
    def kept_bytes(self) -> int:
        """What is held at the cut, beside the samples themselves."""
        return sum(_size(state) for state in self._kept) if self._cut else 0

    def outputs(
        self, graph: FileGraph, found: Difference, wanted: Sequence[str]
    ) -> list[np.ndarray]:
        """The tensors `wanted` of a file that differs from FP32 as `found`, over all samples.

        Raises:
            CompressionError: it does not load or run.
        """
        self._move_to(found.cut)
        nodes, taken = needed_for(found.nodes, wanted)
        taken -= set(graph.constants)
        # A rewritten node takes tensors that live at the cut; should one not, all of it runs.
        reused = self._kept if taken <= self._live else []
        parts = self._run(graph, nodes, reused, wanted)
        rest = self._inputs[len(reused) :]
        if rest:
            whole, _ = needed_for(graph.nodes, wanted)
            parts += self._run(graph, whole, rest, wanted)
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def _move_to(self, cut: int) -> None:
        if cut < self._cut:
            self._cut, self._live, self._kept = 0, {self.fp32.input}, list(self._inputs)
        if cut == self._cut:
            return
        start, states = self._cut, self._kept
        live = self.fp32.live_at(cut)
        self._cut, self._live, self._kept = cut, live, []
        # Batches that did not fit at an earlier cut may fit at this one.
        late = [] if start == 0 else self._inputs[len(states) :]
        room = self._memory_bytes
        for origin, waiting in ((start, states), (0, late)):
            for state in self._advance(waiting, origin, cut):
                room -= _size(state)
                if room < 0:
                    return
                self._kept.append(state)

    def _advance(self, states: list[_Tensors], start: int, cut: int) -> Iterator[_Tensors]:
        """The live tensors at `cut`, from those at `start`; empties `states` on the way."""
        live = sorted(self._live)
        nodes, _ = needed_for(self.fp32.nodes[start:cut], live)
        run: Callable[[_Tensors], list[np.ndarray]] | None = None
        while states:
            state = states.pop(0)
            run = run or self._runner(self.fp32, nodes, state, live)
            self.nodes_run += len(nodes)
            yield dict(zip(live, run(state), strict=True))

    def _run(
        self,
        graph: FileGraph,
        nodes: Sequence[Node],
        states: Sequence[_Tensors],
        wanted: Sequence[str],
    ) -> list[list[np.ndarray]]:
        if not states:
            return []
        run = self._runner(graph, nodes, states[0], wanted)
        return [run(state) for state in states]

    def _runner(
        self, graph: FileGraph, nodes: Sequence[Node], example: _Tensors, wanted: Sequence[str]
    ) -> Callable[[_Tensors], list[np.ndarray]]:
        """Runs the nodes; what is wanted and flows in already is handed through."""
        made = {name for node in nodes for name in node.outputs}
        asked = [name for name in wanted if name in made]
        if not asked:
            return lambda state: [state[name] for name in wanted]
        taken = {name for node in nodes for name in node.taken} - made - set(graph.constants)
        inputs = {name: example[name] for name in sorted(taken)}
        first = example if graph.input in example else self._inputs[0]
        batch = len(first[self.fp32.input])
        piece = graph.model(nodes, inputs=inputs, outputs=asked, batch=batch)
        session = Session(piece, threads=self._threads, what="a part of the model")

        def run(state: _Tensors) -> list[np.ndarray]:
            answers = session.run({name: state[name] for name in inputs}, asked)
            found = dict(zip(asked, answers, strict=True))
            return [found[name] if name in found else state[name] for name in wanted]

        return run


def _size(state: _Tensors) -> int:
    return sum(tensor.nbytes for tensor in state.values())
