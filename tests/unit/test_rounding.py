"""Rounded weights: nearer in the layer's outputs, unbiased, the same every time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from autotune.compression import rounding
from autotune.compression.calibration import Range, calibrate
from autotune.compression.equalization import Equalization, Stretched
from autotune.compression.graph import GraphView
from autotune.compression.kernels import REDUCED_RANGE, X86
from autotune.compression.post_training import post_training, reduced_rounding
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.rounding import Rounding, input_rows, round_weights, second_order_codes
from autotune.compression.units import find_layers
from search_spaces import INT8
from tests.unit.compression_models import run, samples, tiny_source
from tests.unit.test_precisions import gemm_model


def correlated(n: int, k: int) -> np.ndarray:
    """Inputs that a few causes move together, as neighbouring pixels are."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 4)) @ rng.normal(size=(4, k)) + 0.1 * rng.normal(size=(n, k))


def test_second_order_rounding_beats_the_nearest_code_on_correlated_inputs() -> None:
    x = correlated(2000, 48)
    steps = np.random.default_rng(1).uniform(-100, 100, (1, 6, 48))
    codes = second_order_codes(steps, (x.T @ x / len(x))[None])
    assert (codes == np.rint(codes)).all()

    def error(chosen: np.ndarray) -> float:
        return float((((chosen - steps)[0] @ x.T) ** 2).mean())

    assert error(codes) < 0.2 * error(np.rint(steps))


def test_independent_inputs_take_the_nearest_codes() -> None:
    steps = np.random.default_rng(2).uniform(-100, 100, (3, 2, 9))
    codes = second_order_codes(steps, np.broadcast_to(np.eye(9), (3, 9, 9)))
    assert (codes == np.rint(steps)).all()


def test_codes_stay_in_eight_bits() -> None:
    steps = np.full((1, 2, 16), 127.4)
    codes = second_order_codes(steps, np.ones((1, 16, 16)))
    assert np.abs(codes).max() == 127


def test_the_rows_of_a_convolution_are_what_it_multiplies() -> None:
    view = GraphView(tiny_source().graph)
    x = samples(2)
    stem = next(layer for layer in find_layers(view) if layer.input == view.input_name)
    rows = input_rows(view, stem, x, np.random.default_rng(0), n_samples=2)
    weight = view.array(stem.weight)
    assert rows.shape == (2 * 256, 1, 27)
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    # All 256 positions are taken, in order; the 18th is row 1, column 1.
    assert np.array_equal(rows[17, 0], padded[0, :, 1:4, 1:4].ravel())
    assert weight[0].size == 27


def test_rounding_survives_being_written_and_is_the_same_every_time() -> None:
    model = tiny_source().graph
    view, x = GraphView(model), samples(8)
    stretched = Equalization(view, calibrate(model, x)).whole
    first = round_weights(view, x, stretched)
    assert first.plain.keys() == {layer.name for layer in find_layers(view)}
    assert first.stretched.keys() <= first.plain.keys()
    assert first.stretched
    data = first.to_bytes()
    assert round_weights(view, x, stretched).to_bytes() == data
    assert Rounding.from_bytes(data).to_bytes() == data


def test_outputs_of_few_inputs_take_the_step_that_moves_them_least() -> None:
    model = tiny_source().graph
    view, x = GraphView(model), samples(8)
    errors = []
    for widenings in (rounding._WIDENINGS, np.ones(1, np.float32)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounding, "_WIDENINGS", widenings)
            stem = round_weights(view, x, {}).plain[find_layers(view)[0].name]
        layer = find_layers(view)[0]
        weight = view.array(layer.weight)
        scale = np.abs(weight).max(axis=(1, 2, 3)) / 127 * stem.widening
        error = stem.codes * scale[:, None, None, None] - weight
        rows = input_rows(view, layer, x, np.random.default_rng(0), n_samples=8)[:, 0]
        made = rows @ error.reshape(len(error), -1).T
        errors.append(made.var(axis=0))
    assert (errors[0] <= errors[1] * 1.001).all() and errors[0].sum() < 0.9 * errors[1].sum()


def test_a_corrected_bias_takes_up_the_mean_error_of_every_output() -> None:
    model = gemm_model(k=32)
    x = (3 + np.abs(np.random.default_rng(5).normal(size=(512, 32)))).astype(np.float32)
    expected = run(model.SerializeToString(), x)
    rounded = round_weights(GraphView(model), x, {}).plain["a"]
    uncorrected = replace(rounded, mean_error=np.zeros_like(rounded.mean_error))
    errors = []
    for held in (rounded, uncorrected):
        graph = QuantizableGraph(model, calibrate(model, x), rounding=Rounding(plain={"a": held}))
        errors.append(np.abs((run(graph.emit({"a": INT8}), x) - expected).mean(axis=0)))
    # What is left is that the inputs are rounded as well.
    left = float(errors[0].max())
    assert left < 2e-3 * expected.std(axis=0).min()
    assert errors[1].mean() > 5 * errors[0].mean()
    assert errors[1] == pytest.approx(np.abs(rounded.mean_error), abs=1.1 * left)


def reduced(model: onnx.ModelProto, x: np.ndarray) -> tuple[QuantizableGraph, QuantizableGraph]:
    """The model for kernels of reduced range: with the nearest codes, and with rounded ones."""
    calibration = calibrate(model, x)
    stretched = Equalization(GraphView(model), calibration).whole
    found = round_weights(GraphView(model), x, stretched, largest_code=REDUCED_RANGE)
    nearest, rounded = (
        QuantizableGraph(model, calibration, kernels=X86, rounding=Rounding(reduced=held))
        for held in (None, found)
    )
    return nearest, rounded


def test_codes_of_reduced_range_are_rounded_and_their_biases_corrected_too() -> None:
    model = gemm_model(k=32)
    x = (3 + np.abs(np.random.default_rng(5).normal(size=(512, 32)))).astype(np.float32)
    expected = run(model.SerializeToString(), x)
    errors = [run(graph.emit({"a": INT8}), x) - expected for graph in reduced(model, x)]
    nearest, rounded = (np.abs(error.mean(axis=0)).mean() for error in errors)
    assert rounded < 0.1 * nearest
    assert np.square(errors[1]).mean() < 0.5 * np.square(errors[0]).mean()


def test_a_network_of_reduced_range_comes_nearer_to_fp32_on_other_samples() -> None:
    source, x = tiny_source(), samples(64, seed=3)
    expected = run(source.fp32_bytes, x)
    errors = []
    for graph in reduced(source.graph, samples(32)):
        artifact = graph.emit(dict.fromkeys(graph.units, INT8))
        assert all(np.abs(codes).max() <= REDUCED_RANGE for codes in weight_codes_of(artifact))
        errors.append(float(np.square(run(artifact, x) - expected).mean()))
    assert errors[1] < 0.8 * errors[0]


def weight_codes_of(artifact: bytes) -> list[np.ndarray]:
    constants = onnx.load_from_string(artifact).graph.initializer
    arrays = [numpy_helper.to_array(c) for c in constants if c.name.endswith(".weight/q")]
    assert arrays
    return arrays


def test_inputs_whose_squares_are_no_numbers_leave_a_layer_at_its_nearest_codes() -> None:
    view, x = GraphView(gemm_model()), np.random.default_rng(3).normal(size=(64, 80))
    assert round_weights(view, x.astype(np.float32), {}).plain.keys() == {"a"}
    x[3, 5] = 1e30
    assert round_weights(view, x.astype(np.float32), {}).plain.keys() == set()


def test_inputs_that_hardly_differ_from_their_offset_leave_a_layer_at_its_nearest_codes() -> None:
    """Of a mean of 1000 float32 keeps too little for a variance of 1e-6."""
    view = GraphView(gemm_model())
    x = 1000 + 1e-3 * np.random.default_rng(4).normal(size=(64, 80))
    held = Range(low=-1.0, high=1.0)
    around = Stretched(factors=np.ones(80), offsets=np.full(80, 1000.0), held=held)
    rounded = round_weights(view, x.astype(np.float32), {"input": around})
    assert (rounded.plain.keys(), rounded.stretched.keys()) == ({"a"}, set())


def test_what_a_base_keeps_diverges_no_more_than_the_plain_way() -> None:
    found = post_training(tiny_source().graph, samples(16))
    assert 0 <= found.mean_kl <= found.plain_kl
    assert found.rounding.plain or found.mean_kl == found.plain_kl


def test_rounded_codes_of_reduced_range_are_kept_where_they_diverge_less() -> None:
    source, x = tiny_source(), samples(16)
    calibration = calibrate(source.graph, x)
    found = reduced_rounding(source.fp32_bytes, calibration, x)
    assert found.plain.keys() == {layer.name for layer in find_layers(GraphView(source.graph))}
    with pytest.MonkeyPatch.context() as patch:
        worse = {name: replace(r, mean_error=r.mean_error + 9) for name, r in found.plain.items()}
        wrong = Rounding(plain=worse, stretched=found.stretched)
        patch.setattr("autotune.compression.post_training.round_weights", lambda *_, **__: wrong)
        assert not reduced_rounding(source.fp32_bytes, calibration, x).plain
