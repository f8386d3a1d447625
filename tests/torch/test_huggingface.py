"""Hugging Face transformers as an outside oracle: the same weights, files read both ways."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversion import convert
from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests.cases import (
    HEADS,
    SWITCHES,
    Arrays,
    Batch,
    batches,
    configs,
    expected,
    labels,
    random_weights,
    tiny,
    words,
)
from tests.test_convert import make
from tests.tolerances import TIMES_TRANSFORMERS, assert_near, error
from tests.wings import Wing

transformers: Any = pytest.importorskip("transformers")
#: What transformers cannot represent.
THEIRS = [name for name in SWITCHES if name != "pruned"]


@pytest.fixture(scope="module", autouse=True)
def silence() -> Iterator[None]:
    """No bars of transformers, which would take those of huggingface_hub along for all tests."""
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def theirs(head: Head, folder: Path, **options: Any) -> Any:
    """The model that transformers makes of a folder.

    Its eager attention: the fused one gives other values where nothing may be attended to, and the
    loss of an answer reads those too.
    """
    kind = getattr(transformers, f"OPT{head.value}")
    return kind.from_pretrained(folder, attn_implementation="eager", **options).eval()


def call(model: Any, **inputs: Any) -> Any:
    tensors = {
        k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()
    }
    with torch.no_grad():
        return model(**tensors)


def numbers(tensor: torch.Tensor) -> Any:
    return tensor.float().numpy()


def assert_same_weights(model: Any, weights: Arrays, head: Head) -> None:
    state = model.state_dict()
    for name, values in weights.items():
        own = name.removeprefix("model.") if head is Head.NONE else name
        np.testing.assert_array_equal(numbers(state[own]), values)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", THEIRS)
@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_transformers_opens_what_is_saved_and_computes_the_same(
    wing: Wing, tmp_path: Path, head: Head, switch: str, size: str
) -> None:
    config = tiny(**SWITCHES[switch])
    weights = random_weights(config, head)
    model = wing.build(head, config, weights)
    model.save_pretrained(tmp_path, max_shard_size=size)
    other = theirs(head, tmp_path)
    assert_same_weights(other, weights, head)
    batch = Batch(words(2, 6), np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))
    inputs = {**batch.inputs, **labels(head, config, batch)}
    found, right = wing.call(model, **inputs), call(other, **inputs)
    for name in ("last_hidden_state", "loss", "logits", "start_logits", "end_logits"):
        if name in found:
            values = numbers(right[name])
            where = batch.shown if values.ndim > 1 and values.shape[1] == 6 else ...
            assert_near(found[name], values, where=where, what=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_half_precision_files(
    wing: Wing, tmp_path: Path, dtype: str, tied: bool
) -> None:
    config = tiny(tie_word_embeddings=tied)
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM), dtype)
    model.save_pretrained(tmp_path)
    other = theirs(Head.CAUSAL_LM, tmp_path, dtype="auto")
    assert str(other.dtype) == f"torch.{dtype}"
    assert (other.lm_head.weight is other.model.decoder.embed_tokens.weight) is tied
    for name, values in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], values)
    ids = words(2, 5)
    found, right = wing.call(model, input_ids=ids).logits, call(other, input_ids=ids).logits
    assert_near(found, numbers(right), "half")


@pytest.mark.parametrize("to", ["safetensors", "pytorch"])
@pytest.mark.parametrize("size", ["5GB", "4KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_opens_what_is_converted(
    tmp_path: Path, to: str, size: str, dtype: str
) -> None:
    for head in HEADS:
        for switch in ("pre_norm", "post_norm_projected", "untied"):
            config, folder = tiny(**SWITCHES[switch]), tmp_path / f"{head.value}-{switch}"
            weights = make(folder / "a", config, head)
            convert(folder / "a", folder / "b", to="flax", dtype=dtype)
            convert(folder / "b", folder / "c", to=to, max_shard_size=size)
            other = theirs(head, folder / "c", dtype="auto")
            assert str(other.dtype) == f"torch.{dtype}"
            rounded = {k: torch.from_numpy(v).to(other.dtype) for k, v in weights.items()}
            assert_same_weights(other, {k: numbers(v) for k, v in rounded.items()}, head)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", ["pre_norm", "post_norm_projected", "untied"])
@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_what_transformers_saves_loads_here(
    wing: Wing, tmp_path: Path, head: Head, switch: str, size: str
) -> None:
    torch.manual_seed(0)
    settings = tiny(**SWITCHES[switch]).to_dict()
    model = getattr(transformers, f"OPT{head.value}")(transformers.OPTConfig(**settings)).eval()
    model.save_pretrained(tmp_path, max_shard_size=size)
    ours = wing.load(head, tmp_path)
    assert_same_weights(model, wing.weights(ours), head)
    ids = words(2, 5)
    assert_near(wing.call(ours, input_ids=ids)[0], numbers(call(model, input_ids=ids)[0]))


@given(config=configs(), batch=batches(), seed=st.integers(0, 2**16))
def test_with_harsh_weights_the_error_is_like_that_of_transformers(
    wing: Wing,
    tmp_path_factory: pytest.TempPathFactory,
    config: OPTConfig,
    batch: Batch,
    seed: int,
) -> None:
    known = transformers.activations.ACT2FN
    name = config.activation_function if config.activation_function in known else "gelu_new"
    config = config.replace(pruned_heads={}, activation_function=name)
    weights = random_weights(config, Head.CAUSAL_LM, seed, std=0.7)
    right = expected(Head.CAUSAL_LM, config, weights, **batch.inputs)["logits"]
    model = wing.build(Head.CAUSAL_LM, config, weights)
    folder = tmp_path_factory.mktemp("harsh")
    model.save_pretrained(folder)
    ours = wing.call(model, **batch.inputs).logits
    other = numbers(call(theirs(Head.CAUSAL_LM, folder), **batch.inputs).logits)
    shown = batch.shown
    allowed = max(TIMES_TRANSFORMERS * error(other[shown], right[shown]), 1e-5)
    assert error(ours[shown], right[shown]) <= allowed


def test_a_cache_of_transformers_is_accepted(wing: Wing) -> None:
    config = tiny()
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))
    ids = words(2, 7)
    past = wing.call(model, input_ids=ids[:, :4]).past_key_values
    cache = transformers.DynamicCache()
    for layer, (key, value) in enumerate(past):
        cache.update(key.clone(), value.clone(), layer)
    before = [layer.keys.clone() for layer in cache.layers]
    found = wing.call(model, input_ids=ids[:, 4:], past_key_values=cache)
    assert_near(found.logits, wing.call(model, input_ids=ids).logits[:, 4:])
    assert cache.get_seq_length() == 4
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
    empty = wing.call(model, input_ids=ids, past_key_values=transformers.DynamicCache())
    np.testing.assert_array_equal(empty.logits, wing.call(model, input_ids=ids).logits)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"use_cache": False}])
def test_greedy_tokens_are_those_of_transformers(
    wing: Wing, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = tiny()
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM, std=0.3))
    model.save_pretrained(tmp_path)
    ids, mask = words(2, 6), np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    found = wing.generate(model, ids, attention_mask=mask, max_new_tokens=10, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = theirs(Head.CAUSAL_LM, tmp_path).generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=10,
            do_sample=False,
            **options,
        )
    np.testing.assert_array_equal(found, right.numpy())


def test_a_text_streamer_of_transformers_prints_a_generation(wing: Wing) -> None:
    class Letters:
        def decode(self, tokens: Any, **_: Any) -> str:
            return "".join(chr(97 + int(token) % 26) + " " for token in tokens)

    heard: list[str] = []

    class Streamer(transformers.TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            heard.append(text)

    model = wing.fresh(Head.CAUSAL_LM, tiny())
    ids = words(1, 3)
    found = wing.generate(model, ids, max_new_tokens=4, streamer=Streamer(Letters()))
    assert "".join(heard) == Letters().decode(found[0])


def test_generation_options_are_read_as_transformers_reads_them(wing: Wing, tmp_path: Path) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny())
    model.generation_config = model.generation_config.merged(
        do_sample=True, top_k=None, top_p=0.9, eos_token_id=[2, 7]
    )
    model.save_pretrained(tmp_path)
    read = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (read.do_sample, read.top_k, read.top_p, read.eos_token_id) == (True, 0, 0.9, [2, 7])
