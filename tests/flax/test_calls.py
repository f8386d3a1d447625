"""Calls of the classes: the documented signature, training switches, and life inside jit."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opt_flax
from opt_core.weights import Head
from opt_flax import FlaxOPTForCausalLM, FlaxOPTModel
from tests.cases import HEADS, Batch, expected, labels, padded, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = words(2, 6)
#: What the documentation of transformers 4.37 lists, in its order.
DOCUMENTED = [
    *("input_ids", "attention_mask", "position_ids", "params", "past_key_values"),
    *("output_attentions", "output_hidden_states", "return_dict", "dropout_rng", "deterministic"),
]
EXTRA = {
    Head.NONE: [],
    Head.CAUSAL_LM: ["labels"],
    Head.SEQUENCE_CLASSIFICATION: ["labels"],
    Head.QUESTION_ANSWERING: ["start_positions", "end_positions"],
}


def build(wing: Wing, head: Head = Head.CAUSAL_LM, seed: int = 0, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, **changes})
    return wing.build(head, config, random_weights(config, head, seed))


@pytest.fixture(scope="module")
def model(wing: Wing) -> Any:
    return build(wing)


@pytest.fixture(scope="module")
def shallow(wing: Wing) -> Any:
    """One layer, for what takes long to compile."""
    return build(wing, num_hidden_layers=1)


# Signatures


@pytest.mark.parametrize("head", HEADS)
def test_arguments_stand_in_the_documented_order_and_new_ones_go_by_name(head: Head) -> None:
    kind = getattr(opt_flax, f"FlaxOPT{head.value}")
    parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert by_place == DOCUMENTED
    assert by_name == ["train", "inputs_embeds", "head_mask", "use_cache", *EXTRA[head]]
    assert len(parameters) == len(by_place) + len(by_name)


@pytest.mark.parametrize("head", HEADS)
def test_a_model_is_made_with_the_documented_arguments(head: Head) -> None:
    kind = getattr(opt_flax, f"FlaxOPT{head.value}")
    names = list(inspect.signature(kind).parameters)
    assert names[:5] == ["config", "input_shape", "seed", "dtype", "_do_init"]
    made = kind(tiny(), (1, 1), 3, jnp.bfloat16, False)
    assert (made.dtype, made.input_shape) == (jnp.bfloat16, (1, 1))
    assert made.module_class.__name__ == f"FlaxOPT{head.value.removeprefix('Model')}Module"


def test_every_documented_argument_may_be_given_by_place(model: Any) -> None:
    mask, places = np.ones_like(IDS), np.tile(np.arange(6), (2, 1))
    out = model(IDS, mask, places, model.params, None, True, True, False, None, True)
    scores, cache, states, weights = out
    assert (len(cache), len(states), len(weights)) == (2, 3, 2)
    assert_near(scores, model(IDS).logits, "same program")


def test_an_unknown_keyword_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_masks'"):
        model(IDS, attention_masks=np.ones_like(IDS))


@pytest.mark.parametrize("form", [np.asarray, jnp.asarray, np.ndarray.tolist, np.int32, np.uint16])
def test_ids_may_come_in_any_form(model: Any, form: Any) -> None:
    np.testing.assert_array_equal(model(form(IDS)).logits, model(IDS).logits)


def test_a_seed_decides_fresh_parameters() -> None:
    one, same, other = (FlaxOPTModel(tiny(), seed=seed).params for seed in (1, 1, 2))
    for a, b, c in zip(*map(jax.tree.leaves, (one, same, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.asarray(a).std() or (a != c).any()


def test_parameters_of_a_call_stand_for_those_of_the_model(wing: Wing, model: Any) -> None:
    other = build(wing, seed=5)
    found = model(IDS, params=other.params).logits
    np.testing.assert_array_equal(found, other(IDS).logits)
    assert (found != model(IDS).logits).any()


# Training switches


@pytest.mark.parametrize(
    ("rate", "switch", "key"),
    [
        ("dropout", {"train": True}, jax.random.key),
        ("attention_dropout", {"deterministic": False}, jax.random.PRNGKey),
    ],
)
def test_dropout_follows_its_key(wing: Wing, rate: str, switch: Any, key: Any) -> None:
    changes: dict[str, Any] = {rate: 0.5}
    model = build(wing, **changes)
    one, same, other = (model(IDS, dropout_rng=key(seed), **switch).logits for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert (one != model(IDS).logits).any()


@pytest.mark.parametrize("switch", [{}, {"train": False}, {"deterministic": True}])
def test_nothing_is_dropped_outside_of_training(wing: Wing, switch: Any) -> None:
    model = build(wing, dropout=0.5, attention_dropout=0.5)
    found = model(IDS, dropout_rng=jax.random.key(0), **switch).logits
    np.testing.assert_array_equal(found, model(IDS).logits)


@pytest.mark.parametrize("value", [True, False])
def test_switches_that_contradict_each_other_are_refused(model: Any, value: bool) -> None:
    with pytest.raises(ValueError, match="they are opposites: give one of them"):
        model(IDS, train=value, deterministic=value)
    np.testing.assert_array_equal(
        model(IDS, train=False, deterministic=True).logits, model(IDS).logits
    )


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "layerdrop"])
def test_training_with_dropout_asks_for_a_key(wing: Wing, rate: str) -> None:
    changes: dict[str, Any] = {rate: 0.5}
    model = build(wing, **changes)
    with pytest.raises(ValueError, match="needs dropout_rng: pass a key of"):
        model(IDS, train=True)


def test_training_without_any_dropout_needs_no_key(model: Any) -> None:
    assert_near(model(IDS, train=True).logits, model(IDS).logits, "same program")


# In programs of one's own


@pytest.mark.parametrize("head", HEADS)
def test_a_call_may_be_a_part_of_a_program(wing: Wing, head: Head) -> None:
    model = build(wing, head, num_labels=3)
    batch = padded([words(1, 6)[0], words(1, 3)[0]], "left")
    given = {**batch.inputs, **labels(head, model.config, batch)}
    plain = model(**given)
    inside = jax.jit(lambda params, given: model(params=params, **given))(model.params, given)
    assert type(inside) is type(plain)
    assert list(inside) == list(plain)
    weights = random_weights(model.config, head)
    for name, values in expected(head, model.config, weights, **given).items():
        if name not in ("modules", "hidden_states", "attentions"):
            assert_near(inside[name], values, what=name, where=shown(batch, values))


def shown(batch: Batch, values: Any) -> Any:
    return batch.shown if np.shape(values)[:2] == batch.shown.shape else ...


def test_a_program_may_ask_for_a_tuple(model: Any) -> None:
    found = jax.jit(lambda ids: model(ids, return_dict=False, use_cache=False))(IDS)
    assert isinstance(found, tuple)
    assert_near(found[0], model(IDS).logits, "same program")


def test_an_output_is_a_tree_whose_paths_are_its_names(model: Any) -> None:
    out = model(IDS, output_hidden_states=True, use_cache=False, labels=IDS)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(out)]
    assert paths == [".loss", ".logits", *(f".hidden_states[{i}]" for i in range(3))]
    doubled = jax.tree.map(lambda x: 2 * x, out)
    assert type(doubled) is type(out)
    np.testing.assert_array_equal(doubled.logits, 2 * out.logits)


def test_shapes_are_known_without_computing(model: Any) -> None:
    found = jax.eval_shape(model, jax.ShapeDtypeStruct((3, 5), jnp.int32))
    assert found.logits.shape == (3, 5, 40)
    assert found.past_key_values[0][0].dtype == jnp.float32


def test_gradients_inside_a_program_are_those_outside(shallow: Any) -> None:
    def loss(params: Any) -> Any:
        return shallow(IDS, params=params, labels=IDS).loss

    inside, outside = jax.jit(jax.grad(loss))(shallow.params), jax.grad(loss)(shallow.params)
    for a, b in zip(*map(jax.tree.leaves, (inside, outside)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_gradients_flow_to_embeddings_and_head_factors(shallow: Any) -> None:
    embeds = jnp.asarray(np.random.default_rng(0).normal(0, 0.02, (1, 4, 16)).astype(np.float32))
    factors = jnp.ones((1, 4))

    def total(embeds: Any, factors: Any) -> Any:
        out = shallow(inputs_embeds=embeds, head_mask=factors)
        return jnp.square(out.logits).sum()

    grads = jax.grad(total, argnums=(0, 1))(embeds, factors)
    assert all(np.isfinite(g).all() and (g != 0).all() for g in grads)


def test_derivatives_forward_agree_with_those_backward(shallow: Any) -> None:
    def loss(params: Any) -> Any:
        return shallow(IDS, params=params, labels=IDS, use_cache=False).loss

    direction = jax.tree.map(jnp.ones_like, shallow.params)
    _, forward = jax.jvp(loss, (shallow.params,), (direction,))
    backward = sum(float(g.sum()) for g in jax.tree.leaves(jax.grad(loss)(shallow.params)))
    np.testing.assert_allclose(forward, backward, rtol=1e-3)


def test_a_call_may_be_mapped_over_texts(model: Any) -> None:
    texts = words(6, 5).reshape(3, 2, 5)
    found = jax.vmap(lambda ids: model(ids).logits)(texts)
    assert_near(found, np.stack([model(ids).logits for ids in texts]))


def test_a_call_may_be_mapped_over_parameters(wing: Wing, model: Any) -> None:
    models = [build(wing, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(m.params for m in models))
    found = jax.vmap(lambda params: model(IDS, params=params).logits)(stacked)
    assert_near(found, np.stack([m(IDS).logits for m in models]))


def test_every_text_of_a_batch_may_have_its_own_gradient(shallow: Any) -> None:
    def loss(params: Any, ids: Any) -> Any:
        return shallow(ids[None], labels=ids[None], params=params).loss

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(shallow.params, IDS)
    alone = jax.grad(loss)(shallow.params, IDS[1])
    for a, b in zip(*map(jax.tree.leaves, (each, alone)), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-7)


def test_a_call_runs_without_compilation_for_debuggers(shallow: Any) -> None:
    with jax.disable_jit():
        assert_near(shallow(IDS[:, :2]).logits, shallow(IDS[:, :2]).logits)


# What Python cannot look at


def test_an_id_outside_the_vocabulary_poisons_its_text(model: Any) -> None:
    inside = jax.jit(model)
    for wrong in (40, 41, 2**31 - 1, -1, -40):
        ids = IDS.copy()
        ids[0, 2] = wrong
        found = np.asarray(inside(ids).logits)
        assert np.isnan(found[0]).all()
        assert_near(found[1], model(IDS).logits[1])
        with pytest.raises(ValueError, match=f"input_ids hold {wrong} in row 0 at place 2"):
            model(ids)


def test_ids_of_a_narrow_type_cannot_hide_in_it(wing: Wing) -> None:
    model = build(wing, vocab_size=300, num_hidden_layers=1)
    ids = np.where(IDS[0, 2] == IDS, -2, IDS).astype(np.int8)
    assert np.isnan(jax.jit(model)(ids).logits[0]).all()
    with pytest.raises(ValueError, match="input_ids hold -2 in row 0 at place 2"):
        model(jnp.asarray(ids))
    right = model(IDS).logits
    np.testing.assert_array_equal(model(jnp.asarray(IDS, jnp.int8)).logits, right)


def test_a_position_out_of_range_poisons_its_text(model: Any) -> None:
    inside = jax.jit(lambda places: model(IDS, position_ids=places))
    for wrong in (32, 33, 1000, 2**31 - 1, -2, -1000, -(2**31)):
        places = np.tile(np.arange(6), (2, 1))
        places[1, 3] = wrong
        found = np.asarray(inside(places).logits)
        assert np.isnan(found[1]).all()
        assert_near(found[0], model(IDS).logits[0])
        with pytest.raises(ValueError, match=f"position {wrong}"):
            model(IDS, position_ids=places)


def test_a_text_longer_than_the_table_is_poisoned(model: Any) -> None:
    ids, mask = words(2, 34), np.ones((2, 34), np.int64)
    mask[1, :2] = 0
    found = np.asarray(jax.jit(lambda ids, mask: model(ids, mask))(ids, mask).logits)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()
    with pytest.raises(ValueError, match="position 33, but positions go from 0 to 31"):
        model(ids, mask)


def test_a_text_without_a_mask_longer_than_the_table_is_refused_even_in_a_program(
    model: Any,
) -> None:
    with pytest.raises(ValueError, match="position 32, but positions go from 0 to 31"):
        jax.jit(model)(words(2, 33))


def test_a_mask_of_other_values_poisons_its_text(model: Any) -> None:
    mask = np.ones((2, 6), np.float32)
    mask[1, 0] = -1e9
    found = np.asarray(jax.jit(lambda mask: model(IDS, mask))(mask).logits)
    assert np.isnan(found[1]).all()
    assert_near(found[0], model(IDS).logits[0])
    with pytest.raises(ValueError, match="attention_mask holds values other than 0 and 1"):
        model(IDS, mask)


def test_a_label_that_is_no_class_gives_no_loss(model: Any) -> None:
    inside = jax.jit(lambda targets: model(IDS, labels=targets).loss)
    for wrong in (40, -1, -101):
        targets = IDS.copy()
        targets[0, 2] = wrong
        assert np.isnan(inside(targets))
        with pytest.raises(ValueError, match=f"labels hold {wrong}, outside 0 to 39"):
            model(IDS, labels=targets)


def test_shapes_are_checked_inside_a_program_too(model: Any) -> None:
    for wrong, why in (
        ({"attention_mask": np.ones((2, 5))}, r"attention_mask is \(2, 5\), expected \(2, 6\)"),
        ({"position_ids": np.ones((3, 6), np.int32)}, r"position_ids are \(3, 6\)"),
        ({"head_mask": np.ones((3, 4))}, r"head_mask is \(3, 4\)"),
        ({"labels": np.ones((2, 4), np.int32)}, r"labels are \(2, 4\), expected \(2, 6\)"),
    ):
        with pytest.raises(ValueError, match=why):
            jax.jit(lambda given: model(IDS, **given))(wrong)


# Programs


def test_equal_shapes_share_one_program_whatever_the_values_and_the_model(
    wing: Wing, compiled: list[str]
) -> None:
    one, other = (build(wing, seed=seed, vocab_size=43) for seed in (1, 2))
    one(IDS, np.tril(np.ones((6, 6), np.int64))[:2])
    assert compiled
    compiled.clear()
    one(words(2, 6, seed=3), np.tril(np.ones((6, 6), np.int64))[2:4])
    other(jnp.asarray(IDS), np.tril(np.ones((6, 6), np.int64))[1:3])
    assert not compiled


def test_training_compiles_one_program_for_all_steps(wing: Wing, compiled: list[str]) -> None:
    model = build(wing, dropout=0.1, vocab_size=43)

    @jax.jit
    def step(params: Any, ids: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            return model(ids, params=params, labels=ids, train=True, dropout_rng=key).loss

        found, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), found

    params, keys = model.params, list(jax.random.split(jax.random.key(0), 4))
    texts = [jnp.asarray(words(2, 6, seed=seed)) for seed in range(4)]
    params, first = step(params, texts[0], keys[0])
    jax.block_until_ready(first)
    compiled.clear()
    for ids, key in zip(texts[1:], keys[1:], strict=True):
        params, last = step(params, ids, key)
    jax.block_until_ready(last)
    assert not compiled


def test_a_change_of_behaviour_in_the_configuration_takes_effect(wing: Wing) -> None:
    model = build(wing)
    before = model(IDS, train=True, dropout_rng=jax.random.key(0)).logits
    model.config.dropout = 0.5
    after = model(IDS, train=True, dropout_rng=jax.random.key(0)).logits
    assert (before != after).any()


def test_fresh_models_of_every_class_answer(wing: Wing) -> None:
    for head in HEADS:
        out = wing.fresh(head, tiny())(IDS)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


def test_a_language_model_is_what_the_documentation_shows() -> None:
    model = FlaxOPTForCausalLM(tiny(), seed=0)
    next_token_logits = model(input_ids=IDS).logits[:, -1]
    assert next_token_logits.shape == (2, 40)
