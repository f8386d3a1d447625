"""The cache of a record holds every token of every sequence, also where rows ended early."""

from typing import Any

import jax
import numpy as np
import pytest

from opt_flax.generation import collecting
from tests.cases import padded, words
from tests.subject import Subject
from tests.tolerances import assert_near
from tests.wings import Wing

BATCH = padded([words(1, count, seed=count)[0] for count in (5, 3)], "left")
PAD, P = 1, BATCH.ids.shape[1]
STOPS = [7, 9, 13, 16, 22, 23, 32, 36]
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "guided beams": {"num_beams": 3, "num_return_sequences": 2, "guidance_scale": 1.5},
    "groups": {
        "num_beams": 4,
        "num_beam_groups": 2,
        "diversity_penalty": 0.5,
        "num_return_sequences": 4,
    },
    "forced": {"num_beams": 3, "force_words_ids": [[14]], "num_return_sequences": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing)


def generated(subject: Subject, ids: Any, mask: Any, **options: Any) -> Any:
    asked: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": STOPS, "pad_token_id": PAD}
    return subject.model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, **asked | options
    )


def ends_of(sequences: Any, start: int) -> Any:
    """Behind the last token of every row."""
    found = np.asarray(sequences)
    is_stop = np.isin(found, STOPS) & (np.arange(found.shape[1]) >= start)
    return np.where(is_stop.any(1), is_stop.argmax(1) + 1, found.shape[1])


def check_cache(subject: Subject, record: Any, mask: Any) -> None:
    """Keys and values of all real tokens are those of one pass over the sequences."""
    ids, start = np.asarray(record.sequences)[:, :-1], mask.shape[1]
    ends = ends_of(record.sequences, start)
    mask = np.repeat(mask, len(ids) // len(mask), axis=0)
    mask = np.pad(mask, ((0, 0), (0, ids.shape[1] - start)), constant_values=1)
    is_real = (mask == 1) & (np.arange(ids.shape[1]) < ends[:, None])
    right = subject.model(ids, attention_mask=is_real.astype(np.int32), use_cache=True)
    for found, wanted in zip(record.past_key_values, right.past_key_values, strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == other.shape
            one, other = (np.moveaxis(np.asarray(x), 1, 2)[is_real] for x in (one, other))
            assert_near(one, other)


def test_every_real_token_of_guided_beams_is_held(subject: Subject) -> None:
    record = generated(subject, BATCH.ids, BATCH.mask, **STRATEGIES["guided beams"])
    ends = ends_of(record.sequences, P)
    assert ends.min() < ends.max()
    check_cache(subject, record, np.asarray(BATCH.mask))


@pytest.mark.parametrize("strategy", ["beams", "groups", "lookup"])
def test_a_cache_of_the_caller_is_held_too(subject: Subject, strategy: str) -> None:
    first = generated(subject, BATCH.ids, BATCH.mask, max_new_tokens=2, eos_token_id=None)
    ids = np.concatenate([first.sequences, words(2, 3, seed=8)], axis=1)
    mask = np.pad(np.asarray(BATCH.mask), ((0, 0), (0, ids.shape[1] - P)), constant_values=1)
    past = first.past_key_values
    record = generated(subject, ids, mask, past_key_values=past, **STRATEGIES[strategy])
    ends = ends_of(record.sequences, ids.shape[1])
    assert ends.min() < ends.max()
    check_cache(subject, record, mask)


@pytest.mark.parametrize("strategy", ["greedy", "beams", "forced", "lookup"])
def test_rows_of_one_length_take_no_other_pass(
    subject: Subject, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "prefill", None)
    options = STRATEGIES[strategy] | {"max_new_tokens": 4, "eos_token_id": None}
    record = generated(subject, BATCH.ids, BATCH.mask, **options)
    assert int(record.past_key_values.length) == P + 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(record.past_key_values))
