"""The output records: a dictionary, a tuple and an object with fields at once."""

import copy
import pickle
from collections.abc import Mapping

import pytest

from opt_core.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    GenerateOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)

RECORDS: list[type[ModelOutput]] = [
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    QuestionAnsweringModelOutput,
    GenerateOutput,
]


def test_a_value_reads_by_attribute_key_and_index() -> None:
    out = CausalLMOutputWithPast(logits="scores", loss=0.5)
    assert out.loss == out["loss"] == out[0] == 0.5
    assert out.logits == out["logits"] == out[1] == out[-1] == "scores"
    assert out[:1] == (0.5,)


def test_what_was_not_asked_for_is_absent_and_not_counted() -> None:
    out = CausalLMOutputWithPast(loss=None, logits="scores")
    assert out.loss is None
    assert "loss" not in out
    assert out[0] == "scores"
    assert out.to_tuple() == ("scores",)
    with pytest.raises(KeyError):
        out["loss"]
    with pytest.raises(IndexError):
        out[1]


def test_values_come_in_the_order_of_the_fields() -> None:
    out = CausalLMOutputWithPast(attentions=3, logits=2, loss=1)
    assert list(out) == ["loss", "logits", "attentions"]
    assert out.to_tuple() == (1, 2, 3)
    assert tuple(out.values()) == (1, 2, 3)


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_is_none_until_it_is_given(record: type[ModelOutput]) -> None:
    out = record()
    assert [getattr(out, name) for name in record.fields] == [None] * len(record.fields)
    assert out.to_tuple() == ()


def test_a_record_is_a_mapping_and_is_made_from_one() -> None:
    out = CausalLMOutputWithPast(logits=1)
    assert isinstance(out, dict)
    assert isinstance(out, Mapping)
    assert CausalLMOutputWithPast({"logits": 1}) == out
    assert CausalLMOutputWithPast([("logits", 1)]) == out
    assert {**out} == {"logits": 1}


def test_a_value_may_be_set_and_taken_away() -> None:
    out = CausalLMOutputWithPast(logits=1)
    out.loss = 2
    out["attentions"] = 3
    assert out.to_tuple() == (2, 1, 3)
    out.loss = None
    assert out.to_tuple() == (1, 3)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_a_record_survives_copies_and_pickling(copied: object) -> None:
    out = SequenceClassifierOutputWithPast(logits=[1, 2], loss=3)
    assert callable(copied)
    other = copied(out)
    assert type(other) is type(out)
    assert other == out
    assert other.loss == 3


def test_a_field_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="CausalLMOutputWithPast has no field score, scores"):
        CausalLMOutputWithPast(score=1, scores=2)
    out = CausalLMOutputWithPast(logits=1)
    with pytest.raises(AttributeError, match="CausalLMOutputWithPast has no field 'score'"):
        out.score  # noqa: B018
    with pytest.raises(TypeError, match="CausalLMOutputWithPast has no field 'score'"):
        out.score = 1
    with pytest.raises(TypeError, match="CausalLMOutputWithPast has no field 'score'"):
        out["score"] = 1
