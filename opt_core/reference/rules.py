"""The rules that change a step's scores before a token is chosen, and the choice, in float64.

A rule takes scores [B, V] and gives scores [B, V]; what it takes out of the choice becomes -inf. At
least `keep` tokens stay (1 unless a strategy needs more). Ties go to the lowest id, except that
`top_k` keeps every token that ties with the last one kept, as transformers does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opt_core.generation import GenerationConfig
from opt_core.reference.inputs import Floats, Ints, Mask

#: The rules that take tokens out of the choice by comparing scores.
_CUTS = ("top_k", "top_p", "min_p")


def repetition_penalty(scores: Floats, seen: Mask, penalty: float) -> Floats:
    """Make the tokens that a row holds already, bool [B, V], less likely (CTRL, 1909.05858)."""
    return np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores)


def suppress(scores: Floats, tokens: Sequence[int]) -> Floats:
    """Take tokens out of the choice, such as stop tokens until the least length is reached."""
    result = scores.copy()
    result[:, list(tokens)] = -np.inf
    return result


def temperature(scores: Floats, value: float) -> Floats:
    """Flatten (above 1) or sharpen (below 1) the distribution."""
    return scores / value


def top_k(scores: Floats, count: int, keep: int = 1) -> Floats:
    """Leave the `count` best tokens, and those that tie with the last of them."""
    place = min(max(count, keep), scores.shape[1])
    least = np.sort(scores, axis=1)[:, -place, None]  # [B, 1]
    return np.where(scores < least, -np.inf, scores)


def top_p(scores: Floats, mass: float, keep: int = 1) -> Floats:
    """Leave the smallest set of best tokens whose probabilities sum to `mass` (1904.09751)."""
    dropped = mass_up_to(scores) <= 1 - mass
    return np.where(dropped & ~_best(scores, keep), -np.inf, scores)


def min_p(scores: Floats, share: float, keep: int = 1) -> Floats:
    """Leave the tokens with at least `share` of the best one's probability (2407.01082)."""
    probability = softmax(scores)
    dropped = probability < share * probability.max(axis=1, keepdims=True)
    return np.where(dropped & ~_best(scores, keep), -np.inf, scores)


def process(
    generation: GenerationConfig, scores: Floats, *, seen: Mask, suppresses_stops: bool
) -> tuple[Floats, Floats]:
    """All active rules in their order: [B, V] -> [B, V], and how close each row's cuts were [B].

    `seen` says which tokens a row holds. A cut's closeness is the smallest change of a score or a
    probability that would have kept another set; inf without cuts.
    """
    margins = np.full(len(scores), np.inf)
    for name in generation.rules:
        before = scores
        if name == "repetition_penalty":
            scores = repetition_penalty(scores, seen, generation.repetition_penalty or 1.0)
        elif name == "min_new_tokens":
            scores = suppress(scores, generation.stops) if suppresses_stops else scores
        elif name == "temperature":
            scores = temperature(scores, generation.temperature or 1.0)
        elif name == "top_k":
            scores = top_k(scores, generation.top_k or 0)
        elif name == "top_p":
            scores = top_p(scores, 1.0 if generation.top_p is None else generation.top_p)
        else:
            scores = min_p(scores, generation.min_p or 0.0)
        if name in _CUTS:
            margins = np.minimum(margins, _cut_margin(generation, name, before, scores))
    return scores, margins


def best(scores: Floats) -> tuple[Ints, Floats]:
    """The best token of every row [B], the lowest id of equals, and its lead on the second [B]."""
    ordered = np.sort(scores, axis=1)
    second = ordered[:, -2] if scores.shape[1] > 1 else np.full(len(scores), -np.inf)
    return scores.argmax(axis=1).astype(np.int64), ordered[:, -1] - second


def draw(scores: Floats, uniform: Floats) -> tuple[Ints, Floats]:
    """Draw by the inverse of the cumulative distribution: [B, V], [B] in [0, 1) -> tokens [B].

    The token is the first, in token order, at which the cumulative sum of the probabilities exceeds
    the uniform times their total. Also the draw's distance to the nearest edge between tokens [B].
    """
    cumulative = np.exp(scores - scores.max(axis=1, keepdims=True)).cumsum(axis=1)
    total = cumulative[:, -1:]
    tokens = (cumulative > uniform[:, None] * total).argmax(axis=1).astype(np.int64)
    is_edge = (cumulative > 0) & (cumulative < total)
    distance = np.abs(cumulative / total - uniform[:, None])
    return tokens, np.where(is_edge, distance, np.inf).min(axis=1)


def softmax(scores: Floats) -> Floats:
    """Probabilities [B, V]."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def mass_up_to(scores: Floats) -> Floats:
    """For every token the probability of all that are no better, itself included [B, V]."""
    order = _ranking(scores)[:, ::-1]
    result = np.empty_like(scores)
    sums = np.take_along_axis(softmax(scores), order, axis=1).cumsum(axis=1)
    np.put_along_axis(result, order, sums, axis=1)
    return result


def _ranking(scores: Floats) -> Ints:
    """Token ids from best to worst, of equals the lowest id first [B, V]."""
    return np.argsort(-scores, axis=1, kind="stable").astype(np.int64)


def _best(scores: Floats, count: int) -> Mask:
    """Which tokens are among the `count` best [B, V]."""
    result = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(result, _ranking(scores)[:, :count], True, axis=1)
    return result


def _cut_margin(generation: GenerationConfig, name: str, before: Floats, after: Floats) -> Floats:
    """How far a cut was from keeping another set of tokens [B]."""
    kept = np.isfinite(after)
    lowest = np.where(kept, before, np.inf).min(axis=1)
    highest = np.where(kept, -np.inf, before).max(axis=1)
    margin: Floats = lowest - highest
    if name == "top_k":
        return margin
    if name == "top_p":
        distance = np.abs(mass_up_to(before) - (1 - (generation.top_p or 0.0)))
    else:
        probability = softmax(before)
        share = generation.min_p or 0.0
        distance = np.abs(probability - share * probability.max(axis=1, keepdims=True))
    # The best token stays whatever its distance.
    distance = np.where(_best(before, 1) | ~np.isfinite(before), np.inf, distance)
    return np.asarray(np.minimum(margin, distance.min(axis=1)))
