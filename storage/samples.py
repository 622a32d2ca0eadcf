"""Raw samples as bytes: how `LatencyReport.blocks` is kept beside a measurement.

zlib over compact JSON, because anything reads it, and because digits of similar durations
compress as well as packed integers do.
"""

from __future__ import annotations

import json
import zlib
from typing import Final

from device_agents.protocol import Block, LatencyReport
from storage.errors import StorageError

SAMPLES_VERSION: Final = 2
# Version 1 (2026-11-21): {"version", "blocks": [[subject, [ns, ...]], ...]}, in time order.
# Version 2 (2026-11-21): [subject, [ns, ...], sitting]; version 1 is read as one sitting.


def encode_blocks(blocks: tuple[Block, ...]) -> bytes:
    """The blocks as bytes."""
    document = {
        "version": SAMPLES_VERSION,
        "blocks": [[block.subject, block.samples_ns, block.sitting] for block in blocks],
    }
    return zlib.compress(json.dumps(document, separators=(",", ":")).encode())


def decode_blocks(encoded: bytes) -> tuple[Block, ...]:
    """The blocks that `encode_blocks` wrote.

    Raises:
        StorageError: the bytes are damaged or of a newer release.
    """
    try:
        document = json.loads(zlib.decompress(encoded))
        if document["version"] not in range(1, SAMPLES_VERSION + 1):
            raise StorageError(
                f"raw samples have format version {document['version']!r}; "
                f"this release reads versions up to {SAMPLES_VERSION}"
            )
        return tuple(
            Block(subject=subject, samples_ns=tuple(samples), sitting=next(iter(sitting), 0))
            for subject, samples, *sitting in document["blocks"]
        )
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"raw samples cannot be read: {error}") from error


def split_blocks(
    report: LatencyReport | None,
) -> tuple[LatencyReport | None, tuple[Block, ...]]:
    """The report without its raw samples, and the samples."""
    if report is None:
        return None, ()
    return report.model_copy(update={"blocks": ()}), report.blocks
