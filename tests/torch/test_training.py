"""Training: checkpointing, layerdrop, dropout where OPT has it, optimisers, prefixes, autocast."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opt_core.weights import Head
from tests.cases import HEADS, Batch, labels, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = torch.from_numpy(words(3, 7))


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, **changes})
    return wing.build(head, config, random_weights(config, head)).train()


def step(model: Any, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one pass, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(IDS, labels=IDS, **more).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


# Gradient checkpointing


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(
    wing: Wing, every: int, dropout: float, name: str
) -> None:
    model = build(wing, dropout=dropout, num_hidden_layers=3)
    model.set_attn_implementation(name)
    torch.manual_seed(0)
    loss, gradients = step(model)
    model.gradient_checkpointing_enable(every_n_layers=every)
    torch.manual_seed(0)
    again, recomputed = step(model)
    assert torch.equal(again, loss)
    assert gradients.keys() == recomputed.keys()
    for path, gradient in gradients.items():
        assert torch.equal(recomputed[path], gradient), path


def test_checkpointing_runs_every_layer_twice(wing: Wing) -> None:
    model = build(wing)
    runs: list[int] = []
    for layer in model.model.decoder.layers:
        layer.fc1.register_forward_hook(lambda *_: runs.append(1))
    step(model)
    assert len(runs) == 2
    model.gradient_checkpointing_enable()
    step(model)
    assert len(runs) == 2 + 4
    model.gradient_checkpointing_disable()
    step(model)
    assert len(runs) == 2 + 4 + 2


@pytest.mark.parametrize("head", HEADS)
def test_checkpointing_is_switched_on_any_class(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    assert model.supports_gradient_checkpointing is True
    assert not model.is_gradient_checkpointing
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=1, offload=False)
    assert model.is_gradient_checkpointing
    assert model.base_model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"offload": True}, "offload"),
        ({"activation_checkpointing_kwargs": {"context_fn": None}}, "context_fn"),
        (
            {"activation_checkpointing_kwargs": {"debug": True}, "offload": True},
            "debug, offload",
        ),
    ],
)
def test_other_options_of_checkpointing_are_refused(
    wing: Wing, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"gradient checkpointing has no option {named}"):
        build(wing).activation_checkpointing_enable(**options)


def test_checkpointing_keeps_attentions_and_states(wing: Wing) -> None:
    model = build(wing)
    plain = model(IDS, output_attentions=True, output_hidden_states=True, use_cache=False)
    model.gradient_checkpointing_enable()
    again = model(IDS, output_attentions=True, output_hidden_states=True)
    for name in ("attentions", "hidden_states"):
        assert len(plain[name]) == len(again[name])
        assert all(torch.equal(*pair) for pair in zip(plain[name], again[name], strict=True))


@pytest.mark.parametrize("changes", [{}, {"layerdrop": 0.5}])
def test_training_with_layers_run_again_or_left_out_returns_no_cache(
    wing: Wing, changes: dict[str, Any]
) -> None:
    model = build(wing, **changes)
    if not changes:
        assert model(IDS).past_key_values is not None
        model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(IDS).past_key_values is None, "by default without a word"
    with pytest.warns(UserWarning, match="use_cache is off while training with gradient") as seen:
        assert model(IDS, use_cache=True).past_key_values is None
    assert len(seen) == 1
    assert model.eval()(IDS, use_cache=True).past_key_values is not None


# Dropout


def test_a_model_in_training_without_any_dropout_is_deterministic(wing: Wing) -> None:
    model = build(wing)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(model(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("changes", [{"dropout": 0.5}, {"attention_dropout": 0.5}])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_dropout_acts_in_training_alone(wing: Wing, changes: dict[str, Any], name: str) -> None:
    model = build(wing, **changes)
    model.set_attn_implementation(name)
    plain = build(wing).eval()(IDS).logits
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(model.eval()(IDS).logits, plain, atol=1e-6, rtol=0)


def test_no_dropout_acts_on_embeddings(wing: Wing) -> None:
    model = build(wing, dropout=0.5)
    states = model(IDS, output_hidden_states=True).hidden_states
    quiet = model.eval()(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], quiet[0])
    assert not torch.equal(states[1], quiet[1])


def test_dropout_of_a_built_model_follows_its_configuration(wing: Wing) -> None:
    model = build(wing, dropout=0.5)
    model.config.dropout = 0.0
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_attention_dropout_keeps_the_mean_of_the_weights(wing: Wing) -> None:
    model = build(wing, attention_dropout=0.5)
    torch.manual_seed(0)
    sums = torch.zeros(3, 7, 40)
    with torch.no_grad():
        for _ in range(300):
            sums += model(IDS).logits / 300
        plain = model.eval()(IDS).logits
    assert (sums - plain).abs().max() < 0.15 * plain.abs().max()


def test_layerdrop_leaves_out_all_layers_at_1_and_none_at_0(wing: Wing) -> None:
    model = build(wing, layerdrop=1.0)
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(states[0], states[1])
    assert not torch.equal(model.eval()(IDS).logits, model.train()(IDS).logits)
    model.config.layerdrop = 0.0
    assert torch.equal(model(IDS).logits, model.eval()(IDS).logits)


def test_layerdrop_leaves_out_about_its_share(wing: Wing) -> None:
    model = build(wing, layerdrop=0.3)
    runs: list[int] = []
    for layer in model.model.decoder.layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(0)
    for _ in range(200):
        model(IDS)
    assert 240 < len(runs) < 320


# Optimisers


def test_three_steps_of_adamw_are_those_of_the_reference_data(wing: Wing, shared: Path) -> None:
    model = wing.load(Head.CAUSAL_LM, shared / "reference/opt/lm_base")
    with np.load(shared / "reference/opt/gradients/lm_base.npz") as arrays:
        data = {name: arrays[name] for name in arrays}
    names = ("input_ids", "attention_mask", "labels")
    inputs = {name: wing.array(data[f"masked/{name}"]) for name in names}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8, weight_decay=0.01)
    losses = []
    for _ in range(3):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert_near(np.array(losses), data["adamw/losses"], "float32 files")
    found = wing.weights(model)
    for name, values in found.items():
        if name.endswith("k_proj.bias"):
            # Its gradient is rounding alone, and Adam makes steps of full length of any gradient.
            assert np.abs(values - data[f"adamw/param/{name}"]).max() <= 2 * 3 * 1e-3
        else:
            assert_near(values, data[f"adamw/param/{name}"], "gradient", what=name)


def test_a_tied_head_stays_tied_through_training(wing: Wing) -> None:
    model = build(wing)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model)
    optimiser.step()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_few_steps_lower_the_loss_of_every_head(wing: Wing, head: Head) -> None:
    model = build(wing, head, num_labels=3)
    arrays = labels(head, model.config, Batch(IDS.numpy(), None))
    targets = {name: wing.array(values) for name, values in arrays.items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(IDS, **targets).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_autocast_trains_in_bfloat16_with_float32_weights_and_loss(wing: Wing, name: str) -> None:
    model = build(wing)
    model.set_attn_implementation(name)
    exact, gradients = step(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert_near(out.loss.detach().numpy(), exact.numpy(), "half")
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for path, parameter in model.named_parameters():
        assert (parameter.grad - gradients[path]).abs().max() < 0.05 * largest


def test_a_cache_of_the_same_autocast_goes_on(wing: Wing) -> None:
    model = build(wing).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(IDS).logits
        past = model(IDS[:, :4]).past_key_values
        rest = model(IDS[:, 4:], past_key_values=past).logits
    assert past[0][0].dtype == torch.bfloat16
    assert_near(rest.float().numpy(), whole[:, 4:].float().numpy(), "half")


# Prefixes and caches with gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_keys_and_values_that_were_passed_in(
    wing: Wing, checkpointing: bool
) -> None:
    model = build(wing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    prefix = [tuple(torch.randn(3, 4, 2, 4, requires_grad=True) for _ in "kv") for _ in range(2)]
    mask = torch.ones(3, 9)
    loss = model(IDS, mask, past_key_values=tuple(prefix), labels=IDS).loss
    loss.backward()
    for key, value in prefix:
        assert key.grad is not None
        assert value.grad is not None
    key = prefix[0][0]
    assert key.grad is not None
    # Along the gradient: the slope of one number alone would drown in the rounding of a loss.
    start, way = key.detach().clone(), key.grad / key.grad.norm()
    ends = []
    with torch.no_grad():
        for far in (0.5, -0.5):
            key.copy_(start + far * way)
            ends.append(float(model(IDS, mask, past_key_values=tuple(prefix), labels=IDS).loss))
    assert ends[0] - ends[1] == pytest.approx(float(key.grad.norm()), rel=0.02)


def test_a_text_may_be_trained_on_in_pieces_through_a_cache(wing: Wing) -> None:
    model = build(wing)

    def gradients_of(cuts: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        past: Any = None
        total: Any = torch.zeros(())
        for start, end in zip([0, *cuts], [*cuts, 7], strict=True):
            out = model(IDS[:, start:end], past_key_values=past)
            past, total = out.past_key_values, total + out.logits.square().sum()
        total.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    whole = gradients_of([])
    for cuts in ([3], [1, 2, 5]):
        for name, gradient in gradients_of(cuts).items():
            torch.testing.assert_close(gradient, whole[name], atol=1e-4, rtol=1e-4)


def test_inputs_may_require_gradients_for_adapters_on_a_frozen_model(wing: Wing) -> None:
    model = build(wing)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    adapter = nn.Linear(16, 16, bias=False)
    layer = model.model.decoder.layers[0]
    layer.fc1.register_forward_pre_hook(lambda _, inputs: (inputs[0] + adapter(inputs[0]),))
    model(IDS, labels=IDS).loss.backward()
    assert adapter.weight.grad is not None
    assert adapter.weight.grad.abs().max() > 0
