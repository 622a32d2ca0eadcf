"""A candidate: one point of a search space, with a canonical form and a digest.

The digest is the identity: a sampler that repeats itself, a retried task and a restarted
service all meet the same candidate again. The artifact digest leaves the runtime options
out, because they do not change the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from search_spaces.choices import FP32, Precision, RuntimeOptions
from search_spaces.errors import InvalidCandidate, SearchSpaceError

CANDIDATE_VERSION = 3
# Version 1 (2026-11-21): precisions, prune_ratios, runtime; an absent group is FP32, unpruned.
# Version 2 (2026-11-21): rounding. A candidate without it is still written as version 1, so that
# its digest stays what it was.
# Version 3 (2026-11-21): graph_level, memory_arena and spinning of the runtime. A candidate whose
# runtime has the usual ones is still written as the version before.

Rounding = Literal["adaround"]
"""How weights may be rounded otherwise than every candidate of the base has them: `adaround`
learns it for this candidate (Nagel et al. 2020)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Precision per layer group, fraction of channels pruned per prunable group, runtime.

    A group that is not named is FP32 (or unpruned), so defaults never change the identity.
    `rounding` says how its weights were rounded, where that was done for this candidate alone.

    >>> a = Candidate(precisions={"conv1": FP32, "fc": Precision(8, 8)})
    >>> b = Candidate(precisions={"fc": Precision(8, 8)}, prune_ratios={"conv1": 0.0})
    >>> a.digest == b.digest
    True
    """

    precisions: Mapping[str, Precision] = field(default_factory=dict)
    prune_ratios: Mapping[str, float] = field(default_factory=dict)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        for name, ratio in self.prune_ratios.items():
            if not 0.0 <= ratio < 1.0:
                raise InvalidCandidate(
                    f"prune ratio {ratio} of {name!r} is not a fraction in [0, 1)"
                )
        if self.rounding not in (None, *get_args(Rounding)):
            raise InvalidCandidate(
                f"rounding {self.rounding!r} is not known; it is left out, or one of "
                f"{', '.join(get_args(Rounding))}"
            )
        kept = {n: p for n, p in sorted(self.precisions.items()) if p != FP32}
        ratios = {n: round(r, 4) for n, r in sorted(self.prune_ratios.items()) if r > 0.0}
        object.__setattr__(self, "precisions", kept)
        object.__setattr__(self, "prune_ratios", ratios)

    def precision(self, group: str) -> Precision:
        """The precision of a layer group, FP32 where none is set."""
        return self.precisions.get(group, FP32)

    def prune_ratio(self, group: str) -> float:
        """The fraction of channels removed from a prunable group, 0.0 where none is set."""
        return self.prune_ratios.get(group, 0.0)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, with the format's version."""
        version = 3 if self.runtime.unusual else 1 if self.rounding is None else 2
        return {
            "version": version,
            **self._artifact_json(),
            "runtime": self.runtime.to_json(),
        }

    def canonical_json(self) -> str:
        """The one textual form: sorted keys, no white space, defaults left out."""
        return _canonical(self.to_json())

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, in hex: the candidate's identity."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    @property
    def artifact_digest(self) -> str:
        """sha256 over what shapes the file: candidates that share it share an artifact."""
        return hashlib.sha256(_canonical(self._artifact_json()).encode()).hexdigest()

    @property
    def base_digest(self) -> str:
        """sha256 over the prune ratios: candidates that share it share a pruned base."""
        return hashlib.sha256(_canonical(dict(self.prune_ratios)).encode()).hexdigest()

    def with_precision(self, group: str, precision: Precision) -> Candidate:
        """This candidate with one group's precision changed."""
        return replace(self, precisions={**self.precisions, group: precision})

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Candidate:
        """The candidate that `to_json` wrote.

        Raises:
            InvalidCandidate: the document is of a newer version or not a candidate at all.
        """
        try:
            version = document["version"]
            if version not in range(1, CANDIDATE_VERSION + 1):
                raise InvalidCandidate(
                    f"candidate format version {version!r} is not known here; "
                    f"this release reads versions 1 to {CANDIDATE_VERSION}"
                )
            return cls(
                precisions={n: Precision.parse(p) for n, p in document["precisions"].items()},
                prune_ratios={n: float(r) for n, r in document["prune_ratios"].items()},
                runtime=RuntimeOptions(**document["runtime"]),
                rounding=document.get("rounding"),
            )
        except SearchSpaceError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidCandidate(f"not a candidate: {error!r}") from error

    def _artifact_json(self) -> dict[str, Any]:
        shapes: dict[str, Any] = {
            "precisions": {name: p.name for name, p in self.precisions.items()},
            "prune_ratios": dict(self.prune_ratios),
        }
        return shapes if self.rounding is None else {**shapes, "rounding": self.rounding}


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
