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


_FLAG = Rule("True or False", lambda v: isinstance(v, bool))
_TOKEN = _or_none("a token id", lambda v: _is_in(v, _MOST))
_POSITIVE = _or_none("a number above 0", lambda v: _is_real(v) and v > 0)
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
    "repetition_penalty": (1.0, _POSITIVE),
    "num_return_sequences": (
        1,
        Rule("a whole number of at least 1", lambda v: is_int(v) and v >= 1),
    ),
    "eos_token_id": (
        None,
        _or_none(
            "a token id, a list of token ids", lambda v: _is_in(v, _MOST) or _all_in(v, _MOST)
        ),
    ),
    "pad_token_id": (None, _TOKEN),
    "bos_token_id": (None, _TOKEN),
    "use_cache": (True, _FLAG),
    "return_dict_in_generate": (False, _FLAG),
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
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "diversity_penalty": (0.0, None),
    "early_stopping": (False, None),
    "length_penalty": (1.0, None),
    "penalty_alpha": (0.0, None),
    "dola_layers": (None,),
    "typical_p": (1.0, None),
    "top_h": (None,),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1.0, None),
    "bad_words_ids": (None,),
    "force_words_ids": (None,),
    "constraints": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "forced_decoder_ids": (None,),
    "exponential_decay_length_penalty": (None,),
    "renormalize_logits": (False, None),
    "remove_invalid_values": (False, None),
    "guidance_scale": (1.0, None),
    "watermarking_config": (None,),
    "token_healing": (False, None),
    "stop_strings": (None,),
    "max_time": (None,),
    "low_memory": (False, None),
    "cache_implementation": (None,),
    "cache_config": (None,),
    "prefill_chunk_size": (None,),
    "output_scores": (False, None),
    "output_logits": (False, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "prompt_lookup_num_tokens": (None,),
    "assistant_model": (None,),
    "assistant_early_exit": (None,),
    "logits_processor": (None,),
    "stopping_criteria": (None,),
    "prefix_allowed_tokens_fn": (None,),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "synced_gpus": (False, None),
}


def nearest(name: str) -> str:
    """A question that names the known option most like this one, or nothing."""
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
    """Whole numbers, real numbers and lists of any library as those of Python."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.floating):
        return float(value)
    try:
        return operator.index(value)
    except TypeError:
        return [plain(v) for v in value] if isinstance(value, Iterable) else value
