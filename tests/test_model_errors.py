"""What a call refuses, and that the message says what was expected, what was found, and where."""

from typing import Any

import numpy as np
import pytest

from opt_core.weights import Head
from tests.cases import HEADS, random_weights, tiny, words
from tests.wings import Wing

IDS = words(2, 4)
EMBEDS = np.zeros((2, 4, 16), np.float32)
HEAD_MASK = np.ones((3, 4), np.float32)


@pytest.fixture
def model(wing: Wing) -> Any:
    return wing.build(Head.CAUSAL_LM, tiny(), random_weights(tiny(), Head.CAUSAL_LM))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither ids nor embeddings": ({}, "give either input_ids or inputs_embeds; found neither"),
    "both ids and embeddings": (
        {"input_ids": IDS, "inputs_embeds": EMBEDS},
        "give either input_ids or inputs_embeds; found both",
    ),
    "one axis of ids": (
        {"input_ids": IDS[0]},
        r"input_ids are .*int\d+ \(4,\), expected whole num",
    ),
    "ids that are no whole numbers": (
        {"input_ids": IDS.astype(np.float32)},
        r"input_ids are .*float32 \(2, 4\), expected whole numbers \(batch, tokens\)",
    ),
    "no token": ({"input_ids": IDS[:, :0]}, r"the input is empty: \(2, 0\); give at least one"),
    "no row": ({"input_ids": IDS[:0]}, r"the input is empty: \(0, 4\); give at least one"),
    "no embedding": ({"inputs_embeds": EMBEDS[:, :0]}, r"the input is empty: \(2, 0, 16\)"),
    "embeddings of another width": (
        {"inputs_embeds": EMBEDS[..., :5]},
        r"inputs_embeds are \(2, 4, 5\), expected \(batch, tokens, 16\): the width of embed_tokens",
    ),
    "embeddings of two axes": ({"inputs_embeds": EMBEDS[0]}, r"inputs_embeds are \(4, 16\), expec"),
    "an id beyond the vocabulary": (
        {"input_ids": np.array([[3, 4], [5, 40]])},
        "input_ids hold 40 in row 1 at place 1; the vocabulary goes from 0 to 39: was the text",
    ),
    "an id below 0": ({"input_ids": np.array([[3, -1]])}, "input_ids hold -1 in row 0 at place 1"),
    "a mask that is too short": (
        {"input_ids": IDS, "attention_mask": IDS[:, :3] * 0 + 1},
        r"attention_mask is \(2, 3\), expected \(2, 4\): 0 tokens in the cache and 4 new ones",
    ),
    "a mask that is too long": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 5), np.int64)},
        r"attention_mask is \(2, 5\), expected \(2, 4\)",
    ),
    "a mask for one row of two": (
        {"input_ids": IDS, "attention_mask": np.ones((1, 4), np.int64)},
        r"attention_mask is \(1, 4\), expected \(2, 4\)",
    ),
    "a mask of four axes": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 1, 4, 4), np.float32)},
        r"attention_mask is \(2, 1, 4, 4\), expected \(2, 4\)",
    ),
    "a mask to be added to scores": (
        {"input_ids": IDS, "attention_mask": np.where(IDS > 9, 0.0, -1e9).astype(np.float32)},
        "attention_mask holds values other than 0 and 1; give 1 for what may be attended to",
    ),
    "a mask of large numbers": (
        {"input_ids": IDS, "attention_mask": IDS * 0 + 2},
        "attention_mask holds values other than 0 and 1",
    ),
    "positions of another shape": (
        {"input_ids": IDS, "position_ids": IDS[:, :3]},
        r"position_ids are \(2, 3\), expected \(2, 4\)",
    ),
    "a position beyond the table": (
        {"input_ids": IDS, "position_ids": np.array([[0, 1, 2, 32]])},
        r"asks for position 32, but positions go from 0 to 31 \(max_position_embeddings is 32\)",
    ),
    "a position below -1": (
        {"input_ids": IDS, "position_ids": np.array([[0, 1, 2, -2]])},
        "asks for position -2, but positions go from 0 to 31",
    ),
    "more tokens than positions": (
        {"input_ids": words(1, 33)},
        "asks for position 32, but positions go from 0 to 31 .*; shorten the input",
    ),
    "more tokens than positions beside padding": (
        {"input_ids": words(1, 35), "attention_mask": np.array([[0] + [1] * 34])},
        "asks for position 33, but positions go from 0 to 31 .*; shorten the input",
    ),
    "head factors of another shape": (
        {"input_ids": IDS, "head_mask": HEAD_MASK},
        r"head_mask is \(3, 4\), expected \(2, 4\) \(layers, heads\) or \(4,\)",
    ),
    "labels of another shape": (
        {"input_ids": IDS, "labels": IDS[:, 1:]},
        r"labels are \(2, 3\), expected \(2, 4\) as the input",
    ),
    "labels outside the vocabulary": (
        {"input_ids": IDS, "labels": IDS * 0 + 40},
        "labels hold 40, outside 0 to 39; -100 marks what does not count",
    ),
    "labels below 0": ({"input_ids": IDS, "labels": IDS * 0 - 1}, "labels hold -1, outside 0 to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_call_refuses(wing: Wing, model: Any, case: str) -> None:
    inputs, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        wing.call(model, **inputs)


@pytest.mark.parametrize("head", HEADS)
def test_every_class_checks_its_inputs(wing: Wing, head: Head) -> None:
    model = wing.fresh(head, tiny())
    with pytest.raises(ValueError, match="input_ids hold 40 in row 0 at place 1"):
        wing.call(model, input_ids=np.array([[3, 40]]))
    with pytest.raises(ValueError, match="found neither"):
        wing.call(model)


HEADED: dict[str, tuple[Head, dict[str, Any], dict[str, Any], str]] = {
    "classes for another number of rows": (
        Head.SEQUENCE_CLASSIFICATION,
        {"num_labels": 3},
        {"labels": np.array([0, 1, 2])},
        r"labels are \(3,\), expected one class for each of 2 rows",
    ),
    "a class that is not there": (
        Head.SEQUENCE_CLASSIFICATION,
        {"num_labels": 3},
        {"labels": np.array([0, 3])},
        "labels hold 3, outside 0 to 2; -100 marks what does not count",
    ),
    "real numbers of another shape": (
        Head.SEQUENCE_CLASSIFICATION,
        {"num_labels": 3},
        {"labels": np.zeros((2, 2), np.float32)},
        r"labels are \(2, 2\), expected \(2, 3\) for multi_label_classification",
    ),
    "regression of another shape": (
        Head.SEQUENCE_CLASSIFICATION,
        {"num_labels": 1},
        {"labels": np.zeros(3, np.float32)},
        r"labels are \(3,\), expected \(2, 1\) for regression",
    ),
    "rows of unknown length": (
        Head.SEQUENCE_CLASSIFICATION,
        {"pad_token_id": None},
        {},
        "2 rows without attention_mask, and the configuration has no pad_token_id: nobody knows",
    ),
    "the start of an answer alone": (
        Head.QUESTION_ANSWERING,
        {},
        {"start_positions": np.array([0, 1])},
        "give both start_positions and end_positions, or neither",
    ),
    "the end of an answer alone": (
        Head.QUESTION_ANSWERING,
        {},
        {"end_positions": np.array([0, 1])},
        "give both start_positions and end_positions, or neither",
    ),
    "starts for another number of rows": (
        Head.QUESTION_ANSWERING,
        {},
        {"start_positions": np.array([0]), "end_positions": np.array([0, 1])},
        r"start_positions are \(1,\), expected one place for each of 2 rows",
    ),
    "ends for another number of rows": (
        Head.QUESTION_ANSWERING,
        {},
        {"start_positions": np.array([0, 1]), "end_positions": np.array([0, 1, 1])},
        r"end_positions are \(3,\), expected one place for each of 2 rows",
    ),
}


@pytest.mark.parametrize("case", HEADED)
def test_a_head_refuses(wing: Wing, case: str) -> None:
    head, changes, inputs, message = HEADED[case]
    model = wing.fresh(head, tiny(**changes))
    with pytest.raises(ValueError, match=message):
        wing.call(model, input_ids=IDS, **inputs)


@pytest.mark.parametrize("name", ["flash", "xformers", ""])
def test_an_unknown_attention_implementation_is_refused(wing: Wing, name: str) -> None:
    with pytest.raises(ValueError, match=f"no attention implementation '{name}'; there are eager"):
        wing.fresh(Head.NONE, tiny(), attn_implementation=name)


def test_flash_attention_is_refused_where_it_cannot_run(wing: Wing) -> None:
    if wing.fused is None:
        pytest.skip("this wing computes attention in a way that every device can")
    model = wing.fresh(Head.NONE, tiny(), attn_implementation=wing.fused)
    with pytest.raises(
        ValueError, match=r"needs float16 or bfloat16 on a CUDA device, found .*cpu"
    ):
        wing.call(model, input_ids=IDS)
    with pytest.raises(ValueError, match="never holds the attention weights, so output_attentions"):
        wing.call(model, input_ids=IDS, output_attentions=True)


def test_an_argument_that_nobody_knows_is_refused(wing: Wing, model: Any) -> None:
    with pytest.raises(TypeError, match="token_type_ids"):
        wing.call(model, input_ids=IDS, token_type_ids=IDS)


def test_a_built_models_configuration_keeps_what_shapes_its_weights(wing: Wing, model: Any) -> None:
    with pytest.raises(ValueError, match="hidden_size cannot change from 16 to 32: the model is"):
        model.config.hidden_size = 32
    model.config.use_cache = False
    assert wing.call(model, input_ids=IDS).past_key_values is None


def test_a_model_does_not_share_the_configuration_of_its_caller(wing: Wing) -> None:
    config = tiny()
    model = wing.fresh(Head.CAUSAL_LM, config)
    config.use_cache = False
    config.hidden_size = 32
    assert wing.call(model, input_ids=IDS).past_key_values is not None
    assert model.config.hidden_size == 16


def test_generation_names_an_id_outside_the_vocabulary(wing: Wing) -> None:
    config = tiny()
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))
    ids = words(2, 4)
    ids[1, 2] = config.vocab_size
    with pytest.raises(ValueError, match=rf"hold {config.vocab_size} in row 1 at place 2"):
        wing.generate(model, ids, max_new_tokens=3)
