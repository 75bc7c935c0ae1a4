"""Acknowledgements: how a process that leaves writing to another one learns how far that has come.

A file in the process's directory, written over by whoever writes its operations: one line as in a segment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

import orjson

from astrocyte_otel_audit.pipeline.directory import ACKNOWLEDGED
from astrocyte_otel_audit.pipeline.segment import ACKNOWLEDGEMENT, frame, frames, padded

_BYTES: Final = 128


class Acknowledged(NamedTuple):
    """How far the operations of a process are settled."""

    #: The oldest that isn't: the number of its segment, and its offset there.
    segment: int
    offset: int
    #: How many are in the table, and how many were set aside or can't be read.
    stored: int
    refused: int


def write_acknowledged(directory: Path, done: Acknowledged) -> None:
    """Write over what the file says.

    Raises:
        OSError: it can't be written.
    """
    descriptor = os.open(directory / ACKNOWLEDGED, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, padded(frame(ACKNOWLEDGEMENT, orjson.dumps([*done])), _BYTES) or b"", 0)
    finally:
        os.close(descriptor)


def read_acknowledged(directory: Path) -> Acknowledged | None:
    """Return what the file says; None where it says nothing, or is being written at this very moment."""
    try:
        line = next(frames((directory / ACKNOWLEDGED).read_bytes()), None)
        return Acknowledged(*orjson.loads(line.content)) if line is not None and line.kind == ACKNOWLEDGEMENT else None
    except (OSError, ValueError, TypeError):
        return None
