"""PEFT works on opt_torch without special cases: LoRA, prompt and prefix tuning."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opt_core.weights import Head
from tests.cases import random_weights, tiny, words
from tests.wings import Wing

peft: Any = pytest.importorskip("peft")

IDS = torch.from_numpy(words(3, 6))
#: Every way of tuning, with the inputs that it adds in front of the text.
WAYS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
}


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, **changes})
    return wing.build(head, config, random_weights(config, head))


def wrapped(model: Any, way: str, task: str = "CAUSAL_LM", **options: Any) -> Any:
    settings = getattr(peft, way)(task_type=task, **WAYS[way], **options)
    torch.manual_seed(0)
    return peft.get_peft_model(model, settings)


def train(model: Any, **inputs: Any) -> list[float]:
    """The losses of a few steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.1)
    losses = []
    for _ in range(6):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masked", [False, True])
def test_an_adapter_trains_while_the_model_stays(wing: Wing, way: str, masked: bool) -> None:
    base = build(wing)
    before = wing.weights(base)
    model = wrapped(base, way).train()
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    losses = train(model, input_ids=IDS, labels=IDS, **({"attention_mask": mask} if masked else {}))
    assert losses[-1] < losses[0]
    inner = model.get_base_model()
    if way == "LoraConfig":
        inner = model.unload()
    for name, values in wing.weights(inner).items():
        np.testing.assert_array_equal(values, before[name])


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_is_saved_and_loaded(wing: Wing, tmp_path: Path, way: str) -> None:
    build(wing).save_pretrained(tmp_path / "base")
    model = wrapped(wing.load(Head.CAUSAL_LM, tmp_path / "base"), way).train()
    train(model, input_ids=IDS, labels=IDS)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    told = (tmp_path / "adapter/adapter_config.json").read_text()
    assert str(tmp_path / "base") in told, "the adapter names its base model"
    base = wing.load(Head.CAUSAL_LM, tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("way", WAYS)
def test_a_tuned_model_generates(wing: Wing, way: str) -> None:
    model = wrapped(build(wing), way).train()
    train(model, input_ids=IDS, labels=IDS)
    model.eval()
    found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5)
    assert found.shape[0] == 3
    assert torch.equal(found[:, :6], IDS)


def test_lora_takes_the_layers_it_knows_and_merges_into_them(wing: Wing, tmp_path: Path) -> None:
    model = wrapped(build(wing), "LoraConfig").train()
    targets = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert targets == {"q_proj", "v_proj"}
    train(model, input_ids=IDS, labels=IDS)
    with torch.no_grad():
        tuned = model.eval()(input_ids=IDS).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = wing.call(wing.load(Head.CAUSAL_LM, tmp_path), input_ids=IDS.numpy()).logits
    np.testing.assert_allclose(again, tuned.numpy(), atol=1e-5)


def test_a_model_under_an_adapter_is_not_saved_as_a_whole(wing: Wing, tmp_path: Path) -> None:
    model = wrapped(build(wing), "LoraConfig")
    with pytest.raises(ValueError, match="something took the place of its module, such as an adap"):
        model.get_base_model().save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lora_trains_on_a_half_precision_model(wing: Wing, dtype: str) -> None:
    base = wing.build(
        Head.CAUSAL_LM, tiny(dropout=0.0), random_weights(tiny(), Head.CAUSAL_LM), dtype
    )
    model = wrapped(base, "LoraConfig").train()
    forward = torch.autocast("cpu", getattr(torch, dtype))(model.forward)
    model.forward = forward
    losses = train(model, input_ids=IDS, labels=IDS)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_lora_trains_under_gradient_checkpointing(wing: Wing) -> None:
    base = build(wing)
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable()
    losses = train(wrapped(base, "LoraConfig").train(), input_ids=IDS, labels=IDS)
    assert losses[-1] < losses[0]


def test_a_classifiers_head_is_trained_and_saved_with_its_adapter(
    wing: Wing, tmp_path: Path
) -> None:
    base = build(wing, Head.SEQUENCE_CLASSIFICATION, num_labels=3)
    model = wrapped(base, "LoraConfig", "SEQ_CLS").train()
    losses = train(model, input_ids=IDS, labels=torch.tensor([0, 2, 1]))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    names = load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("score.weight") for name in names)


def test_prefix_tuning_sees_a_cache_of_its_own_each_time(wing: Wing) -> None:
    model = wrapped(build(wing), "PrefixTuningConfig").eval()
    with torch.no_grad():
        one, other = (model(input_ids=IDS).logits for _ in range(2))
        plain = model.get_base_model()(input_ids=IDS).logits
    assert torch.equal(one, other)
    assert not torch.allclose(one, plain)


def test_k_bit_preparation_finds_what_it_calls(wing: Wing) -> None:
    base = build(wing)
    base.is_loaded_in_8bit = True
    prepared = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    assert prepared.is_gradient_checkpointing
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
