"""What every benchmark shares: its command line, the machine's conditions, how it reports.

A benchmark ends with one line `NAME: key=value key=value ...`; a quick one says on the line
before that its figures are quick ones. The JSON holds the same keys, their intervals and n,
the conditions and the raw values. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autotune.export.provenance import tool_versions
from device_agents.conditions import read_conditions
from device_agents.device import describe_device
from device_agents.protocol import Conditions

RESULT_VERSION = 1
# Version 1 (2026-11-21): one object with the keys, `intervals`, `conditions`, `raw`.

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "benchmarks"
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure under a key: its value and, where it has them, its interval and n."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(slots=True)
class Benchmark:
    """A running benchmark: figures are added as they are known, then reported once."""

    name: str
    quick: bool = False
    json_path: Path | None = None
    models: tuple[str, ...] = ()
    figures: dict[str, Figure] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    before: dict[str, Any] = field(default_factory=lambda: momentary_conditions())
    _clock: float = field(default_factory=time.monotonic)

    def add(self, key: str, figure: Figure) -> None:
        """Set one key; a key is set once."""
        if key in self.figures:
            raise ValueError(f"the key {key!r} is already set to {self.figures[key].value}")
        if not math.isfinite(figure.value):
            raise ValueError(f"{key} is {figure.value}; a figure that does not exist has no key")
        self.figures[key] = figure

    def say(self, text: str) -> None:
        """A line of progress, on stderr, with the seconds since the start."""
        print(f"[{time.monotonic() - self._clock:6.1f} s] {text}", file=sys.stderr, flush=True)

    def document(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "benchmark": self.name,
            "version": RESULT_VERSION,
            "quick": self.quick,
            **{key: figure.value for key, figure in self.figures.items()},
            "intervals": {
                key: {"low": figure.low, "high": figure.high, "n": figure.n}
                for key, figure in self.figures.items()
            },
            "conditions": {
                "machine": machine(),
                "versions": tool_versions(),
                "commit": commit(),
                "started_at": self.started_at.isoformat(timespec="seconds"),
                "wall_s": round(time.monotonic() - self._clock, 1),
                "before": self.before,
                "after": momentary_conditions(),
            },
            "raw": self.raw,
        }

    def save(self) -> None:
        """Write the JSON with what is known so far: a long run that ends early is not lost."""
        if self.json_path is not None:
            self.json_path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.document(), indent=2, allow_nan=False)
            self.json_path.write_text(text + "\n", encoding="utf-8")

    def report(self) -> None:
        """Write the JSON, then print the closing lines on stdout."""
        self.save()
        for key, figure in self.figures.items():
            print(f"  {key:<32} {described(figure)}")
        if self.quick:
            print("quick figures: fewer runs than the full benchmark, not to be quoted")
        print(last_line(self.name, self.figures), flush=True)


def start(
    name: str,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    models: Sequence[str] = (),
    quick_models: Sequence[str] = (),
) -> Benchmark:
    """The benchmark that the command line asks for.

    With `models` it has the option --model, any number of times; without it all of them run, or
    the `quick_models`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{name}", description=description
    )
    parser.add_argument("--quick", action="store_true", help="under 50 s on 2 cores; rough figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and raw values")
    if models:
        parser.add_argument(
            "--model", choices=models, action="append", metavar="NAME", help="this one alone"
        )
    options = parser.parse_args(argv)
    asked = (models and options.model) or (quick_models if options.quick else models)
    return Benchmark(
        name=name, quick=options.quick, json_path=options.json, models=tuple(dict.fromkeys(asked))
    )


def last_line(name: str, figures: Mapping[str, Figure]) -> str:
    """`NAME: key=value ...` with four significant digits."""
    return f"{name}: " + " ".join(f"{key}={rounded(f.value)}" for key, f in figures.items())


def described(figure: Figure) -> str:
    """A figure with its interval and n where it has them."""
    text = rounded(figure.value)
    if figure.low is not None and figure.high is not None:
        text += f" [{rounded(figure.low)}, {rounded(figure.high)}]"
    return text if figure.n is None else f"{text} n={figure.n}"


def rounded(value: float) -> str:
    """Four significant digits, and whole numbers as they are: never an exponent for a large one.

    >>> rounded(2.11049), rounded(123456.7), rounded(600), rounded(0.00012345)
    ('2.11', '123457', '600', '0.0001234')
    """
    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.4g}"


def median_figure(values: Sequence[float], *, seed: int = 0) -> Figure:
    """The median with its 95 % bootstrap interval (percentile method, Efron 1979).

    Fewer than three values have no interval: resampling them says nothing about their spread.

    Raises:
        ValueError: there is no value.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("no value to take the median of")
    if sample.size < 3:
        return Figure(value=statistics.median(values), n=int(sample.size))
    rng = np.random.default_rng(seed)
    draws = rng.choice(sample, size=(BOOTSTRAP_DRAWS, sample.size))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Figure(
        value=statistics.median(values), low=float(low), high=float(high), n=int(sample.size)
    )


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    description = describe_device(probe=lambda: ())
    return {
        "cpu_model": description.cpu_model,
        "cpu_flags": list(description.cpu_flags),
        "logical_cpus": description.logical_cpus,
        "memory_bytes": description.memory_bytes,
        "architecture": description.architecture,
        "operating_system": description.operating_system,
        "kernel": description.kernel,
        "python": platform.python_version(),
    }


def momentary_conditions() -> dict[str, Any]:
    """Load, frequency, temperature and their like at this moment."""
    return Conditions.model_validate(read_conditions()).model_dump(mode="json")


def commit() -> str | None:
    """The commit that is checked out, with `+changes` where the tree differs from it."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
