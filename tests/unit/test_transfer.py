"""An artifact arrives in as few bytes as possible, and right or not at all."""

import hashlib
from contextlib import contextmanager

import pytest

from device_agents.cache import ArtifactCache
from device_agents.connection import Download
from device_agents.errors import ArtifactCorrupt, ServiceUnreachable
from device_agents.protocol import ArtifactReference
from device_agents.transfer import Transfer
from storage.segments import find_segments
from tests.unit.test_segments import model


class FakeConnection:
    """A service with artifacts; `breaks_after` bytes of one answer the line goes down."""

    def __init__(self, *, knows_ranges=True):
        self.artifacts = {}
        self.sent = 0
        self.breaks_after = None
        self.knows_ranges = knows_ranges

    def add(self, data):
        sha256 = hashlib.sha256(data).hexdigest()
        self.artifacts[sha256] = data
        return ArtifactReference(sha256=sha256, size_bytes=len(data))

    def segments(self, sha256):
        return find_segments(self.artifacts[sha256])

    @contextmanager
    def download(self, sha256, *, offset=0, stop=None):
        start = offset if self.knows_ranges else 0
        data = self.artifacts[sha256][start : stop if self.knows_ranges else None]
        yield Download(offset=start, chunks=self._chunks(data))

    def _chunks(self, data):
        for position in range(0, len(data), 1000):
            if self.breaks_after is not None and position >= self.breaks_after:
                raise ServiceUnreachable("the line went down")
            self.sent += len(data[position : position + 1000])
            yield data[position : position + 1000]


@pytest.fixture
def connection():
    return FakeConnection()


def test_a_second_artifact_ships_only_what_differs(connection, tmp_path):
    transfer = Transfer(connection, ArtifactCache(tmp_path))
    transfer.fetch(connection.add(model()))
    connection.sent = 0
    path = transfer.fetch(connection.add(model(changed=7)))
    assert path.read_bytes() == model(changed=7)
    assert connection.sent < len(model()) / 20


def test_an_assembled_artifact_that_broke_off_is_finished_by_the_next_try(connection, tmp_path):
    transfer = Transfer(connection, ArtifactCache(tmp_path))
    transfer.fetch(connection.add(model()))
    connection.breaks_after, connection.sent = 5000, 0
    wanted = connection.add(model(changed=7))
    with pytest.raises(ServiceUnreachable):
        transfer.fetch(wanted)
    connection.breaks_after = None
    again = Transfer(connection, ArtifactCache(tmp_path))
    assert again.fetch(wanted).read_bytes() == model(changed=7)
    assert connection.sent < len(model()) / 20


def test_a_worn_out_part_here_is_found_out_and_the_file_fetched_whole(connection, tmp_path):
    cache = ArtifactCache(tmp_path)
    transfer = Transfer(connection, cache)
    first = transfer.fetch(connection.add(model()))
    first.write_bytes(b"\0" * len(model()))
    wanted = connection.add(model(changed=7))
    with pytest.raises(ArtifactCorrupt):
        transfer.fetch(wanted)
    assert transfer.fetch(wanted, in_parts=False).read_bytes() == model(changed=7)


def test_a_proxy_that_sends_whole_files_only_is_coped_with(tmp_path):
    connection = FakeConnection(knows_ranges=False)
    transfer = Transfer(connection, ArtifactCache(tmp_path))
    transfer.fetch(connection.add(model()))
    wanted = connection.add(model(changed=7))
    assert transfer.fetch(wanted).read_bytes() == model(changed=7)


def test_an_evicted_artifact_lends_no_parts(connection, tmp_path):
    cache = ArtifactCache(tmp_path)
    transfer = Transfer(connection, cache)
    transfer.fetch(connection.add(model())).unlink()
    assert cache.places() == {}
    assert transfer.fetch(connection.add(model(changed=7))).read_bytes() == model(changed=7)


def test_the_artifacts_that_lend_parts_are_not_evicted_for_it(connection, tmp_path):
    transfer = Transfer(connection, ArtifactCache(tmp_path, max_bytes=len(model()) + 20_000))
    transfer.fetch(connection.add(model()))
    connection.sent = 0
    assert transfer.fetch(connection.add(model(changed=7))).read_bytes() == model(changed=7)
    assert connection.sent < len(model()) / 20
