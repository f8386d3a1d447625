"""opt_torch models as modules: copies, state dicts, embeddings, counts, devices, types."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from opt_core.weights import Head, count_parameters, table
from opt_torch import OPTConfig, OPTForCausalLM, OPTModel
from tests.cases import HEADS, SWITCHES, random_weights, tiny, words
from tests.wings import Wing

IDS = torch.from_numpy(words(2, 5))
EMBEDDING = "model.decoder.embed_tokens.weight"


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**changes)
    return wing.build(head, config, random_weights(config, head))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS)[0]
    return result


# Copies


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_computes_the_same_and_shares_nothing(wing: Wing, head: Head, way: str) -> None:
    model = build(wing, head)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(logits(other), logits(model))
    assert other.config == model.config
    assert other.config is not model.config
    before = logits(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(logits(model), before)
    if head is Head.CAUSAL_LM:
        assert other.lm_head.weight is other.model.decoder.embed_tokens.weight


# State dicts


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_state_dict_has_the_names_and_shapes_of_the_table(
    wing: Wing, head: Head, switch: str
) -> None:
    model = build(wing, head, **SWITCHES[switch])
    rows = table(model.config, head)
    prefix = "model." if head is Head.NONE else ""
    assert {prefix + n: tuple(v.shape) for n, v in model.state_dict().items()} == {
        name: row.shape for name, row in rows.items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_state_dict_loads_into_another_model(wing: Wing, tied: bool) -> None:
    model, other = (build(wing, tie_word_embeddings=tied) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    result = other.load_state_dict(model.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(logits(other), logits(model))
    assert (other.lm_head.weight is other.model.decoder.embed_tokens.weight) is tied


def test_a_tied_state_dict_may_hold_both_names(wing: Wing) -> None:
    model = build(wing)
    state = model.state_dict()
    assert "lm_head.weight" not in state
    other = build(wing)
    other.load_state_dict({**state, "lm_head.weight": state[EMBEDDING]})
    assert torch.equal(logits(other), logits(model))


def test_a_tied_model_inside_another_module_keeps_its_names(wing: Wing) -> None:
    outer, other = (nn.ModuleDict({"inner": build(wing)}) for _ in range(2))
    state = outer.state_dict()
    assert f"inner.{EMBEDDING}" in state
    assert "inner.lm_head.weight" not in state
    other.load_state_dict(state)


def test_safetensors_takes_a_tied_state_dict(wing: Wing, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = build(wing)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    other = build(wing)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(other), logits(model))


def test_a_missing_name_is_still_an_error(wing: Wing) -> None:
    model = build(wing)
    state = model.state_dict()
    del state[EMBEDDING]
    with pytest.raises(RuntimeError, match=r"Missing key.*embed_tokens\.weight"):
        model.load_state_dict(state)


# Embeddings


@pytest.mark.parametrize("head", HEADS)
def test_embeddings_are_found_and_replaced(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    decoder = model.base_model.decoder
    assert model.get_input_embeddings() is decoder.embed_tokens
    fresh = nn.Embedding(40, 16)
    model.set_input_embeddings(fresh)
    assert decoder.embed_tokens is fresh
    if head is Head.CAUSAL_LM:
        assert model.get_output_embeddings() is model.lm_head
        assert model.lm_head.weight is fresh.weight, "a tied head follows"
    else:
        assert model.get_output_embeddings() is None
        with pytest.raises(ValueError, match=f"OPT{head.value} has no output embeddings to set"):
            model.set_output_embeddings(nn.Linear(16, 40))


def test_an_untied_head_is_replaced_alone(wing: Wing) -> None:
    model = build(wing, tie_word_embeddings=False)
    fresh = nn.Linear(16, 40, bias=False)
    model.set_output_embeddings(fresh)
    assert model.get_output_embeddings() is model.lm_head is fresh
    model.tie_weights()
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_a_resized_embedding_is_returned_and_stays_trainable_or_frozen(wing: Wing) -> None:
    model = build(wing)
    model.get_input_embeddings().requires_grad_(False)
    resized = model.resize_token_embeddings(48)
    assert resized is model.get_input_embeddings()
    assert resized.num_embeddings == model.lm_head.out_features == 48
    assert resized.weight is model.lm_head.weight
    assert not resized.weight.requires_grad
    model.prune_heads({0: [1]})
    assert model.model.decoder.layers[0].self_attn.q_proj.weight.requires_grad


# Facts


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_parameters_are_counted_once_each(wing: Wing, head: Head, switch: str) -> None:
    model = build(wing, head, **SWITCHES[switch])
    total = count_parameters(model.config, head)
    assert model.num_parameters() == total
    tables = [r.size for n, r in table(model.config, head).items() if "embed_" in n]
    assert model.num_parameters(exclude_embeddings=True) == total - sum(tables)
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    tied = head is Head.CAUSAL_LM and model.config.tie_word_embeddings
    own = 0 if tied else total - count_parameters(model.config, Head.NONE)
    assert model.num_parameters(only_trainable=True) == own


@pytest.mark.parametrize("head", HEADS)
def test_what_other_libraries_ask_of_a_model_is_there(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    assert model.main_input_name == "input_ids"
    assert model._no_split_modules == ["OPTDecoderLayer"]
    assert {type(layer).__name__ for layer in model.base_model.decoder.layers} == {
        "OPTDecoderLayer"
    }
    assert model.base_model_prefix == "model"
    assert model.config_class is OPTConfig
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.half().dtype == torch.float16
    assert "name_or_path" in model.__dict__
    assert model._keys_to_ignore_on_save is None
    tied = {"lm_head.weight": EMBEDDING} if head is Head.CAUSAL_LM else {}
    assert dict(model._tied_weights_keys) == tied
    if head is Head.SEQUENCE_CLASSIFICATION:
        assert model.num_labels == 2


def test_outputs_are_trees_of_tensors_for_pytorch(wing: Wing) -> None:
    out = build(wing)(IDS, labels=IDS, output_hidden_states=True, use_cache=False)
    leaves, spec = _pytree.tree_flatten(out)
    assert len(leaves) == 2 + 3
    again = _pytree.tree_unflatten([leaf * 2 for leaf in leaves], spec)
    assert type(again) is type(out)
    assert torch.equal(again.logits, out.logits * 2)


def test_fresh_weights_follow_the_distribution_of_the_table() -> None:
    torch.manual_seed(0)
    config = tiny(vocab_size=2000, hidden_size=64, ffn_dim=128, init_std=0.05)
    model = OPTForCausalLM(config)
    rows = table(config)
    for name, row in rows.items():
        values = model.get_parameter(name).detach()
        if row.std:
            assert values.std() == pytest.approx(row.std, rel=0.1)
            assert abs(float(values.mean())) < 0.01
        else:
            assert bool((values == row.mean).all())
    assert not model.get_parameter(EMBEDDING)[config.pad_token_id].any()
    torch.manual_seed(0)
    again = OPTForCausalLM(config)
    assert all(
        torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_model_may_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = OPTModel(OPTConfig.preset("175b"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.num_parameters() > 174e9


# Loading into PyTorch's own places and types


def test_a_type_may_be_pytorchs_own(wing: Wing, tmp_path: Path) -> None:
    build(wing).save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert wing.load(Head.CAUSAL_LM, tmp_path, dtype=dtype).dtype is dtype
        assert wing.load(Head.CAUSAL_LM, tmp_path, torch_dtype=dtype).dtype is dtype
    with pytest.raises(
        ValueError, match=r"dtype is torch\.int8; it must be auto or one of float32"
    ):
        wing.load(Head.CAUSAL_LM, tmp_path, dtype=torch.int8)


def test_a_model_loads_where_it_is_told(wing: Wing, tmp_path: Path) -> None:
    build(wing).save_pretrained(tmp_path)
    for device in ("cpu", torch.device("cpu"), "meta"):
        model = wing.load(Head.CAUSAL_LM, tmp_path, device=device)
        assert {p.device for p in model.parameters()} == {torch.device(device)}
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    with torch.device("meta"):
        assert wing.load(Head.CAUSAL_LM, tmp_path).device.type == "meta"


@pytest.mark.parametrize("head", HEADS)
def test_a_loaded_model_is_ready_for_inference(wing: Wing, tmp_path: Path, head: Head) -> None:
    build(wing, head).train().save_pretrained(tmp_path)
    model = wing.load(head, tmp_path)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_an_adapter_in_the_place_of_a_weight_keeps_the_whole_model_from_being_saved(
    wing: Wing, tmp_path: Path
) -> None:
    model = build(wing)
    model.model.decoder.layers[1].fc1 = nn.Sequential(model.model.decoder.layers[1].fc1)
    with pytest.raises(
        ValueError, match=r"no parameter model\.decoder\.layers\.1\.fc1\.weight: some"
    ):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
