"""Small networks with every pattern that quantization knows, exported once per test session."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from autotune.compression.calibration import calibrate
from autotune.compression.data import DataSplits, LabelledData
from autotune.compression.effective import optimized_graph
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.source import SourceModel, load_source_model
from autotune.compression.torchvision_repair import import_torchvision
from autotune.spec import ModelSpec

SHAPE = (3, 16, 16)
CLASSES = 5


class Block(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project; HardSwish inside, a residual outside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.BatchNorm2d(2 * channels)
        )
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.fc1 = nn.Conv2d(2 * channels, 8, 1)
        self.fc2 = nn.Conv2d(8, 2 * channels, 1)
        self.project = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.hardswish(self.depthwise(nn.functional.relu6(self.expand(x))))
        gate = nn.functional.relu(self.fc1(nn.functional.adaptive_avg_pool2d(y, 1)))
        y = y * nn.functional.hardsigmoid(self.fc2(gate))
        return x + self.project(y)


class TinyNet(nn.Module):
    """A stem, two residual blocks, a pool, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.pool = nn.MaxPool2d(2)
        self.block1 = Block(16)
        self.mix = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.SiLU())
        self.block2 = Block(32)
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.mix(self.block1(self.pool(self.stem(x)))))
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
        return self.head(torch.relu(self.hidden(x)))


def tiny_module() -> nn.Module:
    """TinyNet with weights and BatchNorm statistics that differ from their defaults."""
    torch.manual_seed(0)
    module = TinyNet()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    nn.init.normal_(module.head.weight, std=0.5)
    return module.eval()


@functools.cache
def tiny_source() -> SourceModel:
    """TinyNet as a source model; the module stays with it."""
    spec = ModelSpec(source="python:tests.unit.compression_models:tiny_module")
    return load_source_model(spec, input_shape=SHAPE, trust_job_code=True)


def vit_b_16() -> nn.Module:
    """torchvision's, for 64x64 images; its head is drawn, because it starts as zeros."""
    torch.manual_seed(0)
    module = import_torchvision().models.vit_b_16(image_size=64, num_classes=10)
    nn.init.normal_(module.heads.head.weight, std=0.05)
    return module.eval()


@functools.cache
def torchvision_source(name: str) -> SourceModel:
    """A torchvision model with fixed random weights for 64x64 images."""
    if name == "vit_b_16":
        spec = ModelSpec(source="python:tests.unit.compression_models:vit_b_16")
    else:
        spec = ModelSpec(source=f"torchvision:{name}", num_classes=10)
    return load_source_model(spec, input_shape=(3, 64, 64), trust_job_code=True)


@functools.cache
def quantizable(name: str) -> QuantizableGraph:
    """The model's graph, calibrated on 8 samples; `tiny` is TinyNet."""
    source = tiny_source() if name == "tiny" else torchvision_source(name)
    return QuantizableGraph(source.graph, calibrate(source.graph, samples(8, source.input_shape)))


def samples(n: int, shape: tuple[int, ...] = SHAPE, *, seed: int = 0) -> np.ndarray:
    """Smooth random images: their neighbouring pixels agree, as those of pictures do."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((n, shape[0], shape[1] // 8, shape[2] // 8))
    fine = coarse.repeat(8, axis=2).repeat(8, axis=3) + 0.2 * rng.standard_normal((n, *shape))
    return fine.astype(np.float32)


def labelled(n: int, *, seed: int = 1, classes: int = CLASSES) -> LabelledData:
    """Samples with labels 0, 1, 2, ... in turn."""
    return LabelledData(x=samples(n, seed=seed), y=np.arange(n, dtype=np.int64) % classes)


def tiny_splits(*, training: bool = True) -> DataSplits:
    """Few samples of each kind."""
    return DataSplits(
        calibration=samples(16),
        training=labelled(32, seed=2) if training else None,
        search=labelled(40, seed=3),
        held_out=labelled(40, seed=4),
    )


def run(model: bytes, x: np.ndarray) -> np.ndarray:
    """The model's output in a plain session with default options."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def operators(artifact: bytes) -> Counter[str]:
    """How many nodes of each kind a plain onnxruntime session executes."""
    return Counter(node.op_type for node in optimized_graph(artifact).graph.node)


def save(model: onnx.ModelProto, path: Path) -> str:
    """Write the model; the `onnx:` reference to it."""
    path.write_bytes(model.SerializeToString())
    return f"onnx:{path}"


def export_quietly(module: nn.Module, path: Path, **options: object) -> None:
    """A plain torch export, as a user would make one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.zeros(1, *SHAPE),), path, verbose=False, **options)
