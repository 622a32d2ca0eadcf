"""`autotune job sensitivity`, against a client that answers from memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from autotune.api_types import Sensitivity
from autotune.cli.root import run
from autotune.cli.session import Session
from tests.unit.cli_fakes import FakeClient

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def call(client: FakeClient, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line; its exit code, stdout and stderr."""

    def invoke(*arguments: str) -> tuple[int, str, str]:
        session = Session(connect=lambda *_: client)  # type: ignore[arg-type, return-value]
        code = run(["--url", "http://service", "--token", "secret", *arguments], session)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return invoke


SENSITIVITIES = [
    Sensitivity(group="conv1", precision="w8a8", mean_kl=1.2e-5, samples=200, sqnr_db=38.6),
    Sensitivity(group="conv1", prune_ratio=0.5, mean_kl=0.02, is_estimate=True),
    Sensitivity(group="fc", precision="w8a8", sqnr_db=49.5),
]


def test_job_sensitivity_is_a_table_of_groups_and_choices(call: Call, client: FakeClient) -> None:
    client.sensitivities = SENSITIVITIES
    code, out, err = call("job", "sensitivity", "digits")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["group", "w8a8", "prune", "50%"],
        ["conv1", "1.2e-05", "~2.0e-02"],
        ["fc", "-", "-"],
    ]
    assert "in nats" in err and "n=200 samples; 1 measured, 1 estimated (~), 1 not known" in err


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_job_sensitivity_for_programs_has_one_entry_each(
    call: Call, client: FakeClient, form: str
) -> None:
    client.sensitivities = SENSITIVITIES
    code, out, _ = call("job", "sensitivity", "digits", "-o", form)
    lines = out.splitlines()
    assert code == 0
    if form == "json":
        assert [entry["group"] for entry in json.loads(out)] == ["conv1", "conv1", "fc"]
    elif form == "jsonl":
        assert json.loads(lines[1])["is_estimate"] is True
    else:
        assert lines[0].startswith("group,precision,prune_ratio,mean_kl_nats,is_estimate")
        assert lines[2].startswith("conv1,,0.5,0.02,true")


def test_job_sensitivity_draws_the_heat_map(call: Call, client: FakeClient, tmp_path: Path) -> None:
    client.sensitivities = SENSITIVITIES
    code, _, err = call(
        "job", "sensitivity", "digits", "--heat-map", str(tmp_path / "a" / "map.SVG")
    )
    assert (code, client.calls[-1]) == (0, ("heat_map", "digits", "svg"))
    assert (tmp_path / "a" / "map.SVG").read_bytes() == b"picture"
    assert "map.SVG" in err
    assert call("job", "sensitivity", "digits", "--heat-map", "map.gif")[0] == 2


def test_job_sensitivity_without_entries_exits_13(call: Call) -> None:
    code, out, err = call("job", "sensitivity", "digits")
    assert (code, out) == (13, "")
    assert "has no sensitivities yet" in err
