"""The cache in JAX: a tree of arrays that goes into a program and comes out of it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_core.weights import Head
from opt_flax import Cache, FlaxOPTForCausalLM
from tests.cases import SWITCHES, padded, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = words(2, 8)


def build(wing: Wing, **changes: Any) -> Any:
    config = tiny(**changes)
    return wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))


@pytest.fixture(scope="module")
def model(wing: Wing) -> Any:
    return build(wing)


def stepping(model: Any) -> Any:
    """A program that feeds tokens behind a cache."""

    @jax.jit
    def step(params: Any, ids: Any, cache: Any, mask: Any = None) -> Any:
        out = model(ids, mask, params=params, past_key_values=cache)
        return out.logits, out.past_key_values

    return step


# What it is


@pytest.mark.parametrize("switch", ["pre_norm", "post_norm_projected", "pruned"])
def test_an_empty_cache_has_room_and_holds_nothing(switch: str) -> None:
    model = FlaxOPTForCausalLM(tiny(**SWITCHES[switch]), dtype=jnp.bfloat16)
    cache = model.init_cache(3, 9)
    assert cache.capacity == 9
    assert int(cache.length) == 0
    for layer, (key, value) in enumerate(cache):
        heads = model.config.heads(layer)
        assert key.shape == value.shape == (3, heads, 0, 4)
        assert cache.keys[layer].shape == (3, heads, 9, 4)
        assert key.dtype == jnp.bfloat16
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(cache))


def test_a_cache_is_a_tree_of_a_buffer_for_keys_and_values_of_each_layer() -> None:
    cache = FlaxOPTForCausalLM(tiny(), _do_init=False).init_cache(2, 6)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(cache)]
    assert paths == [".keys[0]", ".keys[1]", ".values[0]", ".values[1]", ".length"]
    again = jax.tree.unflatten(jax.tree.structure(cache), jax.tree.leaves(cache))
    assert isinstance(again, Cache)
    assert isinstance(jax.device_put(cache), Cache)


def test_places_that_nobody_has_filled_hold_zeros(model: Any) -> None:
    cache = model(IDS, past_key_values=model.init_cache(2, 20)).past_key_values
    for buffer in (*cache.keys, *cache.values):
        assert buffer.shape[2] == 20
        assert not np.asarray(buffer)[:, :, 8:].any()
        assert np.asarray(buffer)[:, :, :8].any()


def test_outside_a_program_a_cache_reads_as_the_tokens_held(model: Any) -> None:
    cache = model(IDS, past_key_values=model.init_cache(2, 20)).past_key_values
    assert cache[0][0].shape == (2, 4, 8, 4)
    inside = jax.jit(lambda cache: cache[0][0])(cache)
    assert inside.shape == (2, 4, 20, 4)
    np.testing.assert_array_equal(inside[:, :, :8], cache[0][0])


# Steps


@pytest.mark.parametrize("switch", SWITCHES)
def test_compiled_steps_give_the_scores_of_one_pass(wing: Wing, switch: str) -> None:
    model = build(wing, **SWITCHES[switch])
    step, cache, found = stepping(model), model.init_cache(2, 12), []
    for place in range(8):
        scores, cache = step(model.params, IDS[:, place : place + 1], cache)
        found.append(scores)
    assert int(cache.length) == 8
    assert_near(np.concatenate(found, 1), model(IDS).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_may_be_as_long_as_the_buffers(model: Any, side: str) -> None:
    texts = padded([words(1, 6, seed=1)[0], words(1, 3, seed=2)[0]], side)
    mask = np.pad(np.asarray(texts.mask), ((0, 0), (0, 6)))
    step, cache, found = stepping(model), model.init_cache(2, 12), []
    for place in range(6):
        scores, cache = step(model.params, texts.ids[:, place : place + 1], cache, mask)
        found.append(scores)
    right = model(**texts.inputs).logits
    assert_near(np.concatenate(found, 1), right, where=texts.shown)
    outside = model(texts.ids[:, :4], mask, past_key_values=model.init_cache(2, 12))
    assert_near(outside.logits, right[:, :4], where=texts.shown[:, :4])


def test_a_mask_over_past_and_new_tokens_is_taken_outside_of_programs(model: Any) -> None:
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    past = model(IDS[:, :5], mask[:, :5]).past_key_values
    found = model(IDS[:, 5:], mask, past_key_values=past).logits
    assert_near(found, model(IDS, mask).logits[:, 5:])


def test_steps_of_one_shape_compile_one_program(wing: Wing, compiled: list[str]) -> None:
    model = build(wing, vocab_size=47)
    step, cache = stepping(model), model.init_cache(2, 30)
    tokens = [jnp.asarray(IDS[:, place : place + 1]) for place in range(8)]
    _, cache = step(model.params, tokens[0], cache)
    compiled.clear()
    for token in tokens[1:]:
        _, cache = step(model.params, token, cache)
    jax.block_until_ready(cache)
    assert not compiled


def test_steps_outside_of_programs_compile_once_for_a_size_of_buffer(
    wing: Wing, compiled: list[str]
) -> None:
    model = build(wing, vocab_size=47)
    tokens = words(2, 25, vocab_size=47)
    cache = model(tokens[:, :3]).past_key_values
    cache = model(tokens[:, 3:4], past_key_values=cache).past_key_values
    compiled.clear()
    for place in range(4, 25):
        cache = model(tokens[:, place : place + 1], past_key_values=cache).past_key_values
    assert not compiled


def test_a_loop_inside_a_program_carries_the_cache(model: Any) -> None:
    @jax.jit
    def run(params: Any, ids: Any) -> Any:
        def body(cache: Any, token: Any) -> Any:
            out = model(token[:, None], params=params, past_key_values=cache)
            return out.past_key_values, out.logits[:, 0]

        cache, scores = jax.lax.scan(body, model.init_cache(2, 8), ids.T)
        return cache.length, scores.swapaxes(0, 1)

    length, scores = run(model.params, jnp.asarray(IDS))
    assert int(length) == 8
    assert_near(scores, model(IDS).logits)


def test_a_cache_may_be_given_up_to_its_heir(model: Any) -> None:
    step = jax.jit(
        lambda params, ids, cache: model(ids, params=params, past_key_values=cache)[:2],
        donate_argnums=2,
    )
    cache = jax.jit(partial(model.init_cache, 2, 12))()
    place = cache.keys[0].unsafe_buffer_pointer()
    _, after = step(model.params, IDS[:, :1], cache)
    assert cache.keys[0].is_deleted()
    assert after.keys[0].unsafe_buffer_pointer() == place


def test_branches_are_mapped_over_one_cache(model: Any) -> None:
    past = model(IDS[:1, :5]).past_key_values
    nexts = jnp.asarray(words(3, 1, seed=4)).reshape(3, 1, 1)
    found = jax.vmap(lambda ids: model(ids, past_key_values=past).logits)(nexts)
    for token, scores in zip(nexts, found, strict=True):
        whole = model(np.concatenate([IDS[:1, :5], token], axis=1)).logits
        assert_near(scores[:, 0], whole[:, -1])


def test_pairs_are_taken_inside_a_program_too(model: Any) -> None:
    past = tuple(model(IDS[:, :5]).past_key_values)
    run = jax.jit(lambda pairs: model(IDS[:, 5:], past_key_values=pairs).logits)
    assert_near(run(past), model(IDS).logits[:, 5:])


def test_gradients_flow_through_a_cache(wing: Wing) -> None:
    model = build(wing, num_hidden_layers=1)

    def last(params: Any, cut: int) -> Any:
        cache = model.init_cache(2, 8) if cut else None
        if cut:
            cache = model(IDS[:, :cut], params=params, past_key_values=cache).past_key_values
        return model(IDS[:, cut:], params=params, past_key_values=cache).logits[:, -1].sum()

    whole, pieces = (jax.jit(jax.grad(last), static_argnums=1)(model.params, cut) for cut in (0, 5))
    for a, b in zip(*map(jax.tree.leaves, (pieces, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


# Room


def test_a_write_beyond_the_room_gives_no_numbers(model: Any) -> None:
    step, cache = stepping(model), model.init_cache(2, 4)
    for place in range(4):
        scores, cache = step(model.params, IDS[:, place : place + 1], cache)
        assert np.isfinite(scores).all()
    scores, cache = step(model.params, IDS[:, 4:5], cache)
    assert np.isnan(scores).all()
    scores, _ = step(model.params, IDS[:, 5:6], cache)
    assert np.isnan(scores).all()


@pytest.mark.parametrize("length", [-1, 5, 2**31 - 1])
def test_a_length_that_cannot_be_gives_no_numbers(model: Any, length: int) -> None:
    empty = model.init_cache(2, 4)
    cache = Cache(empty.keys, empty.values, jnp.int32(length))
    scores, _ = stepping(model)(model.params, IDS[:, :1], cache)
    assert np.isnan(scores).all()


def test_more_tokens_than_the_buffers_hold_are_refused_while_compiling(model: Any) -> None:
    with pytest.raises(ValueError, match="room for 4 tokens, and the call brings 5; inside a comp"):
        stepping(model)(model.params, IDS[:, :5], model.init_cache(2, 4))


def test_outside_of_programs_a_cache_grows(model: Any) -> None:
    out = model(IDS, past_key_values=model.init_cache(2, 4))
    assert out.past_key_values.capacity > 8
    assert_near(out.logits, model(IDS).logits)


def test_positions_behind_a_cache_give_nan_beyond_the_table(wing: Wing) -> None:
    model = build(wing, max_position_embeddings=4)
    step, cache = stepping(model), model.init_cache(1, 8)
    for place in range(4):
        scores, cache = step(model.params, IDS[:1, place : place + 1], cache)
        assert np.isfinite(scores).all()
    scores, _ = step(model.params, IDS[:1, 4:5], cache)
    assert np.isnan(scores).all()


def test_masks_of_other_lengths_are_refused_inside_a_program(model: Any) -> None:
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 5\)"):
        stepping(model)(model.params, IDS[:, :1], model.init_cache(2, 12), np.ones((2, 5)))
