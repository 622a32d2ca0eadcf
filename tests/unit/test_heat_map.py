"""The table of sensitivities and its picture."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from autotune.export.heat_map import heat_map, inline_heat_map
from autotune.export.sensitivity_table import cell_text, in_order, table
from storage.sensitivity import Sensitivity
from tests.unit.spaces import inventory

ENTRIES = [
    Sensitivity(group="body", prune_ratio=0.5, mean_kl=0.02, n_samples=100),
    Sensitivity(group="head", precision="w4", mean_kl=3.2e-4, n_samples=200),
    Sensitivity(group="body", prune_ratio=0.25, mean_kl=0.01, is_estimate=True),
    Sensitivity(group="stem", precision="w8a8", mean_kl=1.2e-5, n_samples=200),
    Sensitivity(group="head", precision="w8", sqnr_db=52.0),
    Sensitivity(group="body", precision="w8a8", mean_kl=0.0, n_samples=200),
]


def test_rows_are_in_graph_order_and_columns_by_bits_then_ratio() -> None:
    found = table(in_order(ENTRIES, inventory()))
    assert found.rows == ("stem", "body", "head")
    assert found.columns == ("w8", "w8a8", "w4", "prune 25%", "prune 50%")
    assert found.n_precisions == 3


def test_a_cell_shows_the_figure_and_whether_it_is_an_estimate() -> None:
    found = table(in_order(ENTRIES, inventory()))
    shown = [cell_text(found.cell("body", column)) for column in found.columns]
    assert shown == ["-", "0.0e+00", "-", "~1.0e-02", "2.0e-02"]


def test_a_prunable_group_stands_where_its_layer_does() -> None:
    entry = Sensitivity(group="dw", prune_ratio=0.5, mean_kl=0.1)
    assert [e.group for e in in_order([*ENTRIES, entry], inventory())][:2] == ["stem", "dw"]


@pytest.mark.parametrize("entries", [ENTRIES, []])
def test_every_form_is_a_file_of_its_kind(entries: list[Sensitivity]) -> None:
    ordered = in_order(entries, inventory())
    assert heat_map(ordered, title="t", form="png").startswith(b"\x89PNG")
    svg = heat_map(ordered, title="t", form="svg")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert b"<title>a &lt;b&gt;</title>" in heat_map(ordered, title="a <b>", form="html")


def test_the_picture_has_every_group_choice_and_number() -> None:
    svg = inline_heat_map(in_order(ENTRIES, inventory()), title="job")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"stem", "body", "head", "w8a8", "prune 25%", "1.2e-05", "~1.0e-02"} <= set(texts)
    assert "<image" not in svg and "var(--ink)" in svg


def test_more_damage_is_darker_and_nothing_known_is_blank() -> None:
    svg = inline_heat_map(in_order(ENTRIES, inventory()))
    fills = re.findall(r"fill: (#[0-9a-f]{6})", svg.split("QuadMesh_1")[1].split("</g>\n")[0])
    brightness = [sum(bytes.fromhex(colour[1:])) for colour in fills]
    known = [e for e in ENTRIES if e.mean_kl is not None]
    assert len(fills) == len(known)
    kl = [e.mean_kl for e in in_order(known, inventory())]
    assert [b for _, b in sorted(zip(kl, brightness, strict=True))] == sorted(
        brightness, reverse=True
    )


def test_the_same_entries_give_the_same_bytes() -> None:
    ordered = in_order(ENTRIES, inventory())
    assert heat_map(ordered, title="t") == heat_map(ordered, title="t")
