"""What a checkpoint is once opened: named tensors that know where their bytes lie."""

import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_FLOATS = [np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]
_MOST_AXES, _MOST_VALUES = 64, 1 << 59  # NumPy's limits, for values of up to eight bytes
_ROWS_TURNED = 64  # at once: all values of a cache line are used
_PIECE_BYTES = 128 * 1024  # as far as Linux reads ahead; fits the cache of every core


class CheckpointError(ValueError):
    """A checkpoint's files cannot be used as they are."""


class CheckpointDamaged(CheckpointError):
    """A file is truncated, contradicts itself, or is not what its name says."""


class CheckpointUnsafe(CheckpointError):
    """A file asks for something that no checkpoint may: code to run, a path outside its folder."""


class CheckpointNotFound(FileNotFoundError):
    """The checkpoint, or a file that it needs, is not there."""


class TensorSource(Protocol):
    """A tensor that may still lie on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type: one of NumPy's, or `ml_dtypes.bfloat16`."""
        ...

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis, in C order in memory of their own."""
        ...

    def map(self) -> Array:
        """The values as a writable array; where the file allows, a copy-on-write view of it."""
        ...


class _Mapping:
    """The one memory map of a file that a pass over its tensors shares."""

    def __init__(self) -> None:
        self._alive: weakref.ref[mmap.mmap] | None = None
        self._taken: set[object] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["_Mapping"], tuple[()]]:
        """A copy, also one in another process, maps the file itself."""
        return _Mapping, ()

    def take(self, file: "StoredFile", key: object) -> mmap.mmap:
        """A private map of the whole file in which `key` has not been handed out before.

        Writes to a map stay in it, so two models made from one open checkpoint must not meet in
        it. One map a tensor would do as well, but each holds a file descriptor, and a large model
        has more tensors than a process may have descriptors.
        """
        with self._lock:
            mapped = self._alive() if self._alive is not None else None
            if mapped is None or key in self._taken:
                with file.open() as handle:
                    mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
                self._alive, self._taken = weakref.ref(mapped), set()
            self._taken.add(key)
            return mapped


@dataclass(frozen=True)
class StoredFile:
    """A file as it was when it was opened; later reads refuse one that has changed since."""

    path: Path
    size: int
    modified_ns: int
    mapping: _Mapping = field(default_factory=_Mapping, repr=False, compare=False)

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        """The file at `path` as it is now."""
        status = os.stat(path)
        return cls(Path(path), status.st_size, status.st_mtime_ns)

    def open(self) -> FileIO:
        """The file, unbuffered; CheckpointDamaged if it is no longer the one first opened."""
        try:
            handle = FileIO(self.path)
        except FileNotFoundError:
            raise CheckpointNotFound(
                f"{self.path} was there when the checkpoint was opened and is gone now"
            ) from None
        try:
            self.check(handle)
        except BaseException:
            handle.close()
            raise
        return handle

    def check(self, handle: FileIO) -> None:
        """CheckpointDamaged unless size and time of change are those first seen."""
        status = os.fstat(handle.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns):
            raise CheckpointDamaged(
                f"{self.path} has changed since the checkpoint was opened "
                f"({self.size} bytes then, {status.st_size} now); open the checkpoint again"
            )


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie in a file, not the bytes.

    `strides` count elements; None is C order. Raises CheckpointDamaged when the bytes would lie
    beyond the end of the file, or when no array can have the shape.
    """

    file: StoredFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...] | None = None

    #: Read, looked at and written while the cache holds it: measured two to three times as fast as
    #: blocks of a megabyte and more, which go through the memory each time.
    block_bytes: ClassVar[int] = _PIECE_BYTES

    def __post_init__(self) -> None:
        # NumPy refuses lengths that it could not address, even if another length is 0.
        if len(self.shape) > _MOST_AXES or math.prod(n or 1 for n in self.shape) > _MOST_VALUES:
            raise CheckpointDamaged(
                f"{self.path} holds a tensor that no array can be: of {len(self.shape)} axes "
                f"and the shape {str(self.shape)[:200]}"
            )
        end = self.offset + self._extent(self.shape) * self.dtype.itemsize
        if self.offset < 0 or end > self.file.size:
            raise CheckpointDamaged(
                f"{self.path} is cut short: a tensor of shape {self.shape} and type {self.dtype} "
                f"lies at bytes {self.offset} to {end} of a file of {self.file.size}"
            )

    @property
    def path(self) -> Path:
        """The file that holds the tensor."""
        return self.file.path

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis, in C order in memory of their own.

        Reads little more of the file than the part needs, and nothing through a memory map.
        Raises CheckpointDamaged if the file has changed since it was opened.
        """
        shape, offset = self._window(part, axis)
        values = np.empty(shape, self.dtype)
        with self.file.open() as handle:
            if values.size:
                self._fill(handle, offset, values)
            self.file.check(handle)
        return values

    def blocks(self) -> Iterator[Array]:
        """Parts of the first axis, in order, each in C order; the file is opened once for all.

        Raises CheckpointDamaged if the file has changed since it was opened, at the latest after
        the last part.
        """
        if not self.shape:
            yield self.read()
            return
        rows, *others = self.shape
        row_bytes = math.prod(others) * self.dtype.itemsize
        step = max(1, self.block_bytes // max(1, row_bytes))
        with self.file.open() as handle:
            for start in range(0, rows, step):
                values = np.empty((min(step, rows - start), *others), self.dtype)
                if values.size:
                    _, offset = self._window(slice(start, start + len(values)), 0)
                    self._fill(handle, offset, values)
                yield values
            self.file.check(handle)

    def map(self) -> Array:
        """The values as a copy-on-write view of the file, valid as long as the array lives.

        Bytes that do not lie where their type may lie in memory are copied: libraries read such
        arrays with instructions that need not stand for it.
        """
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        if self.offset % self.dtype.alignment:
            return self.read()
        mapped = self.file.mapping.take(self.file, (self.offset, self.shape, self.strides))
        return self._view(mapped, self.offset, self.shape)

    def _element_strides(self) -> tuple[int, ...]:
        if self.strides is not None:
            return self.strides
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    def _extent(self, shape: tuple[int, ...]) -> int:
        """Elements from the first to the last one, both counted."""
        if math.prod(shape) == 0:
            return 0
        strides = self._element_strides()
        return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))

    def _view(self, buffer: Any, offset: int, shape: tuple[int, ...]) -> Array:
        strides = tuple(step * self.dtype.itemsize for step in self._element_strides())
        return np.ndarray(shape, self.dtype, buffer, offset, strides)

    def _window(self, part: slice | None, axis: int) -> tuple[tuple[int, ...], int]:
        """Shape and byte offset of `part` of `axis`."""
        if part is None:
            return self.shape, self.offset
        start, stop, step = part.indices(self.shape[axis])
        if step != 1:
            raise ValueError(f"a part of a tensor is contiguous: expected step 1, found {step}")
        shape = list(self.shape)
        shape[axis] = max(stop - start, 0)
        skipped = start * self._element_strides()[axis] * self.dtype.itemsize
        return tuple(shape), self.offset + skipped

    def _fill(self, handle: FileIO, offset: int, values: Array) -> None:
        """Reads the window of `values.shape` that starts at `offset`, halving it until it is cheap.

        Cheap is one run of bytes, or a stretch so short that the system reads it whole anyway.
        """
        extent = self._extent(values.shape)
        if extent == values.size and values.flags.c_contiguous and self._in_order(values.shape):
            _read_exactly(handle, offset, values, self.path)
        elif extent * self.dtype.itemsize <= _PIECE_BYTES:
            raw = np.empty(extent, self.dtype)
            _read_exactly(handle, offset, raw, self.path)
            values[...] = self._view(raw, 0, values.shape)
        else:
            strides = self._element_strides()
            spans = [(n - 1) * step for n, step in zip(values.shape, strides, strict=True)]
            axis = int(np.argmax(spans))
            half = values.shape[axis] // 2
            first, second = np.split(values, [half], axis)
            self._fill(handle, offset, first)
            self._fill(handle, offset + half * strides[axis] * self.dtype.itemsize, second)

    def _in_order(self, shape: tuple[int, ...]) -> bool:
        """Whether a window of `shape` lies in the file in C order, without gaps."""
        expected = 1
        for n, step in zip(reversed(shape), reversed(self._element_strides()), strict=True):
            if n != 1 and step != expected:
                return False
            expected *= n
        return True


def _read_exactly(handle: FileIO, offset: int, values: Array, path: Path) -> None:
    """Fills the C-ordered `values` from the bytes at `offset`."""
    room = values.reshape(-1).view(np.uint8).data
    handle.seek(offset)
    while room:
        count = handle.readinto(room)
        if not count:
            raise CheckpointDamaged(
                f"{path} ended {len(room)} bytes before the end of a tensor while it was read"
            )
        room = room[count:]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its tensors under canonical names, read only when asked for."""

    path: Path
    format: str
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorSource]
    original_names: Mapping[str, str]
    metadata: Mapping[str, str]
    #: What the files hold besides weights, such as an optimizer's state.
    left_out: tuple[str, ...] = ()


def turned(values: Array) -> Array:
    """The transpose of a matrix, copied.

    A few rows at a time stay in the cache until their columns are written: several times as fast as
    NumPy's own copy, which misses the cache at each value.
    """
    result = np.empty(values.shape[::-1], values.dtype)
    for i in range(0, len(values), _ROWS_TURNED):
        result[:, i : i + _ROWS_TURNED] = values[i : i + _ROWS_TURNED].T
    return result


def has_nan(array: Array) -> bool:
    """Whether any value is NaN; allocates nothing that grows with the array."""
    return _beyond(array, lambda largest, infinity: largest > infinity)


def is_finite(array: Array) -> bool:
    """Whether no value is NaN or infinite; allocates nothing that grows with the array."""
    return not _beyond(array, lambda largest, infinity: largest >= infinity)


def _beyond(array: Array, test: Callable[[int, int], bool]) -> bool:
    """Whether the largest bit pattern of either sign, beside that of infinity, passes the test.

    Floats of one sign, read as integers, are ordered by size, and NaN lies above infinity: the
    largest pattern tells, at the speed of the memory.
    """
    if array.dtype not in _FLOATS:
        return False
    signed, unsigned = (np.dtype(f"{kind}{array.dtype.itemsize}") for kind in "iu")
    positive, negative = np.array([np.inf, -np.inf], array.dtype).view(unsigned).tolist()
    step = max(1, _PIECE_BYTES // array.dtype.itemsize)
    flat = array.reshape(-1) if array.flags.c_contiguous else None
    pieces = [array] if flat is None else (flat[i : i + step] for i in range(0, flat.size, step))
    return any(
        piece.size > 0
        and (
            test(int(piece.view(signed).max()), positive)
            or test(int(piece.view(unsigned).max()), negative)
        )
        for piece in pieces
    )
