"""The faster ways to the same tokens: packed weights, oneDNN's products, compiled steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch.autograd import forward_ad

from opt_core.outputs import GenerateOutput
from opt_torch import Cache, OPTConfig, OPTForCausalLM, linear, packed
from opt_torch.attention import Visible, choose
from opt_torch.decoder import DecoderLayer

SHAPES: dict[str, dict[str, Any]] = {
    "pre_norm": {},
    "post_norm_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "no_bias": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "gelu": {"activation_function": "gelu", "_remove_final_layer_norm": True},
    "untied": {"tie_word_embeddings": False},
    "pruned": {"pruned_heads": {0: [1, 2]}},
}
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16], [17, 18, 19, 20, 21, 22]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def build(**changes: Any) -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=99,
        max_position_embeddings=128,
        init_std=0.3,
        **changes,
    )
    return OPTForCausalLM(config).eval()


def layer_of(model: OPTForCausalLM, place: int) -> DecoderLayer:
    layer = model.model.decoder.layers[place]
    assert isinstance(layer, DecoderLayer)
    return layer


def tokens(model: OPTForCausalLM, **options: Any) -> torch.Tensor:
    result = model.generate(
        **{
            "input_ids": PROMPT,
            "attention_mask": MASK,
            "max_new_tokens": 40,
            "eos_token_id": None,
            **options,
        },
    )
    assert isinstance(result, torch.Tensor)
    return result


def plain_tokens(model: OPTForCausalLM, **options: Any) -> torch.Tensor:
    """By the modules, one after the other, and attention that holds every score."""
    before = model.attn_implementation
    model.set_attn_implementation("eager")
    result = tokens(model, **options)
    model.set_attn_implementation(before)
    return result


def is_packed(model: OPTForCausalLM) -> bool:
    with torch.no_grad():
        return packed.packed(model, packed.WORTH_PACKING) is not None


needs_operators = pytest.mark.skipif(
    linear.operators() is None, reason="this PyTorch has no oneDNN operators to pack with"
)


@needs_operators
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_weights_give_the_tokens_of_the_modules(shape: str) -> None:
    model = build(**SHAPES[shape])
    assert is_packed(model)
    assert torch.equal(tokens(model), plain_tokens(model))


@needs_operators
@pytest.mark.parametrize("shape", SHAPES)
def test_one_row_has_a_form_of_its_own(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "default_is_slow", lambda: False)
    model = build(**SHAPES[shape])
    for row in ({"input_ids": PROMPT[:1], "attention_mask": MASK[:1]}, {"input_ids": PROMPT[1:2]}):
        for options in ({}, {"do_sample": True, "seed": 1}):
            given = {"attention_mask": None, **row, **options}
            assert torch.equal(tokens(model, **given), plain_tokens(model, **given))
    assert list(packed._PACKED[model][1]) == [packed.Turned]
    assert is_turned(model, one_row=True)
    assert not is_turned(model, one_row=False)
    assert not is_turned(model.bfloat16(), one_row=True)


def is_turned(model: OPTForCausalLM, one_row: bool) -> bool:
    """Whether matrices lie `[in, out]`; asked twice, they are the same ones."""
    with torch.no_grad():
        form, again = (packed.packed(model, packed.WORTH_PACKING, one_row) for _ in range(2))
    assert form is again
    return form is not None and isinstance(form.head, packed.Turned)


@needs_operators
@pytest.mark.parametrize("shape", SHAPES)
def test_the_packed_decoder_computes_what_the_modules_compute(shape: str) -> None:
    model = build(**SHAPES[shape])
    with torch.no_grad():
        form = packed.packed(model, packed.WORTH_PACKING)
        assert form is not None
        hidden = run_packed(model, form)
        expected = model.model(PROMPT).last_hidden_state
    assert (hidden - expected).abs().max() <= 1e-5 * expected.abs().max()


def run_packed(model: OPTForCausalLM, form: packed.PackedDecoder) -> torch.Tensor:
    length = PROMPT.shape[1]
    attend = choose(
        "sdpa",
        Visible(0, length, length, None),
        dropout=0.0,
        weights=False,
        dtype=torch.float32,
        device=PROMPT.device,
    )
    positions = torch.arange(length).expand_as(PROMPT)
    embeds = model.model.decoder.embed_tokens(PROMPT)
    return form(embeds, positions, attend, Cache(len(form.layers)).extended(length))


@needs_operators
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(-1),
        lambda weight: weight.data.__setitem__((0, 0), 3.0),
        lambda weight: torch.optim.SGD([weight], lr=1.0).step,
    ],
    ids=["through .data", "one value through .data", "nothing"],
)
def test_changed_weights_are_packed_again(change: Callable[[torch.Tensor], Any]) -> None:
    model = build()
    tokens(model)
    change(layer_of(model, 0).fc1.weight)
    assert torch.equal(tokens(model), plain_tokens(model))


@needs_operators
def test_unchanged_weights_are_packed_once() -> None:
    model = build()
    with torch.no_grad():
        first = packed.packed(model, packed.WORTH_PACKING)
        assert packed.packed(model, packed.WORTH_PACKING) is first


def hooked(model: OPTForCausalLM) -> None:
    layer_of(model, 1).fc2.register_forward_hook(lambda *_: None)


def replaced(model: OPTForCausalLM) -> None:
    class Wrapped(torch.nn.Linear):
        pass

    layer_of(model, 1).fc2 = Wrapped(64, 32)


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        replaced,
        lambda model: model.double(),
        lambda model: model.train(),
        lambda model: model.set_attn_implementation("eager"),
    ],
    ids=["a hook", "a replaced layer", "float64", "training", "another attention"],
)
def test_a_model_that_is_not_plain_runs_by_its_modules(
    change: Callable[[OPTForCausalLM], Any],
) -> None:
    model = build()
    change(model)
    assert not is_packed(model)


def test_a_hook_sees_every_step_of_generation() -> None:
    model, seen = build(), []
    layer = layer_of(model, 0).fc1
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    tokens(model)
    assert len(seen) == 40


@needs_operators
def test_streamed_tokens_come_from_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = build(), 0
    call = packed.PackedDecoder.__call__

    def counted(*inputs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return call(*inputs)

    monkeypatch.setattr(packed.PackedDecoder, "__call__", counted)
    streamed = list(model.stream(PROMPT, attention_mask=MASK, max_new_tokens=40, eos_token_id=None))
    assert torch.equal(torch.stack(streamed, 1), plain_tokens(model)[:, PROMPT.shape[1] :])
    assert steps == 40


def test_a_stream_refuses_bad_options_before_its_first_token() -> None:
    with pytest.raises(ValueError, match="max_position_embeddings is 128"):
        build().stream(PROMPT, max_new_tokens=1000)


def test_few_tokens_are_not_worth_packing() -> None:
    with torch.no_grad():
        assert packed.packed(build(), packed.WORTH_PACKING - 1) is None


def test_too_little_memory_is_not_filled_with_a_packed_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "_available", lambda: 1.0)
    assert not is_packed(build())


@needs_operators
def test_a_packed_model_can_be_copied_and_pickled() -> None:
    model = build()
    expected = tokens(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tokens(again), expected)


@pytest.mark.parametrize("missing", ["operators", "answers"])
def test_without_usable_operators_layers_run_themselves(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    expected = tokens(build())
    linear.operators.cache_clear()
    if missing == "operators":
        monkeypatch.delattr(torch.ops.mkldnn, "_linear_pointwise", raising=False)
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", object(), raising=False)
    else:
        monkeypatch.setattr(torch, "allclose", lambda *_, **__: False)
    try:
        assert linear.operators() is None
        assert torch.equal(tokens(build()), expected)
    finally:
        linear.operators.cache_clear()


def test_a_product_is_the_layers_own_where_gradients_are_wanted() -> None:
    layer, x = torch.nn.Linear(4, 3), torch.ones(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear.linear(layer, x).sum(), x)
    assert torch.equal(gradient, layer.weight.sum(0).expand(2, 4))


def test_a_product_under_autocast_has_its_type() -> None:
    layer = torch.nn.Linear(4, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear.linear(layer, torch.ones(2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("mask", [None, MASK], ids=["no padding", "padding on both sides"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "top_k": 9}])
def test_compiled_steps_give_the_same_tokens(
    mask: torch.Tensor | None, options: dict[str, Any]
) -> None:
    model = build()
    expected = tokens(model, attention_mask=mask, **options)
    got = tokens(model, attention_mask=mask, compiled="aot_eager", **options)
    assert torch.equal(got, expected)


def test_steps_of_one_plan_share_one_program() -> None:
    torch._dynamo.reset()
    model = build()
    tokens(model, compiled="aot_eager", max_new_tokens=10)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    tokens(model, compiled="aot_eager", max_new_tokens=20)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0


def test_the_cache_of_compiled_steps_reads_as_the_tokens_held() -> None:
    model = build()
    plain, compiled = (
        cast(
            GenerateOutput,
            model.generate(PROMPT, max_new_tokens=9, return_dict_in_generate=True, compiled=how),
        ).past_key_values
        for how in (False, "aot_eager")
    )
    torch.testing.assert_close(list(compiled), list(plain))
    assert compiled.get_seq_length() == PROMPT.shape[1] + 8


def test_compiled_steps_without_a_cache_are_refused() -> None:
    with pytest.raises(ValueError, match="compiled steps need the cache"):
        tokens(build(), compiled="aot_eager", use_cache=False)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("way", ["jvp", "dual numbers", "vmap"])
@torch.no_grad()
def test_transforms_of_a_call_see_the_whole_computation(way: str) -> None:
    model = build()
    model.set_attn_implementation("eager")  # PyTorch's fused kernel has no forward derivative
    embeds, tangent = torch.randn(1, 5, 32), torch.randn(1, 5, 32)

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        output = model(inputs_embeds=inputs, use_cache=False).logits
        assert isinstance(output, torch.Tensor)
        return output

    if way == "vmap":
        both = torch.stack([embeds, tangent])
        expected = torch.stack([logits(embeds), logits(tangent)])
        torch.testing.assert_close(torch.func.vmap(logits)(both), expected)
        return
    if way == "jvp":
        slope: Any = torch.func.jvp(logits, (embeds,), (tangent,))[1]
    else:
        numbers: Any = forward_ad
        with numbers.dual_level():
            slope = numbers.unpack_dual(logits(numbers.make_dual(embeds, tangent))).tangent
    model.double()
    step = 1e-6 * tangent.double()
    exact = (logits(embeds.double() + step) - logits(embeds.double() - step)) / 2e-6
    assert slope is not None
    assert (slope - exact).abs().max() < 1e-3 * exact.abs().max()
