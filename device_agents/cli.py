"""The command line on a device: `autotune-agent run | measure | probe | doctor | unit`.

Owns arguments, what people read and the exit codes. Results go to stdout, talk goes to stderr.
Nothing but click is imported before a command runs.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from device_agents.measurement import MeasurementOutcome
    from device_agents.protocol import (
        DeviceDescription,
        KernelSpeed,
        LatencyReport,
        Profile,
    )

EXIT_CODES = """\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the model cannot be read,
7 the service does not answer, 8 token or key refused, 11 disk full,
12 the device cannot run what was asked, 17 another agent release is needed,
20 the runtime crashed, 21 out of memory, 22 timeout, 23 unstable.
"""

OUTCOME_EXIT_CODES = {
    "ok": 0,
    "artifact_corrupt": 3,
    "artifact_missing": 3,
    "device_disk": 11,
    "unsupported": 12,
    "runtime_crash": 20,
    "oom": 21,
    "timeout": 22,
    "unstable": 23,
}


_state_dir_option = click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("~/.local/state/edge-autotune"),
    show_default=True,
    help="Where the agent keeps its key, its artifacts and its results.",
)


_output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A table for people, or one JSON document.",
)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edge-autotune")
def main() -> None:
    """Measure models on this device, for a service or on its own."""


@main.command(epilog=EXIT_CODES)
@click.option(
    "--service", required=True, metavar="URL", help="Address of the service: http://HOST:8577."
)
@click.option(
    "--token",
    envvar="AUTOTUNE_ENROLMENT_TOKEN",
    help="One-use token from `autotune device enroll`; only for the first start.",
)
@_state_dir_option
@click.option("--name", help="What to call this device.  [default: its host name]")
@click.option(
    "--cache-gb",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Gigabytes of disk that fetched models may take.",
)
@click.option(
    "--kernel-benchmark/--no-kernel-benchmark",
    envvar="AUTOTUNE_KERNEL_BENCHMARK",
    default=True,
    show_default=True,
    help="Whether to measure on enrolling which precisions are faster here; a minute at most.",
)
def run(
    service: str,
    token: str | None,
    state_dir: Path,
    name: str | None,
    cache_gb: float,
    kernel_benchmark: bool,
) -> None:
    """Work for a service until stopped (SIGTERM or Ctrl-C)."""
    from device_agents.agent import Agent, AgentSettings
    from device_agents.device import describe_device
    from device_agents.errors import DeviceAgentError

    settings = AgentSettings(
        service_url=service,
        state_dir=state_dir.expanduser(),
        token=token,
        name=name,
        cache_max_bytes=int(cache_gb * 1e9),
    )
    try:
        agent = Agent(
            settings, say=_say, describe=_described if kernel_benchmark else describe_device
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stop())
        agent.run()
    except DeviceAgentError as error:
        _fail(str(error), code=_exit_code(error))
    _say("stopped")


@main.command(epilog=EXIT_CODES)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Model to compare with.  [default: MODEL itself, in a session of its own]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many threads compute one inference.",
)
@click.option(
    "--runtime",
    default="onnxruntime",
    show_default=True,
    help="What runs the models; `autotune-agent probe` lists what this device has.",
)
@click.option(
    "--provider",
    default="CPUExecutionProvider",
    show_default=True,
    help="The runtime's execution provider, by the runtime's name for it.",
)
@click.option(
    "--graph-level",
    type=click.Choice(["all", "layout", "extended", "basic", "disabled"]),
    default="all",
    show_default=True,
    help="How far onnxruntime rewrites the graph before it runs it.",
)
@click.option(
    "--memory-arena/--no-memory-arena",
    default=True,
    show_default=True,
    help="Whether freed memory is kept for the next inference.",
)
@click.option(
    "--spinning/--no-spinning",
    default=True,
    show_default=True,
    help="Whether threads that wait for work keep their core busy.",
)
@click.option(
    "--target",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Half width of the 95 % interval, as a fraction, at which to stop.",
)
@click.option(
    "--time-cap",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds of timing after which to stop anyway.",
)
@click.option(
    "--profile", is_flag=True, help="Also show how long each kernel of MODEL takes, longest first."
)
@_output_option
def measure(
    model: Path,
    against: Path | None,
    target: float,
    time_cap: float,
    profile: bool,
    output: str,
    **runtime: Any,
) -> None:
    """Measure a model's latency on this device, without a service.

    One sample at a time (batch 1). Blocks of MODEL alternate with blocks of the other model, so
    that their ratio holds whatever else the machine does.
    """
    from device_agents.measurement import Measurement
    from device_agents.protocol import MeasurementPlan, RuntimeRequest

    ended = Measurement(
        candidate=model,
        reference=against or model,
        runtime=RuntimeRequest(**runtime),
        plan=MeasurementPlan(
            kind="confirmation",
            target_half_width=target,
            time_cap_s=time_cap,
            timeout_s=10 * time_cap + 60,
        ),
        profile=profile,
    ).run()
    if output == "json":
        click.echo(_as_json(ended))
    elif ended.report is not None:
        click.echo(_as_text(ended.report, model=model, against=against))
        if ended.report.profile is not None:
            click.echo(_profile_text(ended.report.profile))
    code = OUTCOME_EXIT_CODES[ended.outcome]
    if code:
        _fail(f"{ended.outcome}: {ended.reason}", code=code)


@main.command()
@_output_option
def probe(output: str) -> None:
    """Show this device, its runtimes, and which precisions are faster.

    The last takes a minute at most and is measured once.
    """
    from device_agents.conditions import read_conditions

    device = _described()
    if output == "json":
        document = {"device": device.model_dump(mode="json"), "conditions": read_conditions()}
        click.echo(json.dumps(document, indent=2))
        return
    lists = ("runtimes", "kernel_speeds")
    rows = {key: value for key, value in device.model_dump().items() if key not in lists}
    rows["cpu_flags"] = " ".join(device.cpu_flags)
    rows |= {
        f"runtime {x.name}": f"{x.version} ({', '.join(x.providers)})" for x in device.runtimes
    }
    rows |= {
        f"{x.runtime} {x.operator} {x.precision}": _speed_text(x) for x in device.kernel_speeds
    }
    conditions = read_conditions()
    missing = conditions.pop("missing")
    rows |= conditions | {key: f"not available: {reason}" for key, reason in missing.items()}
    click.echo("\n".join(f"{key:<34}{value}" for key, value in rows.items()))


@main.command(epilog=EXIT_CODES)
@click.option("--service", metavar="URL", help="Also ask whether this service answers.")
@_state_dir_option
@_output_option
def doctor(service: str | None, state_dir: Path, output: str) -> None:
    """Check this device for what would spoil or stop a measurement.

    Each finding names its repair. Ends with exit code 1 where something must be repaired.
    """
    from device_agents.doctor import examine
    from device_agents.errors import DeviceAgentError

    try:
        findings = examine(state_dir=state_dir.expanduser(), service=service)
    except DeviceAgentError as error:
        _fail(str(error), code=2)  # an address that is none
    if output == "json":
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        click.echo("\n".join(f"{f.status:<6}{f.check:<14}{f.text}" for f in findings))
    if any(finding.status == "fail" for finding in findings):
        raise SystemExit(1)


@main.command()
@click.option(
    "--service", required=True, metavar="URL", help="Address of the service: http://HOST:8577."
)
@_state_dir_option
@click.option("--name", help="What to call this device.  [default: its host name]")
@click.option(
    "--user", help="Account to run as, for a system unit.  [default: a unit of your own systemd]"
)
def unit(service: str, state_dir: Path, name: str | None, user: str | None) -> None:
    """Print a systemd unit that keeps the agent running.

    Enroll once with `autotune-agent run --token ...`; the unit needs no token.
    """
    from device_agents.connection import require_address
    from device_agents.errors import DeviceAgentError
    from device_agents.systemd import unit as unit_text

    try:
        require_address(service)
    except DeviceAgentError as error:
        _fail(str(error), code=2)
    if user is not None and str(state_dir).startswith("~/"):
        state_dir = Path(f"~{user}", *state_dir.parts[1:])
    try:
        state_dir = state_dir.expanduser()
    except RuntimeError:
        _fail(f"this device has no account {user!r}; make it, or name another --user", code=2)
    command = [sys.executable, "-m", "device_agents", "run", "--service", service]
    command += ["--state-dir", str(state_dir)]
    if name is not None:
        command += ["--name", name]
    click.echo(unit_text(command, user=user), nl=False)
    where = "/etc/systemd/system" if user else "~/.config/systemd/user"
    manager = "systemctl" if user else "systemctl --user"
    _say(
        f"put this into {where}/autotune-agent.service, then: {manager} enable --now autotune-agent"
    )


def _described() -> DeviceDescription:
    """What this device is, with the speeds of its kernels."""
    from device_agents.device import describe_device
    from device_agents.kernel_benchmark import cache_folder, remembered

    return describe_device(
        speeds=lambda hardware, builds: remembered(cache_folder(), hardware, builds, say=_say)
    )


def _speed_text(speed: KernelSpeed) -> str:
    if speed.ratio is None or speed.ratio_low is None or speed.ratio_high is None:
        return f"not measured: {speed.missing}"
    bounds = f"{speed.ratio_low:.3g} to {speed.ratio_high:.3g}"
    return f"{speed.ratio:.3g} ({bounds}) of FP32's time"


def _as_json(ended: MeasurementOutcome) -> str:
    report = ended.report.model_dump(mode="json") if ended.report else None
    document = {"outcome": ended.outcome, "reason": ended.reason, "report": report}
    return json.dumps(document, indent=2)


def _tail(value_ns: float, high_ns: float | None) -> str:
    """A quantile with its upper bound, where the samples suffice for one."""
    return _ms(value_ns) if high_ns is None else f"{_ms(value_ns)} (at most {_ms(high_ns)})"


def _as_text(report: LatencyReport, *, model: Path, against: Path | None) -> str:
    rows = {
        "latency": (
            f"{_ms(report.p50_ns)} ms ({_ms(report.p50_low_ns)} to {_ms(report.p50_high_ns)}, "
            f"{report.confidence_level:.0%} interval), "
            f"p90 {_tail(report.p90_ns, report.p90_high_ns)}, "
            f"p99 {_tail(report.p99_ns, report.p99_high_ns)}"
        ),
        "ratio": (
            f"{report.ratio:.3f} ({report.ratio_low:.3f} to {report.ratio_high:.3f}) of "
            f"{against.name if against else 'itself'} at {_ms(report.reference_p50_ns)} ms"
        ),
        "samples": (
            f"{report.n_samples} in {report.n_blocks} blocks, {report.wall_s:.1f} s"
            f"{_undisturbed_text(report)}"
        ),
        "runtime": report.runtime.text(version=report.runtime_version),
        "repeated": _repeated_text(report),
        "steady": "yes" if report.is_steady else f"no: {report.unsteady_reason}",
    }
    shown = (f"  {key:<9}{value}" for key, value in rows.items() if value)
    return "\n".join([str(model), *shown])


def _undisturbed_text(report: LatencyReport) -> str:
    """How many of the candidate's samples took what its latency says; the tail is of all."""
    share = report.undisturbed_share
    return "" if share is None else f"; {share:.0%} undisturbed"


def _repeated_text(report: LatencyReport) -> str:
    """What was measured again and why; empty where nothing was."""
    pairs = ", ".join(f"{count} {reason}" for reason, count in report.tainted_pairs.items())
    if pairs:
        pairs = f"pairs of blocks: {pairs}"
        pairs += "; most were, so all of them count" if report.are_tainted_used else ""
    restarts = f"all of it {report.n_restarts} times, for a drift" if report.n_restarts else ""
    return "; ".join(text for text in (pairs, restarts) if text)


def _profile_text(profile: Profile) -> str:
    """The kernels by falling time, with what each is of their sum."""
    if profile.missing is not None:
        return f"  no profile: {profile.missing}"
    total_ns = sum(kernel.time_ns for kernel in profile.kernels)
    lines = [
        f"  {len(profile.kernels)} kernels take {_ms(total_ns)} ms of the "
        f"{_ms(profile.inference_ns or 0.0)} ms of a profiled inference "
        f"(medians of {profile.n_runs} runs)"
    ]
    for kernel in sorted(profile.kernels, key=lambda k: -k.time_ns):
        share = kernel.time_ns / total_ns if total_ns else 0.0
        lines.append(
            f"  {_ms(kernel.time_ns):>9} ms {share:>4.0%}  {kernel.operator}  {kernel.name}"
        )
    return "\n".join(lines)


def _ms(duration_ns: float) -> str:
    return f"{duration_ns / 1e6:.4g}"


def _fail(message: str, *, code: int) -> NoReturn:
    _say(f"Error: {message}")
    raise SystemExit(code)


def _exit_code(error: Exception) -> int:
    from device_agents import errors

    codes: dict[type[Exception], int] = {
        errors.ServiceUnreachable: 7,
        errors.EnrolmentRefused: 8,
        errors.DeviceDiskFull: 11,
        errors.RuntimeUnavailable: 12,
        errors.IncompatibleProtocol: 17,
    }
    return codes.get(type(error), 1)


def _say(line: str) -> None:
    click.echo(line, err=True)
