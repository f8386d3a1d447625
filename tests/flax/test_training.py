"""Training with optax: steps are the right ones, layers are run again or left out."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend import core

from opt_core import reference
from opt_core.weights import Head, table
from tests.cases import HEADS, Arrays, Batch, labels, padded, random_weights, tiny, words
from tests.tolerances import assert_gradients_near, assert_near
from tests.wings import Wing

IDS = words(3, 7)
KEY = jax.random.key(0)


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    """One layer, unless told otherwise: what is tested here takes long to compile."""
    config = tiny(**{"dropout": 0.0, "num_hidden_layers": 1, **changes})
    return wing.build(head, config, random_weights(config, head))


def loss_of(model: Any, **given: Any) -> Any:
    """The loss as a function of the parameters."""

    def loss(params: Any, key: Any = None) -> Any:
        options = {"input_ids": IDS, "labels": IDS, **given}
        return model(**options, params=params, train=True, dropout_rng=key).loss

    return loss


def repetitions(function: Any, *given: Any, primitive: str = "dot_general") -> int:
    """How often a primitive stands in a program, those in its parts included."""

    def count(jaxpr: core.Jaxpr) -> int:
        inner = [part for equation in jaxpr.eqns for part in core.jaxprs_in_params(equation.params)]
        here = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
        return here + sum(map(count, inner))

    return count(jax.make_jaxpr(function)(*given).jaxpr)


# Steps


@pytest.mark.parametrize("head", [head for head in HEADS if head is not Head.NONE])
def test_the_loss_of_every_head_falls_under_adamw(wing: Wing, head: Head) -> None:
    model = build(wing, head, num_labels=3)
    batch = padded([words(1, 7)[0], words(1, 4)[0]], "right")
    given = {**batch.inputs, **labels(head, model.config, batch)}
    optimiser = optax.adamw(0.01)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: model(**given, params=p, train=True).loss)(
            params
        )
        # Optax itself leaves types to JAX.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = model.params, optimiser.init(model.params), []
    for _ in range(8):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(b < a for a, b in pairwise(losses))


def test_a_step_of_sgd_goes_down_the_slopes_of_float64(wing: Wing) -> None:
    # Without a bend, so that differences of a float64 loss are as good as its derivative.
    config = tiny(dropout=0.0, activation_function="gelu")
    weights = random_weights(config, Head.CAUSAL_LM)
    model = wing.build(Head.CAUSAL_LM, config, weights)
    grads = jax.jit(jax.grad(loss_of(model)))(model.params)
    updates, _ = optax.sgd(1.0).update(grads, optax.sgd(1.0).init(model.params))
    stepped = optax.apply_updates(model.params, updates)
    model.params = stepped
    after, sampled, right = wing.weights(model), {}, {}
    random = np.random.default_rng(0)
    for name, before in weights.items():
        place = tuple(int(random.integers(size)) for size in before.shape)
        right[name] = np.array(slope(config, weights, name, place))
        sampled[name] = (before.astype(np.float64) - after[name])[place]
    # A step rounds each weight to float32, whose unit is 1e-7 of it.
    for name, expected in right.items():
        allowed = 1e-4 * abs(expected) + 2e-7 * max(1.0, float(np.abs(weights[name]).max()))
        assert abs(sampled[name] - expected) <= allowed, name


def slope(config: Any, weights: Arrays, name: str, place: tuple[int, ...]) -> float:
    """The derivative of the reference's loss by one weight, by central differences in float64."""
    losses = []
    for step in (1e-6, -1e-6):
        moved = {n: v.astype(np.float64) for n, v in weights.items()}
        moved[name][place] += step
        loss = reference.causal_lm(config, moved, input_ids=IDS, labels=IDS).loss
        losses.append(float(np.float64(loss)))
    return (losses[0] - losses[1]) / 2e-6


def test_the_padding_row_learns_nothing_from_being_looked_up(wing: Wing) -> None:
    model = build(wing, tie_word_embeddings=False)
    ids = np.where(IDS[0, 3] == IDS, 1, IDS)
    grads = jax.grad(loss_of(model, input_ids=ids, labels=ids))(model.params)
    table = np.asarray(grads["model"]["decoder"]["embed_tokens"]["embedding"])
    assert not table[1].any()
    assert table[int(ids[0, 0])].any()


def test_parts_of_the_model_may_stay_as_they_are(wing: Wing) -> None:
    model = build(wing)
    paths = flatten_dict(model.params)
    kinds = unflatten_dict({path: "learns" if "layers" in path else "stays" for path in paths})
    optimiser = optax.multi_transform(
        {"learns": optax.sgd(0.1), "stays": optax.set_to_zero()}, kinds
    )
    grads = jax.grad(loss_of(model))(model.params)
    updates, _ = optimiser.update(grads, optimiser.init(model.params))
    for path, update in flatten_dict(updates).items():
        assert "layers" in path or not np.asarray(update).any()
    assert any(np.asarray(update).any() for update in jax.tree.leaves(updates))


def test_gradients_may_be_summed_over_small_batches(wing: Wing) -> None:
    model = build(wing)

    def loss(params: Any, ids: Any) -> Any:
        return model(ids, labels=ids, params=params, train=True).loss

    @jax.jit
    def summed(params: Any, parts: Any) -> Any:
        def add(total: Any, ids: Any) -> Any:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, ids)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)[0]

    whole = jax.jit(jax.grad(loss))(model.params, IDS)
    parts = summed(model.params, jnp.asarray(IDS)[:, None])
    for a, b in zip(*map(jax.tree.leaves, (parts, whole)), strict=True):
        np.testing.assert_allclose(a / len(IDS), b, rtol=1e-3, atol=1e-6)


# Layers run again


def test_checkpointing_changes_neither_loss_nor_gradients(wing: Wing) -> None:
    model = build(wing, num_hidden_layers=2, dropout=0.3, attention_dropout=0.3)
    loss, grads = jax.jit(jax.value_and_grad(loss_of(model)))(model.params, KEY)
    model.enable_gradient_checkpointing()
    again, recomputed = jax.jit(jax.value_and_grad(loss_of(model)))(model.params, KEY)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(grads).items()}
    found = {"/".join(path): leaf for path, leaf in flatten_dict(recomputed).items()}
    assert_gradients_near(found, flat)


def test_checkpointing_runs_layers_twice(wing: Wing) -> None:
    model = build(wing, num_hidden_layers=4)

    def products() -> int:
        return repetitions(jax.grad(loss_of(model)), model.params)

    plain = products()
    model.enable_gradient_checkpointing()
    every = products()
    model.gradient_checkpointing_enable(every_n_layers=2)
    half = products()
    # Four projections, two products of attention, and the first half of the feed-forward part: the
    # last product of a layer is not needed to go back through it.
    again = every - plain
    assert again >= 4 * 7
    assert half - plain == again // 2
    model.gradient_checkpointing_disable()
    assert products() == plain
    assert not model.is_gradient_checkpointing


def test_checkpointing_does_nothing_outside_of_training(wing: Wing) -> None:
    model = build(wing)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert model(IDS).past_key_values is not None
    assert repetitions(lambda p: model(IDS, params=p).logits, model.params, primitive="remat2") == 0


@pytest.mark.parametrize("changes", [{}, {"layerdrop": 0.5}])
def test_training_with_layers_run_again_or_left_out_returns_no_cache(
    wing: Wing, changes: Any
) -> None:
    model = build(wing, **changes)
    if not changes:
        model.enable_gradient_checkpointing()
    assert model(IDS, train=True, dropout_rng=KEY).past_key_values is None
    with pytest.warns(UserWarning, match="use_cache is off while training with gradient") as seen:
        assert model(IDS, train=True, dropout_rng=KEY, use_cache=True).past_key_values is None
    assert len(seen) == 1
    assert seen[0].filename == __file__


# Dropout


def test_no_dropout_acts_on_embeddings(wing: Wing) -> None:
    model = build(wing, dropout=0.9, attention_dropout=0.9)
    found = model(IDS, output_hidden_states=True, train=True, dropout_rng=KEY).hidden_states
    right = model(IDS, output_hidden_states=True).hidden_states
    np.testing.assert_array_equal(found[0], right[0])
    assert (found[1] != right[1]).any()


def test_attention_dropout_keeps_the_mean_of_the_outputs(wing: Wing) -> None:
    model = build(wing, Head.NONE, attention_dropout=0.5)

    def attended(key: Any, *, deterministic: bool = False) -> Any:
        _, noted = model.module.apply(
            {"params": model.params},
            IDS,
            deterministic=deterministic,
            rngs={"dropout": key},
            capture_intermediates=lambda module, _: module.name == "self_attn",
            mutable="intermediates",
        )
        return jax.tree.leaves(noted)[0]

    drawn = np.asarray(jax.jit(jax.vmap(attended))(jax.random.split(KEY, 4000)))
    right = np.asarray(attended(KEY, deterministic=True))
    spread = drawn.std(0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(0) - right) < 5 * spread + 1e-6).all()
    assert drawn.std(0).max() > 0.01


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_layerdrop_leaves_out_no_layer_at_0_and_all_at_1(wing: Wing, rate: float) -> None:
    model = build(wing, layerdrop=rate)
    options: Any = {"output_hidden_states": True, "output_attentions": True}
    out = model(IDS, train=True, dropout_rng=KEY, **options)
    plain = model(IDS, **options)
    for state, right in zip(out.hidden_states[:-1], plain.hidden_states[:-1], strict=True):
        assert_near(state, plain.hidden_states[0] if rate else right, "same program")
    assert all(not np.asarray(weight).any() for weight in out.attentions) == bool(rate)


def test_layerdrop_leaves_out_about_its_share(wing: Wing) -> None:
    model = build(wing, Head.NONE, layerdrop=0.25)

    def skipped(key: Any) -> Any:
        out = model(IDS[:1, :2], train=True, dropout_rng=key, output_attentions=True)
        return out.attentions[0].sum() == 0

    share = jax.jit(jax.vmap(skipped))(jax.random.split(KEY, 2000)).mean()
    assert abs(float(share) - 0.25) < 0.05


def test_a_layer_that_is_left_out_has_no_gradient(wing: Wing) -> None:
    model = build(wing, layerdrop=1.0)
    grads = jax.grad(loss_of(model))(model.params, KEY)
    layers = grads["model"]["decoder"]["layers"]
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(layers))
    assert np.asarray(grads["model"]["decoder"]["embed_tokens"]["embedding"]).any()


# Precision


def test_half_precision_computes_over_float32_parameters(wing: Wing) -> None:
    full = build(wing)
    model = type(full)(full.config, dtype=jnp.bfloat16, _do_init=False)
    loss, grads = jax.jit(jax.value_and_grad(loss_of(model)))(full.params)
    right, slopes = jax.jit(jax.value_and_grad(loss_of(full)))(full.params)
    assert loss.dtype == jnp.float32
    assert_near(loss, right, "half")
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    for a, b in zip(*map(jax.tree.leaves, (grads, slopes)), strict=True):
        assert a.dtype == jnp.float32
        assert float(jnp.abs(a - b).max()) <= 0.05 * largest


def test_a_batch_without_any_label_has_no_loss(wing: Wing) -> None:
    model = build(wing)
    given = Batch(IDS, None)
    assert np.isnan(model(given.ids, labels=np.full_like(IDS, -100)).loss)


def test_gradients_have_the_paths_and_types_of_the_parameters(wing: Wing) -> None:
    model = build(wing)
    grads = jax.eval_shape(jax.grad(loss_of(model)), model.params)
    assert jax.tree.map(str, grads) == jax.tree.map(str, model.params_shape_tree)
    assert len(jax.tree.leaves(grads)) == len(table(model.config, Head.CAUSAL_LM))
