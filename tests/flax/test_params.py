"""Parameters as values: without a holder, freshly drawn, in other types, resized and pruned."""

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict

import opt_flax
from opt_core.weights import Head, count_parameters, stored_name, table
from opt_flax import FlaxOPTForCausalLM, FlaxOPTForSequenceClassification, FlaxOPTModel
from tests.cases import HEADS, SWITCHES, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = words(2, 6)
EMBEDDING = ("model", "decoder", "embed_tokens", "embedding")


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, **changes})
    return wing.build(head, config, random_weights(config, head))


@pytest.fixture(scope="module")
def folder(wing: Wing, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint")
    config = tiny()
    model = wing.build(
        Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM), dtype="float16"
    )
    model.save_pretrained(made)
    return made


def types_of(params: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}


# A model without parameters


@pytest.mark.parametrize("head", HEADS)
def test_a_model_made_without_parameters_takes_them_with_each_call(wing: Wing, head: Head) -> None:
    full = build(wing, head)
    model = getattr(opt_flax, f"FlaxOPT{head.value}")(full.config, _do_init=False)
    with pytest.raises(ValueError, match=r"holds no params, since it was made with _do_init=False"):
        model.params  # noqa: B018
    with pytest.raises(ValueError, match="pass params= to the call"):
        model(IDS)
    mask = np.ones_like(IDS)
    found, right = model(IDS, mask, params=full.params), full(IDS, mask)
    np.testing.assert_array_equal(found[0], right[0])
    model.params = full.params
    np.testing.assert_array_equal(model(IDS, mask)[0], right[0])


def test_loading_may_give_the_parameters_apart(folder: Path) -> None:
    both: Any = FlaxOPTForCausalLM.from_pretrained(folder, _do_init=False)
    model, params = both
    with pytest.raises(ValueError, match="holds no params"):
        model.params  # noqa: B018
    whole = FlaxOPTForCausalLM.from_pretrained(folder)
    np.testing.assert_array_equal(model(IDS, params=params).logits, whole(IDS).logits)
    assert jax.tree.map(str, model.params_shape_tree) == jax.tree.map(
        lambda leaf: str(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)), params
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_tree_of_shapes_is_that_of_the_parameters(head: Head, switch: str) -> None:
    model = getattr(opt_flax, f"FlaxOPT{head.value}")(tiny(**SWITCHES[switch]))
    shapes = model.params_shape_tree
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), model.params
    )
    assert model.required_params == set(flatten_dict(model.params))
    assert model.num_parameters() == sum(x.size for x in jax.tree.leaves(model.params))
    if head is Head.CAUSAL_LM:
        assert model.num_parameters() == count_parameters(model.config)


def test_parameters_that_do_not_fit_are_refused_with_all_that_is_wrong() -> None:
    model = FlaxOPTForCausalLM(tiny())
    leaves = flatten_dict(model.params)
    leaves[EMBEDDING] = leaves[EMBEDDING][:39]
    leaves["extra", "kernel"] = leaves.pop(("model", "decoder", "layers", "0", "fc1", "bias"))
    with pytest.raises(ValueError, match="params do not fit the model") as caught:
        model.params = unflatten_dict(leaves)
    for part in (
        "missing model/decoder/layers/0/fc1/bias",
        "unexpected extra/kernel",
        r"model/decoder/embed_tokens/embedding is (39, 16), expected (40, 16)",
    ):
        assert part in str(caught.value)


# Fresh values


def test_fresh_parameters_follow_the_table_and_their_key() -> None:
    model = FlaxOPTForCausalLM(tiny(vocab_size=600, hidden_size=64, init_std=0.3), _do_init=False)
    one, same, other = (model.init_weights(jax.random.key(s), (1, 1)) for s in (0, 0, 1))
    for row in table(model.config, Head.CAUSAL_LM).values():
        path = tuple(stored_name(row.path("flax"), Head.CAUSAL_LM).split("."))
        a, b, c = (np.asarray(flatten_dict(tree)[path]) for tree in (one, same, other))
        np.testing.assert_array_equal(a, b)
        if row.std:
            assert a.std() == pytest.approx(row.std, rel=0.15), row.name
            assert (a != c).any()
        else:
            np.testing.assert_array_equal(a, row.mean)
    assert not flatten_dict(one)[EMBEDDING][1].any()


@pytest.mark.parametrize("wrap", [dict, freeze])
def test_fresh_parameters_fill_up_what_is_given(wrap: Any) -> None:
    model = FlaxOPTForSequenceClassification(tiny(), _do_init=False)
    base = FlaxOPTModel(tiny(), seed=7).params
    params = model.init_weights(jax.random.PRNGKey(0), (1, 1), wrap({"model": base}))
    assert set(params) == {"model", "score"}
    for a, b in zip(*map(jax.tree.leaves, (params["model"], base)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="unexpected other"):
        model.init_weights(jax.random.key(0), (1, 1), {"other": jnp.zeros(3)})


# Types


@pytest.mark.parametrize(
    ("name", "dtype"), [("to_fp16", "float16"), ("to_bf16", "bfloat16"), ("to_fp32", "float32")]
)
def test_parameters_are_cast_as_a_new_tree(name: str, dtype: str) -> None:
    start = jnp.bfloat16 if dtype == "float32" else jnp.float32
    model = FlaxOPTForCausalLM(tiny(), param_dtype=start)
    changed = getattr(model, name)(model.params)
    assert types_of(changed) == {dtype}
    assert types_of(model.params) == {jnp.dtype(start).name}
    for a, b in zip(*map(jax.tree.leaves, (changed, model.params)), strict=True):
        np.testing.assert_array_equal(a, b.astype(dtype))
    assert types_of(getattr(model, name)(freeze(model.params))) == {dtype}


@pytest.mark.parametrize("name", ["to_fp16", "to_bf16"])
def test_a_mask_says_which_parameters_are_cast(name: str) -> None:
    model = FlaxOPTForCausalLM(tiny())
    paths = flatten_dict(model.params)
    mask = unflatten_dict({path: not path[-2].endswith("layer_norm") for path in paths})
    changed = flatten_dict(getattr(model, name)(model.params, mask))
    for path, leaf in changed.items():
        assert (leaf.dtype == jnp.float32) == path[-2].endswith("layer_norm"), path


def test_what_is_not_floating_stays(wing: Wing) -> None:
    model = build(wing)
    tree = {**model.params, "steps": jnp.int32(3)}
    assert model.to_fp16(tree)["steps"].dtype == jnp.int32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_in_half_precision_compute_in_the_type_of_the_model(
    wing: Wing, dtype: str
) -> None:
    model = build(wing)
    half = model.to_fp16(model.params) if dtype == "float16" else model.to_bf16(model.params)
    found = model(IDS, params=half)
    assert found.logits.dtype == jnp.float32
    assert_near(found.logits, model(IDS).logits, "half")
    assert type(model)(model.config, dtype=dtype, _do_init=False)(
        IDS, params=half
    ).logits.dtype == jnp.dtype(dtype)


def test_types_of_computation_and_of_parameters_are_apart(folder: Path) -> None:
    def types(**options: Any) -> tuple[str, set[str], str]:
        model = FlaxOPTForCausalLM.from_pretrained(folder, **options)
        return (
            model.dtype.name,
            types_of(model.params),
            jax.eval_shape(model, IDS).logits.dtype.name,
        )

    assert types() == ("float32", {"float32"}, "float32")
    assert types(dtype="auto") == ("float16", {"float16"}, "float16")
    assert types(torch_dtype="auto") == ("float16", {"float16"}, "float16")
    assert types(dtype=jnp.bfloat16) == ("bfloat16", {"bfloat16"}, "bfloat16")
    mixed = types(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert mixed == ("bfloat16", {"float32"}, "bfloat16")
    fresh = FlaxOPTForCausalLM(tiny(), dtype=jnp.bfloat16)
    assert (fresh.dtype, types_of(fresh.params)) == (jnp.bfloat16, {"float32"})


# Changes of shape


def test_resizing_gives_new_parameters_and_leaves_the_old_ones(wing: Wing) -> None:
    model = build(wing)
    old = model.params
    before = model(IDS).logits
    params = model.resize_token_embeddings(45, pad_to_multiple_of=8)
    assert flatten_dict(params)[EMBEDDING].shape == (48, 16)
    assert flatten_dict(old)[EMBEDDING].shape == (40, 16)
    assert_near(model(IDS).logits[..., :40], before, "same program")
    with pytest.raises(ValueError, match=r"embedding is \(40, 16\), expected \(48, 16\)"):
        model.params = old


def test_resizing_and_pruning_change_given_parameters_too(wing: Wing) -> None:
    full = build(wing, tie_word_embeddings=False)
    model = type(full)(full.config, _do_init=False)
    longer = model.resize_token_embeddings(43, params=full.params)
    assert longer["lm_head"]["kernel"].shape == (16, 43)
    assert_near(model(IDS, params=longer).logits[..., :40], full(IDS).logits, "same program")
    factors = np.ones((2, 4), np.float32)
    factors[0, 2] = 0
    right = model(IDS, params=longer, head_mask=factors).logits
    fewer = model.prune_heads({0: [2]}, params=longer)
    attention = fewer["model"]["decoder"]["layers"]["0"]["self_attn"]
    assert attention["q_proj"]["kernel"].shape == (16, 12)
    assert attention["out_proj"]["kernel"].shape == (12, 16)
    assert_near(model(IDS, params=fewer).logits, right)
    with pytest.raises(ValueError, match="holds no params"):
        model.params  # noqa: B018


def test_a_resized_model_still_trains_in_one_program(wing: Wing) -> None:
    model = build(wing)
    model.resize_token_embeddings(42)
    model.prune_heads({1: [0]})
    state = TrainState.create(apply_fn=model, params=model.params, tx=optax.sgd(0.1))

    def loss(params: Any) -> Any:
        return state.apply_fn(IDS, params=params, labels=IDS).loss

    found, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, model.params)
    assert loss(state.apply_gradients(grads=grads).params) < found


def test_a_state_of_training_keeps_its_tree_over_saving_and_loading(
    wing: Wing, tmp_path: Path
) -> None:
    model = build(wing)
    state = TrainState.create(apply_fn=model, params=model.params, tx=optax.adam(1e-3))
    changed = jax.tree.map(lambda leaf: leaf + 0.25, state.params)
    model.save_pretrained(tmp_path, params=changed)
    both: Any = FlaxOPTForCausalLM.from_pretrained(tmp_path, _do_init=False)
    again, params = both
    assert str(jax.tree.structure(params)) == str(jax.tree.structure(state.params))
    for a, b in zip(*map(jax.tree.leaves, (params, changed)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.config.hidden_size == model.config.hidden_size
    assert_near(model(IDS).logits, state.apply_fn(IDS, params=state.params).logits)


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_may_be_copied_and_pickled(wing: Wing, copy: Any) -> None:
    model = build(wing)
    other = copy(model)
    np.testing.assert_array_equal(other(IDS).logits, model(IDS).logits)
    other.resize_token_embeddings(44)
    assert model.config.vocab_size == 40
