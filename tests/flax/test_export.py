"""Programs that outlive the process: jax.export with shapes that are symbols."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from opt_core.weights import Head
from tests.cases import SWITCHES, padded, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

Spec = jax.ShapeDtypeStruct


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**changes)
    return wing.build(head, config, random_weights(config, head))


@pytest.fixture(scope="module")
def model(wing: Wing) -> Any:
    return build(wing)


def reloaded(function: Any, *specs: Any) -> Any:
    """The function, exported, written as bytes, and read again."""
    exported = export.export(jax.jit(function))(*specs)
    return export.deserialize(exported.serialize())


def shapes_of(params: Any) -> Any:
    return jax.tree.map(lambda leaf: Spec(leaf.shape, leaf.dtype), params)


def symbols(names: str, **options: Any) -> Any:
    return export.symbolic_shape(names, **options)


@pytest.mark.parametrize("head", [Head.CAUSAL_LM, Head.SEQUENCE_CLASSIFICATION])
def test_a_program_takes_batches_of_any_size(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    (B,) = symbols("b")

    def run(params: Any, ids: Any, mask: Any) -> Any:
        return model(ids, mask, params=params, use_cache=False).to_tuple()

    found = reloaded(run, shapes_of(model.params), Spec((B, 6), jnp.int32), Spec((B, 6), jnp.int32))
    for rows in (1, 3, 8):
        texts = [words(1, 6, seed)[0][: 6 - seed % 3] for seed in range(rows)]
        batch = padded(texts, "left")
        ids, mask = (np.asarray(x, np.int32) for x in (batch.ids, batch.mask))
        right = model(ids, mask, use_cache=False).to_tuple()
        for a, b in zip(found.call(model.params, ids, mask), right, strict=True):
            where = batch.shown if a.shape[:2] == batch.shown.shape else ...
            assert_near(a, b, where=where)


@pytest.mark.parametrize("switch", ["pre_norm", "post_norm_projected"])
def test_a_program_takes_texts_of_any_length(wing: Wing, switch: str) -> None:
    model = build(wing, **SWITCHES[switch])
    B, T = symbols("b, t", constraints=["t <= 32"])

    def run(params: Any, ids: Any, mask: Any) -> Any:
        return model(ids, mask, params=params, use_cache=False).logits

    specs = (shapes_of(model.params), Spec((B, T), jnp.int32), Spec((B, T), jnp.bool_))
    found = reloaded(run, *specs)
    for rows, length in ((1, 1), (2, 7), (3, 32)):
        ids = words(rows, length).astype(np.int32)
        mask = np.ones(ids.shape, np.bool_)
        mask[0, : length // 2] = False
        scores = found.call(model.params, ids, mask)
        assert_near(scores, model(ids, mask).logits, where=mask)


def test_the_weights_may_be_a_part_of_the_program(model: Any) -> None:
    (B,) = symbols("b")
    found = reloaded(lambda ids: model(ids, use_cache=False).logits, Spec((B, 5), jnp.int32))
    ids = words(3, 5).astype(np.int32)
    assert_near(found.call(ids), model(ids).logits)


def test_a_step_with_a_cache_is_a_program(model: Any) -> None:
    (B,) = symbols("b")

    def step(params: Any, ids: Any, cache: Any) -> Any:
        return model(ids, params=params, past_key_values=cache)

    empty = model.init_cache(2, 12)
    cache_spec = jax.tree.map(
        lambda leaf: Spec((B, *leaf.shape[1:]) if leaf.ndim else (), leaf.dtype), empty
    )
    found = reloaded(step, shapes_of(model.params), Spec((B, 1), jnp.int32), cache_spec)
    ids, cache, scores = words(2, 6).astype(np.int32), empty, []
    for place in range(6):
        out = found.call(model.params, ids[:, place : place + 1], cache)
        cache = out.past_key_values
        scores.append(out.logits)
    assert int(cache.length) == 6
    assert_near(np.concatenate(scores, 1), model(ids).logits)


def test_a_length_that_may_exceed_the_positions_is_refused(model: Any) -> None:
    (T,) = symbols("t")
    with pytest.raises(jax.errors.InconclusiveDimensionOperation, match=r"'t - 1' >= '32'"):
        reloaded(lambda ids: model(ids).logits, Spec((1, T), jnp.int32))


def test_a_gradient_goes_through_a_program_that_was_read_again(wing: Wing) -> None:
    model = build(wing, num_hidden_layers=1)
    exported = export.export(jax.jit(lambda p, ids: model(ids, params=p, labels=ids).loss))(
        shapes_of(model.params), Spec((2, 5), jnp.int32)
    )
    again = export.deserialize(exported.serialize(vjp_order=1))
    ids = words(2, 5).astype(np.int32)
    found = jax.grad(again.call)(model.params, ids)
    right = jax.grad(lambda p: model(ids, params=p, labels=ids).loss)(model.params)
    for a, b in zip(*map(jax.tree.leaves, (found, right)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_program_may_be_made_for_devices_that_are_not_here(model: Any) -> None:
    exported = export.export(
        jax.jit(lambda ids: model(ids, use_cache=False).logits), platforms=("cpu", "cuda", "tpu")
    )(Spec((2, 5), jnp.int32))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    ids = words(2, 5).astype(np.int32)
    assert_near(exported.call(ids), model(ids).logits)
