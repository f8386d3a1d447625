"""Keras's own files: whole models, weights, checkpoints and backups while training, copies."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import opt_tf
from opt_core.weights import Head
from tests.cases import HEADS, SWITCHES, Batch, labels, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = words(4, 6)
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
X = {"input_ids": IDS, "attention_mask": MASK}
MAIN = {
    Head.NONE: "last_hidden_state",
    Head.CAUSAL_LM: "logits",
    Head.SEQUENCE_CLASSIFICATION: "logits",
    Head.QUESTION_ANSWERING: "end_logits",
}


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    options = {name: changes.pop(name) for name in ("dtype",) if name in changes}
    config = tiny(**{"dropout": 0.0, "num_labels": 3, **changes})
    return wing.build(head, config, random_weights(config, head), **options)


def targets(head: Head = Head.CAUSAL_LM) -> dict[str, Any]:
    return labels(head, tiny(num_labels=3), Batch(IDS, MASK))


def compiled(model: Any, rate: float = 1e-2) -> Any:
    model.compile(keras.optimizers.AdamW(rate), run_eagerly=True)
    return model


def fit(model: Any, epochs: int, **options: Any) -> Any:
    data = {**X, **targets(model.head)}
    return model.fit(data, batch_size=2, epochs=epochs, shuffle=False, verbose=0, **options).history


def assert_same(wing: Wing, model: Any, other: Any) -> None:
    """Equal in class, configuration, weights and results."""
    assert type(other) is type(model)
    assert other.config == model.config
    assert other.dtype_policy.name == model.dtype_policy.name
    for name, values in wing.weights(model).items():
        np.testing.assert_array_equal(wing.weights(other)[name], values, err_msg=name)
    found, right = other(IDS, attention_mask=MASK), model(IDS, attention_mask=MASK)
    np.testing.assert_array_equal(found[MAIN[model.head]], right[MAIN[model.head]])


# Whole models


@pytest.mark.parametrize("head", HEADS)
def test_a_whole_model_comes_back_from_one_file(wing: Wing, tmp_path: Path, head: Head) -> None:
    model = build(wing, head)
    path = tmp_path / "model.keras"
    model.save(path)
    other = keras.models.load_model(path)
    assert_same(wing, model, other)
    model.get_input_embeddings().embeddings.assign(
        tf.zeros_like(model.get_input_embeddings().embeddings)
    )
    assert np.any(other.get_input_embeddings().embeddings), "nothing is shared"


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_architecture_comes_back(wing: Wing, tmp_path: Path, switch: str) -> None:
    model = build(wing, **SWITCHES[switch])
    model.save(tmp_path / "model.keras")
    assert_same(wing, model, keras.models.load_model(tmp_path / "model.keras"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "mixed_bfloat16"])
def test_every_type_comes_back(wing: Wing, tmp_path: Path, dtype: str) -> None:
    model = build(wing, dtype=dtype)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    assert other.dtype_policy.name == model.dtype_policy.name == dtype
    assert other.variable_dtype == model.variable_dtype
    for variable in other.weights:
        if "seed" not in variable.path:
            assert variable.dtype == model.variable_dtype
    found, right = (m(IDS).logits for m in (other, model))
    np.testing.assert_array_equal(tf.cast(found, tf.float64), tf.cast(right, tf.float64))


def test_a_resized_and_pruned_model_comes_back(wing: Wing, tmp_path: Path) -> None:
    model = build(wing)
    model.resize_token_embeddings(48)
    model.prune_heads({0: [1], 1: [0, 2]})
    model.save(tmp_path / "model.keras")
    assert_same(wing, model, keras.models.load_model(tmp_path / "model.keras"))


def test_a_loaded_checkpoint_can_be_saved_by_keras_and_back(wing: Wing, tmp_path: Path) -> None:
    build(wing).save_pretrained(tmp_path / "hub")
    model = wing.load(Head.CAUSAL_LM, tmp_path / "hub")
    model.generation_config = model.generation_config.merged(max_new_tokens=3, eos_token_id=None)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    assert_same(wing, model, other)
    assert other.generation_config == model.generation_config
    tokens = [one.generate(IDS, compiled=False) for one in (other, model)]
    np.testing.assert_array_equal(*tokens)
    other.save_pretrained(tmp_path / "again")
    assert_same(wing, model, wing.load(Head.CAUSAL_LM, tmp_path / "again"))


# Configurations


@pytest.mark.parametrize("head", HEADS)
def test_a_configuration_is_json_and_makes_an_equal_model(wing: Wing, head: Head) -> None:
    model = build(wing, head, dtype="mixed_bfloat16")
    config = json.loads(json.dumps(model.get_config()))
    other = type(model).from_config(config)
    assert other.config == model.config
    assert other.dtype_policy.name == "mixed_bfloat16"
    assert other.name == model.name
    for mine, theirs in zip(model.weights, other.weights, strict=True):
        assert mine.path == theirs.path
        assert mine.shape == theirs.shape
    other.set_weights(model.get_weights())
    assert_same(wing, model, other)
    assert type(keras.models.clone_model(model)) is type(model)


def test_a_model_is_known_to_keras_by_its_registered_name(wing: Wing) -> None:
    model = build(wing)
    assert keras.saving.get_registered_name(type(model)) == "optlm>TFOPTForCausalLM"
    other = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    assert other.config == model.config
    by_json = keras.models.model_from_json(model.to_json())
    assert by_json.config == model.config


def test_a_model_may_be_made_of_a_configuration_or_its_fields() -> None:
    config = tiny()
    one = opt_tf.TFOPTModel(config)
    two = opt_tf.TFOPTModel(config.to_dict())
    assert one.config == two.config == config
    assert one.config is not config


# Weights alone


@pytest.mark.parametrize("head", HEADS)
def test_weights_come_back_from_their_file(wing: Wing, tmp_path: Path, head: Head) -> None:
    model = build(wing, head)
    model.save_weights(tmp_path / "model.weights.h5")
    other = wing.fresh(head, model.config)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(wing, model, other)


def test_weights_may_lie_in_several_files(wing: Wing, tmp_path: Path) -> None:
    model = build(wing)
    model.save_weights(tmp_path / "model.weights.json", max_shard_size=1e-5)
    assert len(list(tmp_path.glob("*.h5"))) > 1
    other = wing.fresh(Head.CAUSAL_LM, model.config)
    other.load_weights(tmp_path / "model.weights.json")
    assert_same(wing, model, other)


def test_weights_of_another_shape_are_refused(wing: Wing, tmp_path: Path) -> None:
    build(wing).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match=r"4 objects could not be loaded.*fc1"):
        wing.fresh(Head.CAUSAL_LM, tiny(ffn_dim=32)).load_weights(tmp_path / "model.weights.h5")


def test_tensorflows_own_checkpoints_hold_model_and_optimizer(wing: Wing, tmp_path: Path) -> None:
    model = compiled(build(wing))
    fit(model, 1)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(tmp_path / "c"))
    other = compiled(wing.fresh(Head.CAUSAL_LM, model.config))
    other.optimizer.build(other.trainable_variables)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).read(path).assert_consumed()
    assert_same(wing, model, other)
    assert fit(other, 1) == fit(model, 1)


# Copies


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_shares_nothing(wing: Wing, way: str) -> None:
    model = build(wing)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_same(wing, model, other)
    before = model(IDS).logits.numpy()
    for variable in other.weights:
        variable.assign(tf.zeros_like(variable))
    np.testing.assert_array_equal(model(IDS).logits, before)


# Training that stops and goes on


@pytest.mark.parametrize("head", [Head.CAUSAL_LM, Head.QUESTION_ANSWERING])
def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(
    wing: Wing, tmp_path: Path, head: Head
) -> None:
    whole, first = (compiled(build(wing, head, dropout=0.3)) for _ in range(2))
    for model in (whole, first):
        model.get_layer("model").decoder.seed_generator.state.assign([5, 0])
    right = fit(whole, 4)["loss"]
    losses = fit(first, 2)["loss"]
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    assert int(second.optimizer.iterations) == 4
    losses += fit(second, 2)["loss"]
    assert losses == pytest.approx(right, rel=1e-6)
    expected = wing.weights(whole)
    for name, values in wing.weights(second).items():
        assert_near(values, expected[name], "same program", what=name)


def test_a_model_saved_while_training_keeps_its_compiled_loss_and_metrics(
    wing: Wing, tmp_path: Path
) -> None:
    model = build(wing, Head.SEQUENCE_CLASSIFICATION)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss={"logits": loss}, metrics=["accuracy"], run_eagerly=True)
    fit(model, 1)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    data = {**X, **targets(Head.SEQUENCE_CLASSIFICATION)}
    right = model.evaluate(data, verbose=0, return_dict=True)
    assert set(right) == {"loss", "accuracy"}
    assert other.evaluate(data, verbose=0, return_dict=True) == pytest.approx(right)


@pytest.mark.parametrize("form", ["model.keras", "model.weights.h5"])
def test_a_checkpoint_of_the_best_epoch_is_written_while_training(
    wing: Wing, tmp_path: Path, form: str
) -> None:
    model = compiled(build(wing))
    best = keras.callbacks.ModelCheckpoint(
        str(tmp_path / form),
        monitor="loss",
        save_best_only=True,
        save_weights_only=form.endswith("h5"),
    )
    rates = keras.callbacks.LearningRateScheduler(lambda epoch, _: 1e-2 if epoch < 2 else 1.0)
    kept: list[Any] = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: kept.append(wing.weights(model)))
    losses = fit(model, 3, callbacks=[rates, note, best])["loss"]
    if form.endswith("h5"):
        other = wing.fresh(Head.CAUSAL_LM, model.config)
        other.load_weights(tmp_path / form)
    else:
        other = keras.models.load_model(tmp_path / form)
    for name, values in wing.weights(other).items():
        np.testing.assert_array_equal(values, kept[int(np.argmin(losses))][name])


def test_an_interrupted_training_goes_on_from_its_backup(wing: Wing, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(epoch: int, _: Any) -> None:
        if epoch == 2:
            raise Interrupted

    whole, first, second = (compiled(build(wing)) for _ in range(3))
    right = fit(whole, 4)["loss"]
    stop = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
    with pytest.raises(Interrupted):
        fit(first, 4, callbacks=[keras.callbacks.BackupAndRestore(str(tmp_path)), stop])
    rest = fit(second, 4, callbacks=[keras.callbacks.BackupAndRestore(str(tmp_path))])["loss"]
    assert rest == pytest.approx(right[2:], rel=1e-6)
    expected = wing.weights(whole)
    for name, values in wing.weights(second).items():
        assert_near(values, expected[name], "same program", what=name)


def test_a_model_that_was_trained_by_fit_is_saved_for_the_hub(wing: Wing, tmp_path: Path) -> None:
    model = compiled(build(wing))
    fit(model, 1)
    model.save_pretrained(tmp_path)
    other = wing.load(Head.CAUSAL_LM, tmp_path)
    np.testing.assert_array_equal(other(IDS).logits, model(IDS).logits)


def test_adapters_of_keras_are_merged_into_what_is_saved(wing: Wing, tmp_path: Path) -> None:
    model = build(wing)
    layer = model.model.decoder.layers[0].self_attn.q_proj
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(tf.ones_like(layer.lora_kernel_b))
    assert not np.array_equal(model(IDS).logits, build(wing)(IDS).logits)
    model.save_pretrained(tmp_path)
    other = wing.load(Head.CAUSAL_LM, tmp_path)
    assert_near(other(IDS).logits, model(IDS).logits, "same program")


def test_what_keras_has_quantized_is_not_saved_as_a_checkpoint(wing: Wing, tmp_path: Path) -> None:
    model = build(wing, num_hidden_layers=1)
    with warnings.catch_warnings():
        # Keras warns of every layer that it leaves as it is.
        warnings.simplefilter("ignore")
        model.quantize("int8")
    assert_near(model(IDS).logits, build(wing, num_hidden_layers=1)(IDS).logits, "half")
    with pytest.raises(
        ValueError, match=r"k_proj\.weight is int8: what Keras has quantized cannot"
    ):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
