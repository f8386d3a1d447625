"""The numbers that the rules of a generation take, as arrays of few different shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opt_core.generation.configuration import GenerationConfig
from opt_core.generation.planning import Plan

#: What a rule takes: arrays, in the order of the table below.
Given = Mapping[str, tuple[npt.NDArray[Any], ...]]

_Take = Callable[[], tuple[npt.NDArray[Any], ...]]

#: Every rule in the order in which scores pass through them, and what it takes. Columns count from
#: the start of `DecodeState.tokens`, so that column P is the first new token.
#:
#: - vocabulary: int [], the ids that may be chosen are those below
#: - sequence_bias, bad_words_ids: int [n, L] ids, -1 for any; float [n], what is added to the last
#:   id of a row where the text ends with the ids before it
#: - diversity_penalty: float [], for each earlier group's K / G best candidates of this step that
#:   do not end by a stop token, string or criterion; in the last step too
#: - repetition_penalty: float []
#: - no_repeat_ngram_size: int []
#: - min_new_tokens: bool [V] stop tokens; int [], the column from which they may be chosen
#: - forced_bos_token_id: int [] token
#: - forced_eos_token_id: bool [V] tokens; int [], the last column
#: - exponential_decay_length_penalty: bool [V] stop tokens; int [], column after which it grows;
#:   float [] factor
#: - suppress_tokens: bool [V]
#: - begin_suppress_tokens: bool [V]; int [], the column P; bool [], whether a first token is forced
#: - temperature: float []
#: - top_k: int [], how many stay, 0 for all
#: - top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: float []; int [], how many stay at least
#: - remove_invalid_values, renormalize_logits: nothing
#: - prefix_allowed_tokens_fn, logits_processor: functions of a call, not given here
ORDER = (
    "vocabulary",
    "sequence_bias",
    "diversity_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_new_tokens",
    "prefix_allowed_tokens_fn",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "logits_processor",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "renormalize_logits",
)

#: With draws these are always given, as what changes nothing where they are not active: so one
#: compiled program serves all their values.
STEADY = ("temperature", "top_k", "top_p", "min_p")

#: Lists of sequences and their lengths are rounded up to multiples of these.
_ROWS, _LENGTHS = 8, 4


def given(asked: GenerationConfig, planned: Plan, *, vocab_size: int, known: int) -> Given:
    """What the active rules of a generation take, by their names: see `ORDER`.

    `known` is the number of ids that may be chosen; an attached tokenizer knows no others.
    """
    takes = {**_takes(asked, planned, vocab_size), **_cuts(asked)}
    names = {*asked.rules, *(STEADY if asked.do_sample else ())}
    return {"vocabulary": (_whole(known),)} | {n: takes[n]() for n in ORDER if n in names}


def _takes(asked: GenerationConfig, planned: Plan, vocab_size: int) -> dict[str, _Take]:
    P = planned.prompt_length
    last = P + planned.max_new_tokens - 1
    start, factor = asked.exponential_decay_length_penalty or (0, 1.0)

    def chosen(tokens: Iterable[int]) -> npt.NDArray[np.bool_]:
        result = np.zeros(vocab_size, np.bool_)
        result[list(tokens)] = True
        return result

    return {
        "sequence_bias": lambda: _sequences(asked.sequence_bias or ()),
        "diversity_penalty": lambda: (_number(asked.diversity_penalty),),
        "repetition_penalty": lambda: (_number(asked.repetition_penalty, 1.0),),
        "no_repeat_ngram_size": lambda: (_whole(asked.no_repeat_ngram_size or 0),),
        "bad_words_ids": lambda: _sequences(_bad_words(asked)),
        "min_new_tokens": lambda: (chosen(asked.stops), _whole(P + planned.min_new_tokens)),
        "forced_bos_token_id": lambda: (_whole(asked.forced_bos_token_id or 0),),
        "forced_eos_token_id": lambda: (
            chosen(_tokens(asked.forced_eos_token_id)),
            _whole(last),
        ),
        "remove_invalid_values": lambda: (),
        "exponential_decay_length_penalty": lambda: (
            chosen(asked.stops),
            _whole(P + start),
            _number(factor),
        ),
        "suppress_tokens": lambda: (chosen(asked.suppress_tokens or ()),),
        "begin_suppress_tokens": lambda: (
            chosen(asked.begin_suppress_tokens or ()),
            _whole(P),
            np.array(asked.forced_bos_token_id is not None),
        ),
    }


def _cuts(asked: GenerationConfig) -> dict[str, _Take]:
    kept = asked.kept_tokens
    return {
        "temperature": lambda: (_number(asked.temperature, 1.0),),
        "top_k": lambda: (_whole(max(asked.top_k, kept) if asked.top_k else 0),),
        "top_p": lambda: (_number(asked.top_p, 1.0), _whole(kept)),
        "min_p": lambda: (_number(asked.min_p), _whole(kept)),
        "typical_p": lambda: (_number(asked.typical_p, 1.0), _whole(kept)),
        "epsilon_cutoff": lambda: (_number(asked.epsilon_cutoff), _whole(kept)),
        "eta_cutoff": lambda: (_number(asked.eta_cutoff), _whole(kept)),
        "renormalize_logits": lambda: (),
    }


def _number(value: float | None, neutral: float = 0.0) -> npt.NDArray[np.float64]:
    return np.array(neutral if value is None else value, np.float64)


def _whole(value: int) -> npt.NDArray[np.int32]:
    return np.array(value, np.int32)


def _tokens(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _bad_words(asked: GenerationConfig) -> list[tuple[list[int], float]]:
    """Every word but a stop token alone: a text may end."""
    alone = [[stop] for stop in asked.stops]
    return [(word, -np.inf) for word in asked.bad_words_ids or () if word not in alone]


def _sequences(
    biases: Sequence[tuple[list[int], float]],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    rows = _rounded(len(biases), _ROWS)
    longest = _rounded(max((len(ids) for ids, _ in biases), default=1), _LENGTHS)
    ids = np.full((rows, longest), -1, np.int32)
    values = np.zeros(rows, np.float64)
    for row, (sequence, bias) in enumerate(biases):
        ids[row, longest - len(sequence) :] = sequence
        values[row] = bias
    return ids, values


def _rounded(count: int, step: int) -> int:
    return max(1, -(-count // step)) * step
