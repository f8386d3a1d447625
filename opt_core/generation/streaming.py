"""Who hears of tokens while they are generated, and text as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from numbers import Integral
from queue import Queue
from typing import Any, Protocol

import numpy as np


class Streamer(Protocol):
    """What transformers' text streamers offer: `put` for the prompt and each step, `end` last."""

    def put(self, value: Any) -> None:
        """Take the prompt `[B, P]`, then the tokens `[B]` of each step."""

    def end(self) -> None:
        """Nothing follows."""


def receiver(
    streamer: Streamer | Callable[[Any], None] | None,
    prompt: Any,
    on_host: Callable[[Any], Any],
) -> tuple[Callable[[Any], None], Callable[[], None]]:
    """What takes the tokens of each step, and what is called after the last.

    A function gets the framework's own arrays; a `Streamer` what `on_host` makes of them, the
    prompt first.

    Raises:
        ValueError: it is neither.
    """
    if streamer is None:
        return lambda tokens: None, lambda: None
    if callable(streamer):
        return streamer, lambda: None
    if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(
            f"streamer is {type(streamer).__name__}; give a TextStreamer, another object with "
            "put and end, or a function of the tokens of each step"
        )
    streamer.put(on_host(prompt))
    return lambda tokens: streamer.put(on_host(tokens)), streamer.end


def check_chunk(chunk: object) -> None:
    """See that a stream has a number of tokens for each call of a program.

    Raises:
        ValueError: it is no whole number, or less than 1.
    """
    if not isinstance(chunk, Integral) or chunk < 1:
        raise ValueError(f"chunk is {chunk!r}; give a whole number of tokens, at least 1")


class TextStreamer:
    """Shows the text of one row as it is generated: give it to `generate` as `streamer`.

    Text comes as soon as its characters are complete, so the pieces, joined, are what the tokenizer
    decodes from all tokens at once. They go to `on_text`, or else to standard output, with a line
    break after the last. `skip_prompt` leaves out what was given. One streamer serves one
    generation after the other.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        skip_special_tokens: bool = True,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_prompt, self._skip_special_tokens = skip_prompt, skip_special_tokens
        self._on_text = _to_standard_output if on_text is None else on_text
        self._ends_line = on_text is None
        self._decoder: Any = None

    def put(self, value: Any) -> None:
        """Take the prompt `[1, P]`, then tokens `[n]` of this row.

        Raises:
            ValueError: there are several rows.
        """
        tokens = np.asarray(value)
        if tokens.ndim > 1 and len(tokens) > 1:
            raise ValueError(
                f"a text streamer shows one text, and this prompt has {len(tokens)} rows; generate "
                "one row at a time, or give a function as streamer, which gets the tokens of all"
            )
        # A prompt has two axes. What a call that failed has left behind is forgotten.
        is_prompt = tokens.ndim > 1 or self._decoder is None
        if is_prompt:
            self._decoder = _stream(self._tokenizer, self._skip_special_tokens)
        # A prompt that is not shown is decoded all the same: it may end within a character.
        text = "".join(self._decoder.step(token) for token in tokens.ravel().tolist())
        if text and not (is_prompt and self._skip_prompt):
            self._on_text(text)

    def end(self) -> None:
        """Show what an incomplete character leaves, and be ready for another generation."""
        rest = "" if self._decoder is None else self._decoder.finish()
        self._decoder = None
        if self._ends_line:
            rest += "\n"
        if rest:
            self._on_text(rest)


class TextIteratorStreamer(TextStreamer):
    """As `TextStreamer`, but an iterator over the pieces of text, to read in another thread.

    `next` waits for text; after `timeout` seconds without any it raises `queue.Empty` (None: it
    waits for ever, also for a generation that has failed).
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> None:
        self._pieces: Queue[str | None] = Queue()
        self._timeout = timeout
        super().__init__(tokenizer, skip_prompt, skip_special_tokens, self._pieces.put)

    def end(self) -> None:
        """As `TextStreamer.end`; the iterator ends then."""
        super().end()
        self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self._pieces.get(timeout=self._timeout)
        if piece is None:
            raise StopIteration
        return piece


def _to_standard_output(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _stream(tokenizer: Any, skip_special_tokens: bool) -> Any:
    """What turns tokens into text one by one: the tokenizer's own, or by its `decode`."""
    if hasattr(tokenizer, "decode_stream"):
        return tokenizer.decode_stream(skip_special_tokens=skip_special_tokens)
    return _Decoding(
        lambda ids: str(
            tokenizer.decode(
                ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )
    )


class _Decoding:
    """Text token by token from a function that decodes several.

    What a token adds may hang on the one before it, so both are decoded; all earlier ones are
    settled. Text that ends with U+FFFD waits, since the rest of a character may follow.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # so many of the ids have been shown

    def step(self, token: int) -> str:
        self._ids.append(token)
        added = self._added()
        if not added or added.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return added

    def finish(self) -> str:
        added = self._added()
        self._ids, self._shown = [], 0
        return added

    def _added(self) -> str:
        before = self._decode(self._ids[: self._shown])
        return self._decode(self._ids)[len(before) :]
