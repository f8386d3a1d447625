"""Generation: token for token what the reference gives, in any batch."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opt_core.weights import Head
from tests.cases import PAD, SWITCHES, Batch, batches, padded, random_weights, tiny, words
from tests.subject import MARGIN, STD, Subject
from tests.wings import Wing


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing)


@pytest.fixture(scope="module")
def light(wing: Wing) -> Subject:
    return Subject(wing, lightly=True)


# Against the reference


@given(
    batch=batches(),
    switch=st.sampled_from(sorted(SWITCHES)),
    seed=st.integers(0, 2**16),
    new=st.integers(1, 6),
    eos=st.sampled_from([None, 2, [5, 9, 11, 20]]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    minimum=st.sampled_from([0, 1]),
)
def test_greedy_tokens_are_those_of_the_reference(
    wing: Wing, batch: Batch, switch: str, seed: int, **options: Any
) -> None:
    subject = Subject(wing, seed, lightly=True, **SWITCHES[switch])
    asked = {
        "max_new_tokens": options["new"],
        "eos_token_id": options["eos"],
        "repetition_penalty": options["penalty"],
        "min_new_tokens": options["minimum"],
    }
    right = subject.reference(batch.ids, batch.mask, **asked)
    assume(right.margins.min() >= MARGIN)
    found = subject.generate(batch.ids, batch.mask, **asked)
    np.testing.assert_array_equal(found, right.sequences)


@given(
    batch=batches(),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([None, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 0, 1, 5, 50]),
    top_p=st.sampled_from([None, 0.0, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.1, 1.0]),
    penalty=st.sampled_from([None, 1.2]),
    copies=st.sampled_from([1, 3]),
)
def test_sampled_tokens_are_those_of_the_reference(
    light: Subject, batch: Batch, seed: int, penalty: float | None, copies: int, **cuts: Any
) -> None:
    asked = {"do_sample": True, "seed": seed, "max_new_tokens": 5, **cuts}
    asked |= {"repetition_penalty": penalty, "num_return_sequences": copies}
    right = light.reference(batch.ids, batch.mask, **asked)
    assume(right.margins.min() >= MARGIN)
    found = light.generate(batch.ids, batch.mask, **asked)
    np.testing.assert_array_equal(found, right.sequences)


def test_half_precision_generates_tokens_of_the_vocabulary(wing: Wing) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM, std=STD)
    choices: dict[str, dict[str, Any]] = {
        "float16": {},
        "bfloat16": {"do_sample": True, "seed": 1},
    }
    for dtype, options in choices.items():
        model = wing.build(Head.CAUSAL_LM, tiny(), weights, dtype)
        found = wing.generate(model, words(2, 4), max_new_tokens=5, **options)
        assert found.shape == (2, 9)
        assert ((found >= 0) & (found < 40)).all()


# Batches


TEXTS = [words(1, count, seed=count)[0] for count in (7, 1, 4)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_padded_batch_gives_the_tokens_of_its_rows_alone(
    subject: Subject, side: str, sampled: bool
) -> None:
    batch = padded(TEXTS, side)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None}
    seeds = {"do_sample": True, "seed": [11, 12, 13]} if sampled else {}
    together = subject.generate(batch.ids, batch.mask, **options, **seeds)
    np.testing.assert_array_equal(together[:, : batch.ids.shape[1]], batch.ids)
    for row, text in enumerate(TEXTS):
        own = {"do_sample": True, "seed": [11 + row]} if sampled else {}
        alone = subject.right(text[None], **options, **own)
        np.testing.assert_array_equal(together[row, -8:], alone[0, -8:])


def test_padding_is_found_by_its_id_where_no_mask_is_given(subject: Subject) -> None:
    batch = padded(TEXTS, "left")
    found = subject.generate(batch.ids, max_new_tokens=5)
    np.testing.assert_array_equal(found, subject.generate(batch.ids, batch.mask, max_new_tokens=5))


def test_a_row_draws_by_its_own_seed_wherever_it_stands(subject: Subject) -> None:
    ids = words(2, 4)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": None}
    one = subject.generate(ids, seed=[5, 6], **options)
    other = subject.generate(ids[::-1], seed=[6, 5], **options)
    np.testing.assert_array_equal(other, one[::-1])
    np.testing.assert_array_equal(subject.generate(ids[1:], seed=[6], **options)[0], one[1])


def test_one_seed_gives_the_same_tokens_again_and_rows_of_their_own(subject: Subject) -> None:
    ids = words(1, 4).repeat(4, axis=0)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "temperature": 2.0}
    one = subject.generate(ids, seed=7, **options)
    np.testing.assert_array_equal(subject.generate(ids, seed=7, **options), one)
    assert len({tuple(row) for row in one}) == 4


def test_without_a_seed_the_tokens_are_new_each_time(subject: Subject) -> None:
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "temperature": 5.0}
    one, other = (subject.generate(words(1, 4), **options) for _ in range(2))
    assert one.shape != other.shape or (one != other).any()


def test_several_sequences_of_a_prompt_stand_next_to_each_other(subject: Subject) -> None:
    ids = words(2, 4)
    options: dict[str, Any] = {"do_sample": True, "seed": 3, "max_new_tokens": 6}
    found = subject.generate(ids, num_return_sequences=3, **options)
    np.testing.assert_array_equal(found[:, :4], ids.repeat(3, axis=0))
    np.testing.assert_array_equal(found, subject.generate(ids.repeat(3, axis=0), **options))


def test_threads_may_generate_with_one_model_at_once(subject: Subject) -> None:
    prompts = [words(1 + seed % 2, 3 + seed, seed) for seed in range(6)]
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
    right = [subject.right(ids, **options) for ids in prompts]
    with ThreadPoolExecutor(6) as threads:
        for _ in range(3):
            found = threads.map(lambda ids: subject.generate(ids, **options), prompts)
            for tokens, expected in zip(found, right, strict=True):
                np.testing.assert_array_equal(tokens, expected)


# Stopping and lengths


def test_a_finished_row_is_filled_with_the_pad_id_and_the_run_ends_with_the_last(
    subject: Subject,
) -> None:
    ids = words(3, 4)
    free = subject.right(ids, max_new_tokens=12, eos_token_id=None)[:, 4:]
    stop = int(free[0, 2])
    found = subject.generate(ids, max_new_tokens=12, eos_token_id=stop)[:, 4:]
    for row, tokens in zip(found, free, strict=True):
        end = [*tokens, stop].index(stop) + 1
        np.testing.assert_array_equal(row[:end], tokens[:end])
        assert (row[end:] == PAD).all()
    used = max([*tokens, stop].index(stop) + 1 for tokens in free)
    assert found.shape[1] == min(used, 12)


def test_no_stop_token_at_all_runs_to_the_full_length(wing: Wing) -> None:
    subject = Subject(wing, eos_token_id=list(range(40)))
    assert subject.generate(words(1, 4), max_new_tokens=9).shape == (1, 5)
    assert subject.generate(words(1, 4), max_new_tokens=9, eos_token_id=None).shape == (1, 13)


def test_a_stop_token_fills_where_there_is_no_pad_id(subject: Subject) -> None:
    free = subject.right(TEXTS[0][None], max_new_tokens=4, eos_token_id=None)[0, 7:]
    batch = padded([TEXTS[0], TEXTS[2]], "left")
    options: dict[str, Any] = {"eos_token_id": int(free[0]), "pad_token_id": None}
    found = subject.generate(batch.ids, batch.mask, max_new_tokens=4, **options)
    assert (found[0, 7:] == free[0]).all()


def test_stop_tokens_are_held_back_until_the_least_length(subject: Subject) -> None:
    ids = words(1, 4)
    stop = int(subject.right(ids, max_new_tokens=1)[0, -1])
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": stop}
    assert subject.generate(ids, **options).shape == (1, 5)
    for minimum in ({"min_new_tokens": 3}, {"min_length": 7}):
        found = subject.generate(ids, **options, **minimum)
        np.testing.assert_array_equal(found, subject.right(ids, **options, **minimum))
        assert stop not in found[0, 4:7]


def test_the_length_may_be_said_in_two_ways(subject: Subject) -> None:
    ids = words(2, 4)
    by_new = subject.generate(ids, max_new_tokens=5, eos_token_id=None)
    np.testing.assert_array_equal(subject.generate(ids, max_length=9, eos_token_id=None), by_new)
    assert subject.generate(ids, eos_token_id=None).shape == (2, 24)


def test_without_room_for_the_tokens_nothing_is_generated(subject: Subject) -> None:
    with pytest.raises(ValueError, match="longest prompt has 30 tokens and max_new_tokens is 3"):
        subject.generate(words(1, 30), max_new_tokens=3)
    assert subject.generate(words(1, 30), max_new_tokens=2, eos_token_id=None).shape == (1, 32)
    with pytest.raises(ValueError, match="max_length is 4, but the prompt is 4 tokens wide"):
        subject.generate(words(1, 4), max_length=4)


def test_padding_takes_no_room(subject: Subject) -> None:
    wide = np.concatenate([np.full((1, 20), PAD), words(1, 20)], axis=1)
    mask = (np.arange(40) >= 20)[None].astype(np.int64)
    found = subject.generate(wide, mask, max_new_tokens=12, eos_token_id=None)
    alone = subject.right(words(1, 20), max_new_tokens=12, eos_token_id=None)
    np.testing.assert_array_equal(found[:, 40:], alone[:, 20:])
