"""The job file: what a user submits, validated where it enters.

Owns the format (`JOB_VERSION`), its defaults and its errors. Loading the model and the data
named here is `compression/`'s work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from autotune.errors import InvalidJob
from autotune.limits import LatencyBudget, parse_bytes, parse_joules
from autotune.spec_errors import explain, yaml_fault
from device_agents.protocol import Quantile
from search_spaces import USUAL_PROVIDER, Precision
from search_spaces.errors import InvalidChoice

JOB_VERSION: Literal[1] = 1
# Version 1 (2026-11-21): model, data, device, latency_budget, search, recovery, measurement.
# 2026-11-21: search.prune_importance (before it, l2) and recovery.patience (before it, 3).
# 2026-11-21: search.runtimes (before it, onnxruntime alone).
# 2026-11-21: search.objectives, and precisions with options; a job without them means the same.
# 2026-11-21: rounding; a job without it means the same.
# 2026-11-21: search.providers, graph_levels, memory_arena and spinning; a job without them means
# the same.
# 2026-11-21: latency_at (before it, p50), max_size, max_memory, max_energy; memory and energy as
# objectives; a job without them means the same.
# 2026-11-21: search.least_gain_per_minute and warm_start (before it, none).
# 2026-11-21: recovery.epochs counts passes of the unpruned model (before it, of the pruned one);
# search.prune_ratios goes to 0.75 where left out (before it, 0.5).
# 2026-11-21: device may be a list, latency_budget a mapping; a single one of each means the same.

FILE_SCHEMES = ("onnx", "npz", "imagefolder")
Importance = Literal["l1", "l2", "taylor", "batch_norm"]
"""How pruning ranks channels; `compression/importance.py` says how each is computed.

`taylor` is the default by measurement (digits at 64x64, every group at half of its channels,
BatchNorm re-estimated, top-1 of 1,000 images for l1, l2, batch_norm, taylor): resnet18 59.8,
66.5, 67.6, 68.4 %; mobilenet_v2 35.8, 39.2, 39.8, 60.9 %; mobilenet_v3_small 31.7, 29.4, 45.9,
47.3 %. Two epochs of recovery training bring all four within a point of each other. Molchanov
et al. 2019 (arXiv:1906.10771) see it ahead of weight norms on ImageNet too.
"""

Objective = Literal["accuracy", "latency", "size", "memory", "energy"]
GraphLevel = Literal["all", "layout", "extended", "basic", "disabled"]
"""Those of `search_spaces.GRAPH_LEVELS`. Why `all` with arena is the default: 25 small models
(FP32, INT8 and mixtures) on one x86 core, onnxruntime 1.31.1, time over its: `extended` 1.15 to
3.8, `basic` 1.2 to 10, no arena 0.96 to 1.06; `layout`, on 9 of them, 0.98 to 1.01. With two
threads spinning made no difference that could be told from noise (12 models, 0.94 to 1.04)."""

_UPLOAD = re.compile(r"^sha256:([0-9a-f]{64})$")


class _Section(BaseModel):
    # The text below a key is its description in the published schema.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSpec(_Section):
    """The source model.

    `source` is `torchvision:NAME`, `onnx:PATH` or `python:MODULE:FUNCTION`. `weights` is a
    state_dict (`.pt`, read with `weights_only`) or a `.safetensors` file.
    """

    source: str = Field(pattern=r"^(torchvision|onnx|python):.+")
    """`torchvision:NAME`, `onnx:PATH` or `python:MODULE:FUNCTION`."""
    weights: str | None = None
    """Path of a state_dict (`.pt`) or a `.safetensors` file."""
    num_classes: int | None = Field(default=None, ge=2)
    """Classes of the output, where the source does not say it itself."""


class DataSpec(_Section):
    """Labelled data: `npz:PATH` (arrays x and y), `imagefolder:PATH` or `python:MODULE:FUNCTION`.

    `evaluation` is split, by a seeded stratified shuffle, into search data and held-out data;
    the search never sees the held-out part. `training` feeds calibration and recovery
    training; without it calibration samples are taken out of the search part and pruned
    candidates get no recovery training.
    """

    evaluation: str = Field(pattern=r"^(npz|imagefolder|python):.+")
    """Labelled data to judge candidates by; a part of it is held out from the search."""
    training: str | None = Field(default=None, pattern=r"^(npz|imagefolder|python):.+")
    """Labelled data for calibration and for training after pruning."""
    held_out_fraction: float = Field(default=0.6, gt=0.0, lt=1.0)
    """Share of the evaluation data that the search never sees; confirmed trials are judged by it.
    """
    calibration_samples: int = Field(default=128, ge=1)
    """Samples from which the ranges of quantized tensors are taken."""


class SearchSpec(_Section):
    """The choices and the trial budget.

    The search stops at `trials` finished trials, after `time_s` seconds, or when little is left
    to gain, whichever comes first. `prune_ratios` are fractions of a prunable group's channels.
    """

    precisions: tuple[str, ...] = Field(default=("fp32", "w8a8", "w8", "w4"), min_length=1)
    """Precisions that a layer group may take: `fp32`, `fp16`, `w8a8` (INT8), `w8a16`, weight-only
    `w8`, `w4`, `w2` and `w1` (binary). Behind a dash stands what shares a scale (`-tensor`,
    `-channel`, `-block64`) and `-symmetric` or `-asymmetric` codes, as in `w4-block64`. One that
    cannot be faster on the device is offered only where `size` is an objective."""
    objectives: tuple[Objective, ...] = ("accuracy", "latency")
    """What the search improves. `accuracy` and `latency` always count; `size` adds the file's
    bytes, and the precisions that make a file smaller without making it faster; `memory` adds
    the peak of a process that serves the model, `energy` the joules of one inference, on devices
    with a sensor."""
    prune_ratios: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], ...] = Field(
        default=(0.0, 0.25, 0.5, 0.75), min_length=1
    )
    """Shares of its channels that a prunable group may lose; `[0]` switches pruning off. Larger
    ones cost little: which of them are trained depends on what the ones before have lost."""
    prune_importance: Importance = "taylor"
    """How pruning ranks channels: by the `l1` or `l2` norm of their weights, by the `taylor`
    expansion of the loss (gradients of training samples, or of calibration samples where there
    is no training data), or by the scale of their `batch_norm` (`l2` in groups without one)."""
    runtimes: tuple[str, ...] = Field(default=("onnxruntime",), min_length=1)
    """Runtimes that compete on the device: `onnxruntime`, `openvino`, or a vendor's by its name.
    The service's host needs each of them too, to judge accuracy in the one that ships."""
    threads: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    """Numbers of threads that the runtime may use on the device."""
    providers: tuple[str, ...] = Field(default=(USUAL_PROVIDER,), min_length=1)
    """Execution providers that compete, by onnxruntime's names (`CUDAExecutionProvider`); each
    runtime takes part with those that the devices' builds of it have. `autotune device show`
    lists them. Accuracy is judged on the processor of the service's host."""
    graph_levels: tuple[GraphLevel, ...] = Field(default=("all",), min_length=1)
    """How far onnxruntime rewrites the graph before it runs it: `all`, `layout`, `extended`,
    `basic`, `disabled`. On a processor `all` was never slower than another."""
    memory_arena: tuple[bool, ...] = Field(default=(True,), min_length=1)
    """Whether onnxruntime keeps freed memory for the next inference. Without it the process is
    smaller and, on a processor, 0 to 6 % slower."""
    spinning: tuple[bool, ...] = Field(default=(True,), min_length=1)
    """Whether onnxruntime's threads keep their cores busy while they wait for work; with two
    threads or more. Without it the other programs of the device have more of them."""
    trials: int = Field(default=40, ge=1)
    """Finished trials after which the search stops, baselines included."""
    time_s: float | None = Field(default=None, gt=0)
    """Seconds after which the search stops."""
    least_gain_per_minute: float | None = Field(default=None, gt=0)
    """The search stops when the next trials promise less than this share of hypervolume per minute
    that the device measures: 0.001 is 0.1 % of what the front has. Left out, only `trials` and
    `time_s` end it."""
    warm_start: str = Field(default="auto", min_length=1)
    """Whose results the search begins with, as priors: those of the newest job of the same model
    (`auto`; one on the same devices comes first), of the job of this id or name, or `none`."""
    max_pruned_bases: int = Field(default=4, ge=0)
    """Pruned and recovered versions of the model that are made at most; each is trained once."""
    allow_without_pruning: bool = True
    """Go on where the model cannot be pruned; false makes that an error."""

    @field_validator("objectives")
    @classmethod
    def _complete(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not {"accuracy", "latency"} <= set(names):
            raise ValueError(
                "accuracy and latency are always objectives; size, memory and energy may be added"
            )
        return names

    @field_validator("spinning")
    @classmethod
    def _audible(cls, values: tuple[bool, ...], known: ValidationInfo) -> tuple[bool, ...]:
        if False in values and max(known.data.get("threads", (1,)), default=1) < 2:
            raise ValueError("one thread never waits for another; add 2 to search.threads")
        return values

    @field_validator("precisions")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                Precision.parse(name)
            except InvalidChoice as error:
                raise ValueError(str(error)) from error
        return names


class RecoverySpec(_Section):
    """Training after pruning: epochs of distillation from the FP32 model.

    `learning_rate` is the peak of a one-cycle schedule of SGD with momentum; `temperature`
    softens teacher and student (Hinton et al. 2015, section 2). The defaults bring
    mobilenet_v2 and resnet18, pruned by 25 or 50 %, back on some 2,000 images: many small
    steps do more per second than few large ones.
    """

    epochs: int = Field(default=4, ge=0)
    """What recovering may cost, in passes of the unpruned model over the training data: a smaller
    model passes more often, at most four times. 0 leaves recovery training out."""
    learning_rate: float = Field(default=0.03, gt=0)
    """Peak of the one-cycle schedule."""
    batch_size: int = Field(default=32, ge=2)
    """Samples per step."""
    patience: int = Field(default=3, ge=1)
    """Epochs in a row without a smaller loss on the held-back tenth of the training data that
    end the training once its learning rate has come down to half; the best epoch is kept."""
    temperature: float = Field(default=4.0, gt=0)
    """Softens teacher and student; larger is softer."""


class RoundingSpec(_Section):
    """How the winner's weights are rounded in the end."""

    adaround: bool = False
    """Learn for each 8-bit weight of the confirmed winner whether it goes up or down (AdaRound,
    Nagel et al. 2020), and measure and judge the outcome like any trial. It takes the winner's
    place where it is no worse; minutes, where the model is small."""
    iterations: int = Field(default=500, ge=1)
    """Steps per layer; the paper takes 10,000, from weights that are rounded to nearest."""


class MeasurementSpec(_Section):
    """How exactly the device measures; see `device_agents.protocol.MeasurementPlan`."""

    target_half_width: float = Field(default=0.02, gt=0, lt=1)
    """Half width of the 95 % interval, as a fraction of the latency, at which sampling stops."""
    time_cap_s: float = Field(default=8.0, gt=0)
    """Seconds of timing that end sampling; up to four times that while FP32 is not at rest."""
    confirmation_half_width: float = Field(default=0.01, gt=0, lt=1)
    """The same half width where a front member is confirmed in a fresh process."""
    confirmation_time_cap_s: float = Field(default=15.0, gt=0)
    """The same cap where a front member is confirmed."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds after which a measurement is given up as hanging."""


class JobSpec(_Section):
    """A tuning job.

    `latency_budget` is `0.5x` (a fraction of the FP32 latency measured on the device) or a
    duration such as `2.5ms` or `800us`; None asks for the whole front. A candidate is inside it
    where the upper bound of its latency is, at the quantile `latency_at`; with several devices
    where it is on each of them. A candidate past `max_size`, `max_memory` or `max_energy` is as
    little an answer as one past the budget. `max_accuracy_drop` is the largest acceptable loss of
    the metric against FP32, as a fraction.
    """

    version: Literal[1] = JOB_VERSION
    """Version of the job file's format."""
    name: str = Field(default="job", min_length=1, max_length=100)
    """What to call the job."""
    model: ModelSpec
    """The source model."""
    data: DataSpec
    """The labelled data."""
    device: str | tuple[str, ...] | None = None
    """Name, id or pool of the device to measure on, or a list of them: every candidate is then
    measured on each. Any device that is online where left out."""
    latency_budget: str | dict[str, str] | None = None
    """Bound on the latency: `2.5ms`, `800us`, or `0.5x` of the FP32 latency. With several devices
    it is each one's own, or a mapping names one for each: `{gateway: 3ms, pi4: 20ms}`."""
    latency_at: Quantile = "p50"
    """Where the budget holds and trials are compared with the best baseline: while nothing disturbs
    the device (`p50`) or in the tail (`p90`, `p99`) of single inferences. The tail takes longer to
    measure; raise `measurement.time_cap_s` where it is not seen well enough."""
    max_size: str | None = None
    """Largest acceptable file: `3MB`, `800kB`, `2MiB`."""
    max_memory: str | None = None
    """Largest acceptable peak memory of a process that serves the model: `60MB`."""
    max_energy: str | None = None
    """Most energy that one inference may take, on a device with a sensor: `5mJ`."""
    max_accuracy_drop: float | None = Field(default=None, ge=0.0, le=1.0)
    """Largest acceptable loss of accuracy against FP32, as a fraction: 0.01 is one point. With it
    the fastest trial that keeps it wins, without it the most accurate one inside the budget."""
    search: SearchSpec = SearchSpec()
    """What may be chosen, and how long to search."""
    recovery: RecoverySpec = RecoverySpec()
    """Training after pruning."""
    rounding: RoundingSpec = RoundingSpec()
    """Learned rounding of the winner."""
    measurement: MeasurementSpec = MeasurementSpec()
    """How exactly to measure."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random; the same seed makes the same proposals of the same results."""

    @field_validator("device", mode="before")
    @classmethod
    def _names(cls, given: object) -> object:
        names = [given] if isinstance(given, str) else given
        if names is None:
            return None
        if not isinstance(names, list | tuple) or not names or not _are_names(names):
            raise ValueError("must be the name of a device, or a list of different names")
        return given

    @field_validator("latency_budget", mode="before")
    @classmethod
    def _readable(cls, given: object) -> object:
        budgets = given if isinstance(given, dict) else {"": given}
        for text in budgets.values():
            if isinstance(text, str):
                LatencyBudget.parse(text)
            elif text is not None or isinstance(given, dict):
                raise ValueError("must be a budget such as 3ms, or one for each device")
        return given

    @field_validator("max_size", "max_memory", "max_energy", mode="before")
    @classmethod
    def _amount(cls, given: object, known: ValidationInfo) -> object:
        if given is not None:
            (parse_joules if known.field_name == "max_energy" else parse_bytes)(str(given))
        return given

    @field_validator("latency_budget")
    @classmethod
    def _one_for_each(
        cls, budget: str | dict[str, str] | None, known: ValidationInfo
    ) -> str | dict[str, str] | None:
        if isinstance(budget, dict) and "device" in known.data:
            devices = known.data["device"]
            targets = (devices,) if isinstance(devices, str) else devices or ()
            if set(budget) != set(targets):
                wanted = (
                    f"each of {', '.join(targets)}" if targets else "a device that the job names"
                )
                raise ValueError(f"must have one budget for {wanted}, and no other")
        return budget

    @property
    def targets(self) -> tuple[str | None, ...]:
        """The devices to measure on, the primary one first; (None,) where any will do."""
        return self.device if isinstance(self.device, tuple) else (self.device,)

    def budget_on(self, target: str | None) -> LatencyBudget | None:
        """The bound on the latency on one of `targets`; None where there is none."""
        budget = self.latency_budget
        text = budget.get(target or "") if isinstance(budget, dict) else budget
        return None if text is None else LatencyBudget.parse(text)


def _are_names(given: Sequence[object]) -> bool:
    """Texts, none empty and no two alike."""
    return all(isinstance(x, str) and x for x in given) and len({*given}) == len(given)


def read_job(path: Path) -> JobSpec:
    """The job file at `path`, validated, its relative paths made absolute.

    Paths in the file are relative to the file's own folder.

    Raises:
        InvalidJob: the file is missing, is not YAML, or does not hold a valid job.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidJob(f"cannot read the job file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidJob(f"{path} is not YAML: {yaml_fault(error)}") from error
    if not isinstance(document, dict):
        raise InvalidJob(f"{path} must hold a mapping with at least `model` and `data`")

    def absolute(named: str) -> str:
        return named if upload_of(named) else str((path.parent / named).resolve())

    return map_files(parse_job(document), absolute)


def parse_job(document: Mapping[str, Any]) -> JobSpec:
    """The validated job.

    Raises:
        InvalidJob: one line per mistake; an unknown key is told its nearest known one.
    """
    try:
        return JobSpec.model_validate(dict(document))
    except ValidationError as error:
        lines = [explain(entry, JobSpec) for entry in error.errors()]
        raise InvalidJob("the job is not valid:\n" + "\n".join(f"  {x}" for x in lines)) from error


def measured_on(spec: JobSpec, devices: Sequence[str]) -> JobSpec:
    """The same job on other devices; on its own where none is given.

    Raises:
        InvalidJob: one is named twice, or the job has budgets for devices of other names.
    """
    if not devices:
        return spec
    named = devices[0] if len(devices) == 1 else list(devices)
    return parse_job({**spec.model_dump(mode="json"), "device": named})


def warm_started(spec: JobSpec, job: str | None) -> JobSpec:
    """The same job that begins with that job's results; as it is where None is given."""
    if job is None:
        return spec
    search = spec.search.model_copy(update={"warm_start": job})
    return spec.model_copy(update={"search": search})


def map_files(spec: JobSpec, change: Callable[[str], str]) -> JobSpec:
    """The same job with `change` applied to every path of a file that it names."""

    def reference(text: str | None) -> str | None:
        if text is None:
            return None
        scheme, _, rest = text.partition(":")
        return f"{scheme}:{change(rest)}" if scheme in FILE_SCHEMES else text

    model = spec.model.model_copy(
        update={
            "source": reference(spec.model.source),
            "weights": change(spec.model.weights) if spec.model.weights else None,
        }
    )
    data = spec.data.model_copy(
        update={
            "evaluation": reference(spec.data.evaluation),
            "training": reference(spec.data.training),
        }
    )
    return spec.model_copy(update={"model": model, "data": data})


def upload_of(path: str) -> str | None:
    """The sha256 of a reference to an upload (`sha256:HEX`); None for an ordinary path.

    >>> upload_of("weights.safetensors") is None
    True
    """
    match = _UPLOAD.match(path)
    return match[1] if match else None


def resolve_uploads(spec: JobSpec, path_of: Callable[[str], Path]) -> JobSpec:
    """The same job with every upload replaced by the path of the file that holds it.

    `path_of` takes a sha256; its errors pass through.
    """

    def change(path: str) -> str:
        digest = upload_of(path)
        return path if digest is None else str(path_of(digest))

    return map_files(spec, change)


def name_uploads(message: str, submitted: JobSpec, resolved: JobSpec) -> str:
    """`message` with the job's own keys in place of the paths that `resolve_uploads` put in.

    The user knows the key; where the service keeps its copy says nothing to them.
    """
    keys: dict[str, list[str]] = {}
    for key, before, after in zip(_FILE_KEYS, _files(submitted), _files(resolved), strict=True):
        if before != after:
            keys.setdefault(after, []).append(key)
    for path, named in keys.items():
        written = "|".join((*(f"{scheme}:" for scheme in FILE_SCHEMES), ""))
        message = re.sub(f"({written}){re.escape(path)}", " and ".join(named), message)
    return message


_FILE_KEYS = ("model.source", "model.weights", "data.evaluation", "data.training")


def _files(spec: JobSpec) -> list[str]:
    """The path behind every key of `_FILE_KEYS`; empty where it names no file."""

    def path(reference: str | None) -> str:
        scheme, _, rest = (reference or "").partition(":")
        return rest if scheme in FILE_SCHEMES else ""

    evaluation, training = path(spec.data.evaluation), path(spec.data.training)
    return [path(spec.model.source), spec.model.weights or "", evaluation, training]


def runs_job_code(spec: JobSpec) -> bool:
    """The job names Python code, which runs only by consent."""
    references = (spec.model.source, spec.data.evaluation, spec.data.training or "")
    return any(text.startswith("python:") for text in references)


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, as published."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def job_schema_text() -> str:
    """The published schema as text."""
    return json.dumps(job_schema(), indent=2, sort_keys=True) + "\n"
