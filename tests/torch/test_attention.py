"""Kernels of attention: which one is taken, what it is told, and that all of them agree."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opt_core.config import OPTConfig
from opt_core.weights import Head
from opt_torch import attention
from opt_torch.attention import Visible, choose
from opt_torch.decoder import Cache
from tests.cases import Batch, batches, configs, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

HALF = torch.float16
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def model(wing: Wing) -> Any:
    return wing.build(Head.CAUSAL_LM, tiny(), random_weights(tiny(), Head.CAUSAL_LM))


# The paths agree


@given(config=configs(), batch=batches(), seed=st.integers(0, 2**16), cut=st.integers(0, 8))
def test_eager_and_fused_attention_agree_also_behind_a_cache(
    wing: Wing, config: OPTConfig, batch: Batch, seed: int, cut: int
) -> None:
    weights = random_weights(config, Head.CAUSAL_LM, seed)
    cut = min(cut, batch.ids.shape[1] - 1)
    found = []
    for name in ("eager", "sdpa"):
        model = wing.build(Head.CAUSAL_LM, config, weights, attn_implementation=name)
        past = None
        if cut:
            first = {key: values[:, :cut] for key, values in batch.inputs.items()}
            past = wing.call(model, **first).past_key_values
        rest = {**batch.inputs, "input_ids": batch.ids[:, cut:]}
        found.append(wing.call(model, **rest, past_key_values=past).logits)
    assert_near(found[1], found[0], where=batch.shown[:, cut:])


def test_asking_for_weights_takes_the_plain_path_for_that_call(wing: Wing, model: Any) -> None:
    batch = Batch(words(2, 6), np.array([[0, 0, 1, 1, 1, 1], [1] * 6]))
    fused = wing.call(model, **batch.inputs)
    plain = wing.call(model, **batch.inputs, output_attentions=True)
    assert fused.attentions is None
    assert_near(plain.logits, fused.logits, "same program")
    sums = plain.attentions[0].sum(-1)
    np.testing.assert_allclose(sums, np.ones_like(sums), atol=1e-6)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_implementation_may_be_changed_on_a_built_model(wing: Wing, name: str) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny(), attn_implementation="flash_attention_2")
    assert model.attn_implementation == model.model.attn_implementation == "flash_attention_2"
    model.set_attn_implementation(name)
    assert model.attn_implementation == model.model.attn_implementation == name
    assert wing.call(model, input_ids=words(1, 3)).logits.shape == (1, 3, 40)


# What the kernels are told


def forbid_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("a mask tensor was built")

    monkeypatch.setattr(attention.Visible, "mask", refuse)


@pytest.mark.parametrize("mask", [None, np.ones((2, 6), np.int64), np.ones((2, 6), np.float32)])
def test_without_padding_no_mask_is_built(
    wing: Wing, model: Any, monkeypatch: pytest.MonkeyPatch, mask: Any
) -> None:
    forbid_masks(monkeypatch)
    seen: list[tuple[Any, bool]] = []
    kernel = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((options["attn_mask"], options["is_causal"]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ids = words(2, 6)
    rest = {} if mask is None else {"attention_mask": mask}
    past = wing.call(model, input_ids=ids, **rest).past_key_values
    assert seen == [(None, True)] * 2
    wing.call(model, input_ids=ids[:, :1], past_key_values=past)
    assert seen[2:] == [(None, False)] * 2, "one token may see all that came before"


def test_generation_without_padding_builds_no_mask(
    wing: Wing, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_masks(monkeypatch)
    assert wing.generate(model, words(2, 4), max_new_tokens=5, eos_token_id=None).shape == (2, 9)


@pytest.mark.parametrize(
    ("visible", "needs"),
    [
        (Visible(0, 5, 5, None), False),
        (Visible(4, 1, 5, None), False),
        (Visible(2, 3, 5, None), True),
        (Visible(0, 5, 5, torch.ones(1, 5, dtype=torch.bool)), True),
        (Visible(torch.tensor(4), 1, 8, None), True),
    ],
)
def test_a_mask_is_needed_behind_a_cache_beside_padding_and_in_a_buffer(
    visible: Visible, needs: bool
) -> None:
    assert visible.needs_mask is needs


def test_a_mask_is_causal_from_where_the_queries_start() -> None:
    shown = torch.tensor([[True, False, True, True]])
    mask = Visible(2, 2, 4, shown).mask(CPU)
    assert mask.tolist() == [[[[True, False, True, False], [True, False, True, True]]]]
    in_buffer = Visible(torch.tensor(1), 1, 4, None).mask(CPU)
    assert in_buffer.tolist() == [[[[True, True, False, False]]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_of_half_types_runs_in_float32(dtype: torch.dtype) -> None:
    q = torch.full((1, 1, 1, 4), 3.0, dtype=dtype)
    k = torch.randn(1, 1, 64, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, weights = attention.eager(q, k, k, mask=torch.ones(1, 1, 1, 64).bool(), dropout=0.0)
    exact = torch.softmax((q.double() @ k.double().mT), -1)
    assert weights.dtype == dtype
    rounding = torch.finfo(dtype).eps
    # The scores round once, which is an error of their size in the exponent; nothing else adds up.
    assert torch.allclose(weights.double(), exact, rtol=40 * rounding, atol=rounding)


# Flash attention: the packing, by a kernel that says what the real ones compute


def plain_varlen(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, most_q: int, most_k: int
) -> Tensor:
    """Rows of packed tokens, each causal and aligned to its last key; queries are scaled."""
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert int(ends_q.diff().max()) <= most_q
    assert int(ends_k.diff().max()) <= most_k
    out = torch.empty_like(q)
    rows = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    for start_q, end_q, start_k, end_k in rows:
        own, keys, values = q[start_q:end_q], k[start_k:end_k], v[start_k:end_k]
        T, S = len(own), len(keys)
        seen = torch.ones(T, S).tril(S - T).bool()
        scores = torch.einsum("thd,shd->hts", own, keys).masked_fill(~seen, -torch.inf)
        out[start_q:end_q] = torch.einsum("hts,shd->thd", scores.softmax(-1), values)
    return out


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention that runs on this machine."""
    monkeypatch.setattr(attention, "_refuse_flash", lambda *_: None)
    monkeypatch.setattr(attention, "_varlen_kernel", lambda dropout: plain_varlen)


@pytest.mark.usefixtures("flash")
@given(config=configs(), batch=batches(), seed=st.integers(0, 2**16), cut=st.integers(0, 8))
def test_flash_attention_agrees_at_every_real_token_also_behind_a_cache(
    wing: Wing, config: OPTConfig, batch: Batch, seed: int, cut: int
) -> None:
    weights = random_weights(config, Head.CAUSAL_LM, seed)
    cut = min(cut, batch.ids.shape[1] - 1)
    found = []
    for name in ("sdpa", "flash_attention_2"):
        model = wing.build(Head.CAUSAL_LM, config, weights, attn_implementation=name)
        past = None
        if cut:
            first = {key: values[:, :cut] for key, values in batch.inputs.items()}
            past = wing.call(model, **first).past_key_values
        rest = {**batch.inputs, "input_ids": batch.ids[:, cut:]}
        found.append(wing.call(model, **rest, past_key_values=past).logits)
    assert np.isfinite(found[1]).all()
    assert_near(found[1], found[0], where=batch.shown[:, cut:])


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("mask", [None, np.array([[0, 0, 1, 1, 1], [1] * 5])])
def test_flash_attention_generates_the_same_tokens(wing: Wing, mask: Any) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM, std=0.3)
    plain, flashing = (
        wing.build(Head.CAUSAL_LM, tiny(), weights, attn_implementation=name)
        for name in ("sdpa", "flash_attention_2")
    )
    found, right = (
        wing.generate(model, words(2, 5), attention_mask=mask, max_new_tokens=6)
        for model in (flashing, plain)
    )
    np.testing.assert_array_equal(found, right)


@pytest.mark.usefixtures("flash")
def test_flash_attention_passes_over_what_a_buffer_does_not_hold_yet() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 3, 1, 4)
    k, v = torch.randn(2, 2, 3, 8, 4)
    held, shown = 5, torch.tensor([[True] * 8, [False] * 2 + [True] * 6])
    for mask in (None, shown):
        attend = choose(
            "flash_attention_2",
            Visible(torch.tensor(held - 1), 1, 8, mask),
            dropout=0.0,
            weights=False,
            dtype=HALF,
            device=CPU,
        )
        out, weights = attend(q, k, v)
        seen = torch.arange(8) < held
        seen = seen[None] if mask is None else seen & mask
        right = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], scale=1.0)
        assert weights is None
        assert torch.allclose(out, right, atol=1e-6)


def choice(**changes: Any) -> Any:
    given_options: dict[str, Any] = {
        "dropout": 0.0,
        "weights": False,
        "dtype": HALF,
        "device": GPU,
        **changes,
    }
    return choose("flash_attention_2", Visible(0, 4, 4, None), **given_options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": CPU}, "float16 or bfloat16 on a CUDA device, found torch.float16 on cpu; conv"),
        ({"dtype": torch.float32}, "a CUDA device, found torch.float32 on cuda; convert the model"),
        ({"weights": True}, "never holds the attention weights, so output_attentions cannot be"),
    ],
)
def test_flash_attention_says_why_it_cannot_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choice(**changes)


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)


def test_pytorchs_own_kernel_is_taken_where_the_package_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_package(monkeypatch)
    seen: dict[str, Any] = {}

    def varlen(*inputs: Any, **options: Any) -> Tensor:
        seen.update(options)
        return plain_varlen(*inputs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    q = torch.randn(2, 3, 4, 8)
    out, _ = choice()(q, q, q)
    right = F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=1.0)
    assert torch.allclose(out, right, atol=1e-6)
    assert seen == {"scale": 1.0, "window_size": (-1, 0)}


def test_pytorchs_own_kernel_has_no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    without_package(monkeypatch)
    with pytest.raises(ValueError, match="attention dropout under flash_attention_2 needs the pac"):
        choice(dropout=0.1)


def test_the_package_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def varlen(*inputs: Any, **options: Any) -> Tensor:
        seen.update(options)
        return plain_varlen(*inputs)

    package = ModuleType("flash_attn")
    made: Callable[..., Tensor] = varlen
    package.flash_attn_varlen_func = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q = torch.randn(2, 3, 4, 8)
    choice(dropout=0.25)(q, q, q)
    assert seen == {"dropout_p": 0.25, "softmax_scale": 1.0, "causal": True}


# Caches by themselves


def test_an_empty_cache_has_nothing_to_read() -> None:
    cache = Cache(2)
    assert len(cache) == 0
    assert list(cache) == []
    assert cache.get_seq_length() == 0
    with pytest.raises(IndexError, match="the cache is empty: no call has written to it"):
        cache[0]
