"""A finished job made up of records: what the tests of export and report read."""

import hashlib
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from device_agents.protocol import (
    Conditions,
    DeviceDescription,
    LatencyReport,
    RuntimeBuild,
    RuntimeRequest,
)
from search_spaces import (
    FP32,
    INT8,
    Candidate,
    Layer,
    LayerGroup,
    LayerInventory,
    LayerKind,
    PrunableGroup,
    SearchSpace,
)
from storage.records import (
    AccuracyReport,
    DeviceRecord,
    JobRecord,
    JobState,
    TrialOutcome,
    TrialRecord,
    TrialState,
)
from storage.sensitivity import Sensitivity

START = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
FP32_NS = 2.4e6


def linear_model(*, features: int = 6, classes: int = 3, seed: int = 0) -> bytes:
    """A real ONNX classifier with one MatMul, input `x` of shape (N, features)."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((features, classes)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="test"
    )
    return onnx.ModelProto.SerializeToString(model, deterministic=True)


def accuracy(value: float, *, split: str = "search", n: int = 400) -> AccuracyReport:
    return AccuracyReport(
        split=split,
        n_samples=n,
        value=value,
        value_low=value - 0.012,
        value_high=value + 0.011,
        fp32_value=0.951,
        drop=0.951 - value,
        drop_low=0.951 - value - 0.006,
        drop_high=0.951 - value + 0.006,
        mean_kl=max(0.951 - value, 0.0) * 2,
        wall_s=1.2,
    )


def latency(p50_ns: float, *, half_width: float = 0.018, n: int = 320) -> LatencyReport:
    conditions = Conditions(
        load_1m=0.31,
        cpu_frequency_mhz=1800.0,
        temperature_celsius=51.5,
        governor="ondemand",
        available_memory_bytes=3_100_000_000,
        missing={"steal_fraction": "no hypervisor"},
    )
    ratio = p50_ns / FP32_NS
    return LatencyReport(
        p50_ns=p50_ns,
        p50_low_ns=p50_ns * (1 - half_width),
        p50_high_ns=p50_ns * (1 + half_width),
        p90_ns=p50_ns * 1.08,
        p99_ns=p50_ns * 1.3,
        ratio=ratio,
        ratio_low=ratio * (1 - half_width),
        ratio_high=ratio * (1 + half_width),
        reference_p50_ns=FP32_NS * 1.004,
        reference_latency_ns=FP32_NS,
        n_samples=n,
        n_blocks=16,
        undisturbed_share=0.87,
        is_steady=True,
        wall_s=3.4,
        runtime=RuntimeRequest(),
        runtime_version="1.31.1",
        before=conditions,
        between=tuple(
            conditions.model_copy(update={"temperature_celsius": t, "missing": {}})
            for t in (52.0, 54.5, 53.0)
        ),
        after=conditions.model_copy(update={"temperature_celsius": 52.75, "load_1m": 0.6}),
    )


def device() -> DeviceRecord:
    description = DeviceDescription(
        hostname="pi4",
        host_id="c" * 64,
        architecture="aarch64",
        cpu_model="Cortex-A72",
        cpu_flags=("asimd",),
        logical_cpus=4,
        memory_bytes=4_000_000_000,
        operating_system="Debian GNU/Linux 12",
        kernel="6.1.0",
        python="3.11.2",
        agent_version="0.1.0",
        runtimes=(
            RuntimeBuild(name="onnxruntime", version="1.31.1", providers=("CPUExecutionProvider",)),
        ),
        fingerprint="f" * 64,
    )
    return DeviceRecord(
        id="dev-1",
        name="kitchen-pi4",
        pool="pi4",
        description=description,
        enrolled_at=START,
        last_seen_at=START,
    )


def inventory(n_groups: int = 36) -> LayerInventory:
    """Groups named as mobilenet_v2's are: stem, inverted residual blocks, classifier."""
    blocks = (f"features.{i // 3}.conv.{i % 3}.0" for i in range(3, n_groups + 1))
    names = ["features.0.0", *blocks, "classifier.1"]
    groups = []
    for i, name in enumerate(names):
        kind = LayerKind.GEMM if name == "classifier.1" else LayerKind.CONV
        kind = LayerKind.DEPTHWISE_CONV if ".conv.1." in name else kind
        layer = Layer(
            name=name,
            kind=kind,
            op_type="Gemm" if kind is LayerKind.GEMM else "Conv",
            macs=200_000 * (1 + (i * 7) % 11) // (10 if kind is LayerKind.DEPTHWISE_CONV else 1),
            parameters=900 * (i + 1),
            weight_shape=(16, 16, 1, 1),
            input_shape=(16, 8, 8),
            output_shape=(16, 8, 8),
        )
        groups.append(
            LayerGroup(
                name=name, layers=(layer,), nodes=(f"node_{i}",), precisions=("fp32", "w8a8")
            )
        )
    prunable = tuple(
        PrunableGroup(name=n, channels=96, layers=(n, n.replace("conv.0", "conv.1")))
        for n in names
        if ".conv.0." in n
    )
    return LayerInventory(model_digest="d" * 64, groups=tuple(groups), prunable_groups=prunable)


def trial(
    number: int,
    candidate: Candidate,
    *,
    model_inventory: LayerInventory,
    accuracy_value: float,
    p50_ns: float,
    proposed_by: str = "optuna",
    artifact: bytes | None = None,
) -> TrialRecord:
    groups = []
    for i, group in enumerate(model_inventory.groups):
        planned = candidate.precision(group.name).name
        undone = planned == "w8a8" and i % 13 == 5
        groups.append(
            {
                "group": group.name,
                "planned": planned,
                "effective": "fp32" if undone else planned,
                "reason": "a float consumer keeps the unit from fusing" if undone else None,
            }
        )
    content = artifact if artifact is not None else f"artifact {number}".encode()
    return TrialRecord(
        id=f"trial-{number:04d}",
        job_id="job-1",
        number=number,
        candidate=candidate,
        proposed_by=proposed_by,
        state=TrialState.FINISHED,
        outcome=TrialOutcome.OK,
        artifact_sha256=hashlib.sha256(content).hexdigest(),
        artifact_size_bytes=len(content) if artifact else 9_000_000 - 50_000 * number,
        compression={"groups": groups, "base": {"recovery_epochs": 0}},
        accuracy=accuracy(accuracy_value),
        latency=latency(p50_ns),
        created_at=START + timedelta(seconds=10 * number),
        finished_at=START + timedelta(seconds=10 * number + 8),
    )


def confirmed(record: TrialRecord, *, accuracy_value: float, p50_ns: float) -> TrialRecord:
    return replace(
        record,
        held_out_accuracy=accuracy(accuracy_value, split="held_out", n=600),
        confirmed_latency=latency(p50_ns, half_width=0.008, n=960),
    )


def trials(model_inventory: LayerInventory, *, n: int = 40, seed: int = 3) -> list[TrialRecord]:
    """FP32, uniform INT8, then random mixtures; number 7 is confirmed, the last two failed."""
    rng = random.Random(seed)
    space = SearchSpace.build(
        model_inventory, precisions=(FP32, INT8), prune_ratios=(0.0, 0.25, 0.5)
    )
    made = [
        trial(
            0,
            space.fp32(),
            model_inventory=model_inventory,
            accuracy_value=0.951,
            p50_ns=FP32_NS,
            proposed_by="baseline",
        ),
        trial(
            1,
            space.uniform_int8(),
            model_inventory=model_inventory,
            accuracy_value=0.938,
            p50_ns=0.62 * FP32_NS,
            proposed_by="baseline",
        ),
    ]
    for number in range(2, n):
        share, pruned = rng.random(), rng.choice((0.0, 0.0, 0.3, 0.6))
        candidate = Candidate(
            precisions={name: INT8 for name in space.precisions if rng.random() < share},
            prune_ratios={
                name: rng.choice((0.25, 0.5))
                for name in space.prune_ratios
                if rng.random() < pruned
            },
        )
        ratio = (1 - 0.38 * share) * (1 - 0.6 * pruned) * rng.uniform(0.95, 1.08)
        loss = 0.009 * share + 0.05 * pruned * rng.uniform(0.5, 1.0) + rng.uniform(-0.003, 0.008)
        made.append(
            trial(
                number,
                candidate,
                model_inventory=model_inventory,
                accuracy_value=0.951 - loss,
                p50_ns=ratio * FP32_NS,
                proposed_by="sensitivity" if number < 6 else "optuna",
            )
        )
    made[0] = confirmed(made[0], accuracy_value=0.948, p50_ns=FP32_NS * 1.002)
    made[1] = confirmed(made[1], accuracy_value=0.937, p50_ns=0.625 * FP32_NS)
    winner = trial(
        7,
        made[7].candidate,
        model_inventory=model_inventory,
        accuracy_value=0.939,
        p50_ns=0.47 * FP32_NS,
        proposed_by="optuna",
        artifact=linear_model(),
    )
    made[7] = confirmed(winner, accuracy_value=0.941, p50_ns=0.474 * FP32_NS)
    made[-1] = replace(
        made[-1],
        outcome=TrialOutcome.COMPRESSION_FAILED,
        reason="group features.3.conv.0.0: its range is zero",
        accuracy=None,
        latency=None,
        artifact_sha256=None,
        artifact_size_bytes=None,
        compression=None,
    )
    made[-2] = replace(
        made[-2], outcome=TrialOutcome.MEASUREMENT_FAILED, reason="timeout", latency=None
    )
    return made


def job(model_inventory: LayerInventory) -> JobRecord:
    return JobRecord(
        id="job-1",
        name="digits on a Pi",
        state=JobState.FINISHED,
        phase="finished",
        reason=None,
        spec={
            "version": 1,
            "model": {"source": "torchvision:mobilenet_v2"},
            "data": {"evaluation": "npz:evaluation.npz"},
            "latency_budget": "0.5x",
        },
        cancel_requested=False,
        source={"digest": "d" * 64, "input_name": "x", "input_shape": [6]},
        inventory=model_inventory,
        device_id="dev-1",
        latency_budget_ns=0.5 * FP32_NS,
        reference_latency_ns=FP32_NS,
        sensitivity=tuple(
            Sensitivity(
                group=group.name,
                precision="w8a8",
                sqnr_db=40.0 - i % 9,
                mean_kl=10 ** (-5 + (i * 5 % 17) / 5),
                drop=0.0005 * (i % 5),
                n_samples=400,
            )
            for i, group in enumerate(model_inventory.groups)
        ),
        result={
            "winner": "trial-0007",
            "verdict": "within_budget",
            "explanation": "Trial 7 is the most accurate one inside the budget of 1.200 ms.",
            "fp32_trial": "trial-0000",
            "int8_trial": "trial-0001",
            "beats_baseline": True,
            "stopped_because": "the trial budget is spent",
        },
        created_at=START,
        started_at=START + timedelta(seconds=1),
        finished_at=START + timedelta(minutes=3, seconds=12),
    )
