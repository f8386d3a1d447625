"""Kernels of attention: they agree, each is told the right thing, and says what it cannot do."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pallas_tpu
from jax.experimental.pallas.ops.tpu import flash_attention as tpu_kernel

from opt_core.weights import Head
from opt_flax.attention import IMPLEMENTATIONS, Visible, choose
from tests.cases import SWITCHES, Batch, padded, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

LEFT = padded([words(1, 6, seed=1)[0], words(1, 3, seed=2)[0]], "left")
RIGHT = padded([words(1, 6, seed=1)[0], words(1, 3, seed=2)[0]], "right")
WHOLE = Batch(words(2, 6), None)
BATCHES = {"no padding": WHOLE, "left": LEFT, "right": RIGHT}


def build(wing: Wing, dtype: str = "float32", **options: Any) -> Any:
    changes = options.pop("changes", {})
    weights = random_weights(tiny(**changes), Head.CAUSAL_LM)
    return wing.build(Head.CAUSAL_LM, tiny(**changes), weights, dtype, **options)


def chosen(name: str, visible: Visible, **options: Any) -> Any:
    platform = {"cudnn": "gpu", "tpu_flash": "tpu"}.get(name, "cpu")
    given = {"dropout": 0.0, "weights": False, "dtype": jnp.float32, "platform": platform}
    return choose(name, visible, **{**given, **options})


def drawn(T: int, S: int, seed: int = 0, dtype: Any = np.float32) -> list[Any]:
    random = np.random.default_rng(seed)
    shapes = [(2, 3, T, 4), (2, 3, S, 4), (2, 3, S, 4)]
    return [jnp.asarray(random.normal(0, 1, shape).astype(dtype)) for shape in shapes]


# The choice


def test_a_model_takes_xla_unless_told_otherwise(wing: Wing) -> None:
    model = build(wing)
    assert model.attn_implementation == "xla"
    assert model.config._attn_implementation == "xla"
    assert build(wing, attn_implementation="eager").attn_implementation == "eager"


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("switch", ["pre_norm", "pruned"])
def test_eager_and_xla_are_one_program(wing: Wing, batch: Batch, switch: str) -> None:
    found = [
        build(wing, changes=SWITCHES[switch], attn_implementation=name)(
            **batch.inputs, output_attentions=True
        )
        for name in ("eager", "xla")
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_implementation_may_be_changed_on_a_built_model(wing: Wing) -> None:
    model = build(wing)
    right = model(WHOLE.ids).logits
    model.set_attn_implementation("eager")
    assert model.module.attn_implementation == "eager"
    assert_near(model(WHOLE.ids).logits, right, "same program")
    model.set_attn_implementation("cudnn")
    with pytest.raises(ValueError, match="cudnn needs"):
        model(WHOLE.ids)


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "CUDNN", ""])
def test_an_unknown_implementation_is_refused_with_the_known_ones(wing: Wing, name: str) -> None:
    why = f"no attention implementation '{name}'; there are {', '.join(IMPLEMENTATIONS)}"
    with pytest.raises(ValueError, match=why):
        build(wing, attn_implementation=name)
    with pytest.raises(ValueError, match=why):
        build(wing).set_attn_implementation(name)


# What cannot run


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("cudnn", {}, "cudnn needs float16 or bfloat16 on a CUDA device, found float32 on gpu"),
        ("cudnn", {"platform": "cpu", "dtype": jnp.float16}, "device, found float16 on cpu"),
        ("cudnn", {"weights": True}, "cudnn never holds the attention weights"),
        ("cudnn", {"dropout": 0.1}, "cudnn has no attention dropout; set attention_dropout to 0"),
        ("tpu_flash", {"platform": "gpu"}, "tpu_flash needs a TPU and at most float32, found"),
        ("tpu_flash", {"dtype": jnp.float64}, "found float64 on tpu"),
        ("tpu_flash", {"weights": True}, "tpu_flash never holds the attention weights"),
        ("tpu_flash", {"dropout": 0.1}, "tpu_flash has no attention dropout"),
    ],
)
def test_a_kernel_says_why_it_cannot_run(name: str, options: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        chosen(name, Visible(0, 4, 4, None), **options)


WAYS: dict[str, Any] = {
    "call": lambda model: model(WHOLE.ids),
    "generate": lambda model: model.generate(WHOLE.ids, max_new_tokens=2),
    "jit": lambda model: jax.jit(model)(WHOLE.ids),
    "module": lambda model: model.module.apply({"params": model.params}, WHOLE.ids),
}


@pytest.mark.parametrize("name", ["cudnn", "tpu_flash"])
@pytest.mark.parametrize("way", WAYS)
def test_a_kernel_never_gives_way_to_another_one(wing: Wing, name: str, way: str) -> None:
    model = build(wing, attn_implementation=name)
    with pytest.raises(ValueError, match=f"{name} needs .* found float32 on cpu"):
        WAYS[way](model)


# What the kernels are told


class Stand(list[Any]):
    """Stands for cuDNN: notes what it is asked, and leaves queries that see nothing undefined."""

    def __call__(self, q: Any, k: Any, v: Any, *, mask: Any, is_causal: bool, **rest: Any) -> Any:
        self.append({"mask": mask, "is_causal": is_causal, **rest})
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        if is_causal:
            mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        chances = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("bhts,bshd->bthd", chances, v)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """As on a GPU with cuDNN."""
    stand = Stand()
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    yield stand
    jax.clear_caches()


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_cudnn_is_told_what_the_plain_path_computes(wing: Wing, gpu: Stand, batch: Batch) -> None:
    models = [build(wing, "bfloat16", attn_implementation=name) for name in ("cudnn", "eager")]
    found, right = (wing.call(model, **batch.inputs, labels=batch.ids) for model in models)
    assert_near(found.logits, right.logits, "half")
    assert np.isfinite(found.loss)
    assert len(gpu) == 2
    for asked in gpu:
        assert (asked["scale"], asked["implementation"]) == (1.0, "cudnn")
        assert asked["is_causal"] == (batch.mask is None)
        assert (asked["mask"] is None) == (batch.mask is None)


def test_cudnn_goes_on_behind_a_cache(wing: Wing, gpu: Stand) -> None:
    model = build(wing, "bfloat16", attn_implementation="cudnn")
    right = wing.call(build(wing, "bfloat16"), **LEFT.inputs).logits
    assert LEFT.mask is not None
    past = model(LEFT.ids[:, :4], LEFT.mask[:, :4], past_key_values=model.init_cache(2, 20))
    rest = model(LEFT.ids[:, 4:], LEFT.mask, past_key_values=past.past_key_values)
    assert_near(rest.logits.astype(jnp.float32), right[:, 4:], "half")
    assert gpu[-1]["mask"].shape == (2, 1, 2, 20)


def test_cudnn_generates_what_the_plain_path_generates(wing: Wing, gpu: Stand) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM, std=0.5)
    found = [
        wing.build(Head.CAUSAL_LM, tiny(), weights, "bfloat16", attn_implementation=name).generate(
            LEFT.ids, attention_mask=LEFT.mask, max_new_tokens=4, eos_token_id=None
        )
        for name in ("cudnn", "eager")
    ]
    np.testing.assert_array_equal(*found)
    assert gpu


@pytest.mark.parametrize("filled", [1, 5])
def test_a_query_that_sees_nothing_is_even_over_what_a_buffer_holds(
    gpu: Stand, filled: int
) -> None:
    q, k, v = drawn(1, 8)
    shown = jnp.zeros((2, 8), bool)
    visible = Visible(jnp.int32(filled - 1), 1, 8, shown)
    found = [
        chosen(name, visible, dtype=kind)(q, k, v, None)[0]
        for name, kind in (("cudnn", jnp.float16), ("eager", jnp.float32))
    ]
    mean = np.asarray(v)[:, :, :filled].mean(2, keepdims=True)
    for out in found:
        assert_near(out, mean, "same program")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device")
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_cudnn_agrees_with_the_plain_path_on_a_gpu(wing: Wing, batch: Batch) -> None:
    changes = {"hidden_size": 256, "num_attention_heads": 4}
    found, right = (
        wing.call(
            build(wing, "bfloat16", changes=changes, attn_implementation=name), **batch.inputs
        ).logits
        for name in ("cudnn", "eager")
    )
    assert_near(found, right, "half", where=batch.shown)


# The TPU's own kernel, interpreted


@pytest.mark.parametrize("length", [1, 6, 128, 130])
@pytest.mark.parametrize("is_padded", [False, True])
def test_the_kernel_for_tpus_agrees_with_the_plain_path(length: int, is_padded: bool) -> None:
    shown = None
    if is_padded:
        mask = np.ones((2, length), np.bool_)
        mask[0, : length // 2], mask[1, length - length // 3 :] = False, False
        shown = jnp.asarray(mask)
    given, visible = drawn(length, length), Visible(0, length, length, shown)
    right, _ = chosen("eager", visible)(*given, None)
    with pallas_tpu.force_tpu_interpret_mode():
        found, weights = chosen("tpu_flash", visible)(*given, None)
    assert weights is None
    seen = np.ones((2, length), bool) if shown is None else np.cumsum(np.asarray(shown), 1) > 0
    assert_near(np.asarray(found).swapaxes(1, 2)[seen], np.asarray(right).swapaxes(1, 2)[seen])
    # What sees nothing is even over the text in both.
    assert_near(found, right)


def test_gradients_go_through_the_kernel_for_tpus() -> None:
    given = drawn(6, 6)
    visible = Visible(0, 6, 6, jnp.asarray([[False, True, True, True, True, True], [True] * 6]))

    def total(name: str) -> Any:
        return jax.grad(lambda *x: jnp.square(chosen(name, visible)(*x, None)[0]).sum(), (0, 1, 2))

    right = total("eager")(*given)
    with pallas_tpu.force_tpu_interpret_mode():
        found = total("tpu_flash")(*given)
    for a, b in zip(found, right, strict=True):
        assert_near(a, b, "gradient")


def test_the_kernel_for_tpus_gets_whole_tiles_and_a_text_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def stand(q: Any, k: Any, v: Any, **rest: Any) -> Any:
        asked.append((q, k, v, rest))
        return tpu_kernel.mha_reference_no_custom_vjp(q, k, v, None, **rest)

    monkeypatch.setattr(tpu_kernel, "flash_attention", stand)
    given, shown = drawn(6, 6), jnp.asarray(LEFT.shown)
    visible = Visible(0, 6, 6, shown)
    found, _ = chosen("tpu_flash", visible)(*given, None)
    assert_near(found, chosen("eager", visible)(*given, None)[0])
    q, k, v, rest = asked[0]
    assert q.shape == k.shape == v.shape == (2, 3, 128, 4)
    assert rest["causal"] is True
    assert (rest["segment_ids"].q == 1).all()
    np.testing.assert_array_equal(rest["segment_ids"].kv[:, :6], LEFT.shown)
    assert not rest["segment_ids"].kv[:, 6:].any()


def test_a_model_on_a_tpu_continues_a_cache_on_the_plain_path(
    wing: Wing, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(wing, attn_implementation="tpu_flash")
    right = build(wing)(**LEFT.inputs).logits
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.clear_caches()
    assert LEFT.mask is not None
    with pallas_tpu.force_tpu_interpret_mode():
        first = model(LEFT.ids[:, :4], LEFT.mask[:, :4])
        rest = model(LEFT.ids[:, 4:], LEFT.mask, past_key_values=first.past_key_values)
    jax.clear_caches()
    assert_near(first.logits, right[:, :4], where=LEFT.shown[:, :4])
    assert_near(rest.logits, right[:, 4:])


# The plain path


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_scores_of_half_types_are_held_in_float32(dtype: Any) -> None:
    q, k, v = (x.astype(dtype) for x in drawn(4, 4))
    visible = Visible(0, 4, 4, None)
    plain = chosen("eager", visible, dtype=dtype, weights=True)
    text = str(jax.make_jaxpr(lambda *x: plain(*x, None))(q, k, v))
    assert "f32[2,3,4,4] = exp" in text
    # Sums beyond the range of float16 are no trouble either.
    large = jnp.full((2, 3, 4, 4), 200.0, dtype)
    assert np.isfinite(plain(large, large, v, None)[0]).all()


def test_a_mask_is_causal_from_where_the_queries_start() -> None:
    for start in (3, jnp.int32(3)):
        mask = np.asarray(Visible(start, 2, 6, None).mask())[0, 0]
        np.testing.assert_array_equal(mask, np.tri(2, 6, 3, bool))


def test_attention_dropout_of_one_leaves_nothing() -> None:
    q, k, v = drawn(3, 3)
    plain = chosen("eager", Visible(0, 3, 3, None), dropout=1.0)
    assert not np.asarray(plain(q, k, v, jax.random.key(0))[0]).any()
