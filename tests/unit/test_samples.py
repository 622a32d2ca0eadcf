"""Raw samples as bytes, and what an earlier release wrote."""

import json
import zlib

import pytest

from device_agents.protocol import Block
from storage.errors import StorageError
from storage.samples import decode_blocks, encode_blocks


def encoded(document):
    return zlib.compress(json.dumps(document).encode())


def test_blocks_come_back_as_they_were():
    blocks = (
        Block(subject="candidate", samples_ns=(1, 2), sitting=0),
        Block(subject="reference", samples_ns=(3,), sitting=7),
    )
    assert decode_blocks(encode_blocks(blocks)) == blocks


def test_samples_of_the_first_version_are_one_sitting():
    old = encoded({"version": 1, "blocks": [["candidate", [1, 2]], ["reference", [3]]]})
    assert decode_blocks(old) == (
        Block(subject="candidate", samples_ns=(1, 2)),
        Block(subject="reference", samples_ns=(3,)),
    )


@pytest.mark.parametrize("document", [{"version": 3, "blocks": []}, {"version": 0, "blocks": []}])
def test_samples_of_another_version_are_refused(document):
    with pytest.raises(StorageError, match="version"):
        decode_blocks(encoded(document))
