"""Eight devices: data and tensor parallel from the table's split axes, and what is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opt_core.weights import Head, stored_name, table
from opt_flax import FlaxOPTForCausalLM, FlaxOPTForSequenceClassification, shard, shardings
from opt_flax.weights import path_of
from tests.cases import HEADS, SWITCHES, labels, padded, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

BATCH = padded([words(1, 6, seed)[0][: 3 + seed % 4] for seed in range(8)], "left")
#: Eight devices for data or for layers; the third way is (2, 4).
MESHES = [(8, 1), (1, 8)]
#: Shapes that eight devices can share out.
WIDE = {"num_attention_heads": 8, "hidden_size": 32}


def mesh_of(data: int, model: int, kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(kind,) * 2)


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    """One layer, unless told otherwise: programs for eight devices take long to compile."""
    config = tiny(**{"dropout": 0.0, "num_hidden_layers": 1, **WIDE, **changes})
    return wing.build(head, config, random_weights(config, head))


def spread(values: Any, mesh: Mesh) -> Any:
    """Rows of a batch over the axis for data."""
    place = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda array: jax.device_put(array, place), values)


def parts(array: Any) -> int:
    """How many different parts of an array the devices hold."""
    return len({str(piece.index) for piece in array.addressable_shards})


# Where parameters go


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_each_parameter_is_cut_along_the_axis_of_the_table(head: Head, switch: str) -> None:
    config = tiny(**SWITCHES[switch], **({} if switch == "pruned" else WIDE))
    count = 1 if switch == "pruned" else 8
    places = flatten_dict(shardings(config, head, mesh_of(8 // count, count)))
    rows = table(config, head)
    assert set(places) == {path_of(row, head) for row in rows.values()}
    for row in rows.values():
        names: list[Any] = [None] * len(row.shape)
        if row.split is not None:
            names[row.split] = "model"
        spec = places[path_of(row, head)].spec
        assert tuple(spec) == tuple(names[::-1] if row.transposed("flax") else names), row.name


def test_devices_hold_parts_of_what_is_cut_and_the_whole_of_the_rest(wing: Wing) -> None:
    model = build(wing)
    before = model.params
    params = shard(model, mesh_of(1, 8))
    for row in table(model.config, Head.CAUSAL_LM).values():
        leaf = flatten_dict(params)[path_of(row, Head.CAUSAL_LM)]
        assert len(leaf.sharding.device_set) == 8
        assert parts(leaf) == (1 if row.split is None else 8), row.name
        if row.split is not None:
            assert leaf.addressable_shards[0].data.size == leaf.size // 8
        np.testing.assert_array_equal(leaf, flatten_dict(before)[path_of(row, Head.CAUSAL_LM)])


def test_an_axis_may_have_any_name_and_given_parameters_are_returned_alone(wing: Wing) -> None:
    model = build(wing)
    mesh = jax.make_mesh((4,), ("parts",), axis_types=(AxisType.Auto,))
    params = shard(model, mesh, axis="parts", params=model.params)
    kernel = params["model"]["decoder"]["layers"]["0"]["fc1"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "parts")
    assert len(jax.tree.leaves(model.params)[0].sharding.device_set) == 1


# What they compute


@pytest.mark.parametrize(
    ("head", "shape"),
    [(Head.CAUSAL_LM, shape) for shape in MESHES] + [(head, (2, 4)) for head in HEADS],
)
def test_calls_on_a_mesh_give_what_one_device_gives(
    wing: Wing, head: Head, shape: tuple[int, int]
) -> None:
    model = build(wing, head, num_labels=3)
    given = {**BATCH.inputs, **labels(head, model.config, BATCH)}
    right = model(**given)
    mesh = mesh_of(*shape)
    shard(model, mesh)
    found = model(**spread(given, mesh))
    for name in set(right) - {"past_key_values"}:
        where = BATCH.shown if np.shape(right[name])[:2] == BATCH.shown.shape else ...
        assert_near(found[name], right[name], what=name, where=where)
    assert parts(found.past_key_values.keys[0]) == 8


@pytest.mark.parametrize("switch", ["post_norm_projected", "no_bias", "untied"])
def test_every_architecture_is_spread(wing: Wing, switch: str) -> None:
    model = build(wing, **SWITCHES[switch])
    right = model(**BATCH.inputs).logits
    mesh = mesh_of(2, 4)
    shard(model, mesh)
    assert_near(model(**spread(BATCH.inputs, mesh)).logits, right, where=BATCH.shown)


def test_the_weights_of_layers_never_meet_on_one_device(wing: Wing) -> None:
    model, mesh = build(wing), mesh_of(1, 8)
    params = shard(model, mesh)
    run = jax.jit(lambda params, ids: model(ids, params=params, use_cache=False).logits)
    text = str(run.lower(params, BATCH.ids).compile().as_text())
    # Sums of parts are gathered, weights are not: no whole kernel of a layer appears.
    assert "all-reduce" in text
    assert "f32[32,24]" not in text
    assert "f32[32,32]" not in text
    assert "f32[32,3]" in text


def test_a_step_of_training_on_a_mesh_is_that_of_one_device(wing: Wing) -> None:
    model = build(wing, dropout=0.1)
    given = {**BATCH.inputs, **labels(Head.CAUSAL_LM, model.config, BATCH)}
    optimiser = optax.adam(0.01, eps=0.1)

    @jax.jit
    def step(params: Any, state: Any, given: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            return model(**given, params=params, train=True, dropout_rng=key).loss

        found, grads = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, found

    key, mesh = jax.random.key(0), mesh_of(2, 4)
    right, _, loss = step(model.params, optimiser.init(model.params), given, key)
    params = shard(model, mesh)
    found, state, spread_loss = step(params, optimiser.init(params), spread(given, mesh), key)
    np.testing.assert_allclose(spread_loss, loss, rtol=1e-5)
    for path, leaf in flatten_dict(found).items():
        np.testing.assert_allclose(leaf, flatten_dict(right)[path], rtol=1e-4, atol=1e-6)
        assert leaf.sharding.is_equivalent_to(flatten_dict(params)[path].sharding, leaf.ndim), path
    moments = state[0].mu["model"]["decoder"]["layers"]["0"]["fc1"]["kernel"]
    assert parts(moments) == 4


def test_generation_on_a_mesh_gives_the_same_tokens(wing: Wing) -> None:
    config, mesh = tiny(num_hidden_layers=1, **WIDE), mesh_of(2, 4)
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM, std=0.3))
    asked: Any = {"max_new_tokens": 5, "eos_token_id": None}
    right = model.generate(BATCH.ids, attention_mask=BATCH.mask, **asked)
    shard(model, mesh)
    prompt, mask = spread((BATCH.ids, np.asarray(BATCH.mask)), mesh)
    found = model.generate(prompt, attention_mask=mask, **asked)
    np.testing.assert_array_equal(found, right)


def test_data_alone_is_spread_over_whole_copies(wing: Wing) -> None:
    model = build(wing)
    right = model(**BATCH.inputs).logits
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    copies = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()))
    found = model(**spread(BATCH.inputs, mesh), params=copies).logits
    assert parts(found) == 8
    assert_near(found, right, where=BATCH.shown)


def test_each_device_may_compute_its_own_rows(wing: Wing) -> None:
    model = build(wing)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def gradient(params: Any, ids: Any) -> Any:
        def loss(params: Any) -> Any:
            return jax.lax.pmean(model(ids, params=params, labels=ids).loss, "data")

        return jax.grad(loss)(params)

    rows = PartitionSpec("data")
    mapped = jax.shard_map(
        gradient, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec()
    )
    ids = words(8, 5)
    found = jax.jit(mapped)(model.params, ids)
    right = jax.grad(lambda p: model(ids, params=p, labels=ids).loss)(model.params)
    for a, b in zip(*map(jax.tree.leaves, (found, right)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


# Loading


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16"])
def test_a_checkpoint_is_loaded_into_parts(wing: Wing, tmp_path: Path, dtype: Any) -> None:
    model = build(wing)
    right = model(**BATCH.inputs).logits
    model.save_pretrained(tmp_path)
    mesh = mesh_of(2, 4)
    loaded = FlaxOPTForCausalLM.from_pretrained(tmp_path, dtype, mesh=mesh)
    places = flatten_dict(shardings(loaded.config, Head.CAUSAL_LM, mesh))
    for path, leaf in flatten_dict(loaded.params).items():
        assert leaf.sharding == places[path]
    bound = "half" if dtype == "bfloat16" else "float32"
    found = loaded(**spread(BATCH.inputs, mesh)).logits.astype(jnp.float32)
    assert_near(found, right, bound, where=BATCH.shown)


def test_no_device_ever_holds_a_whole_kernel_while_loading(
    wing: Wing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(wing).save_pretrained(tmp_path)
    put: list[Any] = []
    place = jax.device_put

    def note(array: Any, where: Any = None) -> Any:
        put.append((array, where))
        return place(array, where)

    monkeypatch.setattr(jax, "device_put", note)
    FlaxOPTForCausalLM.from_pretrained(tmp_path, mesh=mesh_of(1, 8))
    sizes = [array.size for array, _ in put]
    assert all(isinstance(array, np.ndarray) for array, _ in put)
    assert all(isinstance(where, NamedSharding) for _, where in put)
    assert sizes == sorted(sizes, reverse=True)


def test_a_new_head_is_drawn_the_same_on_a_mesh(wing: Wing, tmp_path: Path) -> None:
    build(wing, Head.NONE).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"holds no score\.weight"):
        spread_out, alone = (
            FlaxOPTForSequenceClassification.from_pretrained(tmp_path, seed=4, mesh=mesh)
            for mesh in (mesh_of(1, 8), None)
        )
    np.testing.assert_array_equal(
        spread_out.params["score"]["kernel"], alone.params["score"]["kernel"]
    )


def test_what_is_spread_is_saved_whole(wing: Wing, tmp_path: Path) -> None:
    model = build(wing)
    right = wing.weights(model)
    shard(model, mesh_of(1, 8))
    model.save_pretrained(tmp_path)
    again = wing.weights(FlaxOPTForCausalLM.from_pretrained(tmp_path))
    for name, values in right.items():
        np.testing.assert_array_equal(again[name], values)


def test_resizing_and_pruning_keep_a_spread_model_right(wing: Wing) -> None:
    model, mesh = build(wing), mesh_of(2, 4)
    twin = build(wing)
    shard(model, mesh)
    for one in (model, twin):
        one.resize_token_embeddings(48)
        one.prune_heads({0: [1, 2, 5, 6]})
    shard(model, mesh)
    found = model(**spread(BATCH.inputs, mesh)).logits
    assert_near(found, twin(**BATCH.inputs).logits, where=BATCH.shown)


# What is refused


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"num_attention_heads": 4},
            "8 devices cannot share the model evenly: 4 heads in layers 0, 1",
        ),
        ({"ffn_dim": 28}, "evenly: ffn_dim 28; choose a mesh whose size divides these"),
        ({"vocab_size": 42}, r"evenly: vocab_size 42; .* \(resize_token_embeddings can round"),
        ({"pruned_heads": {1: [0]}}, "evenly: 7 heads in layers 1"),
        ({"num_attention_heads": 4, "ffn_dim": 28}, "4 heads in layers 0, 1; ffn_dim 28"),
    ],
)
def test_sizes_that_devices_cannot_share_are_refused(changes: Any, why: str) -> None:
    config = tiny(**{**WIDE, **changes})
    with pytest.raises(ValueError, match=why):
        shardings(config, Head.CAUSAL_LM, mesh_of(1, 8))
    shardings(config, Head.CAUSAL_LM, mesh_of(8, 1))


def test_an_axis_that_the_mesh_lacks_is_refused(wing: Wing) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="has the axes data, and none of the name 'model'"):
        shard(build(wing), mesh)


@pytest.mark.parametrize(
    "make",
    [
        lambda: jax.make_mesh((2, 4), ("data", "model")),
        lambda: mesh_of(2, 4, AxisType.Explicit),
        lambda: mesh_of(2, 4, AxisType.Manual),
    ],
)
def test_axes_of_another_type_are_refused_with_the_remedy(
    wing: Wing, tmp_path: Path, make: Any
) -> None:
    model = build(wing)
    why = r"axes data, model of the mesh are not of the type Auto.*axis_types=\(AxisType\.Auto,\)"
    with pytest.raises(ValueError, match=why):
        shard(model, make())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=why):
        FlaxOPTForCausalLM.from_pretrained(tmp_path, mesh=make())


def test_a_model_without_parameters_has_none_to_spread() -> None:
    with pytest.raises(ValueError, match="holds no params"):
        shard(FlaxOPTForCausalLM(tiny(**WIDE), _do_init=False), mesh_of(1, 8))


def test_names_in_the_tree_of_places_are_those_of_the_parameters() -> None:
    config = tiny(**WIDE)
    places = shardings(config, Head.CAUSAL_LM, mesh_of(1, 8))
    made = FlaxOPTForCausalLM(config).params
    assert str(jax.tree.structure(made)) == str(jax.tree.structure(places))
    rows = table(config, Head.CAUSAL_LM)
    paths = {stored_name(row.path("flax"), Head.CAUSAL_LM) for row in rows.values()}
    assert {".".join(path) for path in flatten_dict(places)} == paths
    assert unflatten_dict(flatten_dict(places)) == places
