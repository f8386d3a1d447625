"""Half and mixed precision: what is computed, stored, scaled and returned in which type."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core.weights import Head
from tests.cases import HEADS, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

MIXED = {"mixed_float16": tf.float16, "mixed_bfloat16": tf.bfloat16}
IDS = words(2, 6)
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
MAIN = {
    Head.NONE: "last_hidden_state",
    Head.CAUSAL_LM: "logits",
    Head.SEQUENCE_CLASSIFICATION: "logits",
    Head.QUESTION_ANSWERING: "start_logits",
}


@pytest.fixture(autouse=True)
def _policy() -> Iterator[None]:
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def build(wing: Wing, dtype: str, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, **changes})
    return wing.build(head, config, random_weights(config, head), dtype)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("policy", MIXED)
def test_mixed_precision_computes_in_half_over_float32_weights(
    wing: Wing, policy: str, head: Head
) -> None:
    model = build(wing, policy, head)
    plain = build(wing, "float32", head)
    assert {v.dtype for v in model.trainable_weights} == {"float32"}
    out = model(IDS, attention_mask=MASK)
    assert out.past_key_values[0][0].dtype == MIXED[policy]
    right = plain(IDS, attention_mask=MASK)[MAIN[head]]
    assert_near(tf.cast(out[MAIN[head]], tf.float32), right, "half", where=_real(right))
    expected = MIXED[policy] if head is Head.NONE else tf.float32
    assert out[MAIN[head]].dtype == expected


def _real(values: Any) -> Any:
    return MASK == 1 if values.shape[:2] == MASK.shape else ...


@pytest.mark.parametrize("policy", MIXED)
def test_every_layer_inside_has_the_policy_of_the_model(wing: Wing, policy: str) -> None:
    for way in ("dtype", "global"):
        if way == "global":
            keras.config.set_dtype_policy(policy)
        model = wing.fresh(Head.CAUSAL_LM, tiny(), **({"dtype": policy} if way == "dtype" else {}))
        layers = model._flatten_layers()
        assert {layer.dtype_policy.name for layer in layers} == {policy}


@pytest.mark.parametrize("policy", MIXED)
def test_a_checkpoint_loads_under_a_policy(wing: Wing, tmp_path: Path, policy: str) -> None:
    plain = build(wing, "float32")
    plain.save_pretrained(tmp_path)
    for way in ("dtype", "object", "global"):
        given: Any = {"dtype": policy, "object": keras.DTypePolicy(policy), "global": None}[way]
        if way == "global":
            keras.config.set_dtype_policy(policy)
        model = wing.load(Head.CAUSAL_LM, tmp_path, dtype=given)
        assert (model.dtype_policy.name, model.variable_dtype) == (policy, "float32")
        assert_near(model(IDS).logits, plain(IDS).logits, "half")
        expected = wing.weights(plain)
        for name, values in wing.weights(model).items():
            np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": True}])
def test_fit_in_mixed_precision_learns(wing: Wing, policy: str, options: dict[str, Any]) -> None:
    model = build(wing, policy, num_hidden_layers=1)
    model.compile(keras.optimizers.Adam(1e-2), **options)
    scales = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scales == (policy == "mixed_float16")
    data = {"input_ids": IDS, "attention_mask": MASK, "labels": np.where(MASK, IDS, -100)}
    exact = build(wing, "float32", num_hidden_layers=1)(data).loss
    losses = model.fit(data, epochs=10, verbose=0).history["loss"]
    assert_near(losses[0], exact, "half")
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_whose_scaled_gradients_overflow_is_left_out(wing: Wing) -> None:
    model = build(wing, "mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**40
    )
    model.compile(optimizer, run_eagerly=True)
    before = wing.weights(model)
    data = {"input_ids": IDS, "labels": IDS}
    loss = model.fit(data, verbose=0).history["loss"][0]
    assert np.isfinite(loss), "what is reported is not scaled"
    for name, values in wing.weights(model).items():
        np.testing.assert_array_equal(values, before[name])
    assert float(optimizer.dynamic_scale) == 2.0**39
    optimizer.dynamic_scale.assign(2.0**10)
    model.fit(data, verbose=0)
    assert not np.array_equal(
        wing.weights(model)["model.decoder.layers.0.fc1.weight"],
        before["model.decoder.layers.0.fc1.weight"],
    )


@pytest.mark.parametrize("policy", MIXED)
def test_labels_weights_and_the_loss_keep_their_precision(wing: Wing, policy: str) -> None:
    model = build(wing, policy, Head.SEQUENCE_CLASSIFICATION, num_labels=1)
    labels = np.array([70001.0, 3.0], np.float32)  # float16 ends at 65504, bfloat16 has 70144
    out = model(IDS, attention_mask=MASK, labels=labels)
    assert out.loss.dtype == tf.float32
    right = np.mean((out.logits.numpy().ravel() - labels) ** 2)
    assert float(out.loss) == pytest.approx(right, rel=1e-6)
    model.compile("sgd", run_eagerly=True)
    for data in (
        ({"input_ids": IDS, "attention_mask": MASK, "labels": labels},),
        ({"input_ids": IDS, "attention_mask": MASK}, labels),
    ):
        assert model.evaluate(*data, verbose=0) == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("policy", MIXED)
def test_masks_positions_and_embeddings_may_have_any_float_type(wing: Wing, policy: str) -> None:
    model = build(wing, policy)
    right = model(IDS, attention_mask=MASK).logits
    found = model(IDS, attention_mask=MASK.astype(np.float32)).logits
    np.testing.assert_array_equal(found, right)
    embeds = tf.cast(model.get_input_embeddings()(IDS), tf.float32)
    by_embeds = model(inputs_embeds=embeds, attention_mask=MASK).logits
    np.testing.assert_array_equal(by_embeds, right)


@pytest.mark.parametrize("policy", [*MIXED, "float16", "bfloat16"])
def test_padding_brings_no_nan_in_half_precision(wing: Wing, policy: str) -> None:
    model = build(wing, policy)
    for mask in (MASK, MASK[:, ::-1], np.zeros_like(MASK)):
        assert np.isfinite(tf.cast(model(IDS, attention_mask=mask).logits, tf.float32)).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
def test_tokens_are_generated_in_half_precision(wing: Wing, policy: str) -> None:
    model = build(wing, policy)
    out = model.generate(
        IDS,
        attention_mask=MASK,
        max_new_tokens=4,
        eos_token_id=None,
        return_dict_in_generate=True,
        compiled=False,
    )
    assert out.sequences.shape == (2, 10)
    assert out.past_key_values[0][0].dtype == MIXED.get(policy, tf.float16)
    one_pass = model(out.sequences[1:, :-1]).logits
    assert int(tf.argmax(one_pass[0, 5])) == int(out.sequences[1, 6])


@pytest.mark.parametrize("policy", MIXED)
def test_a_program_computes_in_mixed_precision_too(wing: Wing, policy: str) -> None:
    model = build(wing, policy)
    right = build(wing, "float32")(IDS).logits
    run = tf.function(lambda ids: model(ids)["logits"], jit_compile=True)
    assert_near(run(IDS), right, "half")
    assert run(IDS).dtype == tf.float32


def test_saving_a_mixed_model_writes_its_float32_weights(wing: Wing, tmp_path: Path) -> None:
    model = build(wing, "mixed_float16")
    model.save_pretrained(tmp_path)
    other = wing.load(Head.CAUSAL_LM, tmp_path, dtype="auto")
    assert other.dtype_policy.name == "float32"
    expected = wing.weights(model)
    for name, values in wing.weights(other).items():
        np.testing.assert_array_equal(values, expected[name])


def test_a_type_that_no_model_computes_in_is_refused(wing: Wing, tmp_path: Path) -> None:
    build(wing, "float32").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be auto or one of float32"):
        wing.load(Head.CAUSAL_LM, tmp_path, dtype="int8")
