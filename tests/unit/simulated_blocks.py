"""Blocks of samples as simulated devices give them, quiet ones and disturbed ones."""

import numpy as np

from device_agents.latency import TimedBlock

RATIO = 0.5
"""What the candidate takes of the reference's 1 ms where nothing disturbs either."""


def pair_order(generator, n_pairs):
    first = generator.random(n_pairs) < 0.5
    return np.column_stack([first, ~first]).ravel()


def blocks_of(is_candidate, medians, *, sitting_pairs=3):
    names = {True: "candidate", False: "reference"}
    return [
        TimedBlock(
            subject=names[bool(c)],
            samples_ns=(round(m),),
            median_ns=float(m),
            sitting=i // (2 * sitting_pairs),
        )
        for i, (c, m) in enumerate(zip(is_candidate, medians, strict=True))
    ]


def disturbances(kind, generator, n):
    """The logarithm of each block's slowdown on a device of that kind."""
    if kind == "quiet":
        return generator.normal(0, 0.01, n)
    if kind == "noisy":
        return generator.normal(0, 0.04, n)
    if kind == "disturbed":
        struck = generator.random(n) < 0.15
        return generator.normal(0, 0.02, n) + struck * generator.exponential(0.4, n)
    values = np.zeros(n)  # correlated
    for i in range(1, n):
        values[i] = 0.8 * values[i - 1] + generator.normal(0, 0.03)
    return values


def in_spells(seed, *, n_pairs, share, of_candidate, of_reference):
    """Blocks that are slower by these factors for `share` of the time, for ten pairs each."""
    generator = np.random.default_rng(seed)
    odds = share / (1 - share) / 10
    state, states = generator.random() < share, []
    for _ in range(n_pairs):
        state = generator.random() >= 0.1 if state else generator.random() < odds
        states.append(state)
    slower = np.where(np.array(states)[:, np.newaxis], [of_candidate, of_reference], 1.0)
    medians = 1e6 * slower * [RATIO, 1.0] * np.exp(generator.normal(0, 0.02, (n_pairs, 2)))
    return blocks_of(np.tile([True, False], n_pairs), medians.ravel())


def simulated_device(kind, seed, n_pairs):
    generator = np.random.default_rng(seed)
    is_candidate = pair_order(generator, n_pairs)
    slowdown = np.exp(disturbances(kind, generator, 2 * n_pairs))
    return is_candidate, np.where(is_candidate, RATIO, 1.0) * 1e6 * slowdown
