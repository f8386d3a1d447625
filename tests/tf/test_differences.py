"""What docs/coming-from-transformers.md says to users of the TensorFlow classes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file

import opt_tf
from opt_core.weights import Head
from opt_tf import (
    OPTConfig,
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
)
from tests.cases import random_weights, tiny, words
from tests.wings import Wing

IDS = words(2, 6)


@pytest.fixture
def model(wing: Wing) -> Any:
    config = tiny(dropout=0.0)
    return wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM, std=0.3))


# --- loading and saving ------------------------------------------------------------------------


def test_keras_classes_are_models_of_keras_3(model: Any) -> None:
    assert isinstance(model, keras.Model)
    assert keras.__version__.startswith("3.")
    assert "tf_keras" not in sys.modules


def test_a_keras_model_has_all_weights_before_its_first_call() -> None:
    fresh = TFOPTModel(tiny())
    assert fresh.built
    assert sum(int(tf.size(v)) for v in fresh.trainable_weights) == fresh.num_parameters()


def test_hints_about_formats_change_nothing_in_keras(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    hints: list[dict[str, Any]] = [{}, {"from_pt": True}, {"from_pt": False}, {"from_tf": True}]
    for hint in hints:
        other = TFOPTForCausalLM.from_pretrained(tmp_path, **hint)
        np.testing.assert_array_equal(other(IDS).logits, model(IDS).logits)


def test_keras_saves_safetensors_in_the_layout_of_pytorch(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model.safetensors", "config.json", "generation_config.json")
    }
    stored = load_file(tmp_path / "model.safetensors")["model.decoder.layers.0.fc1.weight"]
    kernel = model.model.decoder.layers[0].fc1.kernel
    np.testing.assert_array_equal(stored, tf.transpose(kernel))


def test_keras_has_heads_for_classification_and_answers() -> None:
    config = tiny(num_labels=3)
    assert TFOPTForSequenceClassification(config)(IDS, np.ones_like(IDS)).logits.shape == (2, 3)
    assert TFOPTForQuestionAnswering(config)(IDS).end_logits.shape == (2, 6)


def test_keras_leaves_out_biases_and_norms_that_are_switched_off() -> None:
    fresh = TFOPTModel(tiny(enable_bias=False, layer_norm_elementwise_affine=False))
    leaves = {v.path.rpartition("/")[2] for v in fresh.trainable_weights}
    assert leaves == {"kernel", "embeddings"}


def test_the_base_keras_model_holds_its_decoder_itself(model: Any) -> None:
    assert isinstance(model.model, TFOPTModel)
    assert model.model.decoder.layers[0].self_attn.q_proj.kernel.path.endswith(
        "model/decoder/layers.0/self_attn/q_proj/kernel"
    )


# --- calling -----------------------------------------------------------------------------------


def test_position_ids_and_head_mask_have_an_effect_in_keras(model: Any) -> None:
    right = model(IDS).logits
    moved = model(IDS, position_ids=np.arange(6)[None] + 3).logits
    assert np.abs(moved - right).max() > 1e-3
    for mask in (np.zeros((2, 4), np.float32), np.zeros(4, np.float32)):
        assert np.abs(model(IDS, head_mask=mask).logits - right).max() > 1e-3


def test_the_loss_of_keras_classes_is_one_number(model: Any) -> None:
    labels = IDS.copy()
    labels[:, :3] = -100
    assert model(IDS, labels=labels).loss.shape == ()
    assert np.isnan(model(IDS, labels=np.full_like(IDS, -100)).loss)


def test_keras_programs_get_a_plain_dictionary_without_a_cache(model: Any) -> None:
    assert type(model(IDS)) is not dict
    inside = tf.function(lambda ids: model(ids))(IDS)
    assert type(inside) is dict
    assert set(inside) == set(model.predict(IDS, verbose=0)) == {"logits"}
    asked = tf.function(lambda ids: model(ids, use_cache=True))(IDS)
    assert set(asked) == {"logits", "past_key_values"}


def test_an_unknown_key_among_inputs_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="attention_masks"):
        model({"input_ids": IDS, "attention_masks": np.ones_like(IDS)})


def test_a_keras_program_answers_nan_to_ids_that_it_does_not_know(model: Any) -> None:
    wrong = IDS.copy()
    wrong[0, 2] = 40
    with pytest.raises(ValueError, match="input_ids hold 40 in row 0 at place 2"):
        model(wrong)
    for jit in (False, True):
        found = tf.function(lambda ids: model(ids)["logits"], jit_compile=jit)(wrong)
        assert np.isnan(found[0, 2:]).all()
        assert np.isfinite(found[1]).all()


def test_keras_has_one_attention(model: Any) -> None:
    assert model.attn_implementation == "eager"
    with pytest.raises(ValueError, match="no attention implementation 'flash_attention_2'"):
        TFOPTModel(tiny(), attn_implementation="flash_attention_2")


# --- training ----------------------------------------------------------------------------------


def test_keras_trains_by_our_own_loss_unless_another_is_compiled(model: Any) -> None:
    right = float(model(IDS, labels=IDS).loss)
    model.compile("sgd", run_eagerly=True)
    assert model.evaluate(IDS, IDS, verbose=0) == pytest.approx(right, rel=1e-5)
    both = {"input_ids": IDS, "labels": IDS}
    assert model.evaluate(both, verbose=0) == pytest.approx(right, rel=1e-5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss=loss, run_eagerly=True)
    unmoved = float(np.mean(loss(IDS, model(IDS).logits)))
    assert model.evaluate(IDS, IDS, verbose=0) == pytest.approx(unmoved, rel=1e-5)


def test_prepare_tf_dataset_needs_neither_a_library_nor_a_collator(model: Any) -> None:
    rows = [{"input_ids": [2, 5, 6], "text": "a"}, {"input_ids": [2, 7, 8, 9], "text": "b"}]
    batch = next(iter(model.prepare_tf_dataset(rows, batch_size=2, shuffle=False)))
    assert batch["input_ids"].numpy().tolist() == [[2, 5, 6, 1], [2, 7, 8, 9]]
    assert batch["attention_mask"].numpy().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_keras_has_gradient_checkpointing_pruning_and_layerdrop() -> None:
    fresh = TFOPTForCausalLM(tiny(layerdrop=1.0))
    fresh.gradient_checkpointing_enable()
    assert fresh.is_gradient_checkpointing
    states = fresh(IDS, output_hidden_states=True, training=True).hidden_states
    np.testing.assert_array_equal(states[0], states[1])
    fresh.prune_heads({0: [1]})
    assert fresh.config.pruned_heads == {0: [1]}


def test_a_resized_keras_model_keeps_its_tie_and_the_callers_configuration() -> None:
    config: OPTConfig = tiny()
    fresh = TFOPTForCausalLM(config)
    fresh.resize_token_embeddings(44)
    assert (config.vocab_size, fresh.config.vocab_size) == (40, 44)
    assert fresh(IDS).logits.shape == (2, 6, 44)
    assert len(fresh.trainable_weights) == len(TFOPTModel(config).trainable_weights)


# --- generation --------------------------------------------------------------------------------


def test_generate_of_keras_is_a_program_of_its_own(model: Any) -> None:
    with pytest.raises(ValueError, match=r"call it outside tf\.function"):
        tf.function(lambda ids: model.generate(ids))(IDS)
    tokens = [
        model.generate(IDS, max_new_tokens=3, eos_token_id=None, compiled=compiled).numpy()
        for compiled in (True, False)
    ]
    np.testing.assert_array_equal(*tokens)


def test_a_seed_of_keras_generation_is_a_number_for_all_frameworks(model: Any) -> None:
    options = {"do_sample": True, "max_new_tokens": 5, "eos_token_id": None, "compiled": False}
    before = keras.random.SeedGenerator(0).state.numpy()
    one, two = (model.generate(IDS, seed=4, **options).numpy() for _ in range(2))
    np.testing.assert_array_equal(one, two)
    each = model.generate(IDS, seed=[7, 4], **options).numpy()
    assert not np.array_equal(each, one)
    np.testing.assert_array_equal(keras.random.SeedGenerator(0).state.numpy(), before)
    assert opt_tf.GenerationConfig(seed=4).seed == 4
