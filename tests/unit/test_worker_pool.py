"""The pool's book of calls, with scripted workers in the place of Ray's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotune.search.workers import Call, CallFailed, WorkerPool


class ActorDied(Exception):
    """In the place of Ray's, which must not be imported before its environment is set."""


class Actor:
    """Takes its calls in order; `dies_on` is fatal as often as its count says."""

    def __init__(self, dies_on: dict[str, int]) -> None:
        self.dies_on, self.is_dead, self.most_held = dies_on, False, 0
        self.held: list[tuple[object, str]] = []
        self.done: dict[object, str | None] = {}
        self.begin, self.call = self, self

    def remote(self, method: Any, *arguments: Any) -> object:
        future = object()
        if isinstance(method, str):
            self.held.append((future, method))
            self.most_held = max(self.most_held, len(self.held))
        return future

    def work(self) -> object:
        """End the first call that it holds."""
        future, method = self.held.pop(0)
        if self.dies_on.get(method):
            self.dies_on[method] -= 1
            self.is_dead = True
        self.done[future] = None if self.is_dead else method
        return future


class Stage:
    """Ray's part: the actors, and which of them works next (the first that holds a call)."""

    def __init__(self, **dies_on: int) -> None:
        self.actors: list[Actor] = []
        self.dies_on = dies_on

    def take(self) -> Actor:
        self.actors.append(Actor(self.dies_on))
        return self.actors[-1]

    def wait(self, futures: Sequence[object], **_: Any) -> tuple[list[object], list[object]]:
        busy = [actor for actor in self.actors if actor.held]
        return [min(busy, key=lambda actor: len(actor.done)).work()], []

    def get(self, future: object) -> Any:
        (answer,) = (actor.done[future] for actor in self.actors if future in actor.done)
        if answer is None:
            raise ActorDied("the actor died")
        return answer

    def pool(self, monkeypatch: pytest.MonkeyPatch, n_workers: int = 2) -> WorkerPool:
        ray = SimpleNamespace(
            put=lambda value: value,
            wait=self.wait,
            get=self.get,
            kill=lambda actor: setattr(actor, "held", []),
        )
        errors = SimpleNamespace(RayError=ActorDied, RayTaskError=type("Raised", (ActorDied,), {}))
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
        spec: Any = None
        return WorkerPool(
            spec, spec, cache_dir=Path(), n_workers=n_workers, trust=False, starter=self
        )


def calls(*methods: str) -> list[Call]:
    return [Call(method=method) for method in methods]


def test_brief_calls_are_sent_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    results = list(stage.pool(monkeypatch).run(calls(*["brief"] * 12)))
    assert sorted(results) == [(index, "brief") for index in range(12)]
    assert [actor.most_held for actor in stage.actors] == [2, 2]


def test_long_calls_are_not_sent_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.search.workers._BRIEF_S", 0.0)
    stage = Stage()
    assert len(list(stage.pool(monkeypatch).run(calls(*["long"] * 12)))) == 12
    assert [actor.most_held for actor in stage.actors] == [1, 1]


def test_the_last_calls_are_left_for_whoever_is_free_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    pool = stage.pool(monkeypatch)
    list(pool.run(calls("brief", "brief")))
    next(running := pool.run(calls("brief", "brief", "brief")))
    assert [len(actor.held) for actor in stage.actors] == [1, 1]
    running.close()


def test_a_call_behind_one_that_kills_its_worker_has_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(fatal=2)
    pool = stage.pool(monkeypatch, n_workers=1)
    monkeypatch.setattr(pool, "_brief", {"brief", "fatal"})
    results = dict(pool.run(calls("fatal", "brief", "brief", "brief")))
    assert isinstance(results.pop(0), CallFailed)
    assert set(results.values()) == {"brief"}
    assert stage.actors[0].done  # it held a brief call when it died
    assert len(stage.actors) == 3


def test_a_worker_that_dies_once_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(fatal=1)
    results = dict(stage.pool(monkeypatch).run(calls("fatal", *["brief"] * 7)))
    assert results == {0: "fatal"} | dict.fromkeys(range(1, 8), "brief")
