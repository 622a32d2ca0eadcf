"""A model in onnxruntime on this machine: what it answers and how it refuses."""

import numpy as np
import pytest

from autotune.compression.session import BATCH, Session
from autotune.errors import CompressionError
from tests.unit.compression_models import run, samples, tiny_source


def test_many_samples_are_answered_as_in_a_plain_session():
    x = samples(2 * BATCH + 3)
    answers = Session(tiny_source().fp32_bytes).answers(x)
    assert np.allclose(answers, run(tiny_source().fp32_bytes, x), atol=1e-6)


def test_what_is_no_model_is_refused_by_its_name():
    with pytest.raises(CompressionError, match="onnxruntime cannot run a part of the model: "):
        Session(b"no model", what="a part of the model")


def test_inputs_that_do_not_fit_are_refused():
    session = Session(tiny_source().fp32_bytes)
    with pytest.raises(CompressionError, match="onnxruntime cannot run the model: "):
        session.run({tiny_source().input_name: np.zeros((1, 2), np.float32)})
