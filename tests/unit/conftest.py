"""What several files of unit tests begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.cli.root import run
from autotune.cli.session import Session
from tests.unit.cli_fakes import Call, FakeClient
from tests.unit.tuning_bench import Bench, benched


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with benched(tmp_path) as made:
        yield made


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def call(client: FakeClient) -> Call:
    """Run the command line against the fake service."""

    def invoke(*arguments: str) -> int:
        def connect(url: str, token: str) -> Any:
            client.calls.append(("connect", url, token))
            return client

        return run(
            ["--url", "http://service", "--token", "secret", *arguments], Session(connect=connect)
        )

    return invoke
