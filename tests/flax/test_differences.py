"""What docs/coming-from-transformers.md says to users of the Flax classes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file

import opt_flax
from opt_core.weights import Head
from opt_flax import (
    Cache,
    FlaxOPTForCausalLM,
    FlaxOPTForQuestionAnswering,
    FlaxOPTForSequenceClassification,
    FlaxOPTModel,
    shard,
    shardings,
)
from tests.cases import random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = words(2, 6)


@pytest.fixture
def model(wing: Wing) -> Any:
    config = tiny(dropout=0.0)
    return wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM, std=0.3))


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path, params=model.to_fp16(model.params))
    return tmp_path


def types_of(params: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}


# --- loading and saving ------------------------------------------------------------------------


def test_the_type_of_loading_is_that_of_flax_parameters_too(folder: Path) -> None:
    for options, computed, kept in (
        ({}, "float32", "float32"),
        ({"dtype": "auto"}, "float16", "float16"),
        ({"dtype": jnp.bfloat16}, "bfloat16", "bfloat16"),
        ({"dtype": jnp.bfloat16, "param_dtype": jnp.float32}, "bfloat16", "float32"),
    ):
        given: dict[str, Any] = options
        loaded = FlaxOPTForCausalLM.from_pretrained(folder, **given)
        assert (loaded.dtype.name, types_of(loaded.params)) == (computed, {kept})
    assert types_of(FlaxOPTForCausalLM(tiny(), dtype=jnp.bfloat16).params) == {"float32"}


def test_hints_about_formats_change_nothing_in_flax(folder: Path) -> None:
    right = FlaxOPTForCausalLM.from_pretrained(folder)(IDS).logits
    for hint in ("from_pt", "from_tf", "from_flax"):
        given: dict[str, Any] = {hint: True}
        found = FlaxOPTForCausalLM.from_pretrained(folder, **given)
        np.testing.assert_array_equal(found(IDS).logits, right)


def test_flax_saves_safetensors_in_the_layout_of_pytorch(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.msgpack"))
    stored = load_file(tmp_path / "model.safetensors")
    kernel = model.params["model"]["decoder"]["layers"]["0"]["fc1"]["kernel"]
    np.testing.assert_array_equal(stored["model.decoder.layers.0.fc1.weight"], kernel.T)


def test_flax_loads_straight_onto_a_mesh(folder: Path) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    loaded = FlaxOPTForCausalLM.from_pretrained(folder, mesh=mesh)
    places = shardings(loaded.config, loaded.head, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded.params) == places


# --- classes -----------------------------------------------------------------------------------


def test_flax_has_heads_for_classification_and_answers() -> None:
    scores = FlaxOPTForSequenceClassification(tiny(num_labels=3))(IDS, np.ones_like(IDS)).logits
    assert scores.shape == (2, 3)
    assert FlaxOPTForQuestionAnswering(tiny())(IDS).start_logits.shape == (2, 6)


def test_flax_leaves_out_biases_and_norms_that_are_switched_off() -> None:
    config = tiny(enable_bias=False, layer_norm_elementwise_affine=False)
    layer = FlaxOPTModel(config).params["decoder"]["layers"]["0"]
    assert set(layer) == {"self_attn", "fc1", "fc2"}
    assert set(layer["fc1"]) == {"kernel"}


def test_parameters_of_flax_that_do_not_fit_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="params do not fit the model: missing model/decoder"):
        model.params = {}
    with pytest.raises(ValueError, match="unexpected extra"):
        model.init_weights(jax.random.key(0), (1, 1), {"extra": jnp.zeros(1)})


# --- calling -----------------------------------------------------------------------------------


def test_flax_calls_take_labels_and_all_that_pytorch_takes(model: Any) -> None:
    names = list(inspect.signature(FlaxOPTForCausalLM.__call__).parameters)
    assert names[-5:] == ["train", "inputs_embeds", "head_mask", "use_cache", "labels"]
    assert model(IDS, labels=IDS).loss.shape == ()


def test_a_flax_call_is_a_compiled_program(model: Any, compiled: list[str]) -> None:
    model(IDS)
    compiled.clear()
    model(IDS[::-1])
    assert not compiled


def test_flax_calls_return_a_cache_that_is_a_value(model: Any) -> None:
    first = model(IDS[:, :4]).past_key_values
    assert isinstance(first, Cache)
    assert first[0][0].shape == (2, 4, 4, 4)
    one, again = (model(IDS[:, 4:], past_key_values=first).logits for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert_near(one, model(IDS).logits[:, 4:])
    assert model(IDS, use_cache=False).past_key_values is None


def test_a_cache_of_flax_grows_outside_of_programs_and_gives_nan_inside(model: Any) -> None:
    step = jax.jit(lambda ids, cache: model(ids, past_key_values=cache)[:2])
    assert np.isfinite(model(IDS, past_key_values=model.init_cache(2, 3)).logits).all()
    cache = model.init_cache(2, 1)
    scores, cache = step(IDS[:, :1], cache)
    assert np.isfinite(scores).all()
    scores, cache = step(IDS[:, 1:2], cache)
    assert np.isnan(scores).all()


def test_a_flax_program_answers_nan_to_ids_that_it_does_not_know(model: Any) -> None:
    assert np.isnan(jax.jit(model)(np.array([[2, 50]])).logits).all()
    with pytest.raises(ValueError, match="input_ids hold 50 in row 0 at place 1"):
        model(np.array([[2, 50]]))


def test_attention_of_flax_is_xla_unless_told_otherwise(model: Any) -> None:
    assert model.attn_implementation == "xla"
    assert len(model(IDS, output_attentions=True).attentions) == 2
    model.set_attn_implementation("cudnn")
    with pytest.raises(ValueError, match="cudnn needs float16 or bfloat16 on a CUDA device"):
        model(IDS)


# --- training ----------------------------------------------------------------------------------


def test_flax_training_with_dropout_asks_for_a_key(wing: Wing) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny(dropout=0.1))
    with pytest.raises(ValueError, match="training with dropout or layerdrop needs dropout_rng"):
        model(IDS, train=True)
    with pytest.raises(ValueError, match="they are opposites"):
        model(IDS, train=True, deterministic=True)


def test_layerdrop_of_flax_draws_inside_the_program(wing: Wing) -> None:
    config = tiny(dropout=0.0, layerdrop=0.5)
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))
    run = jax.jit(lambda key: model(IDS, train=True, dropout_rng=key).logits)
    kinds = {np.asarray(run(key)).tobytes() for key in jax.random.split(jax.random.key(0), 20)}
    assert 1 < len(kinds) <= 4


def test_flax_has_gradient_checkpointing(model: Any) -> None:
    right = model(IDS, train=True).logits
    model.enable_gradient_checkpointing()
    out = model(IDS, train=True)
    assert_near(out.logits, right, "same program")
    assert out.past_key_values is None


def test_the_row_of_the_padding_id_learns_nothing_from_lookup_in_flax() -> None:
    model = FlaxOPTModel(tiny())
    ids = np.array([[2, 1, 5]])
    grads = jax.grad(lambda p: model(ids, params=p).last_hidden_state[0, 1].sum())(model.params)
    assert not np.asarray(grads["decoder"]["embed_tokens"]["embedding"])[1].any()


def test_resizing_and_pruning_of_flax_return_new_parameters(model: Any) -> None:
    old = model.params
    longer = model.resize_token_embeddings(44)
    assert longer["model"]["decoder"]["embed_tokens"]["embedding"].shape == (44, 16)
    fewer = model.prune_heads({0: [1]})
    kernel = ("model", "decoder", "layers", "0", "self_attn", "q_proj", "kernel")
    assert [shape_at(tree, kernel) for tree in (old, longer, fewer)] == [
        (16, 16),
        (16, 16),
        (16, 12),
    ]


def shape_at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree.shape


def test_flax_refuses_meshes_whose_axes_are_not_auto(model: Any) -> None:
    with pytest.raises(ValueError, match=r"make the mesh with axis_types=\(AxisType\.Auto,\)"):
        shard(model, jax.make_mesh((2, 4), ("data", "model")))


# --- generation --------------------------------------------------------------------------------


def test_generate_of_flax_returns_the_tokens_themselves(model: Any) -> None:
    tokens = model.generate(IDS, max_new_tokens=3, eos_token_id=None)
    assert isinstance(tokens, jax.Array)
    record = model.generate(IDS, max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True)
    np.testing.assert_array_equal(record.sequences, tokens)


def test_a_key_of_flax_generation_stands_for_a_seed(model: Any) -> None:
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 3, "eos_token_id": None}
    by_key = model.generate(IDS, prng_key=jax.random.key(5), **options)
    np.testing.assert_array_equal(by_key, model.generate(IDS, seed=5, **options))
    with pytest.raises(ValueError, match="give either prng_key or seed"):
        model.generate(IDS, prng_key=jax.random.key(5), seed=5, **options)


def test_flax_generation_takes_functions_and_needs_no_preparation(model: Any) -> None:
    def favours_seven(input_ids: Any, scores: Any, cur_len: Any) -> Any:
        return scores.at[:, 7].add(1000.0)

    tokens = model.generate(IDS, max_new_tokens=3, logits_processor=[favours_seven])
    assert (np.asarray(tokens)[:, IDS.shape[1] :] == 7).all()
    assert not hasattr(model, "prepare_inputs_for_generation")
    assert not hasattr(opt_flax, "FlaxLogitsProcessorList")
