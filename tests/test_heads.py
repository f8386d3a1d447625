"""The four heads: what they return, where a classifier looks, and every form of their losses."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests.cases import HEADS, PAD, Batch, batches, expected, labels, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

CLASSIFIER, ANSWERS = Head.SEQUENCE_CLASSIFICATION, Head.QUESTION_ANSWERING


def both(wing: Wing, head: Head, config: OPTConfig, **inputs: Any) -> tuple[Any, Any]:
    """The outputs of a wing, and of the reference with the same weights."""
    weights = random_weights(config, head)
    found = wing.call(wing.build(head, config, weights), **inputs)
    return found, expected(head, config, weights, **inputs)


# What comes out


@pytest.mark.parametrize("head", HEADS)
def test_outputs_are_read_by_name_by_key_by_index_and_as_a_tuple(wing: Wing, head: Head) -> None:
    config = tiny()
    batch = Batch(words(2, 4), None)
    inputs = {**batch.inputs, **labels(head, config, batch)}
    model = wing.build(head, config, random_weights(config, head))
    out = wing.call(model, **inputs, output_hidden_states=True, output_attentions=True)
    first = {Head.NONE: ["last_hidden_state"], ANSWERS: ["loss", "start_logits", "end_logits"]}
    names = [*first.get(head, ["loss", "logits"]), "past_key_values", "hidden_states", "attentions"]
    assert list(out) == names
    assert len(out.to_tuple()) == len(names)
    for place, name in enumerate(names):
        assert out[place] is out[name] is getattr(out, name) is out.to_tuple()[place]


@pytest.mark.parametrize("head", HEADS)
def test_without_return_dict_the_values_come_as_a_tuple(wing: Wing, head: Head) -> None:
    config = tiny()
    weights = random_weights(config, head)
    batch = Batch(words(2, 4), None)
    inputs = {**batch.inputs, **labels(head, config, batch)}
    record = wing.call(wing.build(head, config, weights), **inputs)
    values = wing.call(wing.build(head, config, weights), **inputs, return_dict=False)
    assert type(values) is tuple
    assert len(values) == len(record)
    np.testing.assert_array_equal(values[0], record[0])
    by_config = wing.build(head, tiny(return_dict=False), weights)
    assert type(wing.call(by_config, **inputs)) is tuple
    assert "loss" in wing.call(by_config, **inputs, return_dict=True) or head is Head.NONE


@pytest.mark.parametrize("head", HEADS)
def test_states_and_weights_come_when_the_configuration_or_the_call_asks(
    wing: Wing, head: Head
) -> None:
    weights = random_weights(tiny(), head)
    quiet = wing.build(head, tiny(), weights)
    eager = wing.build(head, tiny(output_attentions=True, output_hidden_states=True), weights)
    ids = words(2, 4)
    out = wing.call(eager, input_ids=ids)
    assert (len(out.hidden_states), len(out.attentions)) == (3, 2)
    assert out.attentions[0].shape == (2, 4, 4, 4)
    assert out.hidden_states[0].shape == (2, 4, 16)
    out = wing.call(eager, input_ids=ids, output_attentions=False, output_hidden_states=False)
    assert out.hidden_states is out.attentions is None
    out = wing.call(quiet, input_ids=ids)
    assert out.hidden_states is out.attentions is None
    assert len(wing.call(quiet, input_ids=ids, output_attentions=True).attentions) == 2


def test_the_last_hidden_state_is_normed_and_projected_as_the_output(wing: Wing) -> None:
    config = tiny(word_embed_proj_dim=12)
    model = wing.build(Head.NONE, config, random_weights(config, Head.NONE))
    out = wing.call(model, input_ids=words(2, 4), output_hidden_states=True)
    np.testing.assert_array_equal(out.hidden_states[-1], out.last_hidden_state)
    assert out.hidden_states[-1].shape == (2, 4, 12)
    assert out.hidden_states[-2].shape == (2, 4, 16)


# The language model


def test_labels_of_minus_100_do_not_count(wing: Wing) -> None:
    ids = words(2, 6)
    some = ids.copy()
    some[0, 2:] = -100
    some[1, 0] = -100
    found, right = both(wing, Head.CAUSAL_LM, tiny(), input_ids=ids, labels=some)
    assert_near(found.loss, right["loss"])
    found, _ = both(wing, Head.CAUSAL_LM, tiny(), input_ids=ids, labels=np.full_like(ids, -100))
    assert np.isnan(found.loss)


def test_one_token_has_nothing_to_predict(wing: Wing) -> None:
    ids = words(2, 1)
    found, _ = both(wing, Head.CAUSAL_LM, tiny(), input_ids=ids, labels=ids)
    assert np.isnan(found.loss)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_scores_by_the_embedding_only_where_it_is_tied(wing: Wing, tied: bool) -> None:
    config = tiny(tie_word_embeddings=tied, word_embed_proj_dim=12)
    weights = random_weights(config, Head.CAUSAL_LM)
    assert ("lm_head.weight" in weights) is not tied
    found, right = both(wing, Head.CAUSAL_LM, config, input_ids=words(2, 5))
    assert_near(found.logits, right["logits"])


# Classification


@given(batch=batches(), seed=st.integers(0, 2**16))
def test_a_classifier_looks_at_the_last_token_that_the_mask_shows(
    wing: Wing, batch: Batch, seed: int
) -> None:
    config = tiny(num_labels=3)
    found, right = both(wing, CLASSIFIER, config, **batch.inputs)
    assert_near(found.logits, right["logits"])


def test_the_mask_wins_over_the_padding_id(wing: Wing) -> None:
    ids = words(2, 6)
    ids[0, 5] = ids[1, 3] = PAD
    ones = np.ones_like(ids)
    found, right = both(wing, CLASSIFIER, tiny(), input_ids=ids, attention_mask=ones)
    assert_near(found.logits, right["logits"])


def test_without_a_mask_the_last_id_that_is_no_padding_counts(wing: Wing) -> None:
    ids = words(4, 6)
    ids[0, 4:] = ids[1, :3] = ids[2, 2] = ids[3] = PAD
    found, right = both(wing, CLASSIFIER, tiny(), input_ids=ids)
    assert_near(found.logits, right["logits"])


def test_embeddings_are_pooled_by_their_mask_else_at_the_end(wing: Wing) -> None:
    embeds = np.random.default_rng(0).normal(0, 0.02, (2, 5, 16)).astype(np.float32)
    found, right = both(wing, CLASSIFIER, tiny(), inputs_embeds=embeds)
    assert_near(found.logits, right["logits"])
    mask = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    found, right = both(wing, CLASSIFIER, tiny(), inputs_embeds=embeds, attention_mask=mask)
    assert_near(found.logits, right["logits"])


def test_one_row_needs_neither_mask_nor_padding_id(wing: Wing) -> None:
    config = tiny(pad_token_id=None)
    found, right = both(wing, CLASSIFIER, config, input_ids=words(1, 5))
    assert_near(found.logits, right["logits"])
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found, right = both(wing, CLASSIFIER, config, input_ids=words(2, 5), attention_mask=mask)
    assert_near(found.logits, right["logits"])


def test_a_classifier_pools_new_tokens_behind_a_cache(wing: Wing) -> None:
    config = tiny()
    model = wing.build(CLASSIFIER, config, random_weights(config, CLASSIFIER))
    ids, mask = words(2, 7), np.array([[1] * 5 + [0, 0], [0, 0] + [1] * 5])
    whole = wing.call(model, input_ids=ids, attention_mask=mask)
    past = wing.call(model, input_ids=ids[:, :3], attention_mask=mask[:, :3]).past_key_values
    rest = wing.call(model, input_ids=ids[:, 3:], attention_mask=mask, past_key_values=past)
    assert_near(rest.logits, whole.logits)


LOSSES: dict[str, tuple[dict[str, Any], Any]] = {
    "one label is regression": ({"num_labels": 1}, np.array([0.5, -1.0, 2.0], np.float32)),
    "one label in a column": ({"num_labels": 1}, np.array([[0.5], [-1.0], [2.0]], np.float32)),
    "one label in whole numbers": ({"num_labels": 1}, np.array([1, 0, 2])),
    "whole numbers are classes": ({"num_labels": 4}, np.array([3, 0, 2])),
    "classes in a column": ({"num_labels": 4}, np.array([[3], [0], [2]])),
    "classes that do not count": ({"num_labels": 4}, np.array([3, -100, 2])),
    "real numbers are many classes": ({"num_labels": 2}, np.eye(3, 2, dtype=np.float32)),
    "a problem type of regression": (
        {"num_labels": 2, "problem_type": "regression"},
        np.arange(6, dtype=np.float32).reshape(3, 2),
    ),
    "a problem type of one class": (
        {"num_labels": 2, "problem_type": "single_label_classification"},
        np.array([1, 0, 1]),
    ),
    "a problem type of many classes": (
        {"num_labels": 2, "problem_type": "multi_label_classification"},
        np.array([[1, 0], [1, 1], [0, 0]]),
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_of_a_classifier_follows_labels_and_problem_type(wing: Wing, case: str) -> None:
    changes, given_labels = LOSSES[case]
    inputs = {"input_ids": words(3, 4), "labels": given_labels}
    found, right = both(wing, CLASSIFIER, tiny(**changes), **inputs)
    assert np.shape(found.loss) == ()
    assert_near(found.loss, right["loss"])


def test_a_loss_never_writes_a_problem_type_into_the_configuration(wing: Wing) -> None:
    config = tiny(num_labels=3)
    model = wing.build(CLASSIFIER, config, random_weights(config, CLASSIFIER))
    wing.call(model, input_ids=words(2, 4), labels=np.array([0, 1]))
    assert model.config.problem_type is None
    assert config.problem_type is None


# Question answering

PLACES: dict[str, tuple[Any, Any]] = {
    "in range": (np.array([0, 4, 2]), np.array([1, 4, 3])),
    "some beyond the end": (np.array([0, 5, 2]), np.array([99, 4, 3])),
    "negative, as 0": (np.array([-1, 4, -7]), np.array([1, -1, 3])),
    "in columns": (np.array([[0], [4], [2]]), np.array([[1], [4], [3]])),
    "all beyond the end": (np.array([5, 6, 7]), np.array([1, 2, 3])),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_loss_of_answers_is_the_mean_of_start_and_end(wing: Wing, case: str) -> None:
    starts, ends = PLACES[case]
    inputs = {"input_ids": words(3, 5), "start_positions": starts, "end_positions": ends}
    found, right = both(wing, ANSWERS, tiny(), **inputs)
    assert_near(found.loss, right["loss"])


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_losses_are_computed_in_float32(wing: Wing, head: Head, dtype: str) -> None:
    config = tiny()
    batch = Batch(words(2, 6), None)
    given_labels = labels(head, config, batch)
    model = wing.build(head, config, random_weights(config, head), dtype)
    loss = wing.call(model, **batch.inputs, **given_labels).loss
    # A number that no half type holds; every bfloat16 of this size is a float16 too.
    assert loss != loss.astype(np.float16)
