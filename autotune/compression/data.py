"""Labelled data: read, checked, and split once into calibration, search and held-out samples.

Owns the refusal of data that would make every later figure meaningless (empty, NaN, labels
that do not fit). Never unpickles. What is computed from the samples is `calibration.py`'s and
`accuracy.py`'s work.
"""

from __future__ import annotations

import importlib
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autotune.compression import job_code
from autotune.compression.session import Session
from autotune.errors import CompressionError, InvalidData, InvalidModel, UntrustedCode
from autotune.spec import DataSpec

if TYPE_CHECKING:
    from autotune.compression.source import SourceModel

_IMAGE_SIZE = 224
# What numpy and zipfile raise for archives that are cut, altered or of another kind.
_DAMAGED = (
    ValueError, EOFError, zipfile.BadZipFile, zlib.error, TypeError, AttributeError, SyntaxError,
    RuntimeError, MemoryError, OverflowError, struct.error,
)  # fmt: skip
# torchvision's own evaluation preset (`ImageClassification`): mean and spread of ImageNet.
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32).reshape(3, 1, 1)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32).reshape(3, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledData:
    """Samples `x`, float32, shape `(n, ...)`, and their class numbers `y`, int64, `(n,)`."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """One sample's shape."""
        return tuple(int(extent) for extent in self.x.shape[1:])

    def take(self, indices: np.ndarray) -> LabelledData:
        """The samples at those positions, in that order."""
        return LabelledData(x=self.x[indices], y=self.y[indices])


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSplits:
    """What each part of a job may look at; no sample is in two of the parts.

    `calibration` are inputs only, shape `(n, ...)`. `training` is None where the job gave
    none: pruned candidates then get no recovery training.
    """

    calibration: np.ndarray
    training: LabelledData | None
    search: LabelledData
    held_out: LabelledData


def load_labelled_data(reference: str, *, trust_job_code: bool = False) -> LabelledData:
    """The data of `npz:PATH`, `imagefolder:PATH` or `python:MODULE:FUNCTION`.

    Raises:
        InvalidData: unreadable, pickled, empty, not numeric, NaN or infinite, labels that
            are no class numbers, or as many samples as labels.
        UntrustedCode: the reference is code and `trust_job_code` is off.
    """
    scheme, _, rest = reference.partition(":")
    if scheme == "npz":
        return _checked(*_read_npz(Path(rest)), where=reference)
    if scheme == "imagefolder":
        return _checked(*_read_image_folder(Path(rest)), where=reference)
    if not trust_job_code:
        raise UntrustedCode(
            f"data {reference!r} runs code of the job; pass --trust-job-code if you trust it, or "
            "give npz: or imagefolder: data"
        )
    return _checked(*_called(rest), where=reference)


def split_data(spec: DataSpec, *, seed: int, trust_job_code: bool = False) -> DataSplits:
    """Split by a seeded, stratified shuffle; the same seed gives the same parts.

    Calibration samples come out of the training data where there is any, otherwise out of
    the evaluation data, before search and held-out parts are made.

    Raises:
        InvalidData: the data is not usable, or too little for two parts.
        UntrustedCode: see `load_labelled_data`.
    """
    evaluation = load_labelled_data(spec.evaluation, trust_job_code=trust_job_code)
    training = None
    if spec.training is not None:
        training = load_labelled_data(spec.training, trust_job_code=trust_job_code)
        if training.sample_shape != evaluation.sample_shape:
            raise InvalidData(
                f"training samples have shape {training.sample_shape}, evaluation samples "
                f"{evaluation.sample_shape}; both must have the model's input shape"
            )
    order = _stratified_order(evaluation.y, seed)
    n_calibration = spec.calibration_samples
    if training is not None:
        picked = _stratified_order(training.y, seed)[:n_calibration]
        calibration = training.x[picked]
    else:
        n_calibration = min(n_calibration, len(order) // 4)
        calibration, order = evaluation.x[order[:n_calibration]], order[n_calibration:]
    n_held_out = round(len(order) * spec.held_out_fraction)
    if len(calibration) == 0 or not 0 < n_held_out < len(order):
        raise InvalidData(
            f"{spec.evaluation!r} holds {len(evaluation)} samples, too few to split into "
            f"calibration, search and held-out parts (held_out_fraction "
            f"{spec.held_out_fraction}); give more"
        )
    # An order that walks through the classes in turn stays stratified in every slice.
    return DataSplits(
        calibration=calibration,
        training=training,
        search=evaluation.take(np.sort(order[n_held_out:])),
        held_out=evaluation.take(np.sort(order[:n_held_out])),
    )


def require_fit(source: SourceModel, splits: DataSplits) -> None:
    """Check that the model takes these samples and answers with their classes.

    Raises:
        InvalidModel: the output is not `(n, classes)` or holds NaN.
        InvalidData: samples of another shape, or labels the model does not have.
    """
    for role, part in (("evaluation", splits.search), ("training", splits.training)):
        if part is None:
            continue
        if part.sample_shape != source.input_shape:
            raise InvalidData(
                f"{role} samples have shape {part.sample_shape}, but {source.reference!r} takes "
                f"{source.input_shape}"
            )
        largest = int(part.y.max())
        if largest >= source.num_classes:
            raise InvalidData(
                f"the {role} data has label {largest}, but {source.reference!r} gives "
                f"{source.num_classes} classes (labels 0 to {source.num_classes - 1}); check "
                "num_classes and the labels"
            )
    _require_sane_output(source, splits.search.x[: min(4, len(splits.search))])


def _require_sane_output(source: SourceModel, x: np.ndarray) -> None:
    try:
        session = Session(source.fp32_bytes)
        (output,) = session.run({source.input_name: x}, [source.output_name])
    except CompressionError as error:
        raise InvalidModel(
            f"{source.reference!r} does not run on a batch of {len(x)} samples: {error}; "
            "export it with a dynamic batch axis"
        ) from error
    if output.shape != (len(x), source.num_classes):
        raise InvalidModel(
            f"{source.reference!r} answers {len(x)} samples with shape {output.shape}; "
            f"({len(x)}, {source.num_classes}) is needed: export it with a dynamic batch axis"
        )
    if not np.isfinite(output).all():
        raise InvalidModel(f"{source.reference!r} gives NaN or infinite outputs on the data")


def _stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A shuffle in which every slice has the classes in about their overall shares.

    Each sample gets the position (rank within its class + a random offset) / class size.
    """
    rng = np.random.default_rng(seed)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return np.argsort(position, kind="stable")


def _checked(x: Any, y: Any, *, where: str) -> LabelledData:
    try:
        x, y = np.asarray(x), np.asarray(y)
    except (ValueError, TypeError, RuntimeError) as error:
        # rows of different lengths; tensors that need gradients or lie on a device
        raise InvalidData(f"{where}: x and y must be arrays of numbers: {error}") from error
    if x.dtype == object or y.dtype.kind not in "fiub" or x.dtype.kind not in "fiub":
        raise InvalidData(
            f"{where}: x must be numbers and y class numbers, not {x.dtype}/{y.dtype}"
        )
    if len(x.shape) < 2 or y.ndim != 1 or len(x) != len(y):
        raise InvalidData(
            f"{where}: x has shape {x.shape} and y {y.shape}; x must be (n, ...) and y (n,)"
        )
    if len(x) == 0:
        raise InvalidData(f"{where}: there are no samples")
    if x.size == 0:
        raise InvalidData(f"{where}: x has shape {x.shape}; a sample holds not one value")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=np.float32)
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        raise InvalidData(
            f"{where}: {int((~finite).sum())} of {len(x)} samples hold NaN or infinite values "
            "(float32 ends at 3.4e38), the first one at position "
            f"{int(np.argmin(finite))}; remove or repair them"
        )
    if y.dtype.kind not in "iu" and not np.array_equal(y, np.floor(y.astype(np.float64))):
        raise InvalidData(f"{where}: labels must be whole class numbers")
    y = np.ascontiguousarray(y, dtype=np.int64)
    if y.min() < 0:
        raise InvalidData(f"{where}: label {int(y.min())} is negative; classes count from 0")
    return LabelledData(x=x, y=y)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in ("x", "y") if key not in archive]
            if missing:
                held = ", ".join(archive.files) or "nothing"
                raise InvalidData(f"{path} has no array {missing[0]!r}; it holds {held}")
            return archive["x"], archive["y"]
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise InvalidData(
            f"{path} is not an .npz file of plain arrays ({_damage(path, error)}); write it with "
            "numpy.savez(path, x=..., y=...)"
        ) from error


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with the file; numpy's own words advise to load pickled objects."""
    if not zipfile.is_zipfile(path):
        return "not a zip archive, or truncated"
    return "it holds pickled objects" if "pickle" in str(error) else str(error)


def _read_image_folder(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One folder per class; resized and normalized as torchvision's ImageNet presets do."""
    from autotune.compression.torchvision_repair import import_torchvision  # brings torch

    import_torchvision()
    datasets = importlib.import_module("torchvision.datasets")
    try:
        folder = datasets.ImageFolder(str(path))
        pairs = [(_image(folder.loader(name)), label) for name, label in folder.samples]
    except (OSError, RuntimeError) as error:
        raise InvalidData(
            f"{path} is not an image folder (one sub-folder of images per class): {error}"
        ) from error
    return np.stack([x for x, _ in pairs]), np.array([y for _, y in pairs])


def _image(picture: Any) -> np.ndarray:
    scale = _IMAGE_SIZE / 0.875 / min(picture.size)
    picture = picture.resize([max(_IMAGE_SIZE, round(side * scale)) for side in picture.size])
    left, top = ((side - _IMAGE_SIZE) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + _IMAGE_SIZE, top + _IMAGE_SIZE))
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 255
    return np.asarray((pixels - _IMAGENET_MEAN) / _IMAGENET_STD)


def _called(reference: str) -> tuple[Any, Any]:
    """The `(x, y)` that `MODULE:FUNCTION` returns."""
    try:
        x, y = job_code.call(reference)
    except Exception as error:
        # the user's code may raise anything
        raise InvalidData(
            f"python:{reference} failed with {type(error).__name__}: {error}; it must return x, y"
        ) from error
    return x, y
