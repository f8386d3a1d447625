"""Checkpoints of training by orbax: parameters and whole states, also into shardings."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType

from opt_core.weights import Head
from opt_flax import FlaxOPTForCausalLM, shard, shardings
from tests.cases import random_weights, tiny, words
from tests.wings import Wing

IDS = words(2, 6)


@pytest.fixture
def model(wing: Wing) -> Any:
    config = tiny(dropout=0.0, num_hidden_layers=1, num_attention_heads=8, hidden_size=32)
    return wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))


def saved(folder: Path, tree: Any) -> Path:
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "step", tree)
        checkpointer.wait_until_finished()
    return folder / "step"


def restored(path: Path, target: Any) -> Any:
    with orbax.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def assert_same(found: Any, right: Any) -> None:
    assert str(jax.tree.structure(found)) == str(jax.tree.structure(right))
    for a, b in zip(*map(jax.tree.leaves, (found, right)), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def test_parameters_come_back_by_the_tree_of_shapes(model: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, model.params)
    params = restored(path, model.params_shape_tree)
    assert_same(params, model.params)
    again = FlaxOPTForCausalLM(model.config, _do_init=False)
    np.testing.assert_array_equal(again(IDS, params=params).logits, model(IDS).logits)


def test_parameters_in_half_precision_come_back_bit_by_bit(model: Any, tmp_path: Path) -> None:
    half = model.to_bf16(model.params)
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), half)
    assert_same(restored(saved(tmp_path, half), target), half)


def test_parameters_come_back_into_their_places_on_a_mesh(model: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, model.params)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    places = shardings(model.config, model.head, mesh)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        model.params_shape_tree,
        places,
    )
    params = restored(path, target)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == places
    assert_same(params, model.params)


def test_what_is_spread_is_saved_and_comes_back_on_another_mesh(model: Any, tmp_path: Path) -> None:
    whole = model.params
    wide, narrow = (
        jax.make_mesh((8 // n, n), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        for n in (8, 2)
    )
    path = saved(tmp_path, shard(model, wide))
    target = shard(FlaxOPTForCausalLM(model.config), narrow)
    params = restored(path, target)
    assert jax.tree.leaves(params)[2].sharding == jax.tree.leaves(target)[2].sharding
    assert_same(params, whole)


def test_a_state_of_training_goes_on_where_it_was_saved(model: Any, tmp_path: Path) -> None:
    optimiser = optax.adam(0.01)

    @jax.jit
    def step(state: TrainState, ids: Any) -> TrainState:
        grads = jax.grad(lambda p: model(ids, labels=ids, params=p).loss)(state.params)
        with jax.numpy_dtype_promotion("standard"):
            stepped: TrainState = state.apply_gradients(grads=grads)
        return stepped

    def fresh(params: Any) -> Any:
        return TrainState.create(apply_fn=model, params=params, tx=optimiser)

    state = step(fresh(model.params), IDS)
    path = saved(tmp_path, state)
    again = restored(path, fresh(model.init_weights(jax.random.key(9))))
    assert int(again.step) == 1
    assert_same(again.params, state.params)
    assert_same(again.opt_state, state.opt_state)
    assert_same(step(again, IDS).params, step(state, IDS).params)


def test_a_state_that_is_spread_comes_back_spread(model: Any, tmp_path: Path) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shard(model, mesh)
    state = TrainState.create(apply_fn=model, params=model.params, tx=optax.adam(0.01))
    again = restored(saved(tmp_path, state), state)
    assert_same(again, state)
    for a, b in zip(*map(jax.tree.leaves, (again.params, state.params)), strict=True):
        assert a.sharding == b.sharding


def test_a_cache_is_saved_like_any_tree(model: Any, tmp_path: Path) -> None:
    cache = model(IDS).past_key_values
    target = jax.eval_shape(lambda: cache)
    again = restored(saved(tmp_path, cache), target)
    assert_same(again, cache)
    np.testing.assert_array_equal(
        model(IDS[:, :1], past_key_values=again).logits,
        model(IDS[:, :1], past_key_values=cache).logits,
    )
