"""What the benchmark of post-training quality computes from outputs."""

import numpy as np
import pytest

from tests.benchmarks import post_training
from tests.unit.compression_models import labelled, samples, tiny_source


def test_the_ratio_is_that_of_the_means_and_its_interval_resamples_images_together() -> None:
    theirs = np.random.default_rng(0).exponential(size=400)
    figure = post_training.ratio_figure(np.stack([0.5 * theirs, theirs], axis=1))
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.5, 0.5, 0.5))
    assert figure.n == 400


def test_divergence_is_none_of_equal_outputs_and_positive_of_others() -> None:
    logits = np.random.default_rng(1).normal(size=(6, 5))
    assert post_training.divergence(logits, logits + 3.0) == pytest.approx(np.zeros(6), abs=1e-12)
    assert (post_training.divergence(logits, -logits) > 0).all()


def test_a_spread_model_has_other_weights_and_the_same_function() -> None:
    images = post_training.Images(sets=(samples(4),), held_out=labelled(4))
    changed = post_training.spread(tiny_source(), images)
    assert changed.fp32_bytes != tiny_source().fp32_bytes
    expected = post_training.outputs(tiny_source().fp32_bytes, samples(8, seed=3))
    found = post_training.outputs(changed.fp32_bytes, samples(8, seed=3))
    assert found == pytest.approx(expected, abs=1e-5)
