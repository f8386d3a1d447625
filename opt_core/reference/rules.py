"""The rules that change the scores of one text's next token, up to the functions of the user.

A rule takes scores [V] and gives scores [V], in float64; what may not be chosen becomes -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from opt_core.generation import GenerationConfig, Plan
from opt_core.reference.inputs import Floats

#: What `remove_invalid_values` puts in the place of inf: a float64 would not fit the wings.
LARGEST = float(np.finfo(np.float32).max)
LOWEST = -LARGEST

#: A word and what is added to the score of its last token.
Bias = tuple[list[int], float]


class Place(NamedTuple):
    """Where a text stands when its next token is chosen."""

    #: Its tokens, without padding, the prompt first.
    text: list[int]
    #: How many of them were chosen; padding or not, they are the last.
    new: int
    #: With groups of beams: what the beams of earlier groups have chosen in this step.
    taken: Sequence[int] = ()


def sequence_bias(scores: Floats, text: list[int], biases: Iterable[Bias]) -> Floats:
    """Add a number to the last token of every word of which the text ends with the others."""
    result = scores.copy()
    for word, bias in biases:
        *begun, last = word
        if text[len(text) - len(begun) :] == begun:
            result[last] += bias
    return result


def bad_words_ids(scores: Floats, text: list[int], words: list[list[int]]) -> Floats:
    """Never complete these words."""
    return sequence_bias(scores, text, [(word, -np.inf) for word in words])


def diversity_penalty(scores: Floats, taken: Sequence[int], penalty: float) -> Floats:
    """Lower each token by the penalty for every beam that took it (Diverse beams, 1610.02424)."""
    return scores - penalty * np.bincount(np.array(taken, np.int64), minlength=len(scores))


def repetition_penalty(scores: Floats, text: list[int], penalty: float) -> Floats:
    """Make the tokens that the text holds already less likely (CTRL, 1909.05858)."""
    result = scores.copy()
    for token in set(text):
        score = scores[token]
        result[token] = score * penalty if score < 0 else score / penalty
    return result


def no_repeat_ngram_size(scores: Floats, text: list[int], size: int) -> Floats:
    """Take out every token that would write a run of `size` tokens for the second time."""
    grams = [text[i : i + size] for i in range(len(text) - size + 1)]
    begun = text[len(text) - (size - 1) :]
    return suppress_tokens(scores, [gram[-1] for gram in grams if gram[:-1] == begun])


def suppress_tokens(scores: Floats, tokens: Iterable[int]) -> Floats:
    """Take tokens out of the choice, such as stop tokens until the least length is reached."""
    result = scores.copy()
    result[list(tokens)] = -np.inf
    return result


def allow_tokens(scores: Floats, tokens: Iterable[int]) -> Floats:
    """Take all other tokens out of the choice."""
    allowed = set(tokens)
    return suppress_tokens(scores, [t for t in range(len(scores)) if t not in allowed])


def force_tokens(scores: Floats, tokens: Iterable[int]) -> Floats:
    """Leave nothing but these tokens, all alike."""
    return allow_tokens(np.zeros_like(scores), tokens)


def remove_invalid_values(scores: Floats) -> Floats:
    """Put 0 for NaN and the largest numbers of float32 for inf."""
    return np.nan_to_num(scores, nan=0.0, posinf=LARGEST, neginf=LOWEST)


def exponential_decay_length_penalty(
    scores: Floats, stops: Sequence[int], past: int, factor: float
) -> Floats:
    """Raise the stop tokens ever more, `past` the number of tokens since it began."""
    result = scores.copy()
    for stop in stops:
        # What may not be chosen stays so, also where `remove_invalid_values` has made it the lowest
        # number; in transformers it becomes NaN, or likely.
        may_be = LOWEST < scores[stop] < np.inf
        if past > 0 and may_be and scores[stop] != 0:
            with np.errstate(over="ignore"):  # inf, where Python's power raises an error
                result[stop] += abs(scores[stop]) * (np.float64(factor) ** past - 1)
    return result


#: Every rule by its name in `GenerationConfig.rules`, but for those of `cuts`.
RULES: Mapping[str, Callable[[Floats, Place, GenerationConfig, Plan], Floats]] = {
    "sequence_bias": lambda scores, at, asked, _: sequence_bias(
        scores, at.text, asked.sequence_bias or ()
    ),
    "diversity_penalty": lambda scores, at, asked, _: diversity_penalty(
        scores, at.taken, asked.diversity_penalty or 0.0
    ),
    "repetition_penalty": lambda scores, at, asked, _: repetition_penalty(
        scores, at.text, asked.repetition_penalty or 1.0
    ),
    "no_repeat_ngram_size": lambda scores, at, asked, _: no_repeat_ngram_size(
        scores, at.text, asked.no_repeat_ngram_size or 0
    ),
    # A stop token alone is no bad word: a text may end.
    "bad_words_ids": lambda scores, at, asked, _: bad_words_ids(
        scores, at.text, [w for w in asked.bad_words_ids or () if w not in _alone(asked.stops)]
    ),
    "min_new_tokens": lambda scores, at, asked, planned: (
        suppress_tokens(scores, asked.stops) if at.new < planned.min_new_tokens else scores
    ),
    "forced_bos_token_id": lambda scores, at, asked, _: (
        force_tokens(scores, [asked.forced_bos_token_id or 0]) if len(at.text) == 1 else scores
    ),
    "forced_eos_token_id": lambda scores, at, asked, planned: (
        force_tokens(scores, _several(asked.forced_eos_token_id))
        if at.new == planned.max_new_tokens - 1
        else scores
    ),
    "remove_invalid_values": lambda scores, *_: remove_invalid_values(scores),
    "exponential_decay_length_penalty": lambda scores, at, asked, _: _decay(scores, at, asked),
    "suppress_tokens": lambda scores, _, asked, __: suppress_tokens(
        scores, asked.suppress_tokens or ()
    ),
    "begin_suppress_tokens": lambda scores, at, asked, _: (
        suppress_tokens(scores, asked.begin_suppress_tokens or ())
        if at.new == _first_free(at, asked)
        else scores
    ),
}


def _alone(tokens: Iterable[int]) -> list[list[int]]:
    return [[token] for token in tokens]


def _several(tokens: int | list[int] | None) -> list[int]:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


def _decay(scores: Floats, at: Place, asked: GenerationConfig) -> Floats:
    start, factor = asked.exponential_decay_length_penalty or (0, 1.0)
    return exponential_decay_length_penalty(scores, asked.stops, at.new - start, factor)


def _first_free(at: Place, asked: GenerationConfig) -> int:
    """Which new token is the first that is not forced."""
    return int(asked.forced_bos_token_id is not None and len(at.text) - at.new == 1)
