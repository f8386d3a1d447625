"""Zip archives whose entries are read where they lie in the file: PyTorch's and Keras's."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, BinaryIO

from opt_core.checkpoint import CheckpointDamaged, StoredFile

if TYPE_CHECKING:
    import zipfile

ZIP_START = b"PK\x03\x04"

_HEADER_BYTES = 30  # before the name
_STORED = 0  # the code of an entry's bytes as they are


def read_entries(file: StoredFile, handle: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The directory of an archive; CheckpointDamaged where it cannot be read."""
    import zipfile  # only here: it takes longer to import than a small model to load

    try:
        return {info.filename: info for info in zipfile.ZipFile(handle).infolist()}
    except (zipfile.BadZipFile, RuntimeError, ValueError, struct.error, EOFError) as fault:
        raise CheckpointDamaged(
            f"{file.path} is cut short or damaged: its zip directory cannot be read ({fault})"
        ) from fault


def entry_offset(file: StoredFile, handle: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin; CheckpointDamaged unless they lie there as they are."""
    if entry.compress_type != _STORED or entry.flag_bits & 1:
        raise CheckpointDamaged(
            f"{file.path}: entry {entry.filename!r} is compressed or encrypted, and PyTorch and "
            "Keras write plain entries: unpack the archive, and pack it again with `zip -0 -r`"
        )
    handle.seek(min(max(0, entry.header_offset), file.size))
    header = handle.read(_HEADER_BYTES)
    if entry.header_offset < 0 or len(header) != _HEADER_BYTES or header[:4] != ZIP_START:
        raise CheckpointDamaged(f"{file.path}: entry {entry.filename!r} has no header")
    offset: int = entry.header_offset + _HEADER_BYTES + sum(struct.unpack_from("<HH", header, 26))
    if offset + entry.file_size > file.size:
        raise CheckpointDamaged(
            f"{file.path}: entry {entry.filename!r} of {entry.file_size} bytes at byte {offset} "
            f"goes beyond the end of the file of {file.size} bytes"
        )
    return offset
