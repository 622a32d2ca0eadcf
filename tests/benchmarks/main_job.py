"""The demo's job, whole, for both demo models: `python -m tests.benchmarks.main_job`.

Runs the real `autotune tune` (service, workers and agent as processes of their own) and reads
every figure from the exported bundle. Keys, per model:

- `MODEL.winner_speedup`, `MODEL.int8_speedup`: FP32 latency over latency, both from the same
  process (1 / ratio), confirmed where the trial was confirmed; larger is better;
- `MODEL.winner_accuracy`, `MODEL.fp32_accuracy`, `MODEL.int8_accuracy`: on held-out data where
  the trial was confirmed, else on search data; fractions from 0 to 1;
- `MODEL.wall_s`: `autotune tune` from start to end; training the FP32 model is not in it.

`--quick` tunes a mobilenet_v2 that was trained for a moment on small, clear images (40x40), in few
trials, without pruning.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from autotune.export.bundle import read_bundle
from storage.database import open_database
from storage.repository import Repository
from tests.benchmarks.harness import CACHE, ROOT, Figure, start

MODELS = ("mobilenet_v2", "resnet18")
QUICK_MODEL = "mobilenet_v2"
QUICK_IMAGES = 200
QUICK_RECIPE: dict[str, Any] = {
    "size": 40,
    "variants": 1,
    "evaluation_originals": 600,
    "max_shift": 2.0,
    "coarse_noise": 0.1,
    "fine_noise": 0.2,
}
"""Small and clear images: three short epochs reach 95 %, so that accuracy says something."""
QUICK_BUDGET = "0.8x"  # within reach without pruning
QUICK_CHANGES: dict[str, dict[str, Any]] = {
    "data": {"calibration_samples": 32},
    "search": {"trials": 4, "prune_ratios": [0.0], "precisions": ["fp32", "w8a8"]},
    "measurement": {
        # Wide, so that a quick run ends with figures on a busy machine too; on an idle one the
        # least number of blocks alone gives some 3 %.
        "target_half_width": 0.05,
        "time_cap_s": 0.5,
        "confirmation_half_width": 0.05,
        "confirmation_time_cap_s": 1.0,
    },
}


def main() -> int:
    benchmark = start(
        "main_job",
        "The demo's job for both models, end to end.",
        models=MODELS,
        quick_models=(QUICK_MODEL,),
    )
    for model in benchmark.models:
        benchmark.say(f"{model}: preparing data and FP32 model")
        job = quick_job(CACHE / "quick") if benchmark.quick else full_job(model, CACHE / "digits")
        benchmark.say(f"{model}: tuning")
        document, wall_s = tune(job, CACHE / "main_job" / model)
        reports = read_bundle(Path(document["bundle"])).reports
        for key, figure in job_figures(reports["figures"], wall_s=wall_s).items():
            benchmark.add(f"{model}.{key}", figure)
        benchmark.raw[model] = {
            "figures": reports["figures"],
            "provenance": reports["provenance"],
            "result": document["job"]["result"],
            "front": document["front"]["trials"],
            "verification": document["verification"],
            "at_least_int8": at_least_int8(reports["figures"]),
        }
        benchmark.say(f"{model}: {verdict(reports['figures'])}")
    benchmark.report()
    return 0


def full_job(model: str, folder: Path) -> Path:
    """The demo's own job file, its model trained once and kept."""
    command = [sys.executable, "-m", "examples.digits.prepare"]
    subprocess.run(
        [*command, "--model", model, "--out", str(folder)],
        cwd=ROOT,
        check=True,
        stdout=sys.stderr,
    )
    return folder / f"{model}.yaml"


def quick_job(folder: Path) -> Path:
    """A job on little data, with a model that was trained for a moment; trained once and kept."""
    from examples.digits.prepare import job_text

    if not (folder / f"{QUICK_MODEL}.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _train_briefly(folder)
    job = folder / "job.yaml"
    document = quick_document(yaml.safe_load(job_text(QUICK_MODEL)))
    job.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return job


def quick_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's job with the choices and times of a quick run."""
    changed = {name: {**document.get(name, {}), **part} for name, part in QUICK_CHANGES.items()}
    return {
        **document,
        **changed,
        "name": f"{document['name']}-quick",
        "latency_budget": QUICK_BUDGET,
    }


def tune(job: Path, folder: Path) -> tuple[dict[str, Any], float]:
    """Run `autotune tune` on the job in an empty `folder`; its JSON answer and its seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "autotune.cli", "tune", str(job), "-o", "json"]
    command += ["--data-dir", str(folder / "service"), "--out", str(folder / "bundle")]
    command += ["--report", str(folder / "report.html")]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    wall_s = time.monotonic() - started
    if done.returncode != 0:
        raise SystemExit(f"`{' '.join(command)}` ended with exit code {done.returncode}")
    return json.loads(done.stdout), wall_s


@contextmanager
def records(data_dir: Path) -> Iterator[Repository]:
    """What the service that kept its data there has stored."""
    with closing(open_database(f"sqlite:///{data_dir / 'autotune.db'}")) as database:
        yield Repository(database)


def job_figures(figures: Mapping[str, Any], *, wall_s: float) -> dict[str, Figure]:
    """The keys of one model from the figures of its bundle; INT8's only where it was measured."""
    found = {
        "winner_speedup": speedup(figures["winner"]),
        "winner_accuracy": accuracy(figures["winner"]),
        "fp32_accuracy": accuracy(figures["fp32"]),
    }
    if figures["int8"] is not None and figures["int8"]["accuracy"]["search"] is not None:
        found["int8_speedup"] = speedup(figures["int8"])
        found["int8_accuracy"] = accuracy(figures["int8"])
    return {**found, "wall_s": Figure(value=round(wall_s, 1), n=1)}


def speedup(trial: Mapping[str, Any]) -> Figure:
    """FP32 latency over latency, larger is better; n counts the timed inferences."""
    report = trial["latency"]["confirmed"] or trial["latency"]["screening"]
    return Figure(
        value=1 / report["ratio"],
        low=1 / report["ratio_high"],
        high=1 / report["ratio_low"],
        n=report["n_samples"],
    )


def accuracy(trial: Mapping[str, Any]) -> Figure:
    """The metric as a fraction; n counts the images."""
    report = trial["accuracy"]["held_out"] or trial["accuracy"]["search"]
    return Figure(
        value=report["value"],
        low=report["value_low"],
        high=report["value_high"],
        n=report["n_samples"],
    )


def at_least_int8(figures: Mapping[str, Any]) -> bool | None:
    """The winner is no slower and no less accurate than uniform INT8, within the intervals.

    None where uniform INT8 has no figures to compare with.
    """
    if figures["int8"] is None or figures["int8"]["accuracy"]["search"] is None:
        return None
    faster, correct = speedup(figures["winner"]), accuracy(figures["winner"])
    int8_speed, int8_accuracy = speedup(figures["int8"]), accuracy(figures["int8"])
    return _reaches(faster, int8_speed) and _reaches(correct, int8_accuracy)


def verdict(figures: Mapping[str, Any]) -> str:
    """How the winner compares with uniform INT8, as a sentence."""
    return {
        True: "the winner is at least as fast and as accurate as uniform INT8",
        False: "the winner is slower or less accurate than uniform INT8",
        None: "uniform INT8 could not be measured",
    }[at_least_int8(figures)]


def _reaches(figure: Figure, other: Figure) -> bool:
    """Not below the other: larger, or with an interval that meets the other's."""
    if figure.high is None or other.low is None:
        return figure.value >= other.value
    return figure.value >= other.value or figure.high >= other.low


def _train_briefly(folder: Path) -> None:
    import os

    import numpy as np
    from safetensors.torch import save_file

    from examples.digits.images import ImageRecipe, make_images
    from examples.digits.training import RECIPES, train

    training, evaluation = make_images(ImageRecipe(**QUICK_RECIPE))
    np.savez(folder / "training.npz", x=training.x, y=training.y)
    few = slice(QUICK_IMAGES)
    np.savez(folder / "evaluation.npz", x=evaluation.x[few], y=evaluation.y[few])
    model = train(
        replace(RECIPES[QUICK_MODEL], epochs=3),
        training,
        threads=os.cpu_count() or 1,
        on_epoch=lambda _epoch, _loss: None,
    )
    save_file(model.state_dict(), folder / f"{QUICK_MODEL}.safetensors")


if __name__ == "__main__":
    sys.exit(main())
