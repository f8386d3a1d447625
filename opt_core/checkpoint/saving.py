"""Saving a checkpoint: safetensors files that appear whole or not at all, written tensor by tensor.

At every moment a folder reads as the old checkpoint or as the new one. Readers prefer
`model.safetensors` to an index, so each kind of save has one step that decides between the two:

- one file: `model.safetensors` is renamed into place; an old index and its shards go afterwards;
- shards: they get names that no old file has, then the index is renamed into place;
- shards over one file: the index is there already, and removing `model.safetensors` decides.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from opt_core.checkpoint.reading import DTYPES
from opt_core.checkpoint.tensors import Array, CheckpointNotFound, TensorSource

SINGLE_FILE = "model.safetensors"
INDEX_ENDING = ".index.json"
INDEX_FILE = SINGLE_FILE + INDEX_ENDING

_SHARD_NAME = re.compile(r"model-([0-9a-f]{8}-)?\d{5}-of-\d{5}\.safetensors")
_PARTIAL_NAME = re.compile(r"\.saving-[0-9a-f]{8}-.*\.partial")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])(i?)b", re.IGNORECASE)
_BLOCK_BYTES = 32 * 1024 * 1024
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}

Source = TensorSource | Array
S = TypeVar("S", bound=Source)


def save(
    folder: str | Path,
    tensors: Mapping[str, Source],
    *,
    max_shard_size: int | str = "5GB",
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
    progress: bool = False,
) -> list[Path]:
    """Writes a checkpoint that replaces the one in `folder`, if any; the files of the new one.

    Tensors may be lazy, and may lie in the very files that are replaced. `extra_files`, such as
    config.json, are renamed into place one by one just before the step that decides. Files of
    other formats stay, but safetensors are what readers take first.

    Raises ValueError for a bad argument, OSError when the folder cannot take the files; then the
    old ones are untouched.
    """
    folder = Path(folder)
    limit = size_in_bytes(max_shard_size)
    _check_names(tensors, extra_files)
    staging = _Staging(folder)
    with _tidied(staging):
        staging.begin()
        shards = _named(folder, shards_of(tensors, limit), staging.token)
        count = _progress(sum(map(size_of, tensors.values())), progress)
        for name, content in shards.items():
            staging.write(name, safetensors_blocks(content, count))
        for name, data in extra_files.items():
            staging.write(name, [data])
        if SINGLE_FILE not in shards:
            staging.write(INDEX_FILE, [index_of(shards)])
        return staging.commit(list(shards), list(extra_files))


def write_file(path: str | Path, data: bytes) -> None:
    """Writes one file whole or not at all; raises OSError when the folder cannot take it."""
    path = Path(path)
    staging = _Staging(path.parent)
    with _tidied(staging):
        staging.write(path.name, [data])
        staging.place([path.name])


def size_in_bytes(size: int | str) -> int:
    """Bytes of a size such as 300000000, "300MB" or "1.5GiB"."""
    count = size
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        number, unit, binary = match.groups()
        base = 1024 if binary else 1000
        count = int(float(number) * base ** (1 + "kmgt".index(unit.lower())))
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            "max_shard_size is a positive number of bytes or a text such as '5GB' or '300MB', "
            f"found {size!r}"
        )
    return count


def size_of(tensor: Source) -> int:
    """Bytes that a tensor takes in a file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


class _Staging:
    """Files under temporary names in a folder, until all of them are whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = os.urandom(4).hex()
        self._placed: list[Path] = []
        self._deciding: Path | None = None

    @property
    def decided(self) -> bool:
        """Whether the folder reads as the new checkpoint: the deciding file has gone."""
        return self._deciding is not None and not os.path.lexists(self._deciding)

    def begin(self) -> None:
        """Makes the folder, and removes what a killed save has left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.iterdir():
            if _PARTIAL_NAME.fullmatch(entry.name):
                entry.unlink()

    def write(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        with open(self._partial(name), "xb") as handle:
            for block in blocks:
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())

    def commit(self, weights: list[str], extras: list[str]) -> list[Path]:
        """Renames everything into place, in an order that never leaves a mixture to readers."""
        single = self.folder / SINGLE_FILE
        if SINGLE_FILE in weights:
            self._deciding, last = self._partial(SINGLE_FILE), [SINGLE_FILE]
            stale = [self.folder / INDEX_FILE]
        elif os.path.lexists(single):
            self._place_new([*weights, INDEX_FILE])
            self._deciding, last, stale = single, [], [single]
        else:
            self._place_new(weights)
            self._deciding, last, stale = self._partial(INDEX_FILE), [INDEX_FILE], []
        self.place([*extras, *last])
        stale += [
            entry
            for entry in self.folder.iterdir()
            if _SHARD_NAME.fullmatch(entry.name) and entry.name not in weights
        ]
        for path in stale:
            path.unlink(missing_ok=True)
        index = [] if SINGLE_FILE in weights else [INDEX_FILE]
        return [self.folder / name for name in [*weights, *index, *extras]]

    def discard(self) -> None:
        """Removes what the folder would not read: all of it, unless the new checkpoint is in."""
        if not self.decided:
            for path in self._placed:
                path.unlink(missing_ok=True)
        if self.folder.is_dir():
            for entry in self.folder.glob(f".saving-{self.token}-*.partial"):
                entry.unlink(missing_ok=True)

    def _place_new(self, names: list[str]) -> None:
        """Places files that no reader looks at yet, and that are removed if the save fails."""
        self._placed += [self.folder / name for name in names]
        self.place(names)

    def place(self, names: list[str]) -> None:
        """Renames complete files into place."""
        try:
            for name in names:
                os.replace(self._partial(name), self.folder / name)
        except FileNotFoundError:
            self._deciding = None  # gone by another hand: two saves into one folder at once
            raise
        _sync(self.folder)

    def _partial(self, name: str) -> Path:
        return self.folder / f".saving-{self.token}-{name}.partial"


@contextmanager
def _tidied(staging: _Staging) -> Iterator[None]:
    """Leaves no file of a save that fails, and says of an OSError what it left."""
    try:
        yield
    except CheckpointNotFound:
        raise
    except OSError as fault:
        done = (
            "the new checkpoint is complete, but old files could not be removed"
            if staging.decided
            else "the files that were there are whole"
        )
        message = f"saving into {staging.folder} failed ({fault}); {done}"
        raise OSError(fault.errno, message) from fault
    finally:
        staging.discard()


def _sync(folder: Path) -> None:
    """Makes renames outlast a loss of power, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_names(tensors: Mapping[str, Source], extra_files: Mapping[str, bytes]) -> None:
    if not tensors:
        raise ValueError("a checkpoint holds at least one tensor, found none to save")
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise ValueError("'__metadata__' is no name for a tensor: safetensors keeps it")
        if tensor.dtype not in _CODES:
            raise ValueError(
                f"tensor {name!r} has type {tensor.dtype}, expected one of "
                f"{', '.join(map(str, _CODES))}"
            )
    for name in extra_files:
        taken = name in (SINGLE_FILE, INDEX_FILE) or _SHARD_NAME.fullmatch(name)
        if taken or name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise ValueError(f"extra file {name!r}: expected a plain name that no weights have")


def shards_of(tensors: Mapping[str, S], limit: int) -> list[dict[str, S]]:
    """Shards of at most `limit` bytes, in the given order; a larger tensor has one of its own."""
    shards: list[dict[str, S]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or size_of(tensor) > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= size_of(tensor)
    return shards


def _named(
    folder: Path, shards: list[dict[str, Source]], token: str
) -> dict[str, dict[str, Source]]:
    """The shards by file name; a name that an old file has would change what readers see."""
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}

    def names(unique: str) -> list[str]:
        count = len(shards)
        return [f"model-{unique}{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    taken = any(os.path.lexists(folder / name) for name in names(""))
    return dict(zip(names(f"{token}-" if taken else ""), shards, strict=True))


def index_of(shards: Mapping[str, Mapping[str, Source]]) -> bytes:
    """The index of these shards, as Hugging Face writes it."""
    shard_of = {name: shard for shard, content in shards.items() for name in content}
    total = sum(size_of(tensor) for content in shards.values() for tensor in content.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def safetensors_blocks(
    tensors: Mapping[str, Source], count: Callable[[int], object]
) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece; laid out as the library does, byte for byte."""
    ordered = sorted(tensors.items(), key=lambda item: (-_RANKS[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + size_of(tensor)
        code, shape = _CODES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        for block in blocks(tensor):
            yield block
            count(len(block))


@runtime_checkable
class InBlocks(Protocol):
    """A source that knows how to hand out its values piece by piece."""

    def blocks(self) -> Iterator[Array]:
        """Parts of the first axis, in order, each in C order in memory of its own."""
        ...


def blocks(tensor: Source) -> Iterator[memoryview]:
    """The bytes of a tensor in C order, a bounded number at a time."""
    return (values.reshape(-1).view(np.uint8).data for values in arrays(tensor))


def arrays(tensor: Source) -> Iterator[Array]:
    """Parts of the first axis, in order, each in C order and of a bounded number of bytes."""
    if isinstance(tensor, InBlocks):
        yield from tensor.blocks()
    elif isinstance(tensor, np.ndarray | np.generic):
        for part in parts(tensor):
            yield np.ascontiguousarray(tensor[part] if tensor.shape else tensor)
    else:
        for part in parts(tensor):
            yield np.ascontiguousarray(read_part(tensor, part))


def parts(*tensors: Source) -> Iterator[slice]:
    """Parts of the first axis, to read each of these tensors of one shape in blocks."""
    rows = tensors[0].shape[0] if tensors[0].shape else 1
    width = max(map(size_of, tensors)) // max(1, rows)
    step = max(1, max(map(block_bytes, tensors)) // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def read_part(tensor: TensorSource, part: slice) -> Array:
    """A part of the first axis; of a tensor without axes all there is."""
    return tensor.read(part) if tensor.shape else tensor.read()


def block_bytes(tensor: Source) -> int:
    """How many bytes to read at once: what a source asks for, else what memory has room for."""
    return int(getattr(tensor, "block_bytes", _BLOCK_BYTES))


def _progress(total: int, shown: bool) -> Callable[[int], object]:
    """A function to call with every number of bytes written."""
    if not shown:
        return lambda count: None
    from tqdm import tqdm  # only here: it takes longer to import than a small model to load

    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Saving")

    def count(size: int) -> None:
        bar.update(size)
        if bar.n >= total:
            bar.close()

    return count
