"""Lengths and buffers of one generation, decided before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from opt_core.generation.configuration import GenerationConfig

#: What is generated when nobody names a length: this many tokens after the prompt.
DEFAULT_NEW_TOKENS = 20


class Plan(NamedTuple):
    """How far one generation goes, and how much room it takes."""

    #: P: columns of the prompt, padding included.
    prompt_length: int
    #: N: the most tokens that are chosen for a row.
    max_new_tokens: int
    #: The stop tokens are suppressed for this many steps.
    min_new_tokens: int
    #: W: columns of a buffer of tokens, at least P + N and a round of drafts, rounded up so that
    #: compiled programs are reused.
    width: int
    #: S: slots of the cache, rounded up likewise. As W, but beams keep every token that any of them
    #: tried, and contrastive search needs room for its candidates.
    capacity: int
    #: The columns that a compiled first pass is made for, from P to S: what follows the prompt in
    #: them is hidden, and overwritten by the tokens that are chosen.
    prompt_room: int


#: Options that hold token ids.
_TOKEN_OPTIONS = (
    "eos_token_id",
    "pad_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "force_words_ids",
)


class HasRoom(Protocol):
    """What is read of a model's configuration to plan."""

    max_position_embeddings: int
    vocab_size: int


def bucket(length: int) -> int:
    """The next length that programs are compiled for: multiples of 64, coarser above 1024.

    At most an eighth of a long buffer stays empty, and 2048 positions need no more than 24
    programs.
    """
    step = max(64, (1 << (length - 1).bit_length()) // 16)
    return -(-length // step) * step


def plan(
    generation: GenerationConfig,
    config: HasRoom,
    *,
    prompt_length: int,
    row_lengths: Sequence[int],
    drafts: int = 0,
) -> Plan:
    """From the options, the width of the prompt and what its rows hold to the lengths of the run.

    `prompt_length` counts columns, `row_lengths` the real tokens of every row, `drafts` the tokens
    that assisted decoding guesses before each pass. `max_length` and
    `min_length` count columns, as in transformers. Positions count real tokens, so padding takes
    none of them: the longest row and the new tokens together may not exceed
    `max_position_embeddings`, which gives every token of the result a position, also the last
    one, that is chosen but not fed. Slots of the cache are no positions: `capacity` may be larger
    than the table, and nothing beyond the table is looked up. Without any length,
    20 tokens are generated, or as many as there are positions left.

    Raises:
        ValueError: there is no room for the tokens asked for, a row has no token, the minimum is
            above the maximum, a token id is outside the vocabulary, options contradict each other,
            or one is not honoured.
    """
    generation.check_honoured()
    generation.validate()
    if 0 in row_lengths:
        raise ValueError(
            f"row {list(row_lengths).index(0)} of the prompt has no token to continue; "
            "give it at least one, such as bos_token_id, with 1 in attention_mask"
        )
    _check_tokens(generation, config)
    longest = max(row_lengths, default=0)
    room = config.max_position_embeddings - longest
    count, asked = _new_tokens(generation, prompt_length, room)
    if count > room or room < 1:
        raise ValueError(
            f"the longest prompt has {longest} tokens and {asked}: together {longest + count}, "
            f"but max_position_embeddings is {config.max_position_embeddings}; "
            + (f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt")
        )
    minimum = generation.min_new_tokens
    if minimum is None:
        minimum = max(0, (generation.min_length or 0) - prompt_length)
    if minimum > count:
        raise ValueError(
            f"min_new_tokens or min_length asks for at least {minimum} new tokens, but {asked}; "
            "lower the minimum or raise the maximum"
        )
    _check_phrases(generation, count)
    width = bucket(prompt_length + count + drafts)
    return Plan(
        prompt_length,
        count,
        minimum,
        width,
        max(width, bucket(_slots(generation, prompt_length, count))),
        prompt_room(prompt_length),
    )


def _check_phrases(generation: GenerationConfig, count: int) -> None:
    demands = generation.force_words_ids or ()
    needed = sum(
        min(map(len, words)) if isinstance(words[0], list) else len(words) for words in demands
    )
    if needed > count:
        raise ValueError(
            f"force_words_ids need at least {needed} tokens, but there are at most {count} new "
            "ones; raise max_new_tokens"
        )


def _slots(generation: GenerationConfig, prompt_length: int, count: int) -> int:
    if generation.num_beams > 1:
        return prompt_length + count * generation.num_beams
    candidates = (generation.top_k or 0) if generation.penalty_alpha else 0
    return prompt_length + count + candidates


def prompt_room(length: int) -> int:
    """As `bucket`, but finer for short prompts, where every hidden column is paid for."""
    return next((room for room in (8, 16, 32) if length <= room), bucket(length))


def _new_tokens(generation: GenerationConfig, prompt_length: int, room: int) -> tuple[int, str]:
    """How many new tokens, and which option says so."""
    if generation.max_new_tokens is not None:
        count = generation.max_new_tokens
        return count, f"max_new_tokens is {count}"
    if generation.max_length is None:
        count = max(1, min(DEFAULT_NEW_TOKENS, room))
        return count, f"{count} new ones are the default"
    count = generation.max_length - prompt_length
    if count < 1:
        raise ValueError(
            f"max_length is {generation.max_length}, but the prompt is {prompt_length} tokens "
            "wide already; raise max_length, or give max_new_tokens instead"
        )
    return count, f"max_length {generation.max_length} leaves {count} new ones"


def _check_tokens(generation: GenerationConfig, config: HasRoom) -> None:
    for name in _TOKEN_OPTIONS:
        for token in _flat(getattr(generation, name)):
            if token >= config.vocab_size:
                raise ValueError(
                    f"generation option {name} is {token}, outside the vocabulary of "
                    f"{config.vocab_size}; give an id below that, or None"
                )
    for words, _ in generation.sequence_bias or ():
        if max(words) >= config.vocab_size:
            raise ValueError(
                f"generation option sequence_bias names token {max(words)}, outside the vocabulary "
                f"of {config.vocab_size}; give ids below that"
            )


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif value is not None:
        for item in value:
            yield from _flat(item)
