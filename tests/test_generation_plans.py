"""Plans, and the numbers that rules are given, without any framework."""

from typing import Any

import numpy as np
import pytest

from opt_core.config import OPTConfig
from opt_core.generation import (
    DEFAULT_NEW_TOKENS,
    ORDER,
    GenerationConfig,
    Given,
    Plan,
    bucket,
    given,
    plan,
)

CONFIG = OPTConfig(
    vocab_size=60,
    hidden_size=8,
    num_hidden_layers=1,
    ffn_dim=8,
    num_attention_heads=2,
    max_position_embeddings=32,
)


def plan_of(width: int = 4, rows: list[int] | None = None, **options: Any) -> Plan:
    generation = GenerationConfig(**options)
    return plan(generation, CONFIG, prompt_length=width, row_lengths=rows or [width])


# Plans


def test_without_a_length_twenty_tokens_follow_the_prompt() -> None:
    assert plan_of(4).max_new_tokens == DEFAULT_NEW_TOKENS


def test_without_a_length_the_positions_end_the_text() -> None:
    assert plan_of(30).max_new_tokens == 2


def test_max_new_tokens_wins_over_max_length() -> None:
    assert plan_of(4, max_length=6, max_new_tokens=9).max_new_tokens == 9
    assert plan_of(4, max_length=6).max_new_tokens == 2


def test_the_larger_minimum_counts() -> None:
    assert plan_of(4, min_length=9).min_new_tokens == 5
    assert plan_of(4, min_length=9, min_new_tokens=2).min_new_tokens == 2
    assert plan_of(4, min_length=9, min_new_tokens=0).min_new_tokens == 0
    assert plan_of(4, min_length=3).min_new_tokens == 0


def test_the_last_position_may_be_used_and_the_next_may_not() -> None:
    assert plan_of(4, max_new_tokens=28).max_new_tokens == 28
    with pytest.raises(ValueError, match=r"has 4 tokens .* 29: together 33, but .* is 32; ask for"):
        plan_of(4, max_new_tokens=29)
    with pytest.raises(ValueError, match="max_length 33 leaves 29 new ones: together 33"):
        plan_of(4, max_length=33)


def test_a_prompt_that_fills_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the longest prompt has 32 tokens .*; shorten"):
        plan_of(32)


def test_padding_takes_no_position() -> None:
    planned = plan_of(40, [4, 12], max_new_tokens=20)
    assert planned.max_new_tokens == 20
    assert planned.capacity >= 60


def test_a_max_length_within_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length is 4, but the prompt is 4 tokens wide"):
        plan_of(4, max_length=4)


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 5 new tokens, but max_new_tokens is 3"):
        plan_of(4, min_new_tokens=5, max_new_tokens=3)


def test_a_row_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 of the prompt has no token to continue"):
        plan_of(4, [4, 0])


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="eos_token_id is 60, outside the vocabulary of 60"):
        plan_of(4, eos_token_id=[2, 60])
    with pytest.raises(ValueError, match="pad_token_id is 61, outside the vocabulary of 60"):
        plan_of(4, pad_token_id=61)


def test_several_greedy_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="num_return_sequences is 2, but greedy choice gives the"):
        plan_of(4, num_return_sequences=2)
    assert plan_of(4, num_return_sequences=2, do_sample=True).max_new_tokens == 20


def test_an_id_outside_the_vocabulary_is_refused_wherever_it_stands() -> None:
    with pytest.raises(ValueError, match="bad_words_ids is 60, outside the vocabulary of 60"):
        plan_of(4, bad_words_ids=[[3], [4, 60]])
    with pytest.raises(ValueError, match="force_words_ids is 61, outside the vocabulary of 60"):
        plan_of(4, num_beams=2, force_words_ids=[[[3], [61, 4]]])
    with pytest.raises(ValueError, match="sequence_bias names token 60, outside the vocabulary"):
        plan_of(4, sequence_bias=[[[60, 3], 1.0]])


def test_there_is_a_slot_for_whatever_is_fed() -> None:
    assert plan_of(4, max_new_tokens=25, num_beams=8).capacity >= 4 + 25 * 8
    assert plan_of(4, max_new_tokens=25, penalty_alpha=0.5, top_k=50).capacity >= 4 + 25 + 50
    drafted = plan(
        GenerationConfig(max_new_tokens=25), CONFIG, prompt_length=4, row_lengths=[4], drafts=90
    )
    assert drafted.width >= 4 + 25 + 90
    assert drafted.capacity >= drafted.width


def test_few_programs_serve_all_lengths() -> None:
    lengths = range(1, 2049)
    assert all(bucket(n) >= n for n in lengths)
    assert all(bucket(n) - n < max(64, n / 8) for n in lengths)
    assert len({bucket(n) for n in lengths}) == 24


@pytest.mark.parametrize("length", [1, 8, 9, 17, 33, 64, 65, 200, 1025, 2000])
def test_a_compiled_first_pass_has_room_for_the_prompt_within_the_cache(length: int) -> None:
    config = OPTConfig()
    planned = plan(
        GenerationConfig(max_new_tokens=1), config, prompt_length=length, row_lengths=[length]
    )
    assert length <= planned.prompt_room <= planned.capacity
    assert planned.prompt_room <= max(8, 2 * length)


# What rules are given


def given_of(known: int = 60, **options: Any) -> Given:
    asked = GenerationConfig(**{"max_new_tokens": 6, **options})
    planned = plan(asked, CONFIG, prompt_length=4, row_lengths=[4])
    return given(asked, planned, vocab_size=60, known=known)


def told(found: Given, name: str) -> list[Any]:
    """What a rule is given, as numbers of Python; of a table over tokens those that are in it."""
    return [
        np.flatnonzero(value).tolist() if value.shape == (60,) else value.tolist()
        for value in found[name]
    ]


def test_only_active_rules_are_given_in_their_order() -> None:
    assert list(given_of()) == ["vocabulary"]
    found = given_of(
        eos_token_id=2, min_length=6, repetition_penalty=1.2, suppress_tokens=[3], num_beams=2
    )
    assert list(found) == ["vocabulary", "repetition_penalty", "min_new_tokens", "suppress_tokens"]
    assert list(found) == [name for name in ORDER if name in found]


def test_with_draws_the_common_cuts_are_given_whatever_they_are() -> None:
    off = given_of(do_sample=True, top_k=0)
    on = given_of(do_sample=True, top_k=5, top_p=0.5, min_p=0.1, temperature=3.0)
    assert list(off) == list(on) == ["vocabulary", "temperature", "top_k", "top_p", "min_p"]
    neutral = {"temperature": [1.0], "top_k": [0], "top_p": [1.0, 1], "min_p": [0.0, 1]}
    assert {name: told(off, name) for name in neutral} == neutral


def test_other_values_have_the_same_shapes() -> None:
    one: dict[str, Any] = {
        "bad_words_ids": [[3], [4, 5]],
        "sequence_bias": [[[3, 4], 1.0]],
        "suppress_tokens": [5],
        "eos_token_id": 2,
        "exponential_decay_length_penalty": [2, 1.5],
    }
    other: dict[str, Any] = {
        "bad_words_ids": [[7, 8, 9], [4, 5], [6], [1], [0]],
        "sequence_bias": [[[3], 1.0], [[3, 4, 5, 6], -2.0]],
        "suppress_tokens": [5, 6, 7],
        "eos_token_id": [2, 3],
        "exponential_decay_length_penalty": [1, 2.5],
    }
    shapes = [
        {name: [(v.shape, v.dtype) for v in values] for name, values in given_of(**o).items()}
        for o in (one, other)
    ]
    assert shapes[0] == shapes[1]


def test_columns_count_from_the_start_of_the_prompt() -> None:
    found = given_of(
        eos_token_id=[2, 7],
        min_new_tokens=2,
        forced_eos_token_id=7,
        exponential_decay_length_penalty=[3, 1.5],
        begin_suppress_tokens=[8, 9],
        forced_bos_token_id=11,
    )
    assert told(found, "min_new_tokens") == [[2, 7], 4 + 2]
    assert told(found, "forced_eos_token_id") == [[7], 4 + 6 - 1]
    assert told(found, "exponential_decay_length_penalty") == [[2, 7], 4 + 3, 1.5]
    assert told(found, "begin_suppress_tokens") == [[8, 9], 4, True]
    assert told(found, "forced_bos_token_id") == [11]


def test_words_stand_at_the_end_of_their_rows() -> None:
    ids, values = given_of(sequence_bias=[[[3, 4, 5], 1.5], [[6], -2.0]])["sequence_bias"]
    assert ids[0].tolist() == [-1] * (ids.shape[1] - 3) + [3, 4, 5]
    assert ids[1].tolist() == [-1] * (ids.shape[1] - 1) + [6]
    assert values[:2].tolist() == [1.5, -2.0]
    assert (ids[2:] == -1).all()
    assert not values[2:].any()


def test_a_stop_token_alone_is_no_bad_word() -> None:
    ids, values = given_of(bad_words_ids=[[2], [2, 3], [4]], eos_token_id=2)["bad_words_ids"]
    words = [row[row >= 0].tolist() for row in ids]
    assert [word for word in words if word] == [[2, 3], [4]]
    assert values[:2].tolist() == [-np.inf, -np.inf]


def test_cuts_are_told_how_many_tokens_stay() -> None:
    beams: dict[str, Any] = {"num_beams": 2, "eos_token_id": [2, 3], "do_sample": True}
    found = given_of(**beams, top_k=1, top_p=0.5, typical_p=0.5, epsilon_cutoff=0.1)
    assert told(found, "top_k") == [3]
    assert told(found, "top_p") == [0.5, 3]
    assert told(found, "typical_p") == [0.5, 3]
    assert told(found, "epsilon_cutoff") == [0.1, 3]


def test_ids_that_a_tokenizer_lacks_are_told() -> None:
    assert told(given_of(known=50), "vocabulary") == [50]
