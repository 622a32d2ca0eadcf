"""The figure to quote: `python -m tests.benchmarks.headline [--model NAME]`.

Whole jobs (precisions, pruning with recovery training, groups left in FP32) by `autotune tune`
on models trained on the demo's noisy digits at 64x64, the agent on this machine, one thread.
The job asks for the fastest candidate that loses at most a point, with no latency budget, and
has `TIME_S` seconds to search. What is reported comes from the exported bundle: its model is
timed in a fresh process against the FP32 model (onnxruntime, one thread), alternating, and
judged on the held-out images, which the search never saw. Keys, per model:

- `MODEL.latency_ratio`: latency over FP32's in the same process, with its interval; smaller is
  better; n counts the timed inferences;
- `MODEL.points_lost`: FP32's top-1 less the bundle's on the same images, in points, with its
  paired interval; n counts the images;
- `MODEL.wall_s`: `autotune tune` from start to end, recovery training included; training the
  FP32 model is not in it;
- `MODEL.device_s`: seconds that the device spent on measurements, baselines and confirmations
  included;
- `MODEL.control_ratio`: seconds in which the device stood idle although nothing was missing but
  the control plane's own work (`control_time.py`), over the seconds of its measurements; at most
  0.1; n counts the measurements;
- `MODEL.trials`: candidates evaluated, baselines included.

`--quick` is the quick job of `main_job`: a briefly trained model, few trials, no pruning.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from autotune.compression.accuracy import AccuracyEvaluator
from autotune.compression.data import split_data
from autotune.compression.source import load_source_model
from autotune.export.bundle import read_bundle
from autotune.spec import JobSpec, read_job
from device_agents.protocol import RuntimeRequest
from storage.records import AccuracyReport, TrialState
from tests.benchmarks.control_time import control_time
from tests.benchmarks.harness import CACHE, Benchmark, Figure, start
from tests.benchmarks.main_job import QUICK_MODEL, quick_job, records, tune
from tests.benchmarks.post_training import load_images, trained
from tests.benchmarks.protocols import Measured, by_agent

MODELS = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")
TIME_S = 1200.0
"""Half of the 2,400 s that a whole job may take, so that four models take an hour at most."""
MAX_DROP = 0.01
SEARCH: dict[str, Any] = {
    "precisions": ["fp32", "w8a8"],
    "runtimes": ["onnxruntime", "openvino"],
    "prune_ratios": [0.0, 0.25, 0.5, 0.75, 0.875, 0.9375],
    "trials": 40,
    "time_s": TIME_S,
    "max_pruned_bases": 5,
}
RECOVERY: dict[str, Any] = {"epochs": 8, "learning_rate": 0.1}
MEASUREMENT = {
    "target_half_width": 0.02,
    "time_cap_s": 2.0,
    "confirmation_half_width": 0.01,
    "confirmation_time_cap_s": 4.0,
}
HALF_WIDTH, TIME_CAP_S = 0.01, 20.0
QUICK_TIME_CAP_S = 3.0


def main() -> int:
    benchmark = start(
        "headline",
        "Whole jobs: latency over FP32's at no more than a point lost.",
        models=MODELS,
        quick_models=(QUICK_MODEL,),
    )
    for model in benchmark.models:
        benchmark.say(f"{model}: preparing data and FP32 model")
        job = quick_job(CACHE / "quick") if benchmark.quick else full_job(model)
        benchmark.say(f"{model}: tuning")
        measure(benchmark, model, job)
        benchmark.save()
    benchmark.report()
    return 0


def measure(benchmark: Benchmark, model: str, job: Path) -> None:
    """Run the job and add the keys of its model."""
    folder = CACHE / "headline" / f"{model}-job"
    document, wall_s = tune(job, folder)
    benchmark.say(f"{model}: measuring the bundle")
    spec, bundle = read_job(job), folder / "bundle"
    timed = latency(bundle, spec, folder, quick=benchmark.quick)
    judged = held_out(bundle, spec)
    with records(folder / "service") as repository:
        job_id = document["job"]["id"]
        trials = repository.list_trials(job_id)
        measurements = repository.list_measurements(job_id)
        events = repository.list_events(job_id, limit=sys.maxsize)
    control = control_time(trials, measurements, events)
    device_s = [m.report.wall_s for m in measurements if m.report is not None]
    figures = {
        "latency_ratio": Figure(
            value=timed.ratio, low=timed.low, high=timed.high, n=timed.n_samples
        ),
        "points_lost": points_lost(judged),
        "wall_s": Figure(value=round(wall_s, 1), n=1),
        "device_s": Figure(value=round(sum(device_s), 1), n=len(device_s)),
        "trials": Figure(value=sum(t.state is TrialState.FINISHED for t in trials)),
    }
    if control.ratio is not None:
        figures["control_ratio"] = Figure(value=round(control.ratio, 4), n=control.n)
    for key, figure in figures.items():
        benchmark.add(f"{model}.{key}", figure)
    reports = read_bundle(bundle).reports
    benchmark.raw[model] = {
        "spec": spec.model_dump(mode="json"),
        "result": document["job"]["result"],
        "figures": reports["figures"],
        "provenance": reports["provenance"],
        "control": asdict(control),
        "held_out": judged.to_json(),
        "reference_ns": timed.reference_ns,
        "front": document["front"]["trials"],
    }
    benchmark.say(
        f"{model}: {timed.ratio:.3f} of FP32's latency, {100 * judged.drop:.2f} points lost "
        f"on {judged.n_samples} images"
    )


def full_job(model: str) -> Path:
    """The job file; its data and its FP32 model are made once and kept."""
    folder = CACHE / "headline"
    trained(model, folder, load_images(folder, quick=False), quick=False)
    write_data(folder)
    document = job_document(model, folder / f"{model}.safetensors")
    path = folder / f"{model}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def job_document(model: str, weights: Path) -> dict[str, Any]:
    """The job file's content; the data lies beside it."""
    return {
        "name": f"headline-{model}",
        "model": {
            "source": f"torchvision:{model}",
            "weights": str(weights),
            "num_classes": 10,
        },
        "data": {"evaluation": "npz:evaluation.npz", "training": "npz:training.npz"},
        "max_accuracy_drop": MAX_DROP,
        "search": SEARCH,
        "recovery": RECOVERY,
        "measurement": MEASUREMENT,
    }


def write_data(folder: Path) -> None:
    """The demo's training and evaluation images, of different originals."""
    from examples.digits.images import make_images
    from examples.digits.recipes import ImageRecipe

    paths = [folder / "training.npz", folder / "evaluation.npz"]
    if not all(path.exists() for path in paths):
        for path, images in zip(paths, make_images(ImageRecipe()), strict=True):
            np.savez(path, x=images.x, y=images.y)


def latency(bundle: Path, spec: JobSpec, folder: Path, *, quick: bool) -> Measured:
    """The bundle's model against the FP32 model, in a process that has seen neither."""
    held = read_bundle(bundle)
    fp32 = folder / "fp32.onnx"
    fp32.write_bytes(fp32_bytes(spec, held.reports["model"]["input_shape"]))
    return by_agent(
        bundle / "model.onnx",
        fp32,
        target=HALF_WIDTH,
        time_cap_s=QUICK_TIME_CAP_S if quick else TIME_CAP_S,
        seed=1,
        runtime=RuntimeRequest(**held.reports["model"]["runtime"]),
    )


def held_out(bundle: Path, spec: JobSpec) -> AccuracyReport:
    """The bundle's model on the images that the search never saw, paired with FP32."""
    held, data = read_bundle(bundle), split_data(spec.data, seed=spec.seed).held_out
    evaluator = AccuracyEvaluator(fp32_bytes(spec, data.sample_shape), data, split="held_out")
    return evaluator.evaluate(held.model, runtime=held.reports["model"]["runtime"]["runtime"])


def fp32_bytes(spec: JobSpec, input_shape: Sequence[int]) -> bytes:
    """The source model as the FP32 file that everything is compared with."""
    return load_source_model(spec.model, input_shape=tuple(input_shape)).fp32_bytes


def points_lost(report: AccuracyReport) -> Figure:
    """The drop in points of accuracy with its paired interval."""
    return Figure(
        value=100 * report.drop,
        low=100 * report.drop_low,
        high=100 * report.drop_high,
        n=report.n_samples,
    )


if __name__ == "__main__":
    sys.exit(main())
