"""Padding, masks and neighbours: none of them changes what a real token gives."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests.cases import PAD, SWITCHES, configs, padded, random_weights, tiny, words
from tests.tolerances import assert_gradients_near, assert_near
from tests.wings import Wing

seeds = st.integers(0, 2**16)
lengths = st.lists(st.integers(1, 9), min_size=2, max_size=3)
SIDES = ["left", "right"]


@pytest.fixture
def model(wing: Wing) -> Any:
    config = tiny()
    return wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))


def texts_of(counts: list[int], seed: int = 0) -> list[NDArray[np.int64]]:
    return [words(1, count, seed + row)[0] for row, count in enumerate(counts)]


@pytest.mark.parametrize("side", SIDES)
@given(config=configs(), counts=lengths, seed=seeds)
def test_padding_on_either_side_changes_no_real_token(
    wing: Wing, side: str, config: OPTConfig, counts: list[int], seed: int
) -> None:
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM, seed))
    texts = texts_of(counts, seed)
    batch = padded(texts, side)
    found = wing.call(model, **batch.inputs).logits
    for row, text in enumerate(texts):
        alone = wing.call(model, input_ids=text[None]).logits[0]
        assert_near(found[row][batch.shown[row]], alone, what=f"row {row}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("switch", ["pre_norm", "post_norm_projected"])
def test_padding_in_half_precision_gives_finite_values_near_the_unpadded_ones(
    wing: Wing, dtype: str, side: str, switch: str
) -> None:
    config = tiny(**SWITCHES[switch])
    weights = random_weights(config, Head.CAUSAL_LM)
    model = wing.build(Head.CAUSAL_LM, config, weights, dtype)
    texts = texts_of([9, 1, 4])
    batch = padded(texts, side)
    found = wing.call(model, **batch.inputs).logits
    assert np.isfinite(found).all()
    for row, text in enumerate(texts):
        alone = wing.call(model, input_ids=text[None]).logits[0]
        assert_near(found[row][batch.shown[row]], alone, "half")


@given(config=configs(), seed=seeds)
def test_rows_do_not_depend_on_their_neighbours(wing: Wing, config: OPTConfig, seed: int) -> None:
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM, seed))
    ids = words(3, 6, seed)
    together = wing.call(model, input_ids=ids).logits
    others = wing.call(model, input_ids=np.concatenate([words(2, 6, seed + 1), ids[1:2]])).logits
    assert_near(others[2], together[1], "same program")


def test_what_stands_under_the_mask_does_not_matter(wing: Wing, model: Any) -> None:
    mask = np.array([[0, 0, 1, 1, 0, 1, 0]])
    one, other = words(1, 7, seed=1), words(1, 7, seed=2)
    other[mask == 1] = one[mask == 1]
    found = wing.call(model, input_ids=one, attention_mask=mask).logits
    again = wing.call(model, input_ids=other, attention_mask=mask).logits
    assert_near(again, found, "same program", where=mask == 1)


def test_hidden_places_are_as_if_they_were_not_there(wing: Wing, model: Any) -> None:
    ids, mask = words(1, 9), np.array([[1, 0, 1, 1, 0, 0, 1, 1, 1]])
    found = wing.call(model, input_ids=ids, attention_mask=mask).logits[mask == 1]
    assert_near(found, wing.call(model, input_ids=ids[mask == 1][None]).logits[0])


def test_later_tokens_do_not_change_earlier_ones(wing: Wing, model: Any) -> None:
    one, other = words(1, 8, seed=1), words(1, 8, seed=2)
    other[:, :5] = one[:, :5]
    found, again = (wing.call(model, input_ids=ids).logits[:, :5] for ids in (one, other))
    assert_near(again, found, "same program")


@pytest.mark.parametrize("kind", [np.bool_, np.int32, np.float32, np.float16])
def test_a_mask_may_be_of_any_type(wing: Wing, model: Any, kind: Any) -> None:
    ids, mask = words(2, 5), np.array([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    right = wing.call(model, input_ids=ids, attention_mask=mask).logits
    found = wing.call(model, input_ids=ids, attention_mask=mask.astype(kind)).logits
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("kind", [np.int64, np.float32])
def test_a_mask_of_ones_is_no_mask(wing: Wing, model: Any, kind: Any) -> None:
    ids = words(2, 5)
    found = wing.call(model, input_ids=ids, attention_mask=np.ones((2, 5), kind)).logits
    np.testing.assert_array_equal(found, wing.call(model, input_ids=ids).logits)


def test_the_padding_id_without_a_mask_is_a_word_like_any_other(wing: Wing, model: Any) -> None:
    ids = words(1, 5)
    ids[0, 2] = PAD
    ones = np.ones_like(ids)
    found = wing.call(model, input_ids=ids).logits
    np.testing.assert_array_equal(
        found, wing.call(model, input_ids=ids, attention_mask=ones).logits
    )


def test_a_row_of_nothing_but_padding_stays_finite_and_harms_nobody(wing: Wing, model: Any) -> None:
    ids = words(3, 5)
    mask = np.array([[1] * 5, [0] * 5, [1] * 5])
    found = wing.call(model, input_ids=ids, attention_mask=mask).logits
    assert np.isfinite(found).all()
    assert_near(found[[0, 2]], wing.call(model, input_ids=ids).logits[[0, 2]])


def test_a_long_padded_row_may_be_wider_than_the_table_of_positions(wing: Wing, model: Any) -> None:
    text = words(1, 30)
    wide = np.concatenate([np.full((1, 10), PAD), text], axis=1)
    found = wing.call(model, input_ids=wide, attention_mask=(np.arange(40) >= 10)[None])
    assert_near(found.logits[:, 10:], wing.call(model, input_ids=text).logits)


@pytest.mark.parametrize("side", SIDES)
def test_gradients_do_not_depend_on_padding(wing: Wing, side: str) -> None:
    config = tiny()
    weights = random_weights(config, Head.CAUSAL_LM)
    model = wing.build(Head.CAUSAL_LM, config, weights)
    text = words(1, 6)
    plain = wing.gradients(model, input_ids=text, labels=text)
    batch = padded([text[0], words(1, 9)[0]], side)
    counted = np.where(batch.shown, batch.ids, -100)
    counted[1] = -100
    if side == "left":
        # The place before the first token predicts it from padding; alone, nothing does.
        counted[0, 3] = -100
    assert_gradients_near(wing.gradients(model, **batch.inputs, labels=counted), plain)
