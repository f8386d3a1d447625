"""accelerate places, dispatches and prepares opt_torch models without special cases."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opt_core.weights import Head
from opt_torch import OPTConfig, OPTForCausalLM
from tests.cases import HEADS, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

accelerate: Any = pytest.importorskip("accelerate")

IDS = words(2, 5)


@pytest.fixture
def folder(wing: Wing, tmp_path: Path) -> Path:
    wing.build(Head.CAUSAL_LM, tiny(), random_weights(tiny(), Head.CAUSAL_LM)).save_pretrained(
        tmp_path
    )
    return tmp_path


def right(wing: Wing, folder: Path) -> Any:
    return wing.call(wing.load(Head.CAUSAL_LM, folder), input_ids=IDS).logits


@pytest.mark.parametrize("head", HEADS)
def test_a_model_is_built_without_memory(wing: Wing, head: Head) -> None:
    with accelerate.init_empty_weights():
        model = wing.fresh(head, tiny())
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_is_found(wing: Wing, tied: bool) -> None:
    names = ["lm_head.weight", "model.decoder.embed_tokens.weight"]
    find = accelerate.utils.find_tied_parameters
    assert find(wing.fresh(Head.CAUSAL_LM, tiny(tie_word_embeddings=tied))) == [names] * tied
    with accelerate.init_empty_weights():
        model = wing.fresh(Head.CAUSAL_LM, tiny(tie_word_embeddings=tied))
    # accelerate puts a new parameter in the place of each one; the tie is made again afterwards.
    model.tie_weights()
    assert find(model) == [names] * tied


def test_blocks_are_never_split_over_devices() -> None:
    with accelerate.init_empty_weights():
        model = OPTForCausalLM(OPTConfig.preset("125m"))
    model.tie_weights()
    memory = {0: "200MB", 1: "200MB", "cpu": "4GB"}
    places = accelerate.infer_auto_device_map(
        model, memory, no_split_module_classes=model._no_split_modules
    )
    assert len(set(places.values())) == 3
    for path in places:
        assert "layers." not in path or path.rpartition(".")[2].isdigit(), path
    assert places["model.decoder.embed_tokens"] == places["lm_head"]


@pytest.mark.parametrize(
    "device_map",
    ["auto", "balanced", "sequential", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}],
)
def test_a_device_map_places_a_loaded_model(wing: Wing, folder: Path, device_map: Any) -> None:
    model = wing.load(Head.CAUSAL_LM, folder, device_map=device_map)
    assert set(map(str, model.hf_device_map.values())) == {"cpu"}
    assert_near(wing.call(model, input_ids=IDS).logits, right(wing, folder), "same program")
    assert wing.generate(model, IDS, max_new_tokens=3).shape[0] == 2


def test_layers_may_be_offloaded_to_disk_and_come_back_for_each_call(
    wing: Wing, folder: Path, tmp_path: Path
) -> None:
    model = wing.load(Head.CAUSAL_LM, folder)
    places: dict[str, Any] = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    places |= {f"model.decoder.{name}": "cpu" for name, _ in model.model.decoder.named_children()}
    del places["model.decoder.layers"]
    places |= {"model.decoder.layers.0": "cpu", "model.decoder.layers.1": "disk"}
    model = accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=tmp_path / "away"
    )
    assert model.model.decoder.layers[1].fc1.weight.is_meta
    np.testing.assert_allclose(
        wing.call(model, input_ids=IDS).logits, right(wing, folder), atol=1e-6
    )
    whole = wing.load(Head.CAUSAL_LM, folder)
    np.testing.assert_array_equal(
        wing.generate(model, IDS, max_new_tokens=4),
        wing.generate(whole, IDS, max_new_tokens=4),
    )


def test_without_accelerate_a_device_map_says_what_to_install(
    wing: Wing, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="device_map needs accelerate: pip install accelerate"):
        wing.load(Head.CAUSAL_LM, folder, device_map="auto")


def test_an_accelerator_prepares_and_unwraps_a_model(wing: Wing) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = wing.fresh(Head.CAUSAL_LM, tiny()).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared, optimiser = accelerator.prepare(model, optimiser)
    ids = torch.from_numpy(IDS)
    losses = []
    for _ in range(5):
        loss = prepared(ids, labels=ids).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        accelerator.backward(loss)
        optimiser.step()
    assert losses[-1] < losses[0]
    assert accelerator.unwrap_model(prepared) is model
    state = accelerator.get_state_dict(prepared)
    assert state.keys() == model.state_dict().keys()


def test_a_dispatched_model_in_training_generates_as_in_evaluation(wing: Wing) -> None:
    config = tiny(dropout=0.5, layerdrop=0.5)
    model = wing.fresh(Head.CAUSAL_LM, config)
    right = wing.generate(model, IDS, max_new_tokens=4)
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))
    np.testing.assert_array_equal(wing.generate(model.train(), IDS, max_new_tokens=4), right)
    assert all(module.training for module in model.modules())
