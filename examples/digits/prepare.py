"""Makes the demo's data, model and job file: `python -m examples.digits.prepare`.

Owns the files of the demo's folder and their cache: what exists and was made by the same
recipe is kept. The images are `images.py`'s, the training is `training.py`'s work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.digits.recipes import RECIPES, ImageRecipe, TrainingRecipe

if TYPE_CHECKING:
    from examples.digits.images import Images

RECIPE_FILE = "recipe.json"
DEFAULT_FOLDER = Path("demo")
RECOVERY_EPOCHS = {"mobilenet_v2": 2, "resnet18": 1}
TRAINING_FILE, EVALUATION_FILE = "training.npz", "evaluation.npz"


def main(arguments: list[str] | None = None) -> int:
    """The command: prepare one model's demo and print the path of its job file on stdout."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.prepare",
        description="Make the demo's data, train its model, write its job file.",
    )
    parser.add_argument(
        "--model",
        choices=sorted(RECIPES),
        default="mobilenet_v2",
        help="torchvision's network to train (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_FOLDER,
        metavar="DIR",
        help="the folder for data, model and job file (%(default)s)",
    )
    options = parser.parse_args(arguments)
    # Threads that wait must not spin: on a busy machine that doubles the training time. The
    # OpenMP runtime reads this when torch is first imported, which is later and only if needed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console(stderr=True, soft_wrap=True)
    print(prepare(RECIPES[options.model], options.out, console=console))
    return 0


def prepare(
    recipe: TrainingRecipe, folder: Path, *, console: Console, images: ImageRecipe | None = None
) -> Path:
    """The path of the job file, after making in `folder` whatever is missing or outdated."""
    folder.mkdir(parents=True, exist_ok=True)
    images, made, model = images or ImageRecipe(), _Made(folder), recipe.model
    images_digest = _digest(asdict(images))
    if not made.current("images", images_digest, (TRAINING_FILE, EVALUATION_FILE)):
        _make_images(images, folder, console)
        made.record("images", {"digest": images_digest})
    model_digest = _digest([images_digest, asdict(recipe)])
    if made.current(model, model_digest, (f"{model}.safetensors",)):
        accuracy = made.entry(model)["accuracy"]
        console.print(f"{model} is ready in {folder} (FP32 accuracy {accuracy:.1%}, cached)")
    else:
        facts = _train(recipe, folder, console)
        made.record(model, {"digest": model_digest, **facts})
    job = folder / f"{model}.yaml"
    if not job.exists():  # a job file that the user changed stays theirs
        with _part(job) as part:
            part.write_text(job_text(model), encoding="utf-8")
    return job


def job_text(model: str) -> str:
    """The demo's job file as YAML; its paths are relative to its own folder."""
    document = {
        "version": 1,
        "name": f"digits-{model}",
        "model": {
            "source": f"torchvision:{model}",
            "weights": f"{model}.safetensors",
            "num_classes": 10,
        },
        "data": {"evaluation": f"npz:{EVALUATION_FILE}", "training": f"npz:{TRAINING_FILE}"},
        "latency_budget": "0.5x",
        "max_accuracy_drop": 0.01,
        "search": {"trials": 24, "prune_ratios": [0.0, 0.25, 0.5], "max_pruned_bases": 2},
        "recovery": {"epochs": RECOVERY_EPOCHS[model]},
        "measurement": {
            "target_half_width": 0.02,
            "time_cap_s": 2.0,
            "confirmation_half_width": 0.01,
            "confirmation_time_cap_s": 3.0,
        },
    }
    head = f"# The demo's job: {model} on noisy digits. Run it with: autotune tune THIS_FILE\n"
    return head + yaml.safe_dump(document, sort_keys=False)


def _make_images(recipe: ImageRecipe, folder: Path, console: Console) -> None:
    import numpy as np

    from examples.digits.images import make_images

    training, evaluation = make_images(recipe)
    for name, images in ((TRAINING_FILE, training), (EVALUATION_FILE, evaluation)):
        with _part(folder / name) as part, part.open("wb") as file:
            np.savez(file, x=images.x, y=images.y)
    console.print(
        f"made {len(training.y):,} training and {len(evaluation.y):,} evaluation images in {folder}"
    )


def _train(recipe: TrainingRecipe, folder: Path, console: Console) -> dict[str, Any]:
    from safetensors.torch import save_file

    from examples.digits.training import accuracy, train

    model, started = recipe.model, time.monotonic()
    with _epoch_progress(console, model, recipe.epochs) as on_epoch:
        trained = train(recipe, _load(folder / TRAINING_FILE), threads=_cores(), on_epoch=on_epoch)
    train_s = time.monotonic() - started
    evaluation = _load(folder / EVALUATION_FILE)
    right = accuracy(trained, evaluation)
    with _part(folder / f"{model}.safetensors") as part:
        save_file(trained.state_dict(), part)
    console.print(
        f"{model} trained in {train_s:.0f} s: FP32 accuracy {right:.1%} "
        f"on {len(evaluation.y):,} images never seen in training"
    )
    return {"accuracy": right, "train_s": round(train_s, 1)}


def _load(path: Path) -> Images:
    import numpy as np

    from examples.digits.images import Images

    with np.load(path, allow_pickle=False) as arrays:
        return Images(x=arrays["x"], y=arrays["y"])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _epoch_progress(
    console: Console, model: str, epochs: int
) -> Iterator[Callable[[int, float], None]]:
    """One live bar on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield lambda done, loss: console.print(
            f"training {model}: epoch {done} of {epochs}, loss {loss:.3f}"
        )
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"training {model}", total=epochs)
        yield lambda done, loss: progress.update(
            task, completed=done, description=f"training {model} (loss {loss:.3f})"
        )


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is complete."""
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


class _Made:
    """What the folder holds and by which recipe it was made, in `recipe.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / RECIPE_FILE
        try:
            self._entries: dict[str, dict[str, Any]] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._entries = {}

    def entry(self, name: str) -> dict[str, Any]:
        return self._entries[name]

    def current(self, name: str, digest: str, files: tuple[str, ...]) -> bool:
        """The files are there and were made by the recipe of that digest."""
        complete = all((self._folder / file).exists() for file in files)
        return complete and self._entries.get(name, {}).get("digest") == digest

    def record(self, name: str, entry: dict[str, Any]) -> None:
        self._entries[name] = entry
        with _part(self._path) as part:
            part.write_text(json.dumps(self._entries, indent=2) + "\n", encoding="utf-8")


def _digest(recipe: object) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
