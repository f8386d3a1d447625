"""Generation in several turns: a cache goes on, programs are warmed, what does not fit is said."""

from typing import Any

import numpy as np
import pytest

from tests.cases import padded, words
from tests.subject import Subject
from tests.wings import Wing

NEW = 5
BATCH = padded([words(1, count, seed=count)[0] for count in (5, 3)], "left")
P = BATCH.ids.shape[1]
FREE: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": [1, 2]},
    "contrastive": {"penalty_alpha": 0.4, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "beams": {"num_beams": 3},
}
SEARCHES: dict[str, dict[str, Any]] = {
    "drawn beams": {"num_beams": 3, "do_sample": True, "seed": 1},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "forced": {"num_beams": 3, "force_words_ids": [[6]]},
}


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing, lightly=True)


def _turn(subject: Subject, ids: Any, mask: Any, **options: Any) -> Any:
    return subject.generate(ids, mask, return_dict_in_generate=True, **{**FREE, **options})


def _longer(sequences: Any, more: int, seed: int) -> tuple[Any, Any]:
    """The next prompt and its mask: what was generated, and so many words of the user."""
    ids = np.concatenate([sequences, words(2, more, seed=seed)], axis=1)
    mask = np.ones_like(ids)
    mask[:, :P] = BATCH.mask
    return ids, mask


@pytest.mark.parametrize("first", STRATEGIES)
@pytest.mark.parametrize("second", ["greedy", "beams"])
def test_a_second_turn_goes_on_from_the_cache_of_the_first(
    subject: Subject, first: str, second: str
) -> None:
    turn = _turn(subject, BATCH.ids, BATCH.mask, **STRATEGIES[first])
    ids, mask = _longer(turn.sequences, 3, seed=8)
    fresh = subject.generate(ids, mask, **FREE, **STRATEGIES[second])
    held = [(key.copy(), value.copy()) for key, value in subject.wing.pairs(turn.past_key_values)]
    for _ in range(2):
        found = subject.generate(
            ids, mask, past_key_values=turn.past_key_values, **FREE, **STRATEGIES[second]
        )
        np.testing.assert_array_equal(found, fresh)
    for before, after in zip(held, subject.wing.pairs(turn.past_key_values), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("second", ["sampling", "lookup"])
def test_other_strategies_take_a_cache(subject: Subject, second: str) -> None:
    turn = _turn(subject, BATCH.ids, BATCH.mask)
    ids, mask = _longer(turn.sequences, 3, seed=8)
    fresh = subject.generate(ids, mask, **FREE, **STRATEGIES[second])
    found = subject.generate(
        ids, mask, past_key_values=turn.past_key_values, **FREE, **STRATEGIES[second]
    )
    np.testing.assert_array_equal(found, fresh)


@pytest.mark.parametrize("option", ["penalty_alpha", "guidance_scale", "use_cache"])
def test_a_cache_is_refused_where_the_whole_text_is_needed(subject: Subject, option: str) -> None:
    """Contrastive search compares with hidden states, guidance has rows of its own."""
    values = {"penalty_alpha": 0.4, "guidance_scale": 2.0, "use_cache": False}
    turn = _turn(subject, BATCH.ids, BATCH.mask)
    ids, mask = _longer(turn.sequences, 3, seed=8)
    asked = {**FREE, option: values[option]}
    with pytest.raises(ValueError, match=f"past_key_values do not go with {option}"):
        subject.generate(ids, mask, past_key_values=turn.past_key_values, **asked)


@pytest.mark.parametrize("first", [*STRATEGIES, *SEARCHES])
def test_a_cache_holds_every_token_of_rows_that_ended_early(subject: Subject, first: str) -> None:
    options = {**STRATEGIES, **SEARCHES}[first]
    turn, lengths = _ragged(subject, **options)
    assert lengths.min() < lengths.max()
    new = np.arange(lengths.max()) < lengths[:, None]
    ids, mask = turn.sequences[:, :-1], np.concatenate([BATCH.mask, new], axis=1)[:, :-1]
    called = subject.wing.call(
        subject.model, input_ids=ids, attention_mask=mask.astype(np.int64), use_cache=True
    )
    shown = mask.astype(bool)[:, None, :, None]
    pairs = (subject.wing.pairs(x.past_key_values) for x in (turn, called))
    for found, right in zip(*pairs, strict=True):
        for one, other in zip(found, right, strict=True):
            np.testing.assert_allclose(
                np.where(shown, one, 0), np.where(shown, other, 0), atol=1e-5
            )


def _ragged(subject: Subject, **options: Any) -> tuple[Any, Any]:
    """A generation that ends after different numbers of tokens, int [2]."""
    free = subject.generate(BATCH.ids, BATCH.mask, **FREE, **options)
    for stop in np.setdiff1d(free[:, P:-1], options.get("force_words_ids", [])).tolist():
        turn = _turn(subject, BATCH.ids, BATCH.mask, **{**options, "eos_token_id": stop})
        is_stop = turn.sequences[:, P:] == stop
        lengths = np.where(is_stop.any(1), is_stop.argmax(1) + 1, is_stop.shape[1])
        if lengths.min() < lengths.max():
            return turn, lengths
    raise AssertionError("no stop token ends the rows at different places")


def test_a_third_turn_and_a_plain_cache_go_on_too(subject: Subject) -> None:
    turn = _turn(subject, BATCH.ids, BATCH.mask)
    ids, mask = _longer(turn.sequences, 1, seed=8)
    turn = _turn(subject, ids, mask, past_key_values=turn.past_key_values)
    ids, mask = _longer(turn.sequences, 2, seed=9)
    fresh = subject.generate(ids, mask, **FREE)
    found = subject.generate(ids, mask, past_key_values=turn.past_key_values, **FREE)
    np.testing.assert_array_equal(found, fresh)
    called = subject.wing.call(
        subject.model, input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True
    )
    pairs = tuple(tuple(pair) for pair in called.past_key_values)
    for past in (called.past_key_values, pairs):
        found = subject.generate(ids, mask, past_key_values=past, **FREE)
        np.testing.assert_array_equal(found, fresh)


def test_a_cache_that_does_not_fit_the_prompt_is_refused(subject: Subject) -> None:
    turn = _turn(subject, BATCH.ids, BATCH.mask)
    past = turn.past_key_values
    with pytest.raises(ValueError, match="past_key_values hold 2 rows, but input_ids 1"):
        subject.generate(np.concatenate([turn.sequences] * 2, 1)[:1], past_key_values=past)
    with pytest.raises(ValueError, match=r"hold 9 tokens, but input_ids have 9 columns; give"):
        subject.generate(turn.sequences[:, :9], past_key_values=past)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_prompt_that_is_too_long_is_refused(subject: Subject, strategy: str) -> None:
    with pytest.raises(ValueError, match="longest prompt has 30 tokens and max_new_tokens is 5"):
        subject.generate(words(2, 30), **FREE, **STRATEGIES[strategy])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_last_position_is_used(subject: Subject, strategy: str) -> None:
    """Slots of a cache are no positions: beams and candidates need more of them."""
    ids = words(1, 32 - NEW)
    options = {**STRATEGIES[strategy], **({"seed": 1} if strategy == "sampling" else {})}
    found = subject.generate(ids, **FREE, **options)
    np.testing.assert_array_equal(found, subject.right(ids, **FREE, **options))


@pytest.mark.parametrize("strategy", ["sampling", "beams"])
def test_warming_has_no_effect_but_time(wing: Wing, strategy: str) -> None:
    subject = Subject(wing)
    asked = {**FREE, **STRATEGIES[strategy]}
    assert subject.model.warmup(batch_size=2, prompt_length=P, **asked) is None
    found = subject.generate(BATCH.ids, BATCH.mask, **asked)
    np.testing.assert_array_equal(found, subject.right(BATCH.ids, BATCH.mask, **asked))


def test_warming_refuses_what_a_call_refuses(subject: Subject) -> None:
    with pytest.raises(ValueError, match="num_beams is 3, which 2 groups"):
        subject.model.warmup(num_beams=3, num_beam_groups=2, diversity_penalty=1.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_a_cache_the_tokens_are_the_same(subject: Subject, strategy: str) -> None:
    asked = {**FREE, **STRATEGIES[strategy]}
    if strategy in ("contrastive", "lookup"):
        with pytest.raises(ValueError, match="works on the cache: leave use_cache at True"):
            subject.generate(BATCH.ids, BATCH.mask, use_cache=False, **asked)
        return
    found = subject.generate(BATCH.ids, BATCH.mask, use_cache=False, **asked)
    np.testing.assert_array_equal(found, subject.generate(BATCH.ids, BATCH.mask, **asked))
