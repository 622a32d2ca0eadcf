"""Leases that ran out are taken back for as long as the service lives."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from autotune.service import app
from storage.errors import DatabaseUnavailable


@pytest.mark.parametrize("error", [DatabaseUnavailable("away"), ValueError("a defect")])
def test_leases_run_out_also_after_an_error(error, monkeypatch):
    errors, tried_again = [error], threading.Event()

    def expire_leases(*, max_attempts):
        if errors:
            raise errors.pop()
        tried_again.set()
        return []

    async def live():
        expiry = asyncio.create_task(app._expire_leases(context))
        await asyncio.to_thread(tried_again.wait, 5)
        expiry.cancel()

    context = SimpleNamespace(
        repository=SimpleNamespace(expire_leases=expire_leases),
        settings=SimpleNamespace(measurement_attempts=3),
    )
    monkeypatch.setattr(app, "EXPIRY_S", 0.0)
    asyncio.run(live())
    assert tried_again.is_set()
