"""Whatever a runtime does, the agent lives, says what happened, and goes on with the next.

`AUTOTUNE_HOSTILE_ROUNDS=100` obeys each verb a hundred times; two rounds are enough to see that
a verb leaves nothing behind that stops its successor.
"""

import os
import random
import subprocess
import sys
import threading

import pytest

from device_agents.outbox import Outbox
from device_agents.protocol import Outcome
from tests.unit import hostile
from tests.unit.agent_service import TOKEN, fake_service

ROUNDS = int(os.environ.get("AUTOTUNE_HOSTILE_ROUNDS", "2"))
NEXT_WITHIN_S = 5.0
HANG_S = 1.0

EXPECTED = {
    "ok": {Outcome.OK, Outcome.UNSTABLE},
    "sleep": {Outcome.OK, Outcome.UNSTABLE},
    "segfault": {Outcome.RUNTIME_CRASH},
    "abort": {Outcome.RUNTIME_CRASH},
    "oom": {Outcome.OOM},
    "hang": {Outcome.TIMEOUT},
    "throttle": {Outcome.OK, Outcome.UNSTABLE},
    "nan": {Outcome.RUNTIME_CRASH},
    "nan_report": {Outcome.RUNTIME_CRASH},
    "garbage": {Outcome.RUNTIME_CRASH},
}
"""A machine that is busy with other things may end any honest measurement as unstable."""


class Supervised:
    """An agent's process, started again whenever a signal ended it, as systemd would."""

    def __init__(self, url, state_dir, packages, *, token=TOKEN, cache_gb=2.0):
        self.starts = 0
        self._command = [sys.executable, "-m", "device_agents", "run", "--service", url]
        self._command += ["--token", token, "--name", "pi", "--state-dir", str(state_dir)]
        self._command += ["--cache-gb", str(cache_gb)]
        self._env = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), *sys.path])}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._process.terminate()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self):
        while not self._ended.is_set():
            self.starts += 1
            self._process = subprocess.Popen(
                self._command, env=self._env, stderr=subprocess.DEVNULL
            )
            if self._process.wait() >= 0:
                return


@pytest.fixture
def packages(tmp_path):
    return hostile.package(tmp_path / "packages")


@pytest.fixture
def service():
    with fake_service() as fake:
        yield fake


def offer(service, verb, number):
    service.offer(
        hostile.artifact(verb, number),
        number=number,
        reference=hostile.artifact("ok"),
        runtime="hostile",
        timeout_s=HANG_S if verb == "hang" else 60,
        time_cap_s=0.1,
        min_blocks=4,
    )


@pytest.mark.timeout(60 + 40 * ROUNDS)
def test_the_agent_outlives_every_verb_and_the_next_measurement_starts_soon(
    service, tmp_path, packages
):
    verbs = [verb for verb in EXPECTED for _ in range(ROUNDS)]
    random.Random(3).shuffle(verbs)
    for number, verb in enumerate(verbs, start=1):
        offer(service, verb, number)
    with Supervised(service.url, tmp_path / "state", packages) as agent:
        service.wait_for(lambda s: len(s.results) == len(verbs), 30 * len(verbs))
    assert agent.starts == 1
    for verb, result in zip(verbs, service.results, strict=True):
        assert result.outcome in EXPECTED[verb], (verb, result.outcome, result.reason)
        assert result.outcome is Outcome.OK or result.reason
    assert max(service.pauses) < NEXT_WITHIN_S


@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_an_agent_that_its_model_kills_is_started_again_and_loses_nothing(
    service, tmp_path, packages
):
    for number in range(1, 2 * ROUNDS, 2):
        offer(service, "ok", number)
        offer(service, "kill_agent", number + 1)
    service.answers["results"] = [500] * 2  # what was measured before the kill is still there
    with Supervised(service.url, tmp_path / "state", packages) as agent:
        offer(service, "ok", 2 * ROUNDS + 1)
        done = f"m{2 * ROUNDS + 1}"
        service.wait_for(lambda s: done in [r.measurement_id for r in s.results], 20 * ROUNDS + 20)
    assert agent.starts == ROUNDS + 1
    measured = {r.measurement_id for r in service.results if r.outcome in EXPECTED["ok"]}
    assert measured == {f"m{number}" for number in range(1, 2 * ROUNDS + 2, 2)}
    assert Outbox(tmp_path / "state" / "outbox").pending() == []
    assert max(service.pauses) < NEXT_WITHIN_S


def test_signals_are_named_in_the_reason(service, tmp_path, packages):
    for number, verb in enumerate(("segfault", "abort"), start=1):
        offer(service, verb, number)
    with Supervised(service.url, tmp_path / "state", packages):
        service.wait_for(lambda s: len(s.results) == 2)
    reasons = [result.reason for result in service.results]
    assert ["SIGSEGV" in reasons[0], "SIGABRT" in reasons[1]] == [True, True]


def test_a_spinning_model_on_the_only_core_does_not_starve_the_heartbeat(
    service, tmp_path, packages
):
    service.offer(hostile.artifact("spin"), runtime="hostile", timeout_s=60)
    one_core = {min(os.sched_getaffinity(0))}
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, one_core)  # what is started from here stays there
    try:
        with Supervised(service.url, tmp_path / "state", packages):
            beats = lambda s: [b for b in s.heartbeats if b["lease_id"]]  # noqa: E731
            service.wait_for(lambda s: len(beats(s)) >= 5, 60)
    finally:
        os.sched_setaffinity(0, everywhere)
    assert service.results == []
