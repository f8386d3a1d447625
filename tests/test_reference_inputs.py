"""What the NumPy reference accepts and refuses, and what its parts mean to each other."""

from typing import Any

import numpy as np
import pytest

from opt_core import reference
from opt_core.config import OPTConfig
from opt_core.reference.inputs import Floats
from opt_core.weights import Head, table

CONFIG = OPTConfig(
    vocab_size=23,
    hidden_size=8,
    num_hidden_layers=2,
    ffn_dim=12,
    num_attention_heads=4,
    max_position_embeddings=9,
)
IDS = np.array([[2, 5, 6, 7], [2, 8, 9, 10]])


def fresh_weights(config: OPTConfig = CONFIG, head: Head = Head.CAUSAL_LM) -> dict[str, Floats]:
    random = np.random.default_rng(0)
    return {
        name: random.normal(row.mean, 0.4, row.shape) for name, row in table(config, head).items()
    }


WEIGHTS = fresh_weights()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": np.zeros((2, 4, 8))}, "give either input_ids or inp"),
        ({"input_ids": IDS[0]}, r"input_ids has shape \(4,\); it must be \(rows, tokens\)"),
        ({"input_ids": IDS / 2}, "input_ids holds float64; it must hold whole numbers"),
        (
            {"input_ids": [[2, 23]]},
            "input_ids holds 23 in row 0 at place 1, outside the vocab.* 23",
        ),
        ({"input_ids": [[2], [-1]]}, "input_ids holds -1 in row 1 at place 0"),
        ({"inputs_embeds": np.zeros((2, 4, 7))}, r"inputs_embeds has shape \(2, 4, 7\); .* 8\)"),
        ({"inputs_embeds": np.zeros((2, 8))}, r"inputs_embeds has shape \(2, 8\)"),
        (
            {"input_ids": IDS, "attention_mask": np.ones((2, 5))},
            r"attention_mask has shape \(2, 5\), but there are 2 rows of 4 tokens; .* \(2, 4\)",
        ),
        (
            {"input_ids": IDS, "attention_mask": np.full((2, 4), 0.5)},
            "attention_mask holds 0.5; it must hold 1 to show, 0 to hide",
        ),
        (
            {"input_ids": IDS, "position_ids": np.zeros((2, 3), np.int64)},
            r"position_ids has shape \(2, 3\), but the tokens have \(2, 4\)",
        ),
        (
            {"input_ids": IDS, "position_ids": np.zeros((2, 4))},
            "position_ids holds float64; it must hold whole numbers",
        ),
        (
            {"input_ids": IDS, "position_ids": [[0, 1, 2, 9]]},
            r"position 9 \(row 0, place 3\) .* max_position_embeddings is 9, so positions end at 8",
        ),
        (
            {"input_ids": IDS, "position_ids": [[0, 1, 2, -3]]},
            r"position -3 \(row 0, place 3\) has no embedding",
        ),
        (
            {"input_ids": np.full((1, 10), 5)},
            r"position 9 \(row 0, place 9\) .* max_position_embeddings is 9",
        ),
        (
            {"input_ids": IDS, "head_mask": np.ones((4, 2))},
            r"head_mask has shape \(4, 2\); it must be \(2, 4\) or \(4,\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reference.forward(CONFIG, WEIGHTS, **inputs)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.ones((2, 3), np.int64), r"labels have shape \(2, 3\); they must have \(2, 4\)"),
        (np.ones((2, 4)), "labels holds float64; it must hold whole numbers"),
        (np.where(IDS == 9, 23, IDS), r"labels hold 23 at \(1, 2\); .* -100, .* from 0 to 22"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reference.causal_lm(CONFIG, WEIGHTS, input_ids=IDS, labels=labels)


@pytest.mark.parametrize("kind", [np.bool_, np.int32, np.float32])
def test_a_mask_may_be_of_any_type(kind: Any) -> None:
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1]])
    expected = reference.causal_lm(CONFIG, WEIGHTS, input_ids=IDS, attention_mask=mask)
    found = reference.causal_lm(CONFIG, WEIGHTS, input_ids=IDS, attention_mask=mask.astype(kind))
    np.testing.assert_array_equal(found.logits, expected.logits)


def test_padding_beyond_the_positions_is_no_fault() -> None:
    padded = np.concatenate([np.ones((2, 9), np.int64), IDS], axis=1)
    mask = (np.arange(13) >= 9).astype(np.int64)[None].repeat(2, axis=0)
    found = reference.causal_lm(CONFIG, WEIGHTS, input_ids=padded, attention_mask=mask)
    plain = reference.causal_lm(CONFIG, WEIGHTS, input_ids=IDS)
    np.testing.assert_allclose(found.logits[:, 9:], plain.logits, atol=1e-12)


def test_a_row_of_nothing_but_padding_stays_finite() -> None:
    found = reference.causal_lm(
        CONFIG, WEIGHTS, input_ids=IDS, attention_mask=np.zeros((2, 4), np.int64)
    )
    assert np.isfinite(found.logits).all()


def test_positions_of_one_row_serve_all_rows() -> None:
    places = np.array([[3, 4, 5, 6]])
    one = reference.forward(CONFIG, WEIGHTS, input_ids=IDS, position_ids=places)
    all_rows = reference.forward(CONFIG, WEIGHTS, input_ids=IDS, position_ids=places.repeat(2, 0))
    np.testing.assert_array_equal(one.last_hidden_state, all_rows.last_hidden_state)


def test_a_head_mask_of_one_layer_serves_all_layers() -> None:
    row = np.array([1.0, 0.0, 0.5, 1.0])
    one = reference.forward(CONFIG, WEIGHTS, input_ids=IDS, head_mask=row)
    both = reference.forward(CONFIG, WEIGHTS, input_ids=IDS, head_mask=np.stack([row, row]))
    np.testing.assert_array_equal(one.last_hidden_state, both.last_hidden_state)


def test_a_pruned_head_is_a_head_masked_out() -> None:
    heads = {0: [1, 2], 1: [0]}
    pruned, weights = CONFIG.replace(pruned_heads=heads), dict(WEIGHTS)
    mask = np.ones((2, 4))
    for layer, gone in heads.items():
        mask[layer, gone] = 0
        rows = np.concatenate([np.arange(2) + 2 * head for head in gone])
        path = f"model.decoder.layers.{layer}.self_attn"
        for name in ("q_proj", "k_proj", "v_proj"):
            for leaf in ("weight", "bias"):
                key = f"{path}.{name}.{leaf}"
                weights[key] = np.delete(weights[key], rows, axis=0)
        key = f"{path}.out_proj.weight"
        weights[key] = np.delete(weights[key], rows, axis=1)
    found = reference.causal_lm(pruned, weights, input_ids=IDS)
    expected = reference.causal_lm(CONFIG, WEIGHTS, input_ids=IDS, head_mask=mask)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-12)
    assert [a.shape[1] for a in found.forward.attentions] == [2, 3]
    factor = np.array([[1.0, 1, 1, 0.5], [1, 1, 0.5, 1]])
    found = reference.causal_lm(pruned, weights, input_ids=IDS, head_mask=factor)
    expected = reference.causal_lm(CONFIG, WEIGHTS, input_ids=IDS, head_mask=mask * factor)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-12)


def test_one_token_has_no_label_to_predict() -> None:
    found = reference.causal_lm(CONFIG, WEIGHTS, input_ids=IDS[:, :1], labels=IDS[:, :1])
    assert found.loss is not None
    assert np.isnan(found.loss)


# Classification


def classify(labels: Any = None, **changes: Any) -> reference.SequenceClassification:
    config = CONFIG.replace(**{"num_labels": 3, **changes})
    weights = fresh_weights(config, Head.SEQUENCE_CLASSIFICATION)
    return reference.sequence_classification(config, weights, input_ids=IDS, labels=labels)


def test_the_kind_of_loss_follows_from_the_labels() -> None:
    whole, real = np.array([2, 0]), np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert classify(whole).loss == classify(whole, problem_type="single_label_classification").loss
    assert classify(real).loss == classify(real, problem_type="multi_label_classification").loss
    one = np.array([0.5, -1.0])
    assert classify(one, num_labels=1).loss == classify(one[:, None], num_labels=1).loss
    column = whole[:, None]
    assert classify(column).loss == classify(whole).loss


def test_regression_of_several_numbers_is_the_mean_square_of_all() -> None:
    targets = np.arange(6.0).reshape(2, 3)
    found = classify(targets, problem_type="regression")
    assert found.loss == pytest.approx(((found.logits - targets) ** 2).mean(), rel=1e-14)


def test_classes_outside_the_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels hold 3 at \(1,\); .* from 0 to 2"):
        classify(np.array([0, 3]))
    with pytest.raises(
        ValueError, match=r"labels have shape \(2,\), but multi_label_cl.* \(2, 3\)"
    ):
        classify(np.array([0.0, 1.0]))


def test_classification_takes_the_last_token_that_the_mask_shows() -> None:
    config = CONFIG.replace(num_labels=3)
    weights = fresh_weights(config, Head.SEQUENCE_CLASSIFICATION)
    mask = np.array([[1, 1, 0, 0], [0, 1, 1, 1]])
    found = reference.sequence_classification(config, weights, input_ids=IDS, attention_mask=mask)
    scores = found.forward.modules["score"]
    np.testing.assert_array_equal(found.logits, scores[[0, 1], [1, 3]])


# Question answering


def answer(**positions: Any) -> reference.QuestionAnswering:
    weights = fresh_weights(CONFIG, Head.QUESTION_ANSWERING)
    return reference.question_answering(CONFIG, weights, input_ids=IDS, **positions)


def test_without_positions_an_answer_has_no_loss() -> None:
    assert answer().loss is None


def test_positions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="give both start_positions and end_positions, or none"):
        answer(start_positions=np.array([0, 1]))
    with pytest.raises(ValueError, match=r"answer positions have shape \(3,\); .* of the 2 rows"):
        answer(start_positions=np.array([0, 1, 2]), end_positions=np.array([0, 1, 2]))
