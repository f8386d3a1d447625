"""A reader of the pickles that state dicts are made of; it builds plain values and calls nothing.

Python's own unpickler runs what a file names and takes memory by sizes that a file claims. This
one knows the instructions of a state dict, gives names only the meanings it was handed, and stops
after a bounded number of steps.
"""

import io
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from conversion.torch_file.foreign import Foreign, ForeignClass
from opt_core.checkpoint import CheckpointDamaged, CheckpointError, CheckpointUnsafe

_MOST_STEPS = 1_000_000  # a tensor takes about 60
_LONGEST_TEXT = 1 << 20  # bytes; a tensor's name has a few dozen

# Instructions that build objects of classes, or read from outside the pickle.
_UNSAFE = {b"i": "INST", b"o": "OBJ", b"P": "PERSID", b"\x92": "NEWOBJ_EX"}
_UNSAFE |= {b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"\x97": "NEXT_BUFFER"}


class Maker:
    """What a name in a pickle stands for when the pickle calls it: a function of ours."""

    def __init__(self, make: Callable[..., object]) -> None:
        """`make` gets the arguments that the file gives and must check them itself."""
        self.make = make


class Pickles:
    """The pickles that follow one another in a file, each read with `load`."""

    def __init__(self, path: Path, handle: BinaryIO, size: int) -> None:
        """Reads at most `size` bytes of `handle`, from where it stands; `path` is for errors."""
        self.path = path
        self._handle = handle
        self._left = size

    def load(
        self,
        names: Mapping[str, object],
        persistent: Callable[[object], object] | None = None,
    ) -> object:
        """The next value; `names` says what each global stands for, `persistent` each outer id.

        Raises CheckpointUnsafe for a name that is not in `names`, CheckpointDamaged for the rest.
        """
        machine = _Machine(self, names, persistent)
        try:
            return machine.run()
        except CheckpointError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as fault:
            raise CheckpointDamaged(f"{self.path} holds no valid pickle: {fault}") from fault

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > self._left:
            raise CheckpointDamaged(
                f"{self.path} is cut short: its pickle goes on for {size} bytes, "
                f"{self._left} are left"
            )
        data = self._handle.read(size)
        if len(data) != size:
            raise CheckpointDamaged(f"{self.path} was cut short while it was read")
        self._left -= size
        return data

    def skip(self, size: int) -> int:
        """Goes over the next `size` bytes without reading them; where in the file they begin."""
        if size > self._left:
            raise CheckpointDamaged(
                f"{self.path} is cut short: expected {size} more bytes, {self._left} are left"
            )
        self._left -= size
        return self._handle.seek(size, io.SEEK_CUR) - size

    def line(self) -> str:
        """The text up to the next end of line."""
        data = self._handle.readline(min(self._left, _LONGEST_TEXT))
        self._left -= len(data)
        if not data.endswith(b"\n"):
            raise CheckpointDamaged(f"{self.path} is cut short: its pickle ends within a name")
        return data[:-1].decode()


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(
        self,
        source: Pickles,
        names: Mapping[str, object],
        persistent: Callable[[object], object] | None,
    ) -> None:
        self.source = source
        self.names = names
        self.persistent = persistent
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        for _ in range(_MOST_STEPS):
            code = self.source.take(1)
            if code == b".":
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                self.refuse(code)
            else:
                step(self)
        raise ValueError(f"it takes more than {_MOST_STEPS} steps, which no state dict needs")

    def refuse(self, code: bytes) -> None:
        if code in _UNSAFE:
            self.refuse_instruction(_UNSAFE[code])
        raise ValueError(f"{code!r} is no instruction of a state dict")

    def refuse_instruction(self, name: str) -> None:
        raise CheckpointUnsafe(
            f"{self.source.path} uses the pickle instruction {name}, which can run code and which "
            "no state dict needs; nothing was run"
        )

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.source.take(struct.calcsize(form)))
        return int(value)

    def push_text(self, size: int) -> None:
        self.stack.append(self.raw(size).decode())

    def push_bytes(self, size: int) -> None:
        self.stack.append(self.raw(size))

    def raw(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_TEXT:
            raise ValueError(f"it holds a text of {size} bytes, which no state dict needs")
        return self.source.take(size)

    def push_long(self) -> None:
        data = self.source.take(self.number("<B"))
        self.stack.append(int.from_bytes(data, "little", signed=True))

    def push_float(self) -> None:
        self.stack.extend(struct.unpack(">d", self.source.take(8)))

    def since_mark(self) -> list[object]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def push_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise ValueError("a tuple takes more values than there are")
        items = tuple(self.stack[-size:])
        self.stack[-size:] = [items]

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        room = target.items if isinstance(target, Foreign) else target
        if not isinstance(room, list):
            raise ValueError(f"it appends to a {type(target).__name__}")
        room.extend(items)

    def update(self, items: list[object]) -> None:
        target = self.stack[-1]
        room = target.entries if isinstance(target, Foreign) else target
        if not isinstance(room, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Tuples nested in one another would take for ever to hash.
            if not isinstance(key, str | int):
                raise ValueError(f"a key is a {type(key).__name__}, expected text or a number")
            room[key] = value

    def pop_two(self) -> list[object]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    def push_global(self, name: str) -> None:
        if name not in self.names:
            raise CheckpointUnsafe(
                f"{self.source.path} asks for {name[:200]!r}, which no state dict needs and which "
                "could run code; nothing was run. If you trust the file, open it with the library "
                "that wrote it and save its tensors alone, best as safetensors"
            )
        self.stack.append(self.names[name])

    def push_global_from_stack(self) -> None:
        module, name = self.pop_two()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global's name is no text")
        self.push_global(f"{module}.{name}")

    def reduce(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if isinstance(maker, ForeignClass) and isinstance(arguments, tuple):
            self.stack.append(Foreign(maker.name, arguments))
            return
        if not isinstance(maker, Maker) or not isinstance(arguments, tuple):
            raise CheckpointUnsafe(
                f"{self.source.path} calls a {type(maker).__name__}, which no state dict needs; "
                "nothing was run"
            )
        self.stack.append(maker.make(*arguments))

    def new_object(self) -> None:
        """An object of a class: only a stand-in is made, of the classes that have one."""
        if len(self.stack) < 2 or not isinstance(self.stack[-2], ForeignClass):
            self.refuse_instruction("NEWOBJ")
        self.reduce()

    def build(self) -> None:
        """Attributes, as `_metadata` of a state dict: read past, but kept by a stand-in."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Foreign):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):
            raise ValueError(f"it sets attributes of a {type(self.stack[-1]).__name__}")

    def push_persistent(self) -> None:
        if self.persistent is None:
            raise ValueError("it refers to a storage where none may be")
        self.stack.append(self.persistent(self.stack.pop()))

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: _check_protocol(m.number("<B")),
    b"\x95": lambda m: _ignore(m.number("<Q")),  # a frame's length: a hint for buffering
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"0": lambda m: _ignore(m.stack.pop()),
    b"1": lambda m: _ignore(m.since_mark()),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"J": lambda m: m.stack.append(m.number("<i")),
    b"K": lambda m: m.stack.append(m.number("<B")),
    b"M": lambda m: m.stack.append(m.number("<H")),
    b"\x8a": _Machine.push_long,
    b"G": _Machine.push_float,
    b"X": lambda m: m.push_text(m.number("<I")),
    b"\x8c": lambda m: m.push_text(m.number("<B")),
    b"\x8d": lambda m: m.push_text(m.number("<Q")),
    b"U": lambda m: m.push_text(m.number("<B")),  # Python 2's str, here always ASCII
    b"T": lambda m: m.push_text(m.number("<i")),
    b"C": lambda m: m.push_bytes(m.number("<B")),
    b"B": lambda m: m.push_bytes(m.number("<I")),
    b"]": lambda m: m.stack.append([]),
    b"}": lambda m: m.stack.append({}),
    b")": lambda m: m.stack.append(()),
    b"t": lambda m: m.stack.append(tuple(m.since_mark())),
    b"\x85": lambda m: m.push_tuple(1),
    b"\x86": lambda m: m.push_tuple(2),
    b"\x87": lambda m: m.push_tuple(3),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.since_mark()),
    b"s": lambda m: m.update(m.pop_two()),
    b"u": lambda m: m.update(m.since_mark()),
    b"c": lambda m: m.push_global(f"{m.source.line()}.{m.source.line()}"),
    b"\x93": _Machine.push_global_from_stack,
    b"R": _Machine.reduce,
    b"\x81": _Machine.new_object,
    b"b": _Machine.build,
    b"Q": _Machine.push_persistent,
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.stack.append(m.memo[m.number("<B")]),
    b"j": lambda m: m.stack.append(m.memo[m.number("<I")]),
}


def _ignore(_: object) -> None:
    """For what is read past."""


def _check_protocol(version: int) -> None:
    if not 2 <= version <= 5:
        raise ValueError(f"pickle protocol {version}, expected 2 to 5")
