"""The rules after the user's functions, which cut a distribution to be drawn from, and the draws.

As in `rules`, scores [V] to scores [V]. Every cut leaves at least `keep` tokens. Where a number of
tokens stays, equals stay lowest id first, except that cuts which compare with the score of the last
one kept leave all that equal it, as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from opt_core.generation import GenerationConfig
from opt_core.reference.inputs import Floats, Ints, Mask


def temperature(scores: Floats, value: float) -> Floats:
    """Flatten (above 1) or sharpen (below 1) the distribution."""
    return scores / value


def top_k(scores: Floats, count: int, keep: int = 1) -> Floats:
    """Leave the `count` best tokens, and those that tie with the last of them."""
    return _only(scores, scores >= _nth_best(scores, max(count, keep)))


def top_p(scores: Floats, mass: float, keep: int = 1) -> Floats:
    """Leave the smallest set of best tokens whose probabilities sum to `mass` (1904.09751)."""
    return _only(scores, (mass_up_to(scores) > 1 - mass) | _best(scores, keep))


def min_p(scores: Floats, share: float, keep: int = 1) -> Floats:
    """Leave the tokens with at least `share` of the best one's probability (2407.01082)."""
    probability = softmax(scores)
    return _only(scores, (probability >= share * probability.max()) | _best(scores, keep))


def typical_p(scores: Floats, mass: float, keep: int = 1) -> Floats:
    """Leave the tokens whose surprise is nearest the expected one, up to `mass` (2202.00666).

    The smallest set of them that holds this much probability, and those that tie with its last.
    """
    distance = surprise_off(scores)
    order = np.argsort(distance, kind="stable")
    sums = softmax(scores)[order].cumsum()
    last = min(int((sums < mass).sum()), len(scores) - 1)
    kept = distance <= distance[order[last]]
    kept[order[:keep]] = True
    return _only(scores, kept)


def epsilon_cutoff(scores: Floats, epsilon: float, keep: int = 1) -> Floats:
    """Leave the tokens of at least this probability (2210.15191)."""
    return _only(scores, (softmax(scores) >= epsilon) | (scores >= _nth_best(scores, keep)))


def eta_cutoff(scores: Floats, epsilon: float, keep: int = 1) -> Floats:
    """As `epsilon_cutoff`, but lower where the distribution is flat (2210.15191)."""
    return epsilon_cutoff(scores, eta(scores, epsilon), keep)


def eta(scores: Floats, epsilon: float) -> float:
    """The bound of `eta_cutoff`."""
    return float(min(epsilon, np.sqrt(epsilon) * np.exp(-entropy(scores))))


#: Every rule by its name in `GenerationConfig.rules`.
CUTS: Mapping[str, Callable[[Floats, GenerationConfig], Floats]] = {
    "temperature": lambda scores, asked: temperature(scores, asked.temperature or 1.0),
    "top_k": lambda scores, asked: top_k(scores, asked.top_k or 0, asked.kept_tokens),
    "top_p": lambda scores, asked: top_p(scores, _or_one(asked.top_p), asked.kept_tokens),
    "min_p": lambda scores, asked: min_p(scores, asked.min_p or 0.0, asked.kept_tokens),
    "typical_p": lambda scores, asked: typical_p(
        scores, _or_one(asked.typical_p), asked.kept_tokens
    ),
    "epsilon_cutoff": lambda scores, asked: epsilon_cutoff(
        scores, asked.epsilon_cutoff or 0.0, asked.kept_tokens
    ),
    "eta_cutoff": lambda scores, asked: eta_cutoff(
        scores, asked.eta_cutoff or 0.0, asked.kept_tokens
    ),
    "renormalize_logits": lambda scores, _: log_softmax(scores),
}


def margin(name: str, asked: GenerationConfig, before: Floats, after: Floats) -> float:
    """The smallest change of a score or a probability that would have kept another set.

    It is inf where nothing was cut, and never overestimated.
    """
    kept, known = np.isfinite(after), np.isfinite(before)
    if name in ("temperature", "renormalize_logits"):
        return np.inf
    off = surprise_off(before) if name == "typical_p" else -before
    gap = np.min(off[known & ~kept], initial=np.inf) - np.max(off[kept], initial=-np.inf)
    return float(min(gap, _distance(name, asked, before)))


def _distance(name: str, asked: GenerationConfig, scores: Floats) -> float:
    """How near any token's probability, or sum of them, comes to the bound of a cut."""
    probability = softmax(scores)
    match name:
        case "top_p":
            distance = np.abs(mass_up_to(scores) - (1 - _or_one(asked.top_p)))
        case "min_p":
            distance = np.abs(probability - (asked.min_p or 0.0) * probability.max())
        case "typical_p":
            order = np.argsort(surprise_off(scores), kind="stable")
            distance = np.abs(probability[order].cumsum() - _or_one(asked.typical_p))
            # The sum of all is 1 whatever the scores.
            return float(distance[np.isfinite(scores[order])][:-1].min(initial=np.inf))
        case "epsilon_cutoff":
            distance = np.abs(probability - (asked.epsilon_cutoff or 0.0))
        case "eta_cutoff":
            distance = np.abs(probability - eta(scores, asked.eta_cutoff or 0.0))
        case _:
            return np.inf
    # The best tokens stay whatever their distance.
    counts = np.isfinite(scores) & ~_best(scores, asked.kept_tokens)
    return float(distance[counts].min(initial=np.inf))


def best(scores: Floats) -> tuple[int, float]:
    """The best token, the lowest id of equals, and its lead on the second."""
    ordered = np.sort(scores)
    second = ordered[-2] if len(scores) > 1 else -np.inf
    return int(scores.argmax()), float(ordered[-1] - second)


def draw(scores: Floats, uniform: float) -> tuple[int, float]:
    """Draw a token by the inverse of the cumulative distribution, the uniform in [0, 1).

    The token is the first, in token order, at which the cumulative sum of the probabilities exceeds
    the uniform times their total. Also the draw's distance to the nearest edge between tokens.
    """
    cumulative = np.exp(scores - scores.max()).cumsum()
    total = cumulative[-1]
    token = int((cumulative > uniform * total).argmax())
    edges = cumulative[(cumulative > 0) & (cumulative < total)] / total
    return token, float(np.abs(edges - uniform).min(initial=np.inf))


def softmax(scores: Floats) -> Floats:
    """Probabilities."""
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


def log_softmax(scores: Floats) -> Floats:
    """Log-probabilities; beside a score of inf, or of -inf alone, there are none: scores stay."""
    if not np.isfinite(scores.max()):
        return scores
    shifted = scores - scores.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def entropy(scores: Floats) -> float:
    """The expected surprise: the mean of -log p; what is impossible adds nothing."""
    surprise = -log_softmax(scores)
    return float((softmax(scores) * np.where(np.isfinite(surprise), surprise, 0)).sum())


def surprise_off(scores: Floats) -> Floats:
    """How far each token's surprise, -log p, is from the expected one."""
    return np.abs(-log_softmax(scores) - entropy(scores))


def mass_up_to(scores: Floats) -> Floats:
    """For every token the probability of all that are no better, itself included."""
    order = ranking(scores)[::-1]
    result = np.empty_like(scores)
    result[order] = softmax(scores)[order].cumsum()
    return result


def ranking(scores: Floats) -> Ints:
    """Places from best to worst, of equals the lowest first."""
    return np.argsort(-scores, kind="stable").astype(np.int64)


def _only(scores: Floats, kept: Mask) -> Floats:
    return np.where(kept, scores, -np.inf)


def _nth_best(scores: Floats, place: int) -> float:
    return float(np.sort(scores)[-min(place, len(scores))])


def _best(scores: Floats, count: int) -> Mask:
    """Which tokens are among the `count` best."""
    result = np.zeros(len(scores), np.bool_)
    result[ranking(scores)[:count]] = True
    return result


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value
