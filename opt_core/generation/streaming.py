"""Who hears of tokens while they are generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


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
    """
    if streamer is None:
        return lambda tokens: None, lambda: None
    if callable(streamer):
        return streamer, lambda: None
    streamer.put(on_host(prompt))
    return lambda tokens: streamer.put(on_host(tokens)), streamer.end
