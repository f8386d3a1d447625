"""Keras's loop on our models: where data and labels come from, losses, metrics, weights, calls."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core.weights import Head, table
from tests.cases import HEADS, Arrays, Batch, labels, random_weights, tiny, words
from tests.test_parity import slopes, smallest
from tests.tolerances import assert_near
from tests.wings import Wing

MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
X = {"input_ids": words(4, 6), "attention_mask": MASK}
RATE = 0.1


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, "num_labels": 3, "num_hidden_layers": 1, **changes})
    return wing.build(head, config, random_weights(config, head))


def compiled(wing: Wing, head: Head = Head.CAUSAL_LM, **options: Any) -> Any:
    """A model ready for `fit`; eagerly unless told otherwise, as tracing takes a second."""
    model = build(wing, head)
    plain = {} if "jit_compile" in options else {"run_eagerly": True}
    model.compile(keras.optimizers.SGD(RATE), **{**plain, **options})
    return model


GRAPH = {"jit_compile": False, "run_eagerly": False}


def targets(head: Head = Head.CAUSAL_LM) -> dict[str, Any]:
    return labels(head, tiny(num_labels=3), Batch(X["input_ids"], MASK))


def fit(model: Any, *data: Any, **options: Any) -> list[float]:
    """The losses of two passes over the data, in order."""
    options = {"batch_size": 2, "shuffle": False, "epochs": 2, "verbose": 0, **options}
    if not isinstance(data[0], dict | np.ndarray):
        del options["batch_size"]
    losses: list[float] = model.fit(*data, **options).history["loss"]
    return losses


# Where labels and data come from


def sources(head: Head) -> dict[str, tuple[Any, ...]]:
    """The same four rows, in batches of two, in every form that Keras takes."""
    y = targets(head)
    joined = {**X, **y}
    pair = (X, next(iter(y.values())) if len(y) == 1 else y)

    class Sequence(keras.utils.PyDataset):
        def __init__(self, data: Any) -> None:
            super().__init__()
            self.data = data

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> Any:
            return tf.nest.map_structure(lambda a: a[2 * i : 2 * i + 2], self.data)

    def dataset(data: Any) -> Any:
        return tf.data.Dataset.from_tensor_slices(data).batch(2)

    return {
        "NumPy, labels in x": (joined,),
        "NumPy, labels in y": pair,
        "NumPy, labels in y by name": (X, y),
        "tf.data, labels in x": (dataset(joined),),
        "tf.data, labels in y": (dataset(pair),),
        "tf.data, labels in y by name": (dataset((X, y)),),
        "PyDataset, labels in x": (Sequence(joined),),
        "PyDataset, labels in y": (Sequence(pair),),
    }


@pytest.mark.parametrize(
    "head", [Head.CAUSAL_LM, pytest.param(Head.QUESTION_ANSWERING, marks=pytest.mark.deep)]
)
def test_fit_is_the_same_from_every_source_of_data_and_labels(wing: Wing, head: Head) -> None:
    right: list[float] = []
    expected: Arrays = {}
    for name, data in sources(head).items():
        model = compiled(wing, head, **GRAPH)
        losses = fit(model, *data)
        weights = wing.weights(model)
        if not right:
            right, expected = losses, weights
            assert losses[1] < losses[0]
        assert_near(losses, right, "same program", what=name)
        for path, values in weights.items():
            assert_near(values, expected[path], "same program", what=f"{name}: {path}")


def test_single_batches_are_steps_of_fit(wing: Wing) -> None:
    joined = {**X, **targets()}
    model, other = compiled(wing), compiled(wing)
    right = float(model(joined).loss)
    assert model.test_on_batch(joined) == pytest.approx(right, rel=1e-5)
    assert model.train_on_batch(X, targets()) == pytest.approx(right, rel=1e-5)
    fit(other, joined, batch_size=4, epochs=1)
    expected = wing.weights(other)
    for name, values in wing.weights(model).items():
        assert_near(values, expected[name], "same program", what=name)


LOOPS = [
    *((head, {"run_eagerly": True}) for head in HEADS),
    *((head, {"jit_compile": True}) for head in (Head.NONE, Head.CAUSAL_LM)),
    (Head.SEQUENCE_CLASSIFICATION, GRAPH),
]


@pytest.mark.parametrize(("head", "options"), [loop for loop in LOOPS if loop[0] is not Head.NONE])
def test_training_evaluation_and_calls_agree_on_the_loss(
    wing: Wing, head: Head, options: dict[str, Any]
) -> None:
    model = compiled(wing, head, **options)
    joined = {**X, **targets(head)}
    right = float(model(joined).loss)
    for data in ((joined,), (X, targets(head))):
        found = model.evaluate(*data, batch_size=4, verbose=0)
        assert_near(found, right, "same program")
    assert_near(fit(model, joined, batch_size=4, epochs=1)[0], right, "same program")
    assert float(model(joined).loss) < right


@pytest.mark.parametrize(("head", "options"), LOOPS)
def test_prediction_gives_a_plain_dictionary_of_arrays_without_a_cache(
    wing: Wing, head: Head, options: dict[str, Any]
) -> None:
    model = compiled(wing, head, **options)
    found = model.predict(X, batch_size=2, verbose=0)
    right = model(X)
    names = set(right) - {"past_key_values"}
    assert type(found) is dict
    assert set(found) == names
    for name in names:
        assert_near(found[name], right[name], "same program", where=_real(found[name]))
    assert set(model.predict_on_batch(X)) == names


def _real(values: Any) -> Any:
    """Where padding is not: what stands there depends on the order of summation alone."""
    return MASK == 1 if values.shape[:2] == MASK.shape else ...


def test_prediction_collects_what_the_configuration_asks_for(wing: Wing) -> None:
    model = compiled(wing)
    model.config.output_hidden_states = model.config.output_attentions = True
    found = model.predict(X, batch_size=2, verbose=0)
    right = model(X)
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(right[name])
        for values, expected in zip(found[name], right[name], strict=True):
            assert_near(values, expected, "same program")


def test_ids_alone_are_an_input_of_fit_and_predict(wing: Wing) -> None:
    model = compiled(wing)
    ids = words(4, 6)
    assert set(model.predict(ids, verbose=0)) == {"logits"}
    first = fit(model, ids, ids)[0]
    assert_near(first, fit(compiled(wing), {"input_ids": ids, "labels": ids})[0], "same program")
    assert_near(first, fit(compiled(wing), ids, {"labels": ids})[0], "same program")


def test_without_labels_training_says_where_they_belong(wing: Wing) -> None:
    for head, name in ((Head.CAUSAL_LM, "labels"), (Head.QUESTION_ANSWERING, "start_positions")):
        with pytest.raises(ValueError, match=f"no labels to train for: .*in x or in y.*{name}"):
            fit(compiled(wing, head, run_eagerly=True), X)
    with pytest.raises(ValueError, match="y holds no end_positions"):
        fit(
            compiled(wing, Head.QUESTION_ANSWERING, run_eagerly=True),
            X,
            {"start_positions": MASK[:, 0]},
        )
    with pytest.raises(ValueError, match="TFOPTModel has no loss of its own: compile it with one"):
        fit(compiled(wing, Head.NONE, run_eagerly=True), X, np.zeros((4, 6, 16), np.float32))


# Compiled losses


def cross_entropy() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)


@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("form", ["one", "by name"])
def test_a_compiled_loss_takes_the_place_of_our_own(wing: Wing, where: str, form: str) -> None:
    loss = cross_entropy() if form == "one" else {"logits": cross_entropy()}
    model = compiled(wing, Head.SEQUENCE_CLASSIFICATION, loss=loss)
    y = targets(Head.SEQUENCE_CLASSIFICATION)
    data = ({**X, **y},) if where == "x" else (X, y["labels"])
    own = fit(compiled(wing, Head.SEQUENCE_CLASSIFICATION), X, y["labels"])
    assert_near(fit(model, *data), own, "same program")
    doubled = compiled(
        wing,
        Head.SEQUENCE_CLASSIFICATION,
        loss=loss,
        loss_weights=[2.0] if form == "one" else {"logits": 2.0},
    )
    assert fit(doubled, *data)[0] > 1.5 * own[0]


def test_a_compiled_loss_sees_labels_as_they_are_and_does_not_move_them(wing: Wing) -> None:
    ids = X["input_ids"]
    moved = np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    own = compiled(wing).evaluate(X, ids, batch_size=4, verbose=0)
    found = compiled(wing, loss=cross_entropy()).evaluate(X, moved, batch_size=4, verbose=0)
    # Keras divides by all six places of a row, our loss by the five that count.
    assert found == pytest.approx(own * 5 / 6, rel=1e-5) or found == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("form", ["one for both", "a list", "by name"])
@pytest.mark.parametrize("where", ["x", "y"])
def test_question_answering_trains_with_compiled_losses_of_two_outputs(
    wing: Wing, form: str, where: str
) -> None:
    loss = {
        "one for both": cross_entropy(),
        "a list": [cross_entropy(), cross_entropy()],
        "by name": {"start_logits": cross_entropy(), "end_logits": cross_entropy()},
    }[form]
    y = targets(Head.QUESTION_ANSWERING)
    model = compiled(wing, Head.QUESTION_ANSWERING, loss=loss)
    data = ({**X, **y},) if where == "x" else (X, y)
    found = fit(model, *data, batch_size=4, epochs=1)[0]
    own = fit(compiled(wing, Head.QUESTION_ANSWERING), *data, batch_size=4, epochs=1)[0]
    assert found / 2 == pytest.approx(own, rel=1e-5)  # a sum, where ours is a mean


def test_the_base_model_trains_with_a_compiled_loss(wing: Wing) -> None:
    model = compiled(wing, Head.NONE, loss="mse")
    aim = np.zeros((4, 6, 16), np.float32)
    losses = fit(model, X, aim)
    assert losses[1] < losses[0]
    by_name = compiled(wing, Head.NONE, loss="mse")
    assert_near(fit(by_name, X, {"last_hidden_state": aim}), losses, "same program")


def test_losses_of_layers_are_added(wing: Wing) -> None:
    model = build(wing)
    kernel = model.model.decoder.layers[0].fc1.kernel
    kernel.regularizer = keras.regularizers.L2(1.0)
    model.compile(keras.optimizers.SGD(RATE), run_eagerly=True)
    plain = compiled(wing).evaluate(X, targets(), batch_size=4, verbose=0)
    extra = float(tf.reduce_sum(tf.square(kernel)))
    found = model.evaluate(X, targets(), batch_size=4, verbose=0)
    assert found == pytest.approx(plain + extra, rel=1e-5)


# Metrics and weights of samples


@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("loss", [None, "compiled"])
def test_metrics_are_those_of_predictions(wing: Wing, where: str, loss: str | None) -> None:
    y = targets(Head.SEQUENCE_CLASSIFICATION)
    model = compiled(
        wing,
        Head.SEQUENCE_CLASSIFICATION,
        loss=cross_entropy() if loss else None,
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
    )
    data = ({**X, **y},) if where == "x" else (X, y["labels"])
    found = model.evaluate(*data, batch_size=2, verbose=0, return_dict=True)
    logits = model.predict(X, verbose=0)["logits"]
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == y["labels"]).mean())
    ranks = (logits > np.take_along_axis(logits, y["labels"][:, None], 1)).sum(1)
    assert found["top2"] == pytest.approx((ranks < 2).mean())
    history = model.fit(*data, batch_size=2, verbose=0, validation_data=data).history
    assert set(history) == {
        *("loss", "accuracy", "top2"),
        *("val_loss", "val_accuracy", "val_top2"),
    }


def test_metrics_may_be_named_by_output(wing: Wing) -> None:
    y = targets(Head.QUESTION_ANSWERING)
    model = compiled(
        wing,
        Head.QUESTION_ANSWERING,
        metrics={"start_logits": ["sparse_categorical_accuracy"], "end_logits": ["accuracy"]},
    )
    for data in (({**X, **y},), (X, y), (X, tuple(y.values()))):
        found = model.evaluate(*data, verbose=0, return_dict=True)
        logits = model.predict(X, verbose=0)
        values = sorted(value for name, value in found.items() if name != "loss")
        right = sorted(
            float((logits[f"{end}_logits"].argmax(1) == y[f"{end}_positions"]).mean())
            for end in ("start", "end")
        )
        assert values == pytest.approx(right)


def test_metrics_of_tokens_take_weights_of_tokens(wing: Wing) -> None:
    ids = X["input_ids"]
    model = compiled(wing, weighted_metrics=["accuracy"])
    chosen = np.zeros(ids.shape, np.float32)
    chosen[:, 3] = 1
    found = model.evaluate(X, ids, sample_weight=chosen, verbose=0, return_dict=True)
    best = model.predict(X, verbose=0)["logits"].argmax(-1)
    assert found["accuracy"] == pytest.approx((best[:, 3] == ids[:, 3]).mean())


def weighted(
    where: str, data: tuple[Any, Any], weights: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Data with weights as arguments of fit, from an argument or from a dataset."""
    if where == "argument":
        return data, {"sample_weight": weights, "batch_size": 4}
    return (tf.data.Dataset.from_tensor_slices((*data, weights)).batch(4),), {}


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("where", ["argument", "dataset"])
def test_a_row_of_weight_zero_adds_nothing(wing: Wing, head: Head, where: str) -> None:
    weights = np.array([1, 1, 1, 0], np.float32)
    y = targets(head)
    other = {name: values.copy() for name, values in y.items()}
    for values in other.values():
        values[3] = 2
    found = []
    for labels_ in (y, other):
        model = compiled(wing, head)
        data, options = weighted(where, (X, labels_), weights)
        found.append((fit(model, *data, **options), wing.weights(model)))
    if head is Head.CAUSAL_LM:
        # Keras divides by how many count, whatever they weigh.
        counts = [(v["labels"][:, 1:] != -100).sum() for v in (y, other)]
        assert found[0][0][0] * counts[0] == pytest.approx(found[1][0][0] * counts[1], rel=1e-5)
        return
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, values in found[0][1].items():
        assert_near(found[1][1][name], values, "same program", what=name)


@pytest.mark.parametrize("head", HEADS[1:])
def test_weights_of_one_change_nothing_and_of_two_double(wing: Wing, head: Head) -> None:
    y = targets(head)
    plain = fit(compiled(wing, head), X, y, batch_size=4)[0]
    for factor in (1, 2):
        model = compiled(wing, head)
        weights = np.full(4, factor, np.float32)
        found = model.evaluate(X, y, sample_weight=weights, batch_size=4, verbose=0)
        assert found == pytest.approx(factor * plain, rel=1e-5)


def test_single_tokens_may_be_weighted(wing: Wing) -> None:
    ids = X["input_ids"]
    weights = np.zeros(ids.shape, np.float32)
    weights[:, 2:4] = 1
    model = compiled(wing)
    found = model.evaluate(X, ids, sample_weight=weights, batch_size=4, verbose=0)
    only = np.where(weights == 1, ids, -100)
    right = model.evaluate(X, only, batch_size=4, verbose=0)
    assert found == pytest.approx(right * 8 / 20, rel=1e-5)


def test_weights_may_be_given_by_name(wing: Wing) -> None:
    y = targets(Head.QUESTION_ANSWERING)
    model = compiled(wing, Head.QUESTION_ANSWERING)
    only = {"start_positions": np.ones(4, np.float32), "end_positions": np.zeros(4, np.float32)}
    found = model.test_on_batch(X, y, sample_weight=only)
    other = compiled(
        wing,
        Head.QUESTION_ANSWERING,
        loss={"start_logits": cross_entropy(), "end_logits": cross_entropy()},
    )
    both = other.test_on_batch(X, y, sample_weight=only)[0]
    assert both == pytest.approx(2 * found, rel=1e-5)
    with pytest.raises(ValueError, match="sample_weight names start, but there are labels for"):
        model.test_on_batch(X, y, sample_weight={"start": np.ones(4, np.float32)})


def test_a_compiled_loss_takes_weights_too(wing: Wing) -> None:
    y = targets(Head.SEQUENCE_CLASSIFICATION)["labels"]
    own = compiled(wing, Head.SEQUENCE_CLASSIFICATION)
    other = compiled(wing, Head.SEQUENCE_CLASSIFICATION, loss=cross_entropy())
    weights = np.array([0.5, 2, 0, 1], np.float32)
    found = [
        model.evaluate(X, y, sample_weight=weights, batch_size=4, verbose=0)
        for model in (own, other)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_classes_may_be_weighted(wing: Wing) -> None:
    y = np.array([0, 1, 2, 1])
    model = compiled(wing, Head.SEQUENCE_CLASSIFICATION)
    factors = {0: 0.5, 1: 2.0, 2: 0.0}
    weights = np.array([factors[k] for k in y.tolist()], np.float32)
    right = model.evaluate(X, y, sample_weight=weights, batch_size=4, verbose=0)
    found = fit(model, X, y, class_weight=factors, batch_size=4, epochs=1)[0]
    assert found == pytest.approx(right, rel=1e-5)


# Steps


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("jit", [False, True])
def test_one_step_of_fit_goes_down_the_slopes_of_the_reference(
    wing: Wing, head: Head, jit: bool
) -> None:
    config = smallest(dropout=0.0)
    weights = random_weights(config, head)
    batch = Batch(words(2, 5, vocab_size=12), np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    inputs: Arrays = {**batch.inputs, **labels(head, config, batch)}
    model = wing.build(head, config, weights)
    model.compile(keras.optimizers.SGD(1.0), jit_compile=jit)
    model.fit(inputs, batch_size=2, verbose=0)
    moved = wing.weights(model)
    steps = {name: weights[name].astype(np.float64) - moved[name] for name in weights}
    right = slopes(head, config, weights, inputs)
    # A step is the difference of two float32 weights: their rounding is in it.
    largest = max(float(np.abs(g).max()) for g in right.values())
    for name, slope in right.items():
        rounding = 2e-7 * float(np.abs(weights[name]).max())
        wrong = float(np.abs(steps[name] - slope).max())
        assert wrong <= 1e-4 * max(float(np.abs(slope).max()), 1e-3 * largest) + rounding, name


def test_a_loop_of_ones_own_takes_the_same_steps_as_fit(wing: Wing) -> None:
    ids = words(4, 6)
    model, other = compiled(wing), build(wing)
    fit(model, {"input_ids": ids, "labels": ids}, batch_size=4)
    optimizer = keras.optimizers.SGD(RATE)
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = other(ids, labels=ids, training=True).loss
        slopes_ = tape.gradient(loss, other.trainable_variables)
        optimizer.apply_gradients(zip(slopes_, other.trainable_variables, strict=True))
    expected = wing.weights(other)
    for name, values in wing.weights(model).items():
        assert_near(values, expected[name], "same program", what=name)


def test_the_loss_falls_and_a_memorised_text_is_generated_back(wing: Wing) -> None:
    text = np.array([[2, 7, 19, 4, 33, 8, 26, 12, 5, 30, 21, 9]])
    model = build(wing)
    model.compile(keras.optimizers.Adam(1e-2), jit_compile=True)
    losses = fit(model, {"input_ids": text, "labels": text}, epochs=40, batch_size=1)
    assert losses[-1] < 0.1 * losses[0]
    tokens = model.generate(text[:, :3], max_new_tokens=9, eos_token_id=None)
    np.testing.assert_array_equal(tokens, text)


@pytest.mark.parametrize("head", HEADS[1:])
def test_every_head_learns(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    model.compile(keras.optimizers.AdamW(1e-2), run_eagerly=True)
    losses = fit(model, X, targets(head), epochs=10, batch_size=4)
    assert losses[-1] < 0.7 * losses[0]


def test_frozen_parts_stay_and_the_rest_learns(wing: Wing) -> None:
    model = build(wing, Head.SEQUENCE_CLASSIFICATION)
    model.model.trainable = False
    model.compile(keras.optimizers.SGD(RATE), run_eagerly=True)
    assert [v.path.split("/")[-2:] for v in model.trainable_variables] == [["score", "kernel"]]
    before = wing.weights(model)
    fit(model, X, targets(Head.SEQUENCE_CLASSIFICATION))
    after = wing.weights(model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"score.weight"}
    assert model.num_parameters(only_trainable=True) == 3 * 16


def test_low_rank_adapters_of_keras_train(wing: Wing) -> None:
    model = build(wing)
    for variable in model.weights:
        variable.trainable = False
    for layer in model.model.decoder.layers:
        layer.self_attn.q_proj.enable_lora(2)
        layer.self_attn.v_proj.enable_lora(2)
    model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    losses = fit(model, X, targets(), epochs=5)
    assert losses[-1] < losses[0]
    assert len(model.trainable_variables) == 4
    assert all("lora" in v.path for v in model.trainable_variables)


@pytest.mark.parametrize(
    "options",
    [
        {**GRAPH, "steps_per_execution": 2},
        {**GRAPH, "auto_scale_loss": False},
        {"jit_compile": "auto"},
    ],
)
def test_options_of_compile_change_no_result(wing: Wing, options: dict[str, Any]) -> None:
    right = fit(compiled(wing), {**X, **targets()})
    assert_near(fit(compiled(wing, **options), {**X, **targets()}), right, "same program")


def test_gradients_may_be_gathered_over_several_steps(wing: Wing) -> None:
    model = build(wing)
    optimizer = keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)
    model.compile(optimizer, jit_compile=False)
    before = wing.weights(model)
    y = targets(Head.CAUSAL_LM)
    fit(model, X, y, epochs=1)
    after = wing.weights(model)
    assert not np.array_equal(
        before["model.decoder.embed_positions.weight"],
        after["model.decoder.embed_positions.weight"],
    )
    assert int(optimizer.iterations) == 1


def test_a_frozen_prompt_is_trained_through_its_embeddings(wing: Wing) -> None:
    model = build(wing)
    prompt = tf.Variable(tf.random.stateless_normal((1, 2, 16), (0, 1)) * 0.02)
    ids = tf.constant(words(2, 4))
    with tf.GradientTape() as tape:
        embeds = model.get_input_embeddings()(ids)
        whole = tf.concat((tf.repeat(prompt, 2, 0), embeds), 1)
        targets_ = tf.concat((tf.fill((2, 2), tf.constant(-100, tf.int64)), ids), 1)
        loss = model(inputs_embeds=whole, labels=targets_).loss
    assert float(tf.reduce_max(tf.abs(tape.gradient(loss, prompt)))) > 0


# Callbacks that watch


def test_callbacks_that_watch_see_what_they_expect(wing: Wing) -> None:
    model = build(wing)
    model.compile(keras.optimizers.SGD(RATE), run_eagerly=True)
    seen: list[float] = []
    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_end=lambda _, logs: seen.append(logs["val_loss"])),
        keras.callbacks.EarlyStopping("val_loss", patience=0, min_delta=1e9),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.LearningRateScheduler(lambda epoch, _: RATE / 2 ** (epoch + 1)),
    ]
    joined = {**X, **targets()}
    history = model.fit(
        joined, batch_size=2, epochs=5, verbose=0, validation_data=(joined,), callbacks=callbacks
    )
    # The first epoch improves on infinity, the second one does not improve enough.
    assert len(history.history["loss"]) == len(seen) == 2
    assert seen == history.history["val_loss"]
    assert float(model.optimizer.learning_rate) == pytest.approx(RATE / 4)


def test_early_stopping_brings_the_best_weights_back(wing: Wing) -> None:
    model = compiled(wing)
    joined = {**X, **targets()}
    kept: list[Arrays] = []
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch, _: 1e-3 if epoch == 0 else 50.0),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: kept.append(wing.weights(model))),
        keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True),
    ]
    fit(model, joined, epochs=4, callbacks=callbacks, validation_data=(joined,))
    assert len(kept) == 3 or len(kept) == 2
    for name, values in wing.weights(model).items():
        np.testing.assert_array_equal(values, kept[0][name])


def test_part_of_the_data_may_be_kept_for_validation(wing: Wing) -> None:
    model = compiled(wing)
    joined = {**X, **targets()}
    history = model.fit(joined, batch_size=2, verbose=0, validation_split=0.5).history
    assert np.isfinite(history["val_loss"]).all()


@pytest.mark.parametrize("head", HEADS)
def test_a_summary_counts_every_parameter(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    lines: list[str] = []
    model.summary(print_fn=lines.append)
    assert f"Total params: {model.num_parameters():,}" in "\n".join(lines)
    assert model.count_params() == model.num_parameters()
    assert len(model.trainable_weights) == len(table(model.config, head))
