"""The source model: loaded from where the job says, digested, as one FP32 ONNX graph.

Owns loading (`torchvision:`, `onnx:`, `python:`), weights and the one export to ONNX that a
base needs. Never downloads anything, never unpickles. The normal form of the graph is
`cleanup.py`'s, what the model is made of `inventory.py`'s.
"""

from __future__ import annotations

import difflib
import gc
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import external_data_helper, numpy_helper

from autotune.compression import job_code
from autotune.compression.checkpoint import load_weights, read_weights
from autotune.compression.cleanup import clean_up
from autotune.compression.graph import BATCH_AXIS, model_bytes, shape_of
from autotune.compression.requirements import dynamic_sample_axes, why_it_does_not_load
from autotune.compression.session import Session
from autotune.compression.torchvision_repair import import_torchvision
from autotune.errors import CompressionError, InvalidModel, UntrustedCode
from autotune.spec import ModelSpec

EXPORT_OPSET = 20
_INIT_SEED = 0
# Two float32 implementations of one network differ by rounding; measured: under 2e-6 of the
# largest output on torchvision's CNNs. A wrong graph differs by orders of magnitude more.
_EXPORT_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """The user's model.

    `graph` is FP32 in normal form: BatchNorm folded, a symbolic batch axis, weights named as
    the torch parameters. `module` is None for an ONNX source. `input_shape` has no batch
    axis. `digest` is the sha256 of `fp32_bytes`. `notices` is what the user should know of how
    the model was taken, one sentence each.
    """

    reference: str
    digest: str
    graph: onnx.ModelProto
    module: torch.nn.Module | None
    input_name: str
    input_shape: tuple[int, ...]
    output_name: str
    num_classes: int
    notices: tuple[str, ...] = ()

    @property
    def fp32_bytes(self) -> bytes:
        """The FP32 model as a file; the same bytes in every process."""
        return model_bytes(self.graph)


def load_source_model(
    spec: ModelSpec, *, input_shape: tuple[int, ...], trust_job_code: bool = False
) -> SourceModel:
    """Load the model that a job names.

    `input_shape` is one sample's shape, as the data has it.

    Raises:
        InvalidModel: no such model, unreadable or unfitting weights, or a graph that cannot
            be tuned; the message names the key, node or axis.
        UntrustedCode: the source is code and `trust_job_code` is off.
    """
    scheme, _, rest = spec.source.partition(":")
    if scheme == "python" and not trust_job_code:
        raise UntrustedCode(
            f"model source {spec.source!r} runs code of the job; pass --trust-job-code if you "
            "trust it, or give an onnx: or torchvision: source"
        )
    if scheme == "onnx":
        return _from_onnx(spec, Path(rest), input_shape)
    state = read_weights(Path(spec.weights)) if spec.weights else None
    made = _torchvision_model(rest, spec, state) if scheme == "torchvision" else _called(rest)
    if isinstance(made, onnx.ModelProto):
        _require_valid(made, spec.source)
        return _source_of(made, spec, input_shape)
    if not isinstance(made, torch.nn.Module):
        raise InvalidModel(
            f"{spec.source!r} returned {type(made).__name__}; it must return a torch.nn.Module "
            "or an onnx.ModelProto"
        )
    if state is not None:
        load_weights(made, state, where=str(spec.weights), model=spec.source)
    module = made.float().eval()
    return _source(spec, export_module(module, input_shape), module, input_shape)


def export_module(module: torch.nn.Module, input_shape: tuple[int, ...]) -> onnx.ModelProto:
    """The module as an FP32 ONNX graph in normal form: input `input`, output `output`.

    Weights keep the names of their parameters, so a pruned module has the same layer groups
    as the one it was made from.

    Raises:
        InvalidModel: the module cannot be traced for that input shape, or its graph cannot
            be tuned.
    """
    was_training = module.training
    module.eval()
    try:
        return _exported(module, torch.zeros(2, *input_shape))
    except (
        torch.onnx.errors.OnnxExporterError,
        AssertionError,  # torchvision's transformers assert the image size that they were made for
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise InvalidModel(
            f"{type(module).__name__} cannot be exported to ONNX for an input of shape "
            f"{input_shape}: {_first_line(error)}; this is the shape of one sample (channels "
            "first, without the batch axis), give samples as the model takes them"
        ) from error
    finally:
        module.train(was_training)


def _exported(module: torch.nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    """Traced for one batch size, which takes half the time, unless that fixes the batch axis."""
    with torch.inference_mode():
        x = torch.randn(3, *example.shape[1:], generator=torch.Generator().manual_seed(0))
        expected = module(x)
    for shapes in (None, ({0: torch.export.Dim(BATCH_AXIS)},)):
        model = clean_up(_named_after_scopes(_traced(module, example, shapes)))
        if isinstance(expected, torch.Tensor) and _answers(model, x.numpy(), expected.numpy()):
            return model
    raise InvalidModel(
        f"the ONNX export of {type(module).__name__} answers differently from the module; its "
        "forward may depend on the batch size or on values of its input"
    )


def _traced(
    module: torch.nn.Module, example: torch.Tensor, shapes: tuple[dict[int, Any]] | None
) -> onnx.ModelProto:
    # Tracing makes millions of objects that all live: collecting takes a fifth of its time.
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            # The exporter's own use of what torch has deprecated is nothing a user can act on.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["input"],
                output_names=["output"],
                opset_version=EXPORT_OPSET,
                verbose=False,
            )
    finally:
        if collects:
            gc.enable()
    if program is None:
        raise InvalidModel(f"{type(module).__name__} gave no ONNX program")
    return program.model_proto


def _answers(model: onnx.ModelProto, x: np.ndarray, expected: np.ndarray) -> bool:
    """The graph gives the module's outputs for another batch size than it was traced with."""
    try:
        output = Session(model_bytes(model)).run({model.graph.input[0].name: x})[0]
    except (CompressionError, InvalidModel):
        return False
    spread = float(np.abs(expected).max()) or 1.0
    return output.shape == expected.shape and bool(
        np.allclose(output, expected, rtol=0, atol=_EXPORT_TOLERANCE * spread, equal_nan=True)
    )


def _named_after_scopes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A weight that the exporter transposed lost its name; its node knows the module."""
    held = {i.name: i for i in model.graph.initializer}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in held or "." in node.input[1]:
            continue
        scopes = {p.key: p.value for p in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
        path = _innermost_module(scopes or "")
        if path and f"{path}.weight" not in held and node.input[1] not in renamed:
            renamed[node.input[1]] = f"{path}.weight"
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if any(name in held for name in node.input):
            node.name = ""  # the exporter's count, which pruning would change
    for old, new in renamed.items():
        held[old].name = new
    return model


def _innermost_module(scopes: str) -> str:
    """The last but one of `['', 'a', 'a.b', 'operator']`."""
    parts = [part.strip().strip("'\"") for part in scopes.strip("[]").split(",")]
    return parts[-2] if len(parts) > 1 else ""


def _from_onnx(spec: ModelSpec, path: Path, input_shape: tuple[int, ...]) -> SourceModel:
    if spec.weights:
        raise InvalidModel(
            f"weights {spec.weights!r} were given for the ONNX source {str(path)!r}; an ONNX "
            "file holds its own weights: remove `weights`"
        )
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise InvalidModel(
            f"cannot read the ONNX file {path}: {error.strerror or error}"
        ) from error
    except (DecodeError, ValueError) as error:
        raise _not_onnx(str(path), error) from error
    _load_external_data(model, path)
    _require_valid(model, str(path))
    return _source_of(model, spec, input_shape)


def _source_of(
    model: onnx.ModelProto, spec: ModelSpec, input_shape: tuple[int, ...]
) -> SourceModel:
    """A source that is a graph; axes that only the data fixes are told to the user."""
    graph = clean_up(model, input_shape=input_shape)
    dynamic = dynamic_sample_axes(model.graph)
    notices: tuple[str, ...] = ()
    if dynamic:
        listed = ", ".join(map(str, dynamic))
        notices = (
            f"input {graph.graph.input[0].name!r} has dynamic axes ({listed}): they are fixed to "
            f"the data's, so every artifact takes samples of shape {tuple(input_shape)} alone",
        )
    return _source(spec, graph, None, input_shape, notices)


def _require_valid(model: onnx.ModelProto, where: str) -> None:
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise _not_onnx(where, error) from error


def _not_onnx(where: str, error: Exception) -> InvalidModel:
    return InvalidModel(
        f"{where} is not a valid ONNX file (truncated or of another kind?): {_first_line(error)}"
    )


def _load_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Read the weights that a large model keeps in files of their own, beside it."""
    constants = [entry.t for node in model.graph.node for entry in node.attribute]
    for tensor in (*model.graph.initializer, *constants):
        if not external_data_helper.uses_external_data(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            numpy_helper.to_array(tensor)
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise InvalidModel(
                f"{path} keeps its weights {tensor.name!r} in the file {location!r}, which is "
                "not beside it, is cut short or lies outside its folder; put the file there, or "
                "write the model as one file, as an upload must be: "
                "onnx.save(onnx.load('model.onnx'), 'whole.onnx')"
            ) from error
        del tensor.external_data[:]
        tensor.ClearField("data_location")


def _source(
    spec: ModelSpec,
    graph: onnx.ModelProto,
    module: torch.nn.Module | None,
    input_shape: tuple[int, ...],
    notices: tuple[str, ...] = (),
) -> SourceModel:
    declared = shape_of(graph.graph.input[0])[1:]
    if declared != tuple(input_shape):
        raise InvalidModel(
            f"{spec.source!r} takes samples of shape {declared}, the data has {input_shape}"
        )
    data = model_bytes(graph)
    classes = _classes(spec, data, graph)
    return SourceModel(
        reference=spec.source,
        digest=hashlib.sha256(data).hexdigest(),
        graph=graph,
        module=module,
        input_name=graph.graph.input[0].name,
        input_shape=tuple(input_shape),
        output_name=graph.graph.output[0].name,
        num_classes=classes,
        notices=notices,
    )


def _classes(spec: ModelSpec, data: bytes, graph: onnx.ModelProto) -> int:
    shape = shape_of(graph.graph.output[0])
    if len(shape) != 2 or shape[1] < 2:
        raise InvalidModel(
            f"output {graph.graph.output[0].name!r} of {spec.source!r} has shape "
            f"(N, {', '.join(map(str, shape[1:]))}); a classifier gives (N, classes) with at "
            "least 2 classes"
        )
    if spec.num_classes is not None and spec.num_classes != shape[1]:
        raise InvalidModel(
            f"num_classes is {spec.num_classes}, but {spec.source!r} gives {shape[1]} classes"
        )
    _require_batches(spec, data, graph)
    return shape[1]


def _require_batches(spec: ModelSpec, data: bytes, graph: onnx.ModelProto) -> None:
    """The model loads, and a sample's answer does not depend on how many are asked at once."""
    value = graph.graph.input[0]
    x = np.random.default_rng(0).standard_normal((2, *shape_of(value)[1:])).astype(np.float32)
    try:
        session = Session(data)
        singles = [session.run({value.name: sample})[0] for sample in (x[:1], x[1:])]
    except CompressionError as error:
        raise InvalidModel(
            f"{spec.source!r} does not run in onnxruntime {onnxruntime.__version__}: "
            f"{why_it_does_not_load(graph) or _first_line(error.__cause__ or error)}"
        ) from error
    if not _answers(graph, x, np.concatenate(singles)):
        raise InvalidModel(
            f"{spec.source!r} does not answer a batch of 2 as it answers 2 single samples: its "
            "batch axis is fixed; export it with a dynamic batch axis"
        )


def _torchvision_model(
    name: str, spec: ModelSpec, state: Mapping[str, torch.Tensor] | None
) -> torch.nn.Module:
    """Untrained weights are drawn from a fixed seed, so that the model has one digest."""
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = (
            f"did you mean {', '.join(near)}?" if near else "see torchvision.models.list_models()"
        )
        raise InvalidModel(f"torchvision has no classification model {name!r}; {hint}")
    classes = spec.num_classes or _classes_in(state, models, name)
    options = {} if classes is None else {"num_classes": classes}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Some constructors warn of defaults that will change; weights are loaded afterwards.
        warnings.simplefilter("ignore")
        torch.manual_seed(_INIT_SEED)
        return models.get_model(name, weights=None, **options)


def _classes_in(state: Mapping[str, torch.Tensor] | None, models: Any, name: str) -> int | None:
    """The classifier comes last in torchvision's models; its bias has one entry per class."""
    if not state:
        return None
    with torch.device("meta"):
        last = list(models.get_model(name, weights=None).state_dict())[-1]
    tensor = state.get(last)
    return None if tensor is None or tensor.ndim == 0 else int(tensor.shape[0])


def _called(reference: str) -> Any:
    """The result of `MODULE:FUNCTION`."""
    try:
        return job_code.call(reference)
    except Exception as error:
        # the user's code may raise anything
        raise InvalidModel(
            f"python:{reference} failed with {type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
