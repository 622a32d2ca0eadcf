"""What a device has to fetch for a job: `python -m tests.benchmarks.bytes_per_candidate`.

A whole job with 60 trials is run; then its artifacts are fetched once more in the order of its
trials, into an empty cache, by the agent's own transfer over a line that counts. Keys:

- `bytes_ratio`: bytes sent for a trial's artifact (its list of segments and the ranges that
  are not on the device yet) over the bytes of the file; the median over trials, with the
  quartiles as its bounds. Sending the file is 1; smaller is better;
- `total_ratio`: the same, summed over all trials, first artifacts of each base included;
- `n`: trials that shipped an artifact of their own.

`--quick` takes a job of 12 trials without pruning.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from device_agents.cache import ArtifactCache
from device_agents.connection import Download
from device_agents.protocol import ArtifactReference, ArtifactSegments
from device_agents.segments import Segment
from device_agents.transfer import Transfer
from storage.artifacts import ArtifactStore
from storage.segments import find_segments
from tests.benchmarks.harness import CACHE, Figure, start
from tests.benchmarks.main_job import QUICK_MODEL, full_job, quick_job, records, tune

TRIALS, QUICK_TRIALS = 60, 12
# How well latencies are known does not change what is shipped; an idle machine never needs the
# time, a busy one would end as unstable without it.
MEASUREMENT = {
    "target_half_width": 0.15,
    "time_cap_s": 3.0,
    "confirmation_half_width": 0.15,
    "confirmation_time_cap_s": 3.0,
}
_CHUNK_BYTES = 1 << 16


@dataclass(slots=True)
class CountingLine:
    """An artifact store behind the methods of a service connection; counts the bodies sent."""

    artifacts: ArtifactStore
    sent: int = field(default=0)

    def segments(self, sha256: str) -> tuple[Segment, ...]:
        """The list that the service answers with."""
        found = find_segments(self.artifacts.path(sha256).read_bytes())
        pairs = tuple((s.identity, s.size_bytes) for s in found)
        self.sent += len(ArtifactSegments(segments=pairs).model_dump_json())
        return found

    @contextmanager
    def download(
        self, sha256: str, *, offset: int = 0, stop: int | None = None
    ) -> Iterator[Download]:
        """One range."""
        data = self.artifacts.path(sha256).read_bytes()[offset:stop]
        self.sent += len(data)
        parts = (data[i : i + _CHUNK_BYTES] for i in range(0, len(data), _CHUNK_BYTES))
        yield Download(offset=offset, chunks=parts)


def main() -> int:
    benchmark = start("bytes_per_candidate", "Bytes shipped to a device for each candidate.")
    quick = benchmark.quick
    source = quick_job(CACHE / "quick") if quick else full_job(QUICK_MODEL, CACHE / "digits")
    folder = CACHE / "bytes_per_candidate"
    job = long_job(source, QUICK_TRIALS if quick else TRIALS)
    benchmark.say("running the job")
    document, _ = tune(job, folder)
    sent = replay(folder / "service", document["job"]["id"])
    ratios = np.array([entry["sent"] / entry["size"] for entry in sent])
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    benchmark.raw["artifacts"] = sent
    benchmark.add("bytes_ratio", Figure(value=float(median), low=float(low), high=float(high)))
    total = sum(entry["sent"] for entry in sent) / sum(entry["size"] for entry in sent)
    benchmark.add("total_ratio", Figure(value=total, n=len(sent)))
    benchmark.add("n", Figure(value=len(sent)))
    benchmark.report()
    return 0


def long_job(source: Path, trials: int) -> Path:
    """The job file with that many trials, beside the one it was made from."""
    document = yaml.safe_load(source.read_text(encoding="utf-8"))
    document["search"] = {**document.get("search", {}), "trials": trials}
    document["measurement"] = MEASUREMENT
    path = source.with_name(f"{source.stem}-{trials}.yaml")
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def replay(data_dir: Path, job_id: str) -> list[dict[str, Any]]:
    """The job's artifacts in the order of its trials: size and bytes sent, each file once."""
    with records(data_dir) as repository:
        trials = repository.list_trials(job_id)
    line = CountingLine(artifacts=ArtifactStore(data_dir / "artifacts"))
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bytes-per-candidate-") as name:
        transfer = Transfer(line, ArtifactCache(Path(name)))  # type: ignore[arg-type]
        for trial in sorted(trials, key=lambda t: t.number):
            sha256 = trial.artifact_sha256
            if sha256 is None or sha256 in found:
                continue
            size_bytes = line.artifacts.path(sha256).stat().st_size
            line.sent = 0
            transfer.fetch(ArtifactReference(sha256=sha256, size_bytes=size_bytes))
            found[sha256] = {"trial": trial.number, "size": size_bytes, "sent": line.sent}
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
