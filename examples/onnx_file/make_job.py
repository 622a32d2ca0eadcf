"""Writes the job file for an ONNX model: `python -m examples.onnx_file.make_job`.

An ONNX file has no torch module behind it, so nothing is trained, and pruning costs accuracy
that nothing brings back: this job leaves it out (`prune_ratios` switches it on) and searches
the precision of each layer group. Without `--model` the demo's trained
network is exported first, to have a file to start from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

DEMO = Path("demo")


def main(arguments: list[str] | None = None) -> int:
    """The command: print the path of the job file on stdout."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.onnx_file.make_job",
        description="Write the job file that tunes an ONNX model.",
    )
    parser.add_argument(
        "--model", type=Path, metavar="MODEL.onnx", help="your model (the demo's, exported)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DEMO / "evaluation.npz",
        metavar="DATA.npz",
        help="arrays x (float32, one sample per row) and y (class numbers) (%(default)s)",
    )
    parser.add_argument(
        "--budget", default="0.7x", help="3ms, 800us, or a share of FP32 (%(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("onnx-job.yaml"),
        metavar="JOB.yaml",
        help="the job file to write (%(default)s)",
    )
    options = parser.parse_args(arguments)
    model = options.model or export_demo(DEMO, options.out.with_suffix(".onnx"))
    text = job_text(model, options.data, budget=options.budget)
    options.out.write_text(text, encoding="utf-8")
    print(options.out)
    return 0


def job_text(model: Path, data: Path, *, budget: str) -> str:
    """The job file as YAML."""
    document = {
        "version": 1,
        "name": model.stem,
        "model": {"source": f"onnx:{model.resolve()}"},
        "data": {"evaluation": f"npz:{data.resolve()}"},
        "latency_budget": budget,
        "search": {"precisions": ["fp32", "w8a8", "w8"], "prune_ratios": [0.0], "trials": 20},
    }
    return yaml.safe_dump(document, sort_keys=False)


def export_demo(folder: Path, path: Path) -> Path:
    """The demo's mobilenet_v2 as an ONNX file with a free batch axis."""
    import torch
    from safetensors.torch import load_file

    from autotune.compression.torchvision_repair import import_torchvision

    weights = folder / "mobilenet_v2.safetensors"
    if not weights.exists():
        raise SystemExit(f"{weights} is missing; run: python -m examples.digits.prepare")
    module = import_torchvision().models.mobilenet_v2(num_classes=10).eval()
    module.load_state_dict(load_file(weights))
    torch.onnx.export(
        module,
        (torch.zeros(2, 3, 64, 64),),
        path,
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    return path


if __name__ == "__main__":
    raise SystemExit(main())
