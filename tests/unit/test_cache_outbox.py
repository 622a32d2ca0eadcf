"""What an agent keeps on disk: whole or not at all, bounded, and there after a kill."""

import errno
import hashlib
import os
import stat
import subprocess
import sys

import pytest

from device_agents import files
from device_agents.cache import ArtifactCache
from device_agents.errors import ArtifactCorrupt, DeviceAgentError, DeviceDiskFull
from device_agents.identity import Identity, StateFolder
from device_agents.outbox import Outbox
from device_agents.protocol import MeasurementResult, Outcome


def digest(data):
    return hashlib.sha256(data).hexdigest()


def store(cache, data, **options):
    return cache.put(digest(data), [data], size_bytes=len(data), **options)


def test_an_artifact_comes_back_as_it_was_put(tmp_path):
    cache = ArtifactCache(tmp_path)
    path = cache.put(digest(b"onetwo"), [b"one", b"two"], size_bytes=6)
    assert path.read_bytes() == b"onetwo"
    assert cache.get(digest(b"onetwo")) == path


def test_an_artifact_that_was_never_put_is_not_there(tmp_path):
    assert ArtifactCache(tmp_path).get(digest(b"never")) is None


@pytest.mark.parametrize("arrived", [b"altered", b"too long", b"short"])
def test_other_bytes_than_promised_are_refused_and_leave_nothing(tmp_path, arrived):
    cache = ArtifactCache(tmp_path)
    with pytest.raises(ArtifactCorrupt, match="promised"):
        cache.put(digest(b"correct"), [arrived], size_bytes=7)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_altered_on_disk_is_deleted_and_not_there(tmp_path):
    cache = ArtifactCache(tmp_path)
    path = store(cache, b"artifact")
    path.write_bytes(b"artefact")
    assert cache.get(digest(b"artifact")) is None
    assert not path.exists()


def test_the_least_recently_used_goes_first(tmp_path):
    cache = ArtifactCache(tmp_path, max_bytes=20)
    for age, data in enumerate((b"1" * 8, b"2" * 8)):
        os.utime(store(cache, data), ns=(age, age))
    cache.get(digest(b"1" * 8))
    store(cache, b"3" * 8)
    assert cache.get(digest(b"1" * 8)) is not None
    assert cache.get(digest(b"2" * 8)) is None
    assert cache.size_bytes() == 16


FUTURE_NS = 4_000_000_000 * 10**9  # a clock that starts at 1970 will not come there


def test_what_is_used_last_is_evicted_last_though_the_clock_went_back(tmp_path):
    cache = ArtifactCache(tmp_path, max_bytes=30)
    artifacts = [letter * 8 for letter in (b"1", b"2", b"3")]
    for age, data in enumerate(artifacts):
        os.utime(store(cache, data), ns=(FUTURE_NS + age, FUTURE_NS + age))
    cache.get(digest(artifacts[0]))
    store(cache, b"4" * 8)
    store(cache, b"5" * 8)
    kept = [data[:1] for data in (*artifacts, b"4", b"5") if cache.get(digest(data[:1] * 8))]
    assert kept == [b"1", b"4", b"5"]


def test_what_is_to_be_kept_is_not_evicted(tmp_path):
    cache = ArtifactCache(tmp_path, max_bytes=10)
    store(cache, b"1" * 8)
    store(cache, b"2" * 8, keep=[digest(b"1" * 8)])
    assert cache.get(digest(b"1" * 8)) is not None
    assert cache.size_bytes() == 16  # over the bound, for as long as both are needed
    store(cache, b"3" * 8)
    assert cache.size_bytes() == 8


def test_an_artifact_larger_than_the_bound_is_refused(tmp_path):
    with pytest.raises(DeviceDiskFull, match="bounded to 4"):
        store(ArtifactCache(tmp_path, max_bytes=4), b"12345")


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "no space left")

    cache = ArtifactCache(tmp_path)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DeviceDiskFull, match="free some space"):
        store(cache, b"artifact")
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_the_disk_passes_through(tmp_path, monkeypatch):
    def broken(_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="input/output"):
        store(ArtifactCache(tmp_path), b"artifact")


def breaks_after(*chunks):
    yield from chunks
    raise ConnectionResetError


def test_a_broken_download_goes_on_where_it_stopped_in_the_next_process(tmp_path):
    with pytest.raises(ConnectionResetError):
        ArtifactCache(tmp_path).put(digest(b"onetwo"), breaks_after(b"one"), size_bytes=6)
    cache = ArtifactCache(tmp_path)
    assert cache.received_bytes(digest(b"onetwo")) == 3
    assert cache.get(digest(b"onetwo")) is None
    path = cache.put(digest(b"onetwo"), [b"two"], size_bytes=6, offset=3)
    assert path.read_bytes() == b"onetwo"
    assert cache.received_bytes(digest(b"onetwo")) == 0


def test_a_part_that_turns_out_wrong_is_not_built_upon_again(tmp_path):
    cache = ArtifactCache(tmp_path)
    with pytest.raises(ConnectionResetError):
        cache.put(digest(b"onetwo"), breaks_after(b"0ne"), size_bytes=6)
    with pytest.raises(ArtifactCorrupt):
        cache.put(digest(b"onetwo"), [b"two"], size_bytes=6, offset=3)
    assert cache.received_bytes(digest(b"onetwo")) == 0


def test_a_part_that_is_being_continued_is_not_evicted_to_make_room(tmp_path):
    cache = ArtifactCache(tmp_path, max_bytes=7)
    with pytest.raises(ConnectionResetError):
        cache.put(digest(b"onetwo"), breaks_after(b"one"), size_bytes=6)
    store(cache, b"wide")
    assert cache.put(digest(b"onetwo"), [b"two"], size_bytes=6, offset=3).exists()


def a_result(number=1):
    return MeasurementResult(
        lease_id=f"lease-{number}",
        fencing_token=number,
        measurement_id=f"measurement-{number}",
        outcome=Outcome.TIMEOUT,
        reason="no result within 9 s",
    )


def test_a_result_survives_the_process_that_put_it(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from device_agents.outbox import Outbox
from device_agents.protocol import MeasurementResult
text = {a_result().model_dump_json()!r}
Outbox(Path({str(tmp_path)!r})).put(MeasurementResult.model_validate_json(text))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], timeout=60)
    assert Outbox(tmp_path).pending() == [a_result()]


def test_results_come_oldest_first_until_they_are_acknowledged(tmp_path):
    outbox = Outbox(tmp_path)
    for number in (1, 2, 3):
        outbox.put(a_result(number))
    outbox.acknowledge(a_result(2))
    outbox.acknowledge(a_result(2))
    assert outbox.pending() == [a_result(1), a_result(3)]


def test_results_come_oldest_first_though_the_clock_went_back(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put(a_result(1))
    [first] = tmp_path.iterdir()
    os.utime(first, ns=(FUTURE_NS, FUTURE_NS))
    for number in (2, 3, 4, 5, 6):
        outbox.put(a_result(number))
    assert outbox.pending() == [a_result(number) for number in (1, 2, 3, 4, 5, 6)]


def test_the_same_result_is_kept_once(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put(a_result())
    outbox.put(a_result())
    assert len(outbox.pending()) == 1


def test_a_damaged_result_does_not_stop_the_others(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put(a_result())
    (tmp_path / "broken.json").write_bytes(b'{"lease_id": ')
    assert outbox.pending() == [a_result()]
    assert (tmp_path / "broken.damaged").exists()


def test_ids_with_slashes_name_no_other_file(tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    outbox.put(a_result().model_copy(update={"lease_id": "../../escaped"}))
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path / "outbox"]


IDENTITY = Identity(
    agent_id="a1", device_id="d1", device_name="pi", agent_key="secret", heartbeat_s=5.0
)


def test_an_identity_is_readable_by_its_user_alone(tmp_path):
    state = StateFolder(tmp_path / "state")
    state.save(IDENTITY)
    mode = stat.S_IMODE((tmp_path / "state/agent.json").stat().st_mode)
    assert mode == 0o600
    assert state.identity() == IDENTITY
    state.close()


def test_an_unreadable_identity_is_none(tmp_path):
    (tmp_path / "agent.json").write_text("{}")
    state = StateFolder(tmp_path)
    assert state.identity() is None
    state.close()


def test_two_agents_cannot_share_a_state_folder(tmp_path):
    first = StateFolder(tmp_path)
    with pytest.raises(DeviceAgentError, match="another agent is using"):
        StateFolder(tmp_path)
    first.close()
    StateFolder(tmp_path).close()


def test_what_a_killed_agent_promised_is_a_result_at_the_next_start(tmp_path):
    promised = a_result(1).model_copy(update={"outcome": Outcome.LOST, "reason": "killed"})
    Outbox(tmp_path).promise(promised)
    again = Outbox(tmp_path)
    assert again.pending() == []
    again.redeem()
    assert again.pending() == [promised]
    again.redeem()
    assert again.pending() == [promised]


def test_an_agent_that_lives_withdraws_its_promise(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.promise(a_result())
    outbox.withdraw()
    outbox.redeem()
    assert outbox.pending() == []


def test_a_promise_does_not_replace_the_result_that_its_agent_came_to_keep(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.promise(a_result().model_copy(update={"outcome": Outcome.LOST, "reason": "killed"}))
    outbox.put(a_result())
    again = Outbox(tmp_path)
    again.redeem()
    assert again.pending() == [a_result()]
    again.acknowledge(a_result())
    again.redeem()
    assert again.pending() == []


def test_a_promise_is_withdrawn_for_good_also_over_a_power_cut(tmp_path, monkeypatch):
    synced = []
    outbox = Outbox(tmp_path)
    outbox.promise(a_result())
    monkeypatch.setattr(files.os, "fsync", lambda _: synced.append(list(tmp_path.iterdir())))
    outbox.withdraw()
    assert synced == [[]]
