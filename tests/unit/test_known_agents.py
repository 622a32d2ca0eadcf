"""An agent's key is looked up once, until anything about agents or devices changes."""

import asyncio
from datetime import UTC, datetime

import pytest

from autotune.service.broadcast import Broadcast
from autotune.service.known_agents import KnownAgents
from storage.errors import InvalidToken
from storage.records import AgentRecord, DeviceStanding

START = datetime(2026, 11, 21, tzinfo=UTC)


class Keys:
    """A repository that knows which agent's current key a hash is, and counts the questions."""

    may_be_shared = False

    def __init__(self):
        self.current = {"k1": "k1"}
        self.asked = 0

    def find_agent(self, key_hash):
        self.asked += 1
        if key_hash not in self.current:
            raise InvalidToken("unknown")
        return AgentRecord(
            id="a-1",
            device_id="d-1",
            key_hash=self.current[key_hash],
            enrolled_at=START,
            device=DeviceStanding(name="pi", pool=None, fingerprint="f", drained_because=None),
        )


@pytest.fixture
def keys():
    return Keys()


def find(known, *hashes):
    async def all_of_them():
        return [(await known.find(key_hash)).id for key_hash in hashes]

    return asyncio.run(all_of_them())


def test_a_key_is_looked_up_once(keys):
    assert find(KnownAgents(keys, Broadcast()), "k1", "k1", "k1") == ["a-1"] * 3
    assert keys.asked == 1


def test_a_revoked_key_is_worth_nothing_from_that_moment(keys):
    broadcast = Broadcast()
    known = KnownAgents(keys, broadcast)
    find(known, "k1")
    del keys.current["k1"]
    broadcast.publish("devices")
    with pytest.raises(InvalidToken):
        find(known, "k1")


def test_news_that_comes_during_the_look_is_not_missed(keys):
    broadcast = Broadcast()
    known = KnownAgents(keys, broadcast)
    find_agent = keys.find_agent

    def revoked_meanwhile(key_hash):
        found = find_agent(key_hash)
        del keys.current[key_hash]
        broadcast.publish("devices")
        return found

    keys.find_agent = revoked_meanwhile
    find(known, "k1")
    keys.find_agent = find_agent
    with pytest.raises(InvalidToken):
        find(known, "k1")


@pytest.mark.parametrize("case", ["a key that was replaced", "a database that others write to"])
def test_nothing_is_remembered_that_may_end_without_news(keys, case):
    if case == "a key that was replaced":
        keys.current["k1"] = "k2"
    keys.may_be_shared = case == "a database that others write to"
    find(KnownAgents(keys, Broadcast()), "k1", "k1")
    assert keys.asked == 2
