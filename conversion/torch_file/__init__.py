"""PyTorch's `.bin` and `.pt` files without PyTorch: both layouts are read, nothing in them is run.

A file is a zip archive (PyTorch 1.6 and later) with a pickle and one entry a storage, or the older
layout: a few pickles one after another, then the storages.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from conversion.torch_file.foreign import Foreign, ForeignClass, entries_of
from conversion.torch_file.pickles import Pickles
from conversion.torch_file.values import NAMES, Storage, Storages, View
from conversion.torch_file.writing import write_torch_file
from conversion.zip_file import ZIP_START, entry_offset, read_entries
from opt_core.checkpoint import CheckpointDamaged, CheckpointNotFound, StoredFile, StoredTensor

if TYPE_CHECKING:
    import zipfile

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

__all__ = [
    "LEGACY_START",
    "ZIP_START",
    "entries_of",
    "read_object",
    "read_torch_file",
    "tensors_of",
    "write_torch_file",
]


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict that `torch.save` wrote, as places in the file.

    Raises CheckpointUnsafe for anything but tensors and what holds them, CheckpointDamaged for a
    file that is cut short or holds no state dict, CheckpointNotFound for none.
    """
    return tensors_of(*read_object(Path(path)))


def tensors_of(file: StoredFile, content: object) -> dict[str, StoredTensor]:
    """The tensors of a state dict that `read_object` found in a file."""
    if not isinstance(content, dict):
        raise CheckpointDamaged(
            f"{file.path} holds {_described(content)}, expected a state dict of tensors"
        )
    return {_name(file, key): _tensor(file, key, value) for key, value in content.items()}


def read_object(path: Path) -> tuple[StoredFile, object]:
    """Whatever a file of PyTorch's holds: dicts, lists and plain values, tensors as `View`."""
    try:
        file = StoredFile.of(path)
        with file.open() as raw:
            handle = io.BufferedReader(raw)
            start = handle.read(len(ZIP_START))
            handle.seek(0)
            read = _read_zip if start == ZIP_START else _read_legacy
            content = read(file, handle)
            file.check(raw)
    except FileNotFoundError:
        raise CheckpointNotFound(f"there is no file {path}") from None
    return file, content


def _name(file: StoredFile, key: object) -> str:
    if not isinstance(key, str):
        raise CheckpointDamaged(
            f"{file.path}: an entry is called {key!r}, expected the name of a tensor"
        )
    return key


def _tensor(file: StoredFile, key: str, value: object) -> StoredTensor:
    if isinstance(value, View):
        return value.stored(file, key)
    raise CheckpointDamaged(
        f"{file.path}: entry {key!r} is no tensor but {_described(value)}; expected a state dict, "
        "as torch.save(model.state_dict(), path) writes it"
    )


def _described(value: object) -> str:
    if isinstance(value, Foreign | ForeignClass):
        return f"an object of {value.name}"
    inside = f" of {len(value)} entries" if isinstance(value, dict) else ""
    return f"a {type(value).__name__}{inside}"


def _read_zip(file: StoredFile, handle: BinaryIO) -> object:
    """The pickle of a zip archive; its storages are entries of their own."""
    entries = read_entries(file, handle)
    folder = _archive_folder(file, entries)
    _check_byte_order(file, handle, entries.get(f"{folder}/byteorder"))
    pickled = entries[f"{folder}/data.pkl"]
    handle.seek(entry_offset(file, handle, pickled))
    storages = Storages()
    content = Pickles(file.path, handle, pickled.file_size).load(NAMES, storages.refer)
    for storage in storages.by_key.values():
        entry = entries.get(f"{folder}/data/{storage.key}")
        if entry is None or entry.file_size != storage.size:
            found = "is not there" if entry is None else f"holds {entry.file_size} bytes"
            raise CheckpointDamaged(
                f"{file.path}: storage {storage.key!r}, expected {storage.size} bytes, {found}"
            )
        storage.offset = entry_offset(file, handle, entry)
    return content


def _archive_folder(file: StoredFile, entries: Mapping[str, zipfile.ZipInfo]) -> str:
    """The one folder that everything in the archive lies in; its name differs from file to file."""
    for name in entries:
        folder, _, rest = name.partition("/")
        if rest == "data.pkl":
            return folder
    raise CheckpointDamaged(
        f"{file.path} is a zip archive but no checkpoint of PyTorch's: it has no entry data.pkl"
    )


def _check_byte_order(file: StoredFile, handle: BinaryIO, entry: zipfile.ZipInfo | None) -> None:
    if entry is None:
        return
    handle.seek(entry_offset(file, handle, entry))
    order = handle.read(min(entry.file_size, 16))
    if order != b"little":
        raise CheckpointDamaged(f"{file.path} has byte order {order!r}, expected b'little'")


def _read_legacy(file: StoredFile, handle: BinaryIO) -> object:
    """The layout before PyTorch 1.6: magic, version, machine, content, keys; then the storages."""
    pickles = Pickles(file.path, handle, file.size)
    if not _begins_as_legacy(pickles):
        raise CheckpointDamaged(
            f"{file.path} is empty, damaged or no file of PyTorch's: it begins neither like a zip "
            "archive nor like a checkpoint of PyTorch before 1.6"
        )
    machine = pickles.load({})
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointDamaged(f"{file.path} was not written by a little-endian machine")
    storages = Storages()
    content = pickles.load(NAMES, storages.refer)
    keys = pickles.load({})
    listed = {key for key in keys if isinstance(key, str)} if isinstance(keys, list) else set()
    if not isinstance(keys, list) or listed != storages.by_key.keys() or len(keys) != len(listed):
        raise CheckpointDamaged(f"{file.path}: the list of storages is not that of the tensors")
    for storage in map(storages.by_key.__getitem__, keys):
        storage.offset = _legacy_storage(file, pickles, storage)
    return content


def _begins_as_legacy(pickles: Pickles) -> bool:
    try:
        return pickles.load({}) == _LEGACY_MAGIC and pickles.load({}) == _LEGACY_VERSION
    except CheckpointDamaged:
        return False


def _legacy_storage(file: StoredFile, pickles: Pickles, storage: Storage) -> int:
    """Walks over one storage, its number of elements before it; the offset of its bytes."""
    count = int.from_bytes(pickles.take(8), "little", signed=True)
    if count * storage.dtype.itemsize != storage.size:
        raise CheckpointDamaged(
            f"{file.path}: storage {storage.key!r}, expected {storage.size} bytes, "
            f"holds {count * storage.dtype.itemsize}"
        )
    return pickles.skip(storage.size)
