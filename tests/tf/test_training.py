"""Training: checkpointing, layerdrop, dropout where OPT has it, prefixes, surgery between steps."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core.weights import Head
from tests.cases import HEADS, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = tf.constant(words(3, 7))


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, **changes})
    return wing.build(head, config, random_weights(config, head))


def decoder(model: Any) -> Any:
    return getattr(model, model.base_model_prefix, model).decoder


def restart(model: Any) -> None:
    """Let the next call draw the dropout of the first one."""
    decoder(model).seed_generator.state.assign([7, 0])


def step(model: Any, **more: Any) -> tuple[Any, list[Any]]:
    """The loss of one pass in training, and the gradients of all weights."""
    with tf.GradientTape() as tape:
        loss = model(IDS, labels=IDS, training=True, **more).loss
    return loss.numpy(), tape.gradient(loss, [v.value for v in model.trainable_weights])


# Gradient checkpointing


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_neither_loss_nor_gradients(
    wing: Wing, every: int, dropout: float
) -> None:
    model = build(
        wing, dropout=dropout, attention_dropout=dropout, layerdrop=dropout, num_hidden_layers=3
    )
    restart(model)
    loss, gradients = step(model)
    model.gradient_checkpointing_enable(every_n_layers=every)
    restart(model)
    again, recomputed = step(model)
    np.testing.assert_array_equal(again, loss)
    for found, right in zip(recomputed, gradients, strict=True):
        assert_near(found, right, "same program")


def counted(model: Any) -> list[str]:
    """A list that grows by a word whenever a layer's feed-forward part runs."""
    runs: list[str] = []

    class Noting(keras.layers.Layer):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            self.built = True

        def call(self, x: Any) -> Any:
            runs.append("ran")
            return self.inner(x)

    for layer in model.model.decoder.layers:
        layer._tracker.unlock()
        layer.fc1 = Noting(layer.fc1)
        layer._tracker.lock()
    return runs


def test_checkpointing_runs_every_layer_twice(wing: Wing) -> None:
    model = build(wing)
    runs = counted(model)
    step(model)
    assert len(runs) == 2
    model.gradient_checkpointing_enable()
    step(model)
    assert len(runs) == 2 + 4
    model.gradient_checkpointing_enable(every_n_layers=2)
    step(model)
    assert len(runs) == 2 + 4 + 3
    model.gradient_checkpointing_disable()
    step(model)
    assert len(runs) == 2 + 4 + 3 + 2


def held(model: Any) -> int:
    """How many products a traced training step computes: checkpointed layers come twice."""

    @tf.function
    def run(ids: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True)["loss"]
        return tape.gradient(loss, [v.value for v in model.trainable_weights])

    def products(graph: Any) -> int:
        inside = [f.graph for f in graph._functions.values() if hasattr(f, "graph")]
        here = sum(op.type in ("MatMul", "BatchMatMulV2") for op in graph.get_operations())
        return here + sum(products(other) for other in inside)

    return products(run.get_concrete_function(IDS).graph)


def test_a_traced_step_computes_checkpointed_layers_again(wing: Wing) -> None:
    plain, again = build(wing), build(wing)
    again.gradient_checkpointing_enable()
    assert held(again) > held(plain)


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"jit_compile": False}])
def test_fit_with_checkpointing_gives_the_same_weights(wing: Wing, options: dict[str, Any]) -> None:
    weights = []
    for every in (0, 1):
        model = build(wing, dropout=0.2, num_hidden_layers=1)
        restart(model)
        if every:
            model.gradient_checkpointing_enable(every)
        model.compile(keras.optimizers.SGD(0.1), **options)
        model.fit({"input_ids": IDS, "labels": IDS}, batch_size=3, shuffle=False, verbose=0)
        weights.append(wing.weights(model))
    for name, values in weights[0].items():
        assert_near(weights[1][name], values, "same program", what=name)


@pytest.mark.parametrize("head", HEADS)
def test_checkpointing_is_switched_on_any_class(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert decoder(model).checkpoint_every == 1
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_checkpointing_keeps_attentions_states_and_head_factors(wing: Wing) -> None:
    model = build(wing)
    asked = {
        "output_attentions": True,
        "output_hidden_states": True,
        "head_mask": tf.constant([1.0, 0.0, 0.5, 1.0]),
        "training": True,
    }
    plain = model(IDS, use_cache=False, **asked)
    model.gradient_checkpointing_enable()
    again = model(IDS, **asked)
    for name in ("attentions", "hidden_states"):
        for found, right in zip(again[name], plain[name], strict=True):
            np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_factors_of_heads(wing: Wing, checkpointing: bool) -> None:
    model = build(wing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    factors = tf.Variable(tf.ones((2, 4)))
    with tf.GradientTape() as tape:
        loss = model(IDS, labels=IDS, head_mask=factors, training=True).loss
    found = tape.gradient(loss, factors).numpy()
    values = []
    for sign in (1, -1):
        factors[1, 2].assign(1 + sign * 0.2)
        values.append(float(model(IDS, labels=IDS, head_mask=factors).loss))
    assert found[1, 2] == pytest.approx((values[0] - values[1]) / 0.4, rel=0.05)
    assert found.all()


@pytest.mark.parametrize("changes", [{}, {"layerdrop": 0.5}])
def test_training_with_layers_run_again_or_left_out_returns_no_cache(
    wing: Wing, changes: dict[str, Any]
) -> None:
    model = build(wing, **changes)
    if not changes:
        assert model(IDS, training=True).past_key_values is not None
        model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(IDS, training=True).past_key_values is None, "by default without a word"
    with pytest.warns(UserWarning, match="use_cache is off while training with gradient") as seen:
        assert model(IDS, use_cache=True, training=True).past_key_values is None
    assert len(seen) == 1
    assert model(IDS, use_cache=True).past_key_values is not None


# Dropout


def test_training_without_any_dropout_is_what_prediction_is(wing: Wing) -> None:
    model = build(wing)
    np.testing.assert_array_equal(model(IDS, training=True).logits, model(IDS).logits)


@pytest.mark.parametrize("changes", [{"dropout": 0.5}, {"attention_dropout": 0.5}])
def test_dropout_acts_in_training_alone_and_is_another_in_each_call(
    wing: Wing, changes: dict[str, Any]
) -> None:
    model = build(wing, **changes)
    plain = build(wing)(IDS).logits
    one, two = (model(IDS, training=True).logits.numpy() for _ in range(2))
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(model(IDS).logits, plain)


def test_dropout_of_a_program_is_another_in_each_run(wing: Wing) -> None:
    model = build(wing, dropout=0.5)
    for jit in (False, True):
        run = tf.function(lambda ids: model(ids, training=True)["logits"], jit_compile=jit)
        one, two = (run(IDS).numpy() for _ in range(2))
        assert not np.array_equal(one, two)


def test_rows_and_places_drop_independently(wing: Wing) -> None:
    model = build(wing, dropout=0.5)
    same = tf.constant(np.full((4, 1), 9))
    rows = model(same, training=True).logits.numpy()
    assert len({row.tobytes() for row in rows}) == 4


def test_the_seed_of_keras_repeats_dropout(wing: Wing) -> None:
    def once() -> Any:
        keras.utils.set_random_seed(3)
        model = build(wing, dropout=0.5, attention_dropout=0.5, layerdrop=0.3)
        return [model(IDS, training=True).logits.numpy() for _ in range(2)]

    for one, two in zip(once(), once(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_seed_of_keras_repeats_fresh_weights_and_fit(wing: Wing) -> None:
    def once() -> Any:
        keras.utils.set_random_seed(3)
        model = wing.fresh(Head.CAUSAL_LM, tiny(dropout=0.5))
        model.compile("sgd", run_eagerly=True)
        model.fit({"input_ids": IDS, "labels": IDS}, batch_size=2, verbose=0)
        return wing.weights(model)

    one, two = once(), once()
    for name, values in one.items():
        np.testing.assert_array_equal(two[name], values)


def test_no_dropout_acts_on_embeddings(wing: Wing) -> None:
    model = build(wing, dropout=0.5)
    states = model(IDS, output_hidden_states=True, training=True).hidden_states
    quiet = model(IDS, output_hidden_states=True).hidden_states
    np.testing.assert_array_equal(states[0], quiet[0])
    assert not np.array_equal(states[1], quiet[1])


def test_dropout_of_a_built_model_follows_its_configuration(wing: Wing) -> None:
    model = build(wing, dropout=0.5)
    model.config.dropout = 0.0
    np.testing.assert_array_equal(model(IDS, training=True).logits, model(IDS).logits)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_takes_its_share_and_scales_the_rest(wing: Wing, rate: float) -> None:
    model = build(wing, dropout=rate, num_hidden_layers=1, do_layer_norm_before=False)
    layer = model.model.decoder.layers[0]
    ones = tf.ones((200, 200))
    dropped = layer._dropped(ones, tf.constant([[0, 0], [1, 2], [3, 4], [5, 6]]), 1).numpy()
    assert (dropped == 0).mean() == pytest.approx(rate, abs=0.01)
    assert dropped.max() == pytest.approx(1 / (1 - rate), rel=1e-6)


def test_attention_dropout_keeps_the_mean_and_shows_whole_weights(wing: Wing) -> None:
    model = build(wing, attention_dropout=0.5)
    run = tf.function(lambda: model(IDS, training=True)["logits"], jit_compile=True)
    keras.utils.set_random_seed(0)
    mean = np.mean([run().numpy() for _ in range(300)], 0)
    plain = model(IDS).logits.numpy()
    assert np.abs(mean - plain).max() < 0.15 * np.abs(plain).max()
    weights = model(IDS, training=True, output_attentions=True).attentions[0].numpy()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_layerdrop_leaves_out_all_layers_at_1_and_none_at_0(wing: Wing) -> None:
    model = build(wing, layerdrop=1.0)
    out = model(IDS, output_hidden_states=True, training=True)
    assert len(out.hidden_states) == 3
    np.testing.assert_array_equal(out.hidden_states[0], out.hidden_states[1])
    assert not np.array_equal(model(IDS).logits, out.logits)
    model.config.layerdrop = 0.0
    np.testing.assert_array_equal(model(IDS, training=True).logits, model(IDS).logits)


def test_layerdrop_leaves_out_about_its_share(wing: Wing) -> None:
    model = build(wing, layerdrop=0.3, _remove_final_layer_norm=True)

    @tf.function(jit_compile=True)
    def run() -> Any:
        states = model(IDS, output_hidden_states=True, training=True)["hidden_states"]
        return tf.stack([tf.reduce_all(a == b) for a, b in itertools.pairwise(states)])

    keras.utils.set_random_seed(0)
    left_out = np.mean([run().numpy() for _ in range(200)], 0)
    assert (np.abs(left_out - 0.3) < 0.12).all()


def test_a_layer_that_is_left_out_learns_nothing(wing: Wing) -> None:
    model = build(wing, layerdrop=1.0)
    _, gradients = step(model)
    for variable, gradient in zip(model.trainable_weights, gradients, strict=True):
        if "/layers." in variable.path:
            assert not np.asarray(gradient).any(), variable.path
    assert np.asarray(gradients[0]).any()


# Ties, prefixes and surgery


def test_a_tied_head_is_one_variable_that_both_uses_train(wing: Wing) -> None:
    tied = build(wing)
    assert len(tied.trainable_weights) == len(build(wing, Head.NONE).trainable_weights)
    model = build(wing, tie_word_embeddings=False)
    weights = wing.weights(model)
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    both = wing.build(Head.CAUSAL_LM, model.config, weights)
    whole = wing.gradients(wing.build(Head.CAUSAL_LM, tied.config, weights), **given())
    parts = wing.gradients(both, **given())
    name = "model.decoder.embed_tokens.weight"
    assert_near(whole[name], parts[name] + parts["lm_head.weight"], "gradient")


def given() -> dict[str, Any]:
    return {"input_ids": IDS.numpy(), "labels": IDS.numpy()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_keys_and_values_that_were_passed_in(
    wing: Wing, checkpointing: bool
) -> None:
    model = build(wing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    rng = np.random.default_rng(0)
    values = [tf.Variable(rng.normal(size=(3, 4, 2, 4)), dtype=tf.float32) for _ in range(4)]

    def loss() -> Any:
        prefix = ((values[0], values[1]), (values[2], values[3]))
        return model(IDS, past_key_values=prefix, labels=IDS, training=True, use_cache=False).loss

    with tf.GradientTape() as tape:
        found = loss()
    gradients = tape.gradient(found, values)
    assert all(gradient is not None for gradient in gradients)
    # Along the gradient: the slope of one number alone would drown in the rounding of a loss.
    start, way = values[0].value(), gradients[0] / tf.norm(gradients[0])
    ends = []
    for far in (0.5, -0.5):
        values[0].assign(start + far * way)
        ends.append(float(loss()))
    assert ends[0] - ends[1] == pytest.approx(float(tf.norm(gradients[0])), rel=0.02)


def test_training_goes_on_after_resizing_and_pruning(wing: Wing) -> None:
    model = build(wing)
    joined = {"input_ids": IDS, "labels": IDS}
    model.compile("sgd", jit_compile=False)
    before = model.fit(joined, verbose=0).history["loss"][0]
    model.resize_token_embeddings(48)
    model.prune_heads({0: [1]})
    model.compile("sgd", jit_compile=False)
    after = model.fit(joined, verbose=0).history["loss"][0]
    assert np.isfinite([before, after]).all()
    assert model.predict(IDS, verbose=0)["logits"].shape == (3, 7, 48)
    assert float(model(IDS, labels=IDS).loss) < after
