"""The benchmarks' harness: the last line, the JSON beside it, and honest quick figures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import harness, quiet_window
from tests.benchmarks.harness import Benchmark, Figure, median_figure
from tests.unit import fabricated_job


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    made = harness.start("sample", "A sample.", ["--json", str(tmp_path / "deep" / "out.json")])
    made.add("resnet18.speedup", Figure(value=2.110449, low=2.0, high=2.25, n=600))
    made.add("n_models", Figure(value=2))
    made.raw["samples_ns"] = [1, 2, 3]
    return made


def test_the_last_line_holds_every_key(benchmark: Benchmark, capsys) -> None:
    benchmark.report()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "sample: resnet18.speedup=2.11 n_models=2"


def test_the_json_holds_the_same_keys_with_conditions_and_raw_values(benchmark: Benchmark) -> None:
    benchmark.report()
    document = json.loads(benchmark.json_path.read_text(encoding="utf-8"))
    assert document["resnet18.speedup"] == 2.110449
    assert document["intervals"]["resnet18.speedup"] == {"low": 2.0, "high": 2.25, "n": 600}
    assert document["n_models"] == 2
    assert document["raw"] == {"samples_ns": [1, 2, 3]}
    conditions = document["conditions"]
    assert conditions["machine"]["logical_cpus"] >= 1
    assert re.match(r"\d+\.\d+", conditions["versions"]["onnxruntime"])
    assert {"load_1m", "missing"} <= set(conditions["before"])
    assert document["quick"] is False


def test_a_quick_run_says_so_on_the_line_before_the_last(capsys) -> None:
    quick = harness.start("sample", "A sample.", ["--quick"])
    quick.add("x", Figure(value=1.5))
    quick.report()
    *_, before_last, last = capsys.readouterr().out.splitlines()
    assert before_last.startswith("quick figures")
    assert last == "sample: x=1.5"


def test_a_full_run_does_not_call_itself_quick(benchmark: Benchmark, capsys) -> None:
    benchmark.report()
    assert "quick" not in capsys.readouterr().out


def test_progress_goes_to_stderr(benchmark: Benchmark, capsys) -> None:
    benchmark.say("training")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("training\n")


def test_a_key_is_set_once(benchmark: Benchmark) -> None:
    with pytest.raises(ValueError, match="already set to 2"):
        benchmark.add("n_models", Figure(value=3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_does_not_exist_gets_no_key(benchmark: Benchmark, value: float) -> None:
    with pytest.raises(ValueError, match="has no key"):
        benchmark.add("missing", Figure(value=value))


def test_a_median_has_an_interval_around_it_and_n() -> None:
    figure = median_figure([3.0, 1.0, 2.0, 10.0, 2.5])
    assert (figure.value, figure.n) == (2.5, 5)
    assert 1.0 <= figure.low <= 2.5 <= figure.high <= 10.0
    assert figure == median_figure([3.0, 1.0, 2.0, 10.0, 2.5])


def test_the_interval_of_a_median_narrows_with_n() -> None:
    rng = np.random.default_rng(4)
    few, many = (median_figure(rng.normal(10, 1, n)) for n in (12, 300))
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_two_values_have_a_median_but_no_interval() -> None:
    assert median_figure([1.0, 2.0]) == Figure(value=1.5, n=2)


def test_there_is_no_median_of_nothing() -> None:
    with pytest.raises(ValueError, match="no value"):
        median_figure([])


def test_a_value_during_a_job_is_held_against_its_idle_neighbours() -> None:
    ratios = quiet_window.neighbour_ratios([100.0, 110.0, 90.0], [105.0, 103.0])
    assert ratios == pytest.approx([1.0, 1.03])


def test_the_method_is_held_against_itself_on_the_idle_machine() -> None:
    assert quiet_window.successive_ratios([100.0, 110.0, 99.0]) == pytest.approx([1.1, 0.9])


def test_the_clock_time_undoes_the_calibration() -> None:
    report = fabricated_job.latency(1.2e6)
    assert quiet_window.clock_ns(report) == pytest.approx(1.2e6 * 1.004)


def test_a_turn_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_window, "TURN_TIMEOUT_S", 0.0)
    with pytest.raises(SystemExit, match="not within 0 s: the job pauses"):
        quiet_window.until(lambda: False, "the job pauses")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("a", "b")),
        (["--quick"], ("b",)),
        (["--model", "a"], ("a",)),
        (["--quick", "--model", "a", "--model", "a"], ("a",)),
    ],
)
def test_a_benchmark_of_models_runs_those_asked_for(
    arguments: list[str], expected: tuple[str, ...]
) -> None:
    made = harness.start("sample", "A sample.", arguments, models=("a", "b"), quick_models=("b",))
    assert made.models == expected
