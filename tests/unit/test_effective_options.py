"""What really executes, where a candidate asks for another session than a plain one."""

from autotune.compression.effective import effective_precisions
from autotune.compression.shipped_runtime import unseen_precisions
from search_spaces import INT8
from tests.unit.compression_models import quantizable


def test_a_graph_level_that_fuses_nothing_leaves_every_group_in_float():
    graph = quantizable("tiny")
    plan = dict.fromkeys(graph.units, INT8)
    artifact = graph.emit(plan)
    fused = effective_precisions(artifact, graph.units.values(), plan)
    unfused = effective_precisions(artifact, graph.units.values(), plan, graph_level="basic")
    assert {group.effective for group in fused} == {"w8a8"}
    assert {group.effective for group in unfused} == {"fp32"}
    assert all(group.reason for group in unfused)


def test_what_another_provider_executes_is_not_claimed_to_be_known():
    graph = quantizable("tiny")
    (first, *_) = found = unseen_precisions(graph.units.values(), {}, why="it is elsewhere")
    assert len(found) == len(graph.units)
    assert (first.planned, first.effective) == ("fp32", None)
    assert first.reason == "not seen: it is elsewhere"
