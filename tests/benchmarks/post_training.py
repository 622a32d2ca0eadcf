"""Uniform INT8 against `quantize_static`: `python -m tests.benchmarks.post_training`.

Models trained on noisy digits (64x64), calibrated on the same 128 training images; both files
run in a plain onnxruntime session on images whose originals neither training nor calibration
saw. Ours is the compressor's uniform INT8 with default settings; the peer `quantize_static` with
its best ones (pre-processed, QDQ, u8s8, per channel, min-max). Keys, per model:

- `MODEL.kl_ratio`: our mean KL divergence from FP32's outputs over the peer's; smaller is better;
- `MODEL.kl_ratio_sets`: the same over `CALIBRATION_SETS` calibration sets, each drawn anew for both
  sides (which images one calibrates on moves either side by a tenth): the ratio of the means;
- `MODEL.points_lost`: FP32's top-1 less ours, in points of accuracy (the peer's in
  `MODEL.peer_points_lost`); smaller is better.

Intervals are bootstraps over images, over sets for `kl_ratio_sets`, both sides resampled together.
MODEL_spread is the same FP32 function with channels rescaled between consecutive layers; in
efficientnet_b0 nothing but SiLU stands between them, which lets no factor pass. `--quick` looks at
a briefly trained mobilenet_v2 on 40x40 images.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from autotune.compression.accuracy import log_probabilities
from autotune.compression.compressor import Compressor
from autotune.compression.data import DataSplits, LabelledData
from autotune.compression.graph import GraphView
from autotune.compression.operators import clip_bounds
from autotune.compression.source import SourceModel, load_source_model
from autotune.compression.units import WeightedNode, find_layers
from autotune.spec import ModelSpec, RecoverySpec
from search_spaces import INT8, Candidate
from tests.benchmarks.harness import BOOTSTRAP_DRAWS, CACHE, Benchmark, Figure, start
from tests.benchmarks.main_job import QUICK_IMAGES, QUICK_RECIPE

if TYPE_CHECKING:
    from examples.digits.recipes import ImageRecipe

SPREADABLE = ("resnet18", "mobilenet_v2", "mobilenet_v3_small")
MODELS = (*SPREADABLE, "efficientnet_b0")
QUICK_MODEL = "mobilenet_v2"
CALIBRATION_IMAGES = 128
CALIBRATION_SETS = 6
SPREAD = 4.0
"""Channels of a spread model are multiplied by 2 ** u, u uniform in [-SPREAD, SPREAD]."""
_EPOCHS_AND_RATE = {"efficientnet_b0": (12, 0.03)}
"""92 % on images of other originals; 8 epochs at 0.05, as the others take, reach 76 %."""
FP32_TOLERANCE = 1e-4  # of the largest logit, between a model and its spread variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Calibration inputs, and labelled images of originals that nobody was trained on.

    `sets` are further draws of as many inputs to calibrate on, the first of them `calibration`.
    """

    sets: tuple[np.ndarray, ...]
    held_out: LabelledData

    @property
    def calibration(self) -> np.ndarray:
        """What is calibrated on unless another set is asked for."""
        return self.sets[0]


def main() -> int:
    benchmark = start("post_training", "Uniform INT8 against quantize_static.")
    for name in (QUICK_MODEL,) if benchmark.quick else MODELS:
        # The quick model of the main benchmark is trained alike; whoever comes first makes it.
        folder = CACHE / ("quick" if benchmark.quick else "post_training")
        benchmark.say(f"{name}: data and FP32 model")
        images = load_images(folder, quick=benchmark.quick)
        source = trained(name, folder, images, quick=benchmark.quick)
        compare(benchmark, name, source, images)
        if not benchmark.quick:
            compare_sets(benchmark, name, source, images)
        if name in SPREADABLE:
            compare(benchmark, f"{name}_spread", spread(source, images), images)
    benchmark.report()
    return 0


def compare(benchmark: Benchmark, name: str, source: SourceModel, images: Images) -> None:
    """Add the keys of one model."""
    benchmark.say(f"{name}: quantizing with both")
    x, y = images.held_out.x, images.held_out.y
    fp32 = outputs(source.fp32_bytes, x)
    ours = outputs(uniform_int8(source, images), x)
    theirs = outputs(quantize_static(source.graph, images.calibration), x)
    kl = np.stack([divergence(fp32, ours), divergence(fp32, theirs)], axis=1)
    right = np.stack([(o.argmax(axis=1) == y) for o in (fp32, ours, theirs)], axis=1)
    lost = 100.0 * (right[:, :1].astype(float) - right[:, 1:])
    benchmark.add(f"{name}.kl_ratio", ratio_figure(kl))
    benchmark.add(f"{name}.points_lost", mean_figure(lost[:, 0]))
    benchmark.add(f"{name}.peer_points_lost", mean_figure(lost[:, 1]))
    benchmark.raw[name] = {
        "mean_kl": float(kl[:, 0].mean()),
        "peer_mean_kl": float(kl[:, 1].mean()),
        "fp32_accuracy": float(right[:, 0].mean()),
        "accuracy": float(right[:, 1].mean()),
        "peer_accuracy": float(right[:, 2].mean()),
    }
    benchmark.say(
        f"{name}: KL {kl[:, 0].mean():.3g} against {kl[:, 1].mean():.3g} nats, "
        f"{lost[:, 0].mean():.2f} points lost against {lost[:, 1].mean():.2f}"
    )


def compare_sets(benchmark: Benchmark, name: str, source: SourceModel, images: Images) -> None:
    """Add the key that does not hang on one calibration set; `compare` had the first."""
    fp32 = outputs(source.fp32_bytes, images.held_out.x)
    means = [[benchmark.raw[name][side] for side in ("mean_kl", "peer_mean_kl")]]
    for inputs in images.sets[1:]:
        files = (
            uniform_int8(source, replace(images, sets=(inputs,))),
            quantize_static(source.graph, inputs),
        )
        means.append([divergence(fp32, outputs(f, images.held_out.x)).mean() for f in files])
        benchmark.say(f"{name}: another set: KL {means[-1][0]:.3g} against {means[-1][1]:.3g}")
    benchmark.add(f"{name}.kl_ratio_sets", ratio_figure(np.array(means)))
    benchmark.raw[f"{name}_sets"] = means


def ratio_figure(pairs: np.ndarray) -> Figure:
    """The ratio of the two columns' means, `(images, 2)`, with its 95 % bootstrap interval."""
    sums = _resampled(pairs)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    means = pairs.mean(axis=0)
    return Figure(value=float(means[0] / means[1]), low=float(low), high=float(high), n=len(pairs))


def mean_figure(values: np.ndarray) -> Figure:
    """The mean with its 95 % bootstrap interval."""
    low, high = np.percentile(_resampled(values[:, None])[:, 0], [2.5, 97.5])
    return Figure(value=float(values.mean()), low=float(low), high=float(high), n=len(values))


def _resampled(rows: np.ndarray) -> np.ndarray:
    """Means of `BOOTSTRAP_DRAWS` resamples of the rows, `(draws, columns)`."""
    rng = np.random.default_rng(0)
    n = len(rows)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP_DRAWS)
    return counts @ rows / n


def divergence(fp32: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(FP32 || other) per image, in nats."""
    p, q = log_probabilities(fp32), log_probabilities(other)
    return (np.exp(p) * (p - q)).sum(axis=1)


def outputs(model: bytes, x: np.ndarray) -> np.ndarray:
    """A session's answers; one thread changes none of them and shares a busy machine better."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: x[i : i + 16]})[0] for i in range(0, len(x), 16)]
    return np.concatenate(parts)


def uniform_int8(source: SourceModel, images: Images) -> bytes:
    """Every layer group in 8 bits, by a compressor with default settings and an empty cache."""
    splits = DataSplits(
        calibration=images.calibration,
        training=None,
        search=images.held_out,
        held_out=images.held_out,
    )
    with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
        compressor = Compressor(source, splits, recovery=RecoverySpec(), cache_dir=Path(folder))
        groups = [group.name for group in compressor.inventory.groups]
        return compressor.emit(Candidate(precisions=dict.fromkeys(groups, INT8)))


def quantize_static(model: onnx.ModelProto, x: np.ndarray) -> bytes:
    """The peer's file: QDQ, u8s8, per channel, min-max, after its own pre-processing."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest = iter(x)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self._rest, None)
            return None if sample is None else {model.graph.input[0].name: sample[None]}

    with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
        plain, prepared, made = (Path(folder) / f"{part}.onnx" for part in ("a", "b", "c"))
        onnx.save(model, plain)
        quant_pre_process(plain, prepared)
        quantization.quantize_static(
            prepared,
            made,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
        return made.read_bytes()


def spread(source: SourceModel, images: Images) -> SourceModel:
    """The same FP32 function, its channels rescaled between consecutive convolutions.

    Where a convolution's only reader, directly or behind a ReLU, is another convolution, its
    output channels are multiplied by random powers of two and the reader's input channels
    divided: exact in float32. ReLU6 and HardSwish let nothing pass.

    Raises:
        ValueError: the answers differ by more than float rounding, or nothing was rescaled.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source.graph)
    view = GraphView(source.graph)
    layers = {layer.name: layer for layer in find_layers(view)}
    arrays = {name: view.array(name).copy() for name in view.initializers}
    rng = np.random.default_rng(0)
    pairs = 0
    for layer in layers.values():
        reader = _reader(view, layers, layer)
        if reader is None:
            continue
        factors = np.exp2(rng.uniform(-SPREAD, SPREAD, len(arrays[layer.weight])).round())
        _scale(arrays, layer, reader, factors.astype(np.float32))
        pairs += 1
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    changed = replace(source, graph=model)
    expected = outputs(source.fp32_bytes, images.calibration)
    difference = np.abs(outputs(changed.fp32_bytes, images.calibration) - expected).max()
    if pairs == 0 or difference > FP32_TOLERANCE * np.abs(expected).max():
        raise ValueError(f"{pairs} pairs were rescaled and the logits moved by {difference:g}")
    return changed


def _reader(
    view: GraphView, layers: Mapping[str, WeightedNode], layer: WeightedNode
) -> WeightedNode | None:
    """The convolution that alone reads what the layer makes, directly or behind a ReLU."""
    if layer.is_matrix_product:
        return None
    taker = view.only_consumer(layer.output)
    if taker is not None and clip_bounds(view, taker) == (0.0, float("inf")):
        taker = view.only_consumer(taker.output[0])
    reader = layers.get(taker.name) if taker is not None else None
    return reader if reader is not None and not reader.is_matrix_product else None


def _scale(
    arrays: dict[str, np.ndarray], layer: WeightedNode, reader: WeightedNode, factors: np.ndarray
) -> None:
    arrays[layer.weight] = arrays[layer.weight] * factors.reshape(-1, 1, 1, 1)
    if layer.bias:
        arrays[layer.bias] = arrays[layer.bias] * factors
    weight = arrays[reader.weight]
    is_depthwise = weight.shape[1] == 1 and len(weight) == len(factors)
    shape = (-1, 1, 1, 1) if is_depthwise else (1, -1, 1, 1)
    arrays[reader.weight] = weight / factors.reshape(shape)


def load_images(folder: Path, *, quick: bool) -> Images:
    """The demo's images; two drawings of each original that was kept from training."""
    from examples.digits.images import make_images

    first, second = _recipes(quick)
    training, one = make_images(first)
    other = make_images(second)[1]
    sets = [
        training.x[np.random.default_rng(seed).permutation(len(training.y))[:CALIBRATION_IMAGES]]
        for seed in range(CALIBRATION_SETS)
    ]
    each = slice(QUICK_IMAGES if quick else None)
    held_out = LabelledData(
        x=np.concatenate([one.x[each], other.x[each]]),
        y=np.concatenate([one.y[each], other.y[each]]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    return Images(sets=tuple(sets), held_out=held_out)


def trained(name: str, folder: Path, images: Images, *, quick: bool) -> SourceModel:
    """The FP32 model, trained by the demo's own loop once and kept."""
    weights = folder / f"{name}.safetensors"
    if not weights.exists():
        _train(name, weights, quick=quick)
    spec = ModelSpec(source=f"torchvision:{name}", weights=str(weights), num_classes=10)
    return load_source_model(spec, input_shape=images.calibration.shape[1:])


def _recipes(quick: bool) -> tuple[ImageRecipe, ImageRecipe]:
    """That of training, and another whose evaluation images have other noise."""
    from examples.digits.recipes import ImageRecipe

    recipe = ImageRecipe(**QUICK_RECIPE) if quick else ImageRecipe()
    # Another number of variants draws other noise for the same evaluation originals.
    return recipe, replace(recipe, variants=recipe.variants + 1)


def _train(name: str, weights: Path, *, quick: bool) -> None:
    from safetensors.torch import save_file

    from examples.digits import training
    from examples.digits.images import make_images
    from examples.digits.recipes import RECIPES, TrainingRecipe

    images, _ = make_images(_recipes(quick)[0])
    epochs, learning_rate = _EPOCHS_AND_RATE.get(name, (8, 0.05))
    recipe = RECIPES.get(name) or TrainingRecipe(
        model=name, epochs=epochs, learning_rate=learning_rate
    )
    if quick:
        recipe = replace(recipe, epochs=3)
    model = training.train(
        recipe,
        images,
        threads=os.cpu_count() or 1,
        on_epoch=lambda *_: None,
        batch_norm_momentum=0.1,
    )
    save_file(model.state_dict(), weights)


if __name__ == "__main__":
    sys.exit(main())
