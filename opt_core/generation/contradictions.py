"""Options of generation that cannot hold together: each pair with a way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opt_core.generation.configuration import GenerationConfig


def contradictions(asked: GenerationConfig) -> list[str]:
    """Every contradiction, one sentence each."""
    return [*_of_beams(asked), *_of_groups(asked), *_of_forced_words(asked), *_of_others(asked)]


def _of_beams(asked: GenerationConfig) -> Iterator[str]:
    beams, count = asked.num_beams, asked.num_return_sequences
    if beams > 1 and count > beams:
        yield (
            f"num_return_sequences is {count} and num_beams {beams}; beams give at most as many "
            "sequences as there are: raise num_beams"
        )
    if beams > 1 and asked.penalty_alpha:
        yield "num_beams is above 1 and penalty_alpha asks for contrastive search; choose one"
    if beams > 1 and asked.prompt_lookup_num_tokens:
        yield "num_beams is above 1 and prompt_lookup_num_tokens asks for drafts; choose one"
    greedy = beams == 1 and not asked.do_sample
    if greedy and count > 1:
        yield (
            f"num_return_sequences is {count}, but greedy choice gives the same sequence every "
            "time; set do_sample=True or num_beams, or leave it at 1"
        )


def _of_groups(asked: GenerationConfig) -> Iterator[str]:
    beams, groups = asked.num_beams, asked.num_beam_groups
    if groups == 1:
        if asked.diversity_penalty:
            yield "diversity_penalty acts between groups: give num_beam_groups, or leave it at 0"
        return
    if beams % groups:
        yield f"num_beams is {beams}, which {groups} groups (num_beam_groups) cannot share evenly"
    if not asked.diversity_penalty:
        yield (
            "num_beam_groups is above 1 without a diversity_penalty, so that all groups would find "
            "the same: give one above 0"
        )
    if asked.do_sample:
        yield "num_beam_groups is above 1 and do_sample is True; groups are searched, not drawn"


def _of_forced_words(asked: GenerationConfig) -> Iterator[str]:
    if not asked.force_words_ids:
        return
    if asked.num_beams == 1:
        yield "force_words_ids needs beams: give num_beams above 1"
    if asked.do_sample:
        yield "force_words_ids and do_sample=True: words are forced by search, not by draws"
    if asked.num_beam_groups > 1:
        yield "force_words_ids and num_beam_groups above 1; choose one"
    for words in asked.force_words_ids:
        if isinstance(words[0], list) and _has_prefix(words):
            yield (
                f"force_words_ids has alternatives of which one begins another, {words}; the "
                "longer one could never be reached: leave it out"
            )
        phrases = words if isinstance(words[0], list) else [words]
        if all(_holds(phrase, _never(asked)) for phrase in phrases):
            yield f"force_words_ids asks for {words}, which bad_words_ids or suppress_tokens forbid"
        elif all(_holds(phrase, [[stop] for stop in asked.stops]) for phrase in phrases):
            yield (
                f"force_words_ids asks for {words}, which holds a stop token, with which a text "
                "ends: take it out of eos_token_id"
            )


def _never(asked: GenerationConfig) -> list[list[int]]:
    """The sequences that must never come; a stop token alone may, whatever is said of it."""
    alone = [[stop] for stop in asked.stops]
    suppressed = [[token] for token in asked.suppress_tokens or ()]
    return [*suppressed, *(word for word in asked.bad_words_ids or () if word not in alone)]


def _holds(phrase: list[int], sequences: list[list[int]]) -> bool:
    """Whether one of some sequences stands in a phrase."""
    places = range(len(phrase))
    return any(phrase[i : i + len(word)] == word for word in sequences for i in places)


def _has_prefix(words: list[list[int]]) -> bool:
    return any(
        i != j and longer[: len(word)] == word
        for i, word in enumerate(words)
        for j, longer in enumerate(words)
    )


def _of_others(asked: GenerationConfig) -> Iterator[str]:
    drafted = bool(asked.prompt_lookup_num_tokens)
    if asked.penalty_alpha:
        if asked.do_sample:
            yield "penalty_alpha asks for contrastive search, which draws nothing: do_sample=False"
        if (asked.top_k or 0) < 2:
            yield "penalty_alpha compares candidates: give a top_k of at least 2"
        if drafted:
            yield "penalty_alpha and prompt_lookup_num_tokens; choose one"
    one_pass = "penalty_alpha" if asked.penalty_alpha else "prompt_lookup_num_tokens"
    if (asked.penalty_alpha or drafted) and not asked.use_cache:
        yield f"{one_pass} works on the cache: leave use_cache at True"
    if (asked.penalty_alpha or drafted) and asked.is_guided:
        yield f"{one_pass} and guidance_scale; choose one"
    yield from _of_forced_tokens(asked)
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(asked, name) and not asked.return_dict_in_generate:
            yield f"{name} needs the record: set return_dict_in_generate=True"


def _of_forced_tokens(asked: GenerationConfig) -> Iterator[str]:
    never = [word[0] for word in _never(asked) if len(word) == 1]
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(asked, name)
        tokens = value if isinstance(value, list) else [value]
        if value is not None and set(tokens) <= set(never):
            yield f"{name} is {value}, which bad_words_ids or suppress_tokens forbid"
