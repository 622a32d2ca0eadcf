"""A worker compresses for the device and in the way that the job names."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.search.workers import CompressionWorker
from autotune.spec import parse_job
from tests.unit.compression_models import tiny_source, tiny_splits
from tests.unit.fakes import description


@pytest.mark.parametrize(("flags", "multiple"), [(("avx2", "avx512f"), 16), (("avx2",), 8)])
def test_channels_are_rounded_for_the_device(
    tmp_path: Path, flags: tuple[str, ...], multiple: int
) -> None:
    spec = parse_job(
        {
            "model": {"source": "python:tests.unit.compression_models:tiny_module"},
            "data": {"evaluation": "npz:none.npz"},
            "recovery": {"epochs": 0},
            "search": {"prune_importance": "l1"},
        }
    )
    device = description().model_copy(update={"cpu_flags": flags})
    worker = CompressionWorker(spec, tiny_splits(), str(tmp_path), True, (device,))
    worker.adopt(tiny_source())
    pruning = worker.prepare_base({"hidden": 0.4})["pruning"]
    assert (pruning["channel_multiple"], pruning["importance"]) == (multiple, "l1")
    assert pruning["channels"]["hidden"][1] == {16: 32, 8: 40}[multiple]
