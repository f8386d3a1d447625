"""How well a model predicts a text: which tokens count, in which windows, and the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# As many rows of the vocabulary's width are held in float64 at a time.
_ROWS = 256


class Window(NamedTuple):
    """Tokens `start` to `end` are fed at once; the last `scored` of them count."""

    start: int
    end: int
    scored: int


@dataclass(frozen=True)
class Evaluation:
    """The figures of one text.

    `log_likelihood` is the sum of the natural logarithms of the probabilities of all `tokens` of
    the text; `characters` and `size_bytes` (in UTF-8) are those of the text.
    """

    log_likelihood: float
    tokens: int
    characters: int
    size_bytes: int
    windows: int

    @property
    def nats_per_token(self) -> float:
        """The mean negative log-probability: the loss of training."""
        return -self.log_likelihood / self.tokens

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens would be as hard to predict."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_character(self) -> float:
        """Comparable between tokenizers, unlike figures per token."""
        return -self.log_likelihood / math.log(2) / self.characters

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers and scripts."""
        return -self.log_likelihood / math.log(2) / self.size_bytes


def windows(length: int, *, window: int, stride: int) -> Iterator[Window]:
    """Cut `length` tokens into windows such that every token but the first counts once.

    Windows start `stride` tokens apart and hold at most `window`. A token counts in the first
    window that holds it, so all but those of the first window see at least `window - stride`
    tokens before them.

    Raises:
        ValueError: a stride that is not below the window would leave tokens without a predecessor.
    """
    if not 1 <= stride < window:
        raise ValueError(
            f"stride is {stride} and window {window}; the stride must be at least 1 and below the "
            "window, so that every token has one before it"
        )
    counted = 1
    for start in range(0, length, stride):
        end = min(start + window, length)
        yield Window(start, end, end - counted)
        counted = end
        if end == length:
            return


def evaluate(
    text: str,
    ids: Sequence[int],
    logits: Callable[[NDArray[np.int64]], NDArray[Any]],
    cuts: Iterable[Window],
) -> Evaluation:
    """Score a text whose tokens are `ids`, the first of them standing before the text.

    `logits` gives `[1, T] int -> [1, T, V]`, the scores of what follows each token. The
    log-probabilities are computed and summed in float64 whatever the type of the scores, so that
    every framework gives the same figures.

    Raises:
        ValueError: there is nothing to score, or a score is NaN.
    """
    if len(ids) < 2:
        raise ValueError("the text holds no token to score; give one that is not empty")
    tokens = np.asarray(ids, np.int64)
    sums, counted, count = [], 0, 0
    for start, end, scored in cuts:
        scores = logits(tokens[None, start:end])[0]  # [T, V]
        rows = scores[end - start - scored - 1 : end - start - 1]  # [scored, V]
        sums.append(_log_probability(rows, tokens[end - scored : end]))
        counted, count = counted + scored, count + 1
    total = math.fsum(sums)
    if math.isnan(total):
        raise ValueError("the scores are NaN; do the weights hold NaN or inf?")
    return Evaluation(total, counted, len(text), len(text.encode()), count)


def _log_probability(scores: NDArray[Any], targets: NDArray[np.int64]) -> float:
    """The sum of the targets' log-probabilities: `[N, V]`, `[N]` -> number."""
    total = 0.0
    for first in range(0, len(targets), _ROWS):
        rows = scores[first : first + _ROWS].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(rows)), targets[first : first + _ROWS]]
        total += float((chosen - np.log(np.exp(rows).sum(axis=1))).sum())
    return total
