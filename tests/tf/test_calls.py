"""Calls of Keras models: every way to pass inputs, every argument, what comes out and where."""

from __future__ import annotations

from collections import UserDict
from functools import partial
from inspect import signature
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core.outputs import ModelOutput
from opt_core.weights import Head
from opt_tf import (
    Cache,
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
)
from opt_tf.layers import linear, product
from tests.cases import HEADS, Batch, labels, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = tf.constant(words(2, 6))
MASK = tf.constant([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
MAIN = {
    Head.NONE: "last_hidden_state",
    Head.CAUSAL_LM: "logits",
    Head.SEQUENCE_CLASSIFICATION: "logits",
    Head.QUESTION_ANSWERING: "start_logits",
}


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, "num_labels": 3, **changes})
    return wing.build(head, config, random_weights(config, head))


def targets(head: Head, model: Any) -> dict[str, Any]:
    arrays = labels(head, model.config, Batch(IDS.numpy(), MASK.numpy()))
    return {name: tf.constant(values) for name, values in arrays.items()}


# How inputs may be passed


def ways(model: Any) -> dict[str, Any]:
    """The same ids and mask in every way that Keras and transformers know."""
    names = list(signature(type(model).call).parameters)[1:]
    between: list[Any] = [None] * (names.index("attention_mask") - 1)
    return {
        "keywords": lambda: model(input_ids=IDS, attention_mask=MASK),
        "ids, then a keyword": lambda: model(IDS, attention_mask=MASK),
        "places": lambda: model(IDS, *between, MASK),
        "a list": lambda: model([IDS, *between, MASK]),
        "a tuple": lambda: model((IDS, *between, MASK)),
        "a dictionary": lambda: model({"input_ids": IDS, "attention_mask": MASK}),
        "a mapping": lambda: model(UserDict(input_ids=IDS, attention_mask=MASK)),
        "a dictionary by its name": lambda: model(
            input_ids={"input_ids": IDS, "attention_mask": MASK}
        ),
        "a dictionary and a keyword": lambda: model({"input_ids": IDS}, attention_mask=MASK),
        "NumPy": lambda: model(IDS.numpy(), attention_mask=MASK.numpy()),
        "lists of numbers": lambda: model(
            IDS.numpy().tolist(), attention_mask=MASK.numpy().tolist()
        ),
    }


@pytest.mark.parametrize("head", HEADS)
def test_all_ways_to_pass_inputs_are_one_call(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    calls = ways(model)
    right = calls.pop("keywords")()[MAIN[head]]
    assert not np.array_equal(right, model(IDS)[MAIN[head]]), "the mask has an effect"
    for way, call in calls.items():
        np.testing.assert_array_equal(call()[MAIN[head]], right, err_msg=way)


@pytest.mark.parametrize("head", HEADS)
def test_ids_alone_may_be_a_tensor_or_stand_in_a_list_a_tuple_or_a_dictionary(
    wing: Wing, head: Head
) -> None:
    model = build(wing, head)
    right = model(input_ids=IDS, attention_mask=tf.ones_like(IDS))[MAIN[head]]
    every = tf.ones_like(IDS)
    for given in (IDS, [IDS], (IDS,), {"input_ids": IDS}):
        np.testing.assert_array_equal(model(given, attention_mask=every)[MAIN[head]], right)


def test_places_are_those_of_the_documented_calls() -> None:
    base = ["input_ids", "attention_mask", "head_mask", "past_key_values", "inputs_embeds"]
    flags = ["use_cache", "output_attentions", "output_hidden_states", "return_dict", "training"]
    causal = [
        *("input_ids", "past_key_values", "attention_mask", "position_ids", "head_mask"),
        *("inputs_embeds", "labels", *flags),
    ]
    places = {
        TFOPTModel: [*base, *flags],
        TFOPTForCausalLM: causal,
        TFOPTForSequenceClassification: [*base, "labels", *flags],
        TFOPTForQuestionAnswering: [*base, "start_positions", "end_positions", *flags],
    }
    for kind, names in places.items():
        parameters = list(signature(kind.call).parameters.values())[1:]
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == names
        rest = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert rest == ([] if "position_ids" in names else ["position_ids"])


def test_a_name_that_the_call_does_not_know_is_refused_everywhere(wing: Wing) -> None:
    model = build(wing)
    with pytest.raises(TypeError, match="attention_masks"):
        model(IDS, attention_masks=MASK)
    with pytest.raises(TypeError, match="attention_masks"):
        model({"input_ids": IDS, "attention_masks": MASK})


def test_an_input_that_comes_twice_or_once_too_often_is_refused(wing: Wing) -> None:
    model = build(wing)
    with pytest.raises(TypeError, match="attention_mask came again"):
        model({"input_ids": IDS, "attention_mask": MASK}, attention_mask=MASK)
    with pytest.raises(TypeError, match="the first argument holds 13 inputs of 12"):
        model([IDS, *[None] * 12])
    with pytest.raises(TypeError, match="takes 12 inputs, found 13"):
        model(IDS, *[None] * 12)


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "int64"])
def test_whole_numbers_of_any_width_are_ids(wing: Wing, kind: str) -> None:
    model = build(wing)
    found = model(tf.cast(IDS, kind), attention_mask=tf.cast(MASK, kind)).logits
    np.testing.assert_array_equal(found, model(IDS, attention_mask=MASK).logits)


@pytest.mark.parametrize("kind", ["bool", "float32", "int32"])
def test_a_mask_may_have_any_type(wing: Wing, kind: str) -> None:
    model = build(wing)
    found = model(IDS, attention_mask=tf.cast(MASK, kind)).logits
    np.testing.assert_array_equal(found, model(IDS, attention_mask=MASK).logits)


# Every argument


@pytest.mark.parametrize("head", HEADS)
def test_every_class_takes_every_argument(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    embeds = model.get_input_embeddings()(IDS)
    past = model(IDS[:, :2], use_cache=True).past_key_values
    given = {
        "attention_mask": tf.ones((2, 8)),
        "head_mask": tf.constant([1.0, 0.5, 0.0, 1.0]),
        "past_key_values": past,
        "position_ids": tf.range(6)[None] + 3,
        "inputs_embeds": embeds,
        "use_cache": True,
        "output_attentions": True,
        "output_hidden_states": True,
        "return_dict": True,
        "training": False,
        **targets(head, model),
    }
    assert set(signature(type(model).call).parameters) - {"self", "input_ids"} == set(given)
    out = model(**given)
    assert set(out) == set(type(out).fields)
    by_ids = model(input_ids=IDS, **{k: v for k, v in given.items() if k != "inputs_embeds"})
    np.testing.assert_array_equal(out[MAIN[head]], by_ids[MAIN[head]])
    for name in ("attention_mask", "head_mask", "past_key_values", "position_ids"):
        changed = {**given, name: None}
        if name == "past_key_values":
            changed["attention_mask"] = None
        elif name == "attention_mask":
            changed[name] = tf.concat((tf.zeros((2, 2)), tf.ones((2, 6))), 1)
        other = model(**changed)
        assert not np.array_equal(other[MAIN[head]], out[MAIN[head]]), name


def test_a_cache_goes_on_where_it_ended_and_stays_as_it_was(wing: Wing) -> None:
    model = build(wing)
    whole = model(IDS, attention_mask=MASK).logits
    start = model(IDS[:, :4], attention_mask=MASK[:, :4])
    before = [(key.numpy(), value.numpy()) for key, value in start.past_key_values]
    assert isinstance(start.past_key_values, Cache)
    for past in (start.past_key_values, tuple(start.past_key_values), [list(x) for x in before]):
        rest = model(IDS[:, 4:], attention_mask=MASK, past_key_values=past)
        assert_near(rest.logits, whole[:, 4:])
        assert rest.past_key_values.get_seq_length() == 6
    for (key, value), (old_key, old_value) in zip(start.past_key_values, before, strict=True):
        np.testing.assert_array_equal(key, old_key)
        np.testing.assert_array_equal(value, old_value)


def test_training_switches_dropout_on_and_nothing_else_does(wing: Wing) -> None:
    model = build(wing, dropout=0.5)
    quiet = model(IDS).logits
    for call in (
        lambda: model(IDS, training=False),
        lambda: model({"input_ids": IDS, "training": False}),
        lambda: model(IDS, training=None),
        lambda: model(IDS, labels=IDS),
    ):
        np.testing.assert_array_equal(call().logits, quiet)
    for call in (
        lambda: model(IDS, training=True),
        lambda: model({"input_ids": IDS}, training=True),
        lambda: model({"input_ids": IDS, "training": True}),
    ):
        assert not np.array_equal(call().logits, quiet)


@pytest.mark.parametrize("head", HEADS[1:])
def test_labels_make_a_loss_that_is_one_number(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    given = targets(head, model)
    out = model(IDS, attention_mask=MASK, **given)
    assert out.loss.shape == ()
    assert np.isfinite(out.loss)
    assert out[0] is out.loss
    inside = model({"input_ids": IDS, "attention_mask": MASK, **given})
    np.testing.assert_array_equal(inside.loss, out.loss)
    assert model(IDS, attention_mask=MASK).loss is None


# What comes out of a call of one's own


@pytest.mark.parametrize("head", HEADS)
def test_a_direct_call_returns_the_record_with_a_cache(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    out = model(IDS, attention_mask=MASK)
    assert isinstance(out, ModelOutput)
    assert isinstance(out.past_key_values, Cache)
    assert getattr(out, MAIN[head]) is out[MAIN[head]]
    assert out.hidden_states is None
    assert "hidden_states" not in out
    both = model(IDS, attention_mask=MASK, output_attentions=True, output_hidden_states=True)
    assert len(both.hidden_states) == 3
    assert [tuple(x.shape) for x in both.attentions] == [(2, 4, 6, 6)] * 2


def test_a_tuple_and_no_cache_can_be_asked_for(wing: Wing) -> None:
    model = build(wing)
    logits, cache = model(IDS, return_dict=False)
    np.testing.assert_array_equal(logits, model(IDS).logits)
    assert isinstance(cache, Cache)
    assert len(model(IDS, return_dict=False, use_cache=False)) == 1
    assert model(IDS, use_cache=False).past_key_values is None
    model.config.use_cache = model.config.return_dict = False
    assert len(model(IDS)) == 1


def test_the_configuration_says_what_is_collected_unless_the_call_does(wing: Wing) -> None:
    model = build(wing, output_attentions=True, output_hidden_states=True)
    out = model(IDS)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
    assert model(IDS, output_attentions=False).attentions is None


# What comes out inside Keras and inside programs


def assert_plain(out: Any, *names: str) -> None:
    assert type(out) is dict
    assert set(out) == set(names)
    assert all(value is not None for value in out.values())


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_program_and_another_model_get_a_plain_dictionary_without_a_cache(
    wing: Wing, eagerly: bool
) -> None:
    model = build(wing)
    seen: list[Any] = []

    class Outer(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def call(self, ids: Any) -> Any:
            seen.append(self.inner(ids))
            return seen[-1]["logits"]

    outer = Outer()
    if eagerly:
        np.testing.assert_array_equal(outer(IDS), model(IDS).logits)
    else:
        found = tf.function(outer)(IDS)
        assert_near(found, model(IDS).logits, "same program")
        seen.append(tf.function(lambda ids: model(ids))(IDS))
    for out in seen:
        assert_plain(out, "logits")


@pytest.mark.parametrize("jit", [False, True])
def test_a_program_returns_the_cache_as_pairs_when_asked(wing: Wing, jit: bool) -> None:
    model = build(wing)

    @tf.function(jit_compile=jit)
    def run(ids: Any, past: Any = None) -> Any:
        return model(ids, past_key_values=past, use_cache=True)

    first = run(IDS[:, :4])
    assert_plain(first, "logits", "past_key_values")
    assert type(first["past_key_values"]) is tuple
    assert [tuple(key.shape) for key, _ in first["past_key_values"]] == [(2, 4, 4, 4)] * 2
    rest = run(IDS[:, 4:], first["past_key_values"])
    assert_near(rest["logits"], model(IDS).logits[:, 4:])


@pytest.mark.parametrize("jit", [False, True])
def test_a_program_over_a_cache_of_fixed_shape_is_traced_once(wing: Wing, jit: bool) -> None:
    model = build(wing)
    traces: list[int] = []

    @tf.function(jit_compile=jit, reduce_retracing=False)
    def run(ids: Any, cache: Cache) -> Any:
        traces.append(1)
        out = model(ids, past_key_values=cache, use_cache=True)
        return out["logits"], out["past_key_values"]

    cache = Cache.empty(model.config, 2, 10, tf.float32)
    right = model(IDS).logits
    for place in range(6):
        logits, cache = run(IDS[:, place : place + 1], cache)
        assert_near(logits, right[:, place : place + 1])
    assert len(traces) == 1
    assert int(cache.length) == 6
    assert not np.asarray(cache.keys[0][:, :, 6:]).any()


@pytest.mark.parametrize("jit", [False, True])
def test_inside_a_program_bad_ids_and_positions_give_nan(wing: Wing, jit: bool) -> None:
    model = build(wing)
    run = tf.function(lambda *given: model(*given)["logits"], jit_compile=jit)
    wrong = tf.tensor_scatter_nd_update(IDS, [[0, 1], [0, 2]], tf.constant([40, -1], tf.int64))
    found = run(wrong).numpy()
    assert np.isnan(found[0, 1:]).all()
    assert np.isfinite(found[1]).all()
    places = tf.constant([[0, 1, 2, 3, 4, 32]])
    far = run(IDS, None, None, places).numpy()
    assert np.isnan(far[:, 5]).all()
    full = Cache.empty(model.config, 2, 8, tf.float32)
    full = Cache(full.keys, full.values, tf.constant(5))
    over = tf.function(lambda ids, past: model(ids, past)["logits"], jit_compile=jit)(IDS, full)
    assert np.isnan(over).all()


def test_a_program_may_leave_batch_and_length_open(wing: Wing) -> None:
    model = build(wing)
    open_ended = tf.TensorSpec([None, None], tf.int64)

    @tf.function(input_signature=[open_ended, tf.TensorSpec([None, None], tf.int32)])
    def run(ids: Any, mask: Any) -> Any:
        return model(ids, attention_mask=mask, labels=ids, output_attentions=True)

    for rows, length in ((2, 6), (1, 1), (3, 4)):
        ids, mask = words(rows, length), np.ones((rows, length), np.int32)
        found, right = run(ids, mask), model(ids, attention_mask=mask, labels=ids)
        assert_near(found["logits"], right.logits)
        assert_near(found["loss"], right.loss)


def test_one_row_is_a_product_that_runs_on_all_cores() -> None:
    """One that XLA fuses with the sum of a bias, as in Keras's own layer, runs on one core."""
    layer = linear(6, True, "float32", "fc")
    layer.build((None, None, 4))
    random = np.random.default_rng(0)
    layer.set_weights([random.normal(size=w.shape) for w in layer.weights])
    x = tf.constant(random.normal(size=(1, 1, 4)), tf.float32)
    right = x.numpy() @ layer.kernel.numpy() + layer.bias.numpy()

    def is_fused(call: Any) -> bool:
        program = tf.function(lambda x: call(x), jit_compile=True)
        np.testing.assert_allclose(program(x), right, rtol=1e-5)
        text: str = program.experimental_get_compiler_ir(x)("optimized_hlo")
        return "kind=kOutput" in text

    assert not is_fused(partial(product, layer))
    assert is_fused(layer)
