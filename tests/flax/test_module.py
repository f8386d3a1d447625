"""The plain Linen modules: init, apply, remat, and a place in the user's own modules and states."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.linen import summary
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict

import opt_flax
from opt_core.weights import LEAVES, Head, Kind, stored_name, table
from opt_flax import FlaxOPTForCausalLMModule, FlaxOPTModule
from tests.cases import HEADS, SWITCHES, Batch, labels, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = words(2, 6)
LEAF_NAMES = {kind["flax"] for kind in LEAVES.values()}


def module_of(head: Head) -> Any:
    return getattr(opt_flax, f"FlaxOPT{head.value.removeprefix('Model')}Module")


@pytest.fixture(scope="module")
def model(wing: Wing) -> Any:
    config = tiny(dropout=0.0)
    return wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))


# init and apply


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_init_makes_the_tree_that_the_class_holds(head: Head, switch: str) -> None:
    config = tiny(**SWITCHES[switch])
    kind = getattr(opt_flax, f"FlaxOPT{head.value}")
    shapes = jax.eval_shape(kind.module_class(config).init, jax.random.key(0), IDS)
    assert kind.module_class is module_of(head)
    assert list(shapes) == ["params"]
    model = kind(config, _do_init=False)
    assert jax.tree.map(str, shapes["params"]) == jax.tree.map(str, model.params_shape_tree)


def test_init_draws_from_the_distribution_of_the_table() -> None:
    config = tiny(vocab_size=500, hidden_size=64, ffn_dim=400, init_std=0.3)
    found = jax.jit(FlaxOPTForCausalLMModule(config).init)(jax.random.key(0), IDS)["params"]
    leaves = flatten_dict(found)
    for row in table(config, Head.CAUSAL_LM).values():
        values = np.asarray(leaves[tuple(row.path("flax").split("."))])
        assert values.dtype == np.float32
        if not row.std:
            np.testing.assert_array_equal(values, row.mean)
            continue
        assert values.std() == pytest.approx(row.std, rel=0.1), row.name
        assert abs(values.mean()) < 0.1 * row.std
        if row.zero_row is not None:
            assert not values[row.zero_row].any()


@pytest.mark.parametrize("head", HEADS)
def test_apply_gives_what_the_class_gives(wing: Wing, head: Head) -> None:
    config = tiny(num_labels=3)
    model = wing.build(head, config, random_weights(config, head))
    batch = Batch(IDS, np.tril(np.ones((6, 6), np.int64))[-2:])
    given = {**batch.inputs, **labels(head, config, batch)}
    apply = jax.jit(model.module.apply)
    found, right = apply({"params": model.params}, **given), model(**given, use_cache=False)
    assert list(found) == list(right)
    for name in right:
        assert_near(found[name], right[name], "same program", what=name)


def test_a_cache_comes_out_of_apply_when_asked_for_or_given(model: Any) -> None:
    apply = jax.jit(
        partial(model.module.apply, {"params": model.params}), static_argnames="use_cache"
    )
    assert apply(IDS).past_key_values is None
    first = apply(IDS[:, :4], use_cache=True).past_key_values
    rest = apply(IDS[:, 4:], past_key_values=first)
    assert_near(rest.logits, model(IDS).logits[:, 4:])
    assert [key.shape for key, _ in rest.past_key_values] == [(2, 4, 6, 4)] * 2


def test_random_streams_of_apply_are_those_that_flax_knows(model: Any) -> None:
    module = FlaxOPTForCausalLMModule(tiny(dropout=0.5, layerdrop=0.5))

    @jax.jit
    def run(**keys: Any) -> Any:
        out: Any = module.apply({"params": model.params}, IDS, deterministic=False, rngs=keys)
        return out.logits

    one, two = jax.random.split(jax.random.key(1))
    np.testing.assert_array_equal(run(dropout=one), run(dropout=one))
    assert (run(dropout=one) != run(dropout=two)).any()
    both = [run(dropout=one, layerdrop=key) for key in jax.random.split(two, 8)]
    assert any((a != b).any() for a, b in pairwise(both))


def test_types_of_computation_and_of_parameters_are_fields(wing: Wing) -> None:
    module = FlaxOPTForCausalLMModule(tiny(), dtype=jnp.bfloat16, param_dtype=jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), IDS)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert jax.eval_shape(module.apply, variables, IDS).logits.dtype == jnp.bfloat16


def test_a_bound_module_gives_its_parts(model: Any) -> None:
    bound = model.module.bind({"params": model.params})
    embeds = bound.model.decoder.embed_tokens(jnp.asarray(IDS))
    assert embeds.shape == (2, 6, 16)
    assert_near(model(inputs_embeds=embeds).logits, model(IDS).logits, "same program")


def test_a_table_of_the_module_counts_its_parameters() -> None:
    shown = summary.tabulate(FlaxOPTForCausalLMModule(tiny()), jax.random.key(0), depth=2)(IDS)
    count = sum(row.size for row in table(tiny()).values())
    assert f"Total Parameters: {count:,}" in shown


# Names


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_parameters_have_the_names_of_hugging_face(head: Head, switch: str) -> None:
    config = tiny(**SWITCHES[switch])
    params = getattr(opt_flax, f"FlaxOPT{head.value}")(config).params
    dictionaries = [params]
    for inner in dictionaries:
        assert type(inner) is dict
        dictionaries += [value for value in inner.values() if not isinstance(value, jax.Array)]
    found = {path[:-1] for path in flatten_dict(params)}
    rows = table(config, head)
    assert found == {tuple(stored_name(name, head).split(".")[:-1]) for name in rows}
    assert {path[-1] for path in flatten_dict(params)} <= LEAF_NAMES


def test_a_kernel_maps_inputs_to_outputs() -> None:
    layer = opt_flax.FlaxOPTModel(tiny()).params["decoder"]["layers"]["1"]
    assert layer["fc1"]["kernel"].shape == (16, 24)
    assert layer["fc2"]["kernel"].shape == (24, 16)
    assert layer["self_attn"]["q_proj"]["bias"].shape == (16,)
    assert set(layer["final_layer_norm"]) == {"scale", "bias"}


def test_frozen_parameters_are_as_good_as_plain_ones(model: Any) -> None:
    frozen = freeze(model.params)
    np.testing.assert_array_equal(model(IDS, params=frozen).logits, model(IDS).logits)
    other = opt_flax.FlaxOPTForCausalLM(tiny(dropout=0.0), _do_init=False)
    other.params = frozen
    assert type(other.params["model"]["decoder"]) is dict
    np.testing.assert_array_equal(other(IDS).logits, model(IDS).logits)


# In the user's own programs


def test_a_module_may_be_computed_again_going_back(model: Any) -> None:
    plain, again = (
        kind(model.config)
        for kind in (FlaxOPTForCausalLMModule, nn.remat(FlaxOPTForCausalLMModule))
    )

    def loss(module: Any, params: Any) -> Any:
        return module.apply({"params": params}, IDS, labels=IDS).loss

    for a, b in zip(
        *(
            jax.tree.leaves(jax.jit(jax.value_and_grad(lambda p, m=m: loss(m, p)))(model.params))
            for m in (plain, again)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
    products = [products_of(lambda p, m=m: loss(m, p), model.params) for m in (plain, again)]
    assert products[1] > products[0]


def products_of(loss: Any, params: Any) -> int:
    """How many matrix products a gradient takes."""
    return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")


class Regressor(nn.Module):
    """A user's module around OPT."""

    config: Any

    def setup(self) -> None:
        self.backbone = FlaxOPTModule(self.config)
        self.out = nn.Dense(1)

    def __call__(self, ids: Any, *, deterministic: bool = True) -> Any:
        states = self.backbone(ids, deterministic=deterministic).last_hidden_state
        return self.out(states.mean(1))[:, 0]


def test_a_module_is_a_part_of_the_users_own(wing: Wing) -> None:
    config = tiny()
    whole = wing.build(Head.NONE, config, random_weights(config, Head.NONE))
    module = Regressor(config)
    params = module.init(jax.random.key(0), IDS)["params"]
    assert set(params) == {"backbone", "out"}
    assert str(jax.tree.structure(params["backbone"])) == str(jax.tree.structure(whole.params))
    params = {**params, "backbone": whole.params}
    found = module.apply({"params": params}, IDS)
    states = whole(IDS).last_hidden_state
    right = states.mean(1) @ params["out"]["kernel"] + params["out"]["bias"][None]
    assert_near(found, right[:, 0])


def test_a_train_state_takes_the_model_as_it_is(model: Any) -> None:
    state = TrainState.create(apply_fn=model, params=model.params, tx=optax.sgd(0.5))

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, Any]:
        def loss(params: Any) -> Any:
            return state.apply_fn(IDS, params=params, labels=IDS).loss

        found, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), found

    state, first = step(state)
    state, second = step(state)
    assert second < first
    assert int(state.step) == 2
    assert str(jax.tree.structure(state.params)) == str(jax.tree.structure(model.params))


def test_a_train_state_takes_the_module(model: Any) -> None:
    module = model.module
    state = TrainState.create(apply_fn=module.apply, params=model.params, tx=optax.sgd(0.5))
    found = state.apply_fn({"params": state.params}, IDS).logits
    assert_near(found, model(IDS).logits, "same program")


def test_masks_of_an_optimiser_go_by_the_names(model: Any) -> None:
    def decays(path: tuple[str, ...]) -> bool:
        return path[-1] == LEAVES[Kind.MATRIX]["flax"]

    mask = unflatten_dict({path: decays(path) for path in flatten_dict(model.params)})
    optimiser = optax.add_decayed_weights(1.0, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, model.params)
    updates, _ = optimiser.update(zeros, optimiser.init(model.params), model.params)
    for path, update in flatten_dict(updates).items():
        assert np.asarray(update).any() == decays(path)
