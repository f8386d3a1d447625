"""Stop strings as a table over tokens, so that compiled loops can look for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from opt_core.tokenizer.decoding import bytes_of

#: Tables have a multiple of this many states, so that compiled programs are reused.
_STATES = 16
#: Of each tokenizer so many tables are kept: a table for 50,000 tokens takes 3 MB or more.
_KEPT = 8


class Spells(Protocol):
    """What is read of a byte-level tokenizer: how each of its ids is written."""

    def __len__(self) -> int:
        """The number of ids."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The tokens of a list of ids."""


class StopTable:
    """How far a text has come into a stop string, token by token.

    A state is the longest beginning of a stop string with which the bytes of the text end; state 0
    is none, and the last state is that a stop string is complete, wherever in a token it ends.
    """

    def __init__(self, machine: _Machine, spelled: Sequence[bytes]) -> None:
        #: int32 [n, V]: the state after a token; the last row stays as it is.
        self.after: npt.NDArray[np.int32] = _after(machine, spelled)
        # Of a prompt no string is complete: the machine goes on with what it begins anew.
        self._machine, self._spelled = machine, spelled

    @classmethod
    def of(cls, strings: Sequence[str], tokenizer: Spells, vocab_size: int) -> StopTable:
        """The table of some stop strings for a byte-level tokenizer; the newest ones are kept."""
        key = (tuple(strings), len(tokenizer), vocab_size)
        made = _MADE.setdefault(tokenizer, {})
        table = made.pop(key, None)
        if table is None:
            machine = _Machine.of([string.encode() for string in strings])
            spelled = [bytes_of(t or "") for t in _spelling(tokenizer, vocab_size)]
            table = cls(machine, spelled)
        made[key] = table
        for oldest in list(made)[:-_KEPT]:
            made.pop(oldest, None)  # another thread may have been quicker
        return table

    def start(self, tokens: Iterable[int]) -> int:
        """The state after a prompt. A string that is complete within it ends nothing."""
        state = 0
        for token in tokens:
            for byte in self._spelled[token]:
                state = int(self._machine.after[state, byte])
        return state


class _Machine(NamedTuple):
    """The states over bytes (Aho and Corasick, CACM 1975)."""

    #: int32 [m, 256]: the state after a byte.
    after: npt.NDArray[np.int32]
    #: bool [m, 256]: whether the byte completes a string.
    completes: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> _Machine:
        begun = sorted({s[:n] for s in strings for n in range(len(s))}, key=lambda b: (len(b), b))
        place = {beginning: state for state, beginning in enumerate(begun)}
        after = np.zeros((len(begun), 256), np.int32)
        completes = np.zeros((len(begun), 256), np.bool_)
        for state, beginning in enumerate(begun):
            if state:
                # What the text ends with, but for its first byte, is a shorter state: as it goes on
                # so does this one, unless a string goes on from here.
                shorter = place[next(b for b in _endings(beginning) if b in place)]
                after[state], completes[state] = after[shorter], completes[shorter]
            for byte in {
                s[len(beginning)] for s in strings if s.startswith(beginning) and s != beginning
            }:
                longer = beginning + bytes([byte])
                completes[state, byte] |= longer in strings
                after[state, byte] = place[
                    next(b for b in (longer, *_endings(longer)) if b in place)
                ]
        return cls(after, completes)


#: A tokenizer's tables, by its strings and sizes, the one used last behind the others.
_MADE: WeakKeyDictionary[Any, dict[Any, StopTable]] = WeakKeyDictionary()


def _endings(text: bytes) -> Iterator[bytes]:
    """The proper endings of a text, longest first, the empty one last."""
    return (text[start:] for start in range(1, len(text) + 1))


def _spelling(tokenizer: Spells, vocab_size: int) -> list[str | None]:
    known = min(len(tokenizer), vocab_size)
    tokens: list[str | None] = list(tokenizer.convert_ids_to_tokens(list(range(known))))
    return tokens + [None] * (vocab_size - known)


def _after(machine: _Machine, spelled: Sequence[bytes]) -> npt.NDArray[np.int32]:
    """The table over tokens: all states and all tokens of one length at a time, byte by byte."""
    count = -(-(len(machine.after) + 1) // _STATES) * _STATES
    table = np.full((count, len(spelled)), count - 1, np.int32)
    for length in sorted({len(text) for text in spelled}):
        ids = [i for i, text in enumerate(spelled) if len(text) == length]
        letters = np.array([list(spelled[i]) for i in ids], np.intp).reshape(len(ids), length)
        states = np.arange(len(machine.after), dtype=np.int32)
        state = np.repeat(states[:, None], len(ids), axis=1)
        complete = np.zeros(state.shape, np.bool_)
        for byte in letters.T:
            complete |= machine.completes[state, byte]
            state = machine.after[state, byte]
        table[: len(machine.after), ids] = np.where(complete, count - 1, state)
    return table
