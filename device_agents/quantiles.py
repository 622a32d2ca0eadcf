"""Bounds of the tail: how slow the slowest tenth and hundredth of inferences may be.

Owns the bounds of a quantile of dependent samples, at p90 and p99. Pure numpy: no clock, no
runtime, no protocol. The latency with its interval is `latency.py`'s, the samples `sampling.py`'s.

Why not the bootstrap that the latency has: a resampled series never holds more than its largest
sample, so that the bootstrap of an extreme quantile is biased down, and of few samples it says
nothing at all. Order statistics hold for any distribution (David and Nagaraja 2003, section
7.1) and say themselves when the samples are too few. They ask for independent samples; how many
independent ones the dependent ones are worth is estimated first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from device_agents.latency import (
    MAX_PARTS,
    MIN_SITTINGS,
    NORMAL_QUANTILE,
    SESSION_SPREAD,
    TAIL,
    bootstrap_half_width,
    distinct,
    level_bounds_ns,
    quantiles,
    sitting_parts,
    state_uncertainty,
)
from device_agents.undisturbed import Floats, Pairs, Timed, are_pairs

QUANTILES = {"p90": 0.9, "p99": 0.99}


def upper_bounds(
    blocks: Sequence[Timed], *, reference_latency_ns: float | None
) -> dict[str, float | None]:
    """The candidate's latency in ns that p90 and p99 do not pass, by the quantile's name.

    Scaled as the quantiles are: by the reference's calibrated latency (`reference_latency_ns`,
    None: by nothing) over the one measured. What is not known of that one is added in
    quadrature of logarithms (Zou and Donner 2008, "Construction of confidence limits about
    effect measures", for a ratio), and so is the spread of sessions where there are fewer than
    `MIN_SITTINGS` to show it; `state_uncertainty` comes on top. None where the samples are too
    few for a bound: p90 takes 36 independent ones at least, p99 368; and where blocks are no
    pairs of positive samples.
    """
    return _bounds(blocks, reference_latency_ns, sign=1)


def lower_bounds(
    blocks: Sequence[Timed], *, reference_latency_ns: float | None
) -> dict[str, float | None]:
    """The mirror image of `upper_bounds`: what p90 and p99 are not below.

    It takes fewer samples, because most of them lie on that side.
    """
    return _bounds(blocks, reference_latency_ns, sign=-1)


def tail_bounds(
    blocks: Sequence[Timed],
    *,
    reference_latency_ns: float | None,
    reference_rest_ns: float | None = None,
    reference_ns: float | None = None,
) -> dict[str, float | None]:
    """Both, under the names that a latency report has for them, such as `p90_low_ns`.

    `reference_ns` is what the reference took here, where the quantiles were scaled by that: an
    older agent's are by its median.
    """
    return {
        f"{name}_{end}_ns": ns
        for end, sign in (("low", -1), ("high", 1))
        for name, ns in _bounds(
            blocks, reference_latency_ns, reference_rest_ns, reference_ns, sign=sign
        ).items()
    }


def _bounds(
    blocks: Sequence[Timed],
    reference_latency_ns: float | None,
    reference_rest_ns: float | None = None,
    reference_ns: float | None = None,
    *,
    sign: int,
) -> dict[str, float | None]:
    """Above for the sign 1, below for -1; the reference, divided by, counts the other way."""
    bound_of = upper_quantile if sign > 0 else lower_quantile
    candidate = [b for b in blocks if b.subject == "candidate"]
    if not are_pairs(blocks):
        return dict.fromkeys(QUANTILES)
    sittings = np.array([block.sitting for block in candidate])
    places = _parts(sittings)
    pairs = Pairs.of(blocks)
    reference = reference_ns or pairs.undisturbed_ns("reference")
    beside = bootstrap_half_width(pairs.level("reference"), seed=0)
    calibrated = reference if reference_latency_ns is None else reference_latency_ns
    level = level_bounds_ns(reference, calibrated, reference_rest_ns)[sign > 0]
    apart = state_uncertainty(reference, calibrated, reference_rest_ns)
    scale = level / reference * math.exp(sign * apart)
    samples = [np.concatenate([candidate[i].samples_ns for i in part]) for part in places]
    n_sittings = distinct(sittings).size
    spread = 0.0
    if n_sittings < MIN_SITTINGS:
        spread = NORMAL_QUANTILE * SESSION_SPREAD / math.sqrt(n_sittings)
    found: dict[str, float | None] = {}
    for name, share in QUANTILES.items():
        bound = bound_of(samples, share)
        if bound is None or math.isinf(beside):
            found[name] = None
            continue
        quantile = float(quantiles(np.concatenate(samples), [share])[0])
        away = math.hypot(math.log(bound / quantile), beside, spread)
        found[name] = quantile * math.exp(sign * away) * scale
    return found


def is_bounded(blocks: Sequence[Timed], quantile: str) -> bool:
    """The samples suffice for an upper bound at that quantile; p50 is not of the tail."""
    if quantile not in QUANTILES:
        return True
    return upper_bounds(blocks, reference_latency_ns=None)[quantile] is not None


def upper_quantile(parts: Sequence[Floats], share: float) -> float | None:
    """A value that the quantile passes with probability `TAIL`; None where none can be named.

    Args:
        parts: the samples of parts of the measurement that are nearly independent of each other.
        share: of all inferences that are faster than the quantile, such as 0.9.

    The order statistic of as many independent samples as these are worth, taken at the same
    share of the samples (Woodruff 1952, "Confidence intervals for medians and other position
    measures").
    """
    samples = np.sort(np.concatenate(parts))
    n_worth = independent(parts, share)
    rank = _rank(n_worth, share)
    if rank > n_worth:
        return None
    return float(samples[math.ceil(rank / n_worth * samples.size) - 1])


def lower_quantile(parts: Sequence[Floats], share: float) -> float | None:
    """The same on the other side: a value that the quantile is below with probability `TAIL`."""
    mirrored = upper_quantile([-part for part in parts], 1 - share)
    return None if mirrored is None else -mirrored


def independent(parts: Sequence[Floats], share: float) -> int:
    """How many independent samples these are worth for that quantile; 0 of a single part.

    The samples by their design effect: the variance, over the parts, of how many lie above the
    quantile, against that of independent samples (Kish 1965; for tails Korn and Graubard 1998,
    "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data"). An effect below one is chance and counts as one, which pays for estimating
    it from so few parts: in simulation bounds hold in 97 to 100 % of measurements on a quiet
    device, whose sessions differ or not, and in 91 to 100 % where noise is correlated over ten
    blocks. Where the device switches between two states that last a twelfth of the measurement,
    p90's holds in 77 to 92 %: what was not seen cannot be bounded.
    (`tests/unit/test_quantiles.py` repeats it.)
    """
    samples = np.concatenate(parts)
    n, n_parts = samples.size, len(parts)
    above = [int((part > quantiles(samples, [share])[0]).sum()) for part in parts]
    ratio = sum(above) / n
    if n_parts < 2:
        return 0
    if ratio == 0:  # the largest ones are equal: there is nothing to differ
        return n
    sizes = np.array([part.size for part in parts])
    residuals = np.array(above) - sizes * ratio
    variance = n_parts / (n_parts - 1) * float(residuals @ residuals) / n**2
    effect = max(1.0, variance / (ratio * (1 - ratio) / n))
    return int(n / effect)


def _rank(n: int, share: float) -> int:
    """The least rank of n independent samples that the quantile passes with `TAIL` at most.

    Above n where there is none. The number of samples below the quantile is binomial.

    >>> _rank(35, 0.9), _rank(36, 0.9), _rank(100, 0.9)
    (36, 36, 96)
    """
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    log_mass = logs[n] - logs - logs[::-1] + k * math.log(share) + (n - k) * math.log1p(-share)
    passed = np.cumsum(np.exp(log_mass)[::-1])[::-1]  # of at least k samples below it
    fine = np.flatnonzero(passed <= TAIL)
    return int(fine[0]) if fine.size else n + 1


def _parts(sittings: np.ndarray) -> list[np.ndarray]:
    """The places of the blocks, in at most `MAX_PARTS` parts in order of time.

    Whole sittings, because sessions differ; runs of blocks where there are too few sittings.
    """
    if distinct(sittings).size >= MIN_SITTINGS:
        return sitting_parts(sittings)
    return [part for part in np.array_split(np.arange(sittings.size), MAX_PARTS) if part.size]
