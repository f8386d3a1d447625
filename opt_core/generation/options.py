"""What each option of generation may hold, and which options of transformers are not honoured."""

from __future__ import annotations

import difflib
import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from opt_core.config.rules import Rule, is_int

_MOST = 2**31 - 1


def _or_none(words: str, holds: Callable[[Any], bool]) -> Rule:
    return Rule(f"{words} or None", lambda v: v is None or holds(v))


def _count(least: int) -> Rule:
    return _or_none(
        f"a whole number of at least {least}", lambda v: is_int(v) and least <= v <= _MOST
    )


def _is_real(value: Any) -> bool:
    return (is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _all_in(values: Any, end: int) -> bool:
    return isinstance(values, list) and bool(values) and all(_is_in(v, end) for v in values)


def _is_in(value: Any, end: int) -> bool:
    return is_int(value) and 0 <= value < end


def _is_words(value: Any) -> bool:
    """A list of lists of token ids, each with at least one."""
    return isinstance(value, list) and bool(value) and all(_all_in(v, _MOST) for v in value)


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and _is_words(value[:1]) and _is_real(value[1])
    )


def _is_forced(value: Any) -> bool:
    """Words, or in the place of a word a list of words of which one is enough."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(_all_in(v, _MOST) or _is_words(v) for v in value)
    )


def _is_decay(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_in(value[0], _MOST)
        and _is_positive(value[1])
    )


def _is_positive(value: Any) -> bool:
    return _is_real(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_FLAG = Rule("True or False", lambda v: isinstance(v, bool))
_POSITIVE_COUNT = Rule("a whole number of at least 1", lambda v: is_int(v) and 1 <= v <= _MOST)
_TOKENS_OR_NONE_AT_ALL = _or_none("a list of token ids", lambda v: v == [] or _all_in(v, _MOST))
_CUTOFF = _or_none("a number from 0 to below 1", lambda v: _is_real(v) and 0 <= v < 1)
_TOKEN = _or_none("a token id", lambda v: _is_in(v, _MOST))
_TOKEN_OR_TOKENS = _or_none(
    "a token id, a list of token ids", lambda v: _is_in(v, _MOST) or _all_in(v, _MOST)
)
_POSITIVE = _or_none("a number above 0", _is_positive)
_SHARE = _or_none("a number from 0 to 1", lambda v: _is_real(v) and 0 <= v <= 1)

#: Every option that is honoured: its default and what it may hold.
OPTIONS: Mapping[str, tuple[Any, Rule]] = {
    "max_length": (None, _count(1)),
    "max_new_tokens": (None, _count(1)),
    "min_length": (None, _count(0)),
    "min_new_tokens": (None, _count(0)),
    "do_sample": (False, _FLAG),
    "temperature": (1.0, _POSITIVE),
    "top_k": (50, _count(0)),
    "top_p": (1.0, _SHARE),
    "min_p": (None, _SHARE),
    "typical_p": (
        1.0,
        _or_none("a number above 0, at most 1", lambda v: _is_real(v) and 0 < v <= 1),
    ),
    "epsilon_cutoff": (0.0, _CUTOFF),
    "eta_cutoff": (0.0, _CUTOFF),
    "repetition_penalty": (1.0, _POSITIVE),
    "no_repeat_ngram_size": (0, _count(0)),
    "bad_words_ids": (None, _or_none("a list of lists of token ids", _is_words)),
    "sequence_bias": (
        None,
        _or_none(
            "a list of [token ids, bias] or a mapping of tuples of ids to biases",
            lambda v: isinstance(v, list) and bool(v) and all(map(_is_bias, v)),
        ),
    ),
    "suppress_tokens": (None, _TOKENS_OR_NONE_AT_ALL),
    "begin_suppress_tokens": (None, _TOKENS_OR_NONE_AT_ALL),
    "forced_bos_token_id": (None, _TOKEN),
    "forced_eos_token_id": (None, _TOKEN_OR_TOKENS),
    "exponential_decay_length_penalty": (
        None,
        _or_none("[the new token it starts at, a factor above 0]", _is_decay),
    ),
    "guidance_scale": (1.0, _or_none("a number", _is_real)),
    "remove_invalid_values": (False, _FLAG),
    "renormalize_logits": (False, _FLAG),
    "num_return_sequences": (1, _POSITIVE_COUNT),
    "num_beams": (1, _POSITIVE_COUNT),
    "num_beam_groups": (1, _POSITIVE_COUNT),
    "diversity_penalty": (0.0, _or_none("a number", _is_real)),
    "length_penalty": (1.0, Rule("a number", _is_real)),
    "early_stopping": (
        None,
        _or_none('True, False, "never"', lambda v: isinstance(v, bool) or v == "never"),
    ),
    "force_words_ids": (
        None,
        _or_none("a list of lists of token ids (or of lists of such lists)", _is_forced),
    ),
    "penalty_alpha": (None, _SHARE),
    "prompt_lookup_num_tokens": (None, _count(1)),
    "max_matching_ngram_size": (2, _count(1)),
    "num_assistant_tokens": (5, _POSITIVE_COUNT),
    "stop_strings": (
        None,
        _or_none(
            "a text, a list of texts",
            lambda v: _is_text(v) or (isinstance(v, list) and bool(v) and all(map(_is_text, v))),
        ),
    ),
    "eos_token_id": (None, _TOKEN_OR_TOKENS),
    "pad_token_id": (None, _TOKEN),
    "bos_token_id": (None, _TOKEN),
    "use_cache": (True, _FLAG),
    "return_dict_in_generate": (False, _FLAG),
    "output_scores": (False, _FLAG),
    "output_logits": (False, _FLAG),
    "output_attentions": (False, _FLAG),
    "output_hidden_states": (False, _FLAG),
    "seed": (
        None,
        _or_none(
            "a whole number from 0 to 2**64 - 1, a list of them (one for each row)",
            lambda v: _is_in(v, 2**64) or _all_in(v, 2**64),
        ),
    ),
}

#: Options of transformers' `generate` that are not honoured, each with the values that ask nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "dola_layers": (None,),
    "top_h": (None,),
    "encoder_no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1.0, None),
    "constraints": (None,),
    "forced_decoder_ids": (None,),
    "watermarking_config": (None,),
    "token_healing": (False, None),
    "max_time": (None,),
    "low_memory": (False, None),
    "cache_implementation": (None,),
    "cache_config": (None,),
    "prefill_chunk_size": (None,),
    "assistant_early_exit": (None,),
    "assistant_confidence_threshold": (0.0, None),
    "num_assistant_tokens_schedule": ("constant", None),
    "synced_gpus": (False, None),
}


#: Arguments of transformers' `generate` that are called otherwise here.
_ELSEWHERE: Mapping[str, str] = {"inputs": "input_ids", "inputs_embeds": "input_ids"}


def nearest(name: str) -> str:
    """A question that names the known option most like this one, or nothing."""
    if name in _ELSEWHERE:
        return f"; did you mean {_ELSEWHERE[name]!r}?"
    near = difflib.get_close_matches(name, [*OPTIONS, *NEUTRAL], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def refuse_unhonoured(name: str, value: Any) -> None:
    """Accept a value that asks nothing.

    Raises:
        ValueError: the value asks for what nobody here does.
    """
    neutral = NEUTRAL[name]
    if not any(value is same or (_is_real(value) and value == same) for same in neutral):
        raise ValueError(
            f"generation option {name}={reprlib.repr(value)} is not honoured; "
            f"leave it out or give {' or '.join(map(repr, neutral))}"
        )


def plain(value: Any) -> Any:
    """Whole numbers, real numbers and lists of any library as those of Python.

    A mapping, as `sequence_bias` may be, becomes a list of pairs.
    """
    if isinstance(value, Mapping):
        return [[plain(key), plain(item)] for key, item in value.items()]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.floating):
        return float(value)
    try:
        return operator.index(value)
    except TypeError:
        return [plain(v) for v in value] if isinstance(value, Iterable) else value
