"""The cache: decoding in pieces equals one pass, and what a cache reads as never changes."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests.cases import (
    HEADS,
    SWITCHES,
    Batch,
    batches,
    configs,
    expected,
    random_weights,
    tiny,
    words,
)
from tests.tolerances import assert_near
from tests.wings import Wing

seeds = st.integers(0, 2**16)


@pytest.fixture
def model(wing: Wing) -> Any:
    config = tiny()
    return wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))


def continued(
    wing: Wing, model: Any, batch: Batch, start: int, end: int, cache: Any, **more: Any
) -> Any:
    """The call that feeds columns `start` to `end` after what the cache holds."""
    inputs: dict[str, Any] = {"input_ids": batch.ids[:, start:end], "past_key_values": cache}
    if batch.mask is not None:
        inputs["attention_mask"] = batch.mask[:, :end]
    return wing.call(model, **inputs, use_cache=True, **more)


@given(config=configs(), batch=batches(), seed=seeds, data=st.data())
def test_feeding_a_text_in_pieces_gives_the_scores_of_one_pass(
    wing: Wing, config: OPTConfig, batch: Batch, seed: int, data: st.DataObject
) -> None:
    weights = random_weights(config, Head.CAUSAL_LM, seed)
    model = wing.build(Head.CAUSAL_LM, config, weights)
    right = expected(Head.CAUSAL_LM, config, weights, **batch.inputs)["logits"]
    length = batch.ids.shape[1]
    cuts = [cut for cut in range(1, length) if data.draw(st.booleans())]
    cache = None
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        out = continued(wing, model, batch, start, end, cache)
        cache = out.past_key_values
        places = slice(start, end)
        assert_near(out.logits, right[:, places], where=batch.shown[:, places])


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_cache_reads_as_keys_and_values_of_every_layer(wing: Wing, switch: str) -> None:
    config = tiny(**SWITCHES[switch])
    weights = random_weights(config, Head.NONE)
    ids = words(3, 6)
    out = wing.call(wing.build(Head.NONE, config, weights), input_ids=ids)
    modules: Any = expected(Head.NONE, config, weights, input_ids=ids)["modules"]
    pairs = wing.pairs(out.past_key_values)
    assert len(out.past_key_values) == len(pairs) == config.num_hidden_layers
    for layer, pair in enumerate(pairs):
        for letter, values in zip("kv", pair, strict=True):
            flat = modules[f"model.decoder.layers.{layer}.self_attn.{letter}_proj"]
            split = flat.reshape(3, 6, config.heads(layer), config.head_dim).swapaxes(1, 2)
            assert_near(values, split, what=f"{letter} of layer {layer}")


@given(data=st.data())
def test_a_call_never_changes_what_its_cache_reads_as(
    wing: Wing, model: Any, data: st.DataObject
) -> None:
    batch = Batch(words(2, 12), None)
    known: list[tuple[int, Any, Any]] = [(0, None, [])]
    for _ in range(4):
        held, cache, _ = data.draw(st.sampled_from(known))
        end = held + data.draw(st.integers(1, 3))
        made = continued(wing, model, batch, held, end, cache).past_key_values
        known.append((end, made, wing.pairs(made)))
    for _, cache, before in known[1:]:
        for pair, earlier in zip(wing.pairs(cache), before, strict=True):
            np.testing.assert_array_equal(pair, earlier)


def test_a_second_continuation_of_a_cache_is_right(wing: Wing, model: Any) -> None:
    first, second = Batch(words(2, 9, seed=1), None), Batch(words(2, 9, seed=2), None)
    second.ids[:, :5] = first.ids[:, :5]
    past = continued(wing, model, first, 0, 5, None).past_key_values
    one = continued(wing, model, first, 5, 9, past)
    other = continued(wing, model, second, 5, 9, past)
    again = continued(wing, model, first, 5, 9, past)
    assert_near(one.logits, wing.call(model, input_ids=first.ids).logits[:, 5:])
    assert_near(other.logits, wing.call(model, input_ids=second.ids).logits[:, 5:])
    np.testing.assert_array_equal(again.logits, one.logits)


def test_branches_of_a_cache_may_go_on_by_turns(wing: Wing, model: Any) -> None:
    texts = [Batch(words(1, 8, seed=seed), None) for seed in range(3)]
    for text in texts[1:]:
        text.ids[:, :2] = texts[0].ids[:, :2]
    root = continued(wing, model, texts[0], 0, 2, None).past_key_values
    caches = [root] * 3
    for place in range(2, 8):
        for branch, text in enumerate(texts):
            out = continued(wing, model, text, place, place + 1, caches[branch])
            caches[branch] = out.past_key_values
            whole = wing.call(model, input_ids=text.ids).logits[:, place : place + 1]
            assert_near(out.logits, whole)


def test_threads_may_continue_one_cache_at_once(wing: Wing, model: Any) -> None:
    texts = [Batch(words(1, 9, seed=seed), None) for seed in range(8)]
    for text in texts[1:]:
        text.ids[:, :4] = texts[0].ids[:, :4]
    for _ in range(5):
        past = continued(wing, model, texts[0], 0, 4, None).past_key_values
        past = continued(wing, model, texts[0], 4, 5, past).past_key_values
        for text in texts[1:]:
            text.ids[:, :5] = texts[0].ids[:, :5]

        def go_on(text: Batch, past: Any = past) -> Any:
            return continued(wing, model, text, 5, 9, past).logits

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(go_on, texts))
        for text, logits in zip(texts, found, strict=True):
            assert_near(logits, wing.call(model, input_ids=text.ids).logits[:, 5:])


def test_a_cache_grows_over_many_buffers(wing: Wing) -> None:
    config = tiny(max_position_embeddings=300)
    weights = random_weights(config, Head.CAUSAL_LM)
    model = wing.build(Head.CAUSAL_LM, config, weights)
    batch = Batch(words(1, 270), None)
    cache, scores = None, []
    # Token by token where buffers of 128 are full.
    ends = [0, *range(15, 120, 15), *range(120, 135), *range(135, 250, 15), *range(250, 271)]
    for start, end in itertools.pairwise(ends):
        out = continued(wing, model, batch, start, end, cache)
        cache = out.past_key_values
        scores.append(out.logits)
    right = expected(Head.CAUSAL_LM, config, weights, input_ids=batch.ids)["logits"]
    assert_near(np.concatenate(scores, axis=1), right)


@pytest.mark.parametrize("kind", [tuple, list])
def test_pairs_per_layer_are_accepted_as_a_cache(wing: Wing, model: Any, kind: Any) -> None:
    batch = Batch(words(2, 7), None)
    past = continued(wing, model, batch, 0, 4, None).past_key_values
    pairs = kind(kind((wing.array(k), wing.array(v))) for k, v in wing.pairs(past))
    before = wing.pairs(pairs)
    out = continued(wing, model, batch, 4, 7, pairs)
    assert_near(out.logits, continued(wing, model, batch, 4, 7, past).logits, "same program")
    assert [k.shape[2] for k, _ in wing.pairs(out.past_key_values)] == [7, 7]
    for pair, earlier in zip(wing.pairs(pairs), before, strict=True):
        np.testing.assert_array_equal(pair, earlier)


def test_without_a_mask_all_that_a_cache_holds_counts(wing: Wing, model: Any) -> None:
    batch = Batch(words(2, 7), None)
    past = continued(wing, model, batch, 0, 4, None).past_key_values
    ones = np.ones((2, 7), np.int64)
    new = {"input_ids": batch.ids[:, 4:], "past_key_values": past}
    found = wing.call(model, **new).logits
    np.testing.assert_array_equal(found, wing.call(model, **new, attention_mask=ones).logits)


def test_a_mask_of_the_wrong_length_is_refused_with_both_lengths(wing: Wing, model: Any) -> None:
    ids = words(2, 7)
    past = wing.call(model, input_ids=ids[:, :4]).past_key_values
    with pytest.raises(ValueError, match=r"\(2, 3\), expected \(2, 7\): 4 tokens in the cache and"):
        wing.call(
            model,
            input_ids=ids[:, 4:],
            past_key_values=past,
            attention_mask=np.ones((2, 3), np.int64),
        )


def test_positions_beyond_the_table_are_refused_through_a_cache(wing: Wing, model: Any) -> None:
    ids = words(1, 33)
    past = wing.call(model, input_ids=ids[:, :32]).past_key_values
    with pytest.raises(ValueError, match=r"position 32.*max_position_embeddings is 32"):
        wing.call(model, input_ids=ids[:, 32:], past_key_values=past)


def test_a_cache_longer_than_the_table_is_fine_where_padding_takes_the_places(
    wing: Wing, model: Any
) -> None:
    ids = words(1, 38)
    mask = np.ones((1, 38), np.int64)
    mask[:, :10] = 0
    past = wing.call(model, input_ids=ids[:, :37], attention_mask=mask[:, :37]).past_key_values
    found = wing.call(model, input_ids=ids[:, 37:], attention_mask=mask, past_key_values=past)
    alone = wing.call(model, input_ids=ids[:, 10:])
    assert_near(found.logits[:, -1], alone.logits[:, -1])


def test_given_positions_hold_through_a_cache(wing: Wing, model: Any) -> None:
    ids, places = words(1, 6), np.array([[3, 4, 5, 9, 8, 7]])
    whole = wing.call(model, input_ids=ids, position_ids=places).logits
    first = wing.call(model, input_ids=ids[:, :4], position_ids=places[:, :4])
    rest = wing.call(
        model,
        input_ids=ids[:, 4:],
        position_ids=places[:, 4:],
        past_key_values=first.past_key_values,
    )
    assert_near(rest.logits, whole[:, 4:])


def test_attention_weights_cover_past_and_new_tokens(wing: Wing, model: Any) -> None:
    batch = Batch(words(2, 7), np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7]))
    past = continued(wing, model, batch, 0, 4, None).past_key_values
    found = continued(wing, model, batch, 4, 7, past, output_attentions=True).attentions
    whole = wing.call(model, **batch.inputs, output_attentions=True).attentions
    assert found[0].shape == (2, 4, 3, 7)
    for part, all_weights in zip(found, whole, strict=True):
        assert_near(part, all_weights[:, :, 4:])


@pytest.mark.parametrize("head", HEADS)
def test_no_cache_comes_out_when_none_is_wanted(wing: Wing, head: Head) -> None:
    config = tiny(use_cache=False)
    model = wing.fresh(head, config)
    assert wing.call(model, input_ids=words(1, 3)).past_key_values is None
    assert wing.call(model, input_ids=words(1, 3), use_cache=True).past_key_values is not None
    kept = wing.fresh(head, tiny())
    assert wing.call(kept, input_ids=words(1, 3)).past_key_values is not None
    assert wing.call(kept, input_ids=words(1, 3), use_cache=False).past_key_values is None


def test_a_cache_is_read_without_making_one(wing: Wing, model: Any) -> None:
    batch = Batch(words(2, 7), None)
    past = continued(wing, model, batch, 0, 4, None).past_key_values
    found = wing.call(model, input_ids=batch.ids[:, 4:], past_key_values=past, use_cache=False)
    assert found.past_key_values is None
    assert_near(found.logits, wing.call(model, input_ids=batch.ids).logits[:, 4:])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cache_has_the_type_of_the_model(wing: Wing, dtype: str) -> None:
    config = tiny()
    weights = random_weights(config, Head.CAUSAL_LM)
    model = wing.build(Head.CAUSAL_LM, config, weights, dtype)
    out = wing.call(model, input_ids=words(1, 3))
    key, value = out.past_key_values[0]
    for values in (key, value):
        assert str(values.dtype).strip("<>'").endswith(dtype)


def test_a_cache_of_another_depth_is_refused(wing: Wing, model: Any) -> None:
    past = wing.call(model, input_ids=words(1, 3)).past_key_values
    pairs = tuple((wing.array(k), wing.array(v)) for k, v in wing.pairs(past))
    with pytest.raises(ValueError, match="past_key_values has 1 layers, the model has 2"):
        wing.call(model, input_ids=words(1, 2), past_key_values=pairs[:1])
    with pytest.raises(ValueError, match="past_key_values is a int; pass what a call returned"):
        wing.call(model, input_ids=words(1, 2), past_key_values=7)


def test_an_empty_cache_is_as_good_as_none(wing: Wing, model: Any) -> None:
    ids = words(1, 4)
    right = wing.call(model, input_ids=ids).logits
    np.testing.assert_array_equal(wing.call(model, input_ids=ids, past_key_values=()).logits, right)
