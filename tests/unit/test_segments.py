"""Segments: what two files have in common is found, and every plan gives the whole file."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from device_agents.segments import MOST_REQUESTS, Segment, places, plan
from storage.segments import find_segments


def model(changed=None):
    """A chain of 40 layers with 8 KiB of weights each; `changed` has other weights."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((2, 1024)).astype(np.float32) for _ in range(40)]
    if changed is not None:
        weights[changed] = weights[changed] + 1
    nodes = [helper.make_node("Add", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(40)]
    tensor = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in ("x0", "x40")]
    constants = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "chain", tensor[:1], tensor[1:], constants)
    return helper.make_model(graph).SerializeToString()


def test_the_segments_of_a_file_are_the_whole_file():
    data = model()
    assert sum(segment.size_bytes for segment in find_segments(data)) == len(data)
    assert len(find_segments(data)) > 40


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x3a\xff\xff\x03cut", b"\x00" * 5000])
def test_what_is_no_model_is_at_most_one_segment_of_all_its_bytes(data):
    segments = find_segments(data)
    assert sum(segment.size_bytes for segment in segments) == len(data)


def test_one_changed_weight_changes_its_own_segment_alone():
    before = {segment.identity for segment in find_segments(model())}
    other = [s for s in find_segments(model(changed=7)) if s.identity not in before]
    assert sum(segment.size_bytes for segment in other) < 10_000


def assembled(pieces, data):
    return b"".join(
        data[piece.start : piece.stop]
        if piece.place is None
        else piece.place.path.read_bytes()[
            piece.place.offset : piece.place.offset + piece.stop - piece.start
        ]
        for piece in pieces
    )


def test_a_plan_copies_what_is_here_and_fetches_the_rest(tmp_path):
    (tmp_path / "old").write_bytes(model())
    known = places({tmp_path / "old": find_segments(model())})
    wanted = model(changed=7)
    pieces = plan(find_segments(wanted), known, offset=0)
    assert assembled(pieces, wanted) == wanted
    assert sum(p.stop - p.start for p in pieces if p.place is None) < 10_000


def test_a_plan_goes_on_in_the_middle_of_a_segment(tmp_path):
    (tmp_path / "old").write_bytes(model())
    known = places({tmp_path / "old": find_segments(model())})
    wanted = model(changed=7)
    for offset in (1, 5000, 70_001, len(wanted)):
        pieces = plan(find_segments(wanted), known, offset=offset)
        assert assembled(pieces, wanted) == wanted[offset:]


def test_a_first_artifact_is_one_range():
    segments = find_segments(model())
    assert [(p.start, p.stop) for p in plan(segments, {}, offset=0)] == [(0, len(model()))]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3000)), max_size=200), st.data())
def test_any_plan_is_gapless_and_asks_for_few_ranges(parts, data):
    segments = [Segment(identity=str(i), size_bytes=size) for i, (_, size) in enumerate(parts)]
    known = places({Path("old"): [s for s, (here, _) in zip(segments, parts, strict=True) if here]})
    total = sum(size for _, size in parts)
    offset = data.draw(st.integers(0, total))
    pieces = plan(segments, known, offset=offset)
    edges = [offset, *(piece.stop for piece in pieces)]
    assert [piece.start for piece in pieces] == edges[:-1]
    assert edges[-1] == total
    assert sum(piece.place is None for piece in pieces) <= MOST_REQUESTS
