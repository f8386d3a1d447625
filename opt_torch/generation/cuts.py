"""The rules of drawing, from temperature to renormalising, the draws, and the best of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from opt_torch.generation.rules import Seen

#: Where so many of the best tokens hold the mass that is kept, the others need no order.
_RANKED = 512
#: Places of a block, in which the best of a long row are sought first.
_BLOCK = 32


def temperature(scores: Tensor, _: Seen, value: float) -> Tensor:
    """Flatter above 1, sharper below."""
    return scores if value == 1 else scores / value


def top_k(scores: Tensor, _: Seen, count: int) -> Tensor:
    """The `count` best, and those that tie with the last of them; 0 for all."""
    if not 0 < count < scores.shape[1]:
        return scores
    least = _top(scores, count)[0][:, -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def top_p(scores: Tensor, _: Seen, mass: float, kept: int) -> Tensor:
    """The smallest set of best tokens with this mass (1904.09751)."""
    if mass >= 1:
        return scores
    ranked, order = best(scores, _RANKED)
    # From the best one on: beside huge scores the logarithm of how many there are is lost.
    top = ranked[:, :1]
    whole = (scores - top).logsumexp(1, keepdim=True)
    rest = 1 - (ranked - top - whole).exp().sum(1, keepdim=True)
    if bool((rest > 1 - mass).any()):
        ranked, order = scores.sort(dim=1, descending=True, stable=True)
        rest = torch.zeros_like(rest)
    # The sum of a token and all that are no better runs back.
    up_to = (ranked - top - whole).exp().flip(1).cumsum(1).flip(1) + rest
    dropped = up_to <= 1 - mass
    dropped[:, :kept] = False
    cut = torch.full_like(scores, -torch.inf)
    return cut.scatter(1, order, ranked.masked_fill(dropped, -torch.inf))


def min_p(scores: Tensor, _: Seen, share: float, kept: int) -> Tensor:
    """The tokens with this share of the best one's probability (2407.01082)."""
    if not share:
        return scores
    probability = scores.softmax(1)
    least = share * probability.amax(1, keepdim=True)
    return _but_the_best(scores, probability < least, kept)


def typical_p(scores: Tensor, _: Seen, mass: float, kept: int) -> Tensor:
    """The smallest set of the most typical tokens with this mass (2202.00666)."""
    if mass >= 1:
        return scores
    log_probability = scores.log_softmax(1)
    probability = log_probability.exp()
    surprise = (log_probability + _entropy(log_probability)[:, None]).abs()
    ranked, order = surprise.sort(dim=1, stable=True)
    before = probability.gather(1, order).cumsum(1) < mass
    last = before.sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
    return _without(scores, ranked > ranked.gather(1, last), order, kept)


def epsilon_cutoff(scores: Tensor, _: Seen, least: float, kept: int) -> Tensor:
    """The tokens of at least this probability (2210.15191), and all that tie with the last kept."""
    return _but_ties_with_the_best(scores, scores.softmax(1) < least, kept)


def eta_cutoff(scores: Tensor, _: Seen, least: float, kept: int) -> Tensor:
    """As `epsilon_cutoff`, but lower where the entropy is high (2210.15191)."""
    log_probability = scores.log_softmax(1)
    eta = (least**0.5 * (-_entropy(log_probability)).exp()).clamp(max=least)
    return _but_ties_with_the_best(scores, log_probability.exp() < eta[:, None], kept)


def renormalize_logits(scores: Tensor, _: Seen) -> Tensor:
    """Log-probabilities of what is left."""
    return log_probabilities(scores)


def log_probabilities(scores: Tensor) -> Tensor:
    """Softmax's logarithm; beside a score of inf, or of -inf alone, none is, and scores stay."""
    return torch.where(scores.amax(1, keepdim=True).isfinite(), scores.log_softmax(1), scores)


def _entropy(log_probability: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(log_probability.exp()).sum(1)
    return entropy


def _without(scores: Tensor, dropped: Tensor, order: Tensor, kept: int) -> Tensor:
    """Drop by rank, but not the first of an order."""
    dropped[:, :kept] = False
    return scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


def _but_the_best(scores: Tensor, dropped: Tensor, kept: int) -> Tensor:
    _, places = best(scores, kept)
    return scores.masked_fill(dropped.scatter(1, places, False), -torch.inf)


def _but_ties_with_the_best(scores: Tensor, dropped: Tensor, kept: int) -> Tensor:
    least = scores.topk(min(kept, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(dropped & (scores < least), -torch.inf)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best scores of every row, best first, and their places, of equals the lowest first."""
    count = min(count, scores.shape[1])
    if count == 1:
        value, place = scores.max(1, keepdim=True)  # the first of equals
        return value, place
    values, places = _top(scores, min(count + 1, scores.shape[1]))
    # `topk` leaves open which of equals it takes; a place of -inf is nobody's choice.
    ties = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)
    if bool(ties.any()):
        values, places = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], places[:, :count]


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `topk`, which takes several times as long on a CPU where a row is long.

    The best of a row lie in those blocks whose own best are the best.
    """
    rows, width = scores.shape
    blocks = width // _BLOCK
    if scores.device.type != "cpu" or blocks < 4 * count:
        values, places = scores.topk(count)
        return values, places
    block = scores[:, : blocks * _BLOCK].view(rows, _BLOCK, blocks).amax(1).topk(count).indices
    inside = block[:, None] + blocks * torch.arange(_BLOCK)[:, None]  # [B, _BLOCK, count]
    rest = torch.arange(blocks * _BLOCK, width).expand(rows, -1)
    places = torch.cat((inside.flatten(1), rest), dim=1)
    values, order = scores.gather(1, places).topk(count)
    return values, places.gather(1, order)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution in token order: `[B, V]`, `[B]` -> `[B]`."""
    return _drawn((scores - scores.amax(1, keepdim=True)).exp(), uniform)


def draw_several(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws without replacement: `[B, V]`, `[B, M]` -> places `[B, M]`, and where they are real.

    What is drawn weighs nothing in the draws after it.
    """
    # Cuts leave few of the many: only columns that weigh something in a row are summed.
    columns = (scores > -torch.inf).any(0).nonzero()[:, 0]
    if not columns.numel():
        columns = columns.new_zeros(1)
    weights = scores[:, columns]
    weights = (weights - weights.amax(1, keepdim=True)).exp().nan_to_num(0.0)
    places, real = [], []
    for uniform in uniforms.unbind(1):
        place = _drawn(weights, uniform)[:, None]
        real.append(weights.gather(1, place) > 0)
        weights = weights.scatter(1, place, 0.0)
        places.append(columns[place])
    return torch.cat(places, 1), torch.cat(real, 1)


def _drawn(weights: Tensor, uniform: Tensor) -> Tensor:
    cumulative = weights.cumsum(1)
    aim = uniform[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, aim, right=True)[:, 0]
    return places.clamp(max=weights.shape[1] - 1)
