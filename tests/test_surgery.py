"""Changes of a built model: another vocabulary, fewer attention heads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core.weights import Head, table
from tests.cases import HEADS, SWITCHES, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

EMBEDDING, LM_HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
prunings = st.fixed_dictionaries(
    {}, optional={layer: st.sets(st.integers(0, 3), min_size=1, max_size=3) for layer in (0, 1)}
)


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**changes)
    return wing.build(head, config, random_weights(config, head))


# The vocabulary


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("switch", ["pre_norm", "post_norm_projected"])
def test_a_larger_vocabulary_keeps_what_was_there(
    wing: Wing, head: Head, tied: bool, switch: str
) -> None:
    model = build(wing, head, tie_word_embeddings=tied, **SWITCHES[switch])
    before = wing.weights(model)
    earlier = wing.call(model, input_ids=words(2, 5))
    model.resize_token_embeddings(50)
    after = wing.weights(model)
    assert model.config.vocab_size == 50
    assert {n: v.shape for n, v in after.items()} == {
        name: row.shape for name, row in table(model.config, head).items()
    }
    for name, values in before.items():
        np.testing.assert_array_equal(after[name][: len(values)], values)
    for name in {EMBEDDING, LM_HEAD} & after.keys():
        added = after[name][40:]
        assert 0.01 < added.std() < 0.04
    later = wing.call(model, input_ids=words(2, 5))
    if head is Head.CAUSAL_LM:
        assert later.logits.shape == (2, 5, 50)
        assert_near(later.logits[..., :40], earlier.logits, "same program")
    else:
        assert_near(later[0], earlier[0], "same program")


def test_a_resized_tied_head_still_is_the_embedding(wing: Wing, tmp_path: Path) -> None:
    model = build(wing)
    model.resize_token_embeddings(50)
    ids = np.array([[45, 49, 3]])
    model.save_pretrained(tmp_path)
    again = wing.load(Head.CAUSAL_LM, tmp_path)
    assert LM_HEAD not in wing.weights(again)
    found, right = (wing.call(one, input_ids=ids).logits for one in (again, model))
    assert_near(found, right, "same program")
    gradients = wing.gradients(model, input_ids=ids, labels=ids)
    assert np.abs(gradients[EMBEDDING][10]).max() > 0, "the head's part reaches every row"


def test_a_smaller_vocabulary_warns_and_keeps_the_first_rows(wing: Wing) -> None:
    model = build(wing)
    ids = words(2, 5, vocab_size=20)
    earlier = wing.call(model, input_ids=ids).logits
    with pytest.warns(UserWarning, match="the vocabulary shrinks from 40 to 20 tokens: the rows"):
        model.resize_token_embeddings(20)
    assert_near(wing.call(model, input_ids=ids).logits, earlier[..., :20], "same program")
    with pytest.raises(ValueError, match=r"input_ids hold 20 .* goes from 0 to 19"):
        wing.call(model, input_ids=np.array([[20]]))
    assert wing.generate(model, ids, max_new_tokens=3).max() < 20


@pytest.mark.parametrize(
    ("asked", "multiple", "size"),
    [(41, 8, 48), (48, 8, 48), (None, 64, 64), (None, None, 40), (40, None, 40), (None, 8, 40)],
)
def test_the_size_is_rounded_up_to_a_multiple(
    wing: Wing, asked: int | None, multiple: int | None, size: int
) -> None:
    model = build(wing)
    model.resize_token_embeddings(asked, pad_to_multiple_of=multiple)
    assert model.config.vocab_size == size
    assert wing.weights(model)[EMBEDDING].shape == (size, 16)


def test_resizing_gives_the_model_a_new_configuration(wing: Wing) -> None:
    config = tiny()
    model = wing.fresh(Head.CAUSAL_LM, config)
    held = model.config
    model.resize_token_embeddings(48)
    assert (config.vocab_size, held.vocab_size, model.config.vocab_size) == (40, 40, 48)
    with pytest.raises(ValueError, match="vocab_size cannot change from 48 to 56"):
        model.config.vocab_size = 56


@pytest.mark.parametrize("size", [0, 2, -3])
def test_a_size_that_leaves_special_tokens_outside_is_refused(wing: Wing, size: int) -> None:
    model = build(wing)
    before = wing.weights(model)
    with pytest.raises(
        ValueError, match=r"vocab_size is -?\d|eos_token_id is 2, outside|bos_token"
    ):
        model.resize_token_embeddings(size)
    assert model.config.vocab_size == 40
    np.testing.assert_array_equal(wing.weights(model)[EMBEDDING], before[EMBEDDING])


def test_a_model_of_another_vocabulary_generates_and_trains(wing: Wing) -> None:
    model = build(wing)
    model.resize_token_embeddings(64)
    assert wing.generate(model, np.array([[60, 61]]), max_new_tokens=4).shape[0] == 1
    ids = np.array([[60, 61, 62]])
    gradients = wing.gradients(model, input_ids=ids, labels=ids)
    assert gradients[EMBEDDING].shape == (64, 16)


# Attention heads


@given(gone=prunings)
def test_a_model_without_heads_gives_what_masking_them_gives(
    wing: Wing, gone: dict[int, set[int]]
) -> None:
    model = build(wing)
    ids, mask = words(2, 6), np.ones((2, 4), np.float32)
    for layer, heads in gone.items():
        mask[layer, sorted(heads)] = 0
    masked = wing.call(model, input_ids=ids, head_mask=mask, output_attentions=True)
    model.prune_heads(gone)
    pruned = wing.call(model, input_ids=ids, output_attentions=True)
    assert_near(pruned.logits, masked.logits, "same program")
    for layer, weights in enumerate(pruned.attentions):
        kept = [head for head in range(4) if head not in gone.get(layer, ())]
        assert_near(weights, masked.attentions[layer][:, kept], "same program")
    assert model.config.pruned_heads == {k: sorted(v) for k, v in gone.items()}


def test_heads_keep_their_numbers_when_others_go(wing: Wing) -> None:
    at_once, by_turns = build(wing), build(wing)
    at_once.prune_heads({0: [1, 2], 1: [0]})
    steps: list[dict[int, list[int]]] = [{0: [1]}, {1: [0]}, {0: [2, 1]}, {}, {1: []}]
    for step in steps:
        by_turns.prune_heads(step)
    assert by_turns.config.pruned_heads == at_once.config.pruned_heads == {0: [1, 2], 1: [0]}
    ids = words(2, 5)
    np.testing.assert_array_equal(
        wing.call(by_turns, input_ids=ids).logits, wing.call(at_once, input_ids=ids).logits
    )


def test_a_head_mask_counts_heads_as_before_pruning(wing: Wing) -> None:
    model = build(wing)
    factors = np.array([[0.5, 1.0, 2.0, 0.0], [1.0, 0.0, 0.5, 1.5]], np.float32)
    ids = words(2, 5)
    gone = factors.copy()
    gone[0, 2] = gone[1, 0] = 0
    right = wing.call(model, input_ids=ids, head_mask=gone).logits
    model.prune_heads({0: [2], 1: [0]})
    found = wing.call(model, input_ids=ids, head_mask=factors).logits
    assert_near(found, right, "same program")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", ["pre_norm", "no_bias", "post_norm_projected"])
def test_a_pruned_model_is_smaller_and_comes_back_from_its_files(
    wing: Wing, tmp_path: Path, head: Head, switch: str
) -> None:
    model = build(wing, head, **SWITCHES[switch])
    model.prune_heads({0: [0, 3], 1: [1]})
    weights = wing.weights(model)
    assert weights["model.decoder.layers.0.self_attn.q_proj.weight"].shape == (8, 16)
    assert weights["model.decoder.layers.1.self_attn.out_proj.weight"].shape == (16, 12)
    with pytest.warns(UserWarning, match="only optlm loads the saved files"):
        model.save_pretrained(tmp_path)
    again = wing.load(head, tmp_path)
    assert again.config.pruned_heads == {0: [0, 3], 1: [1]}
    found, right = (wing.call(one, input_ids=words(2, 4))[0] for one in (again, model))
    assert_near(found, right, "same program")
    assert again.config.num_attention_heads == 4


def test_a_pruned_model_generates_from_its_cache(wing: Wing) -> None:
    model = build(wing)
    model.prune_heads({0: [0, 1, 2]})
    ids = words(1, 4)
    cached = wing.generate(model, ids, max_new_tokens=6)
    whole = wing.generate(model, ids, max_new_tokens=6, use_cache=False)
    np.testing.assert_array_equal(cached, whole)


@pytest.mark.parametrize("gone", [{2: [0]}, {0: [4]}, {0: [0, 1, 2, 3]}, {-1: [0]}, {0: [-1]}])
def test_heads_that_cannot_go_are_refused_and_nothing_changes(
    wing: Wing, gone: dict[int, list[int]]
) -> None:
    model = build(wing)
    before = wing.weights(model)
    with pytest.raises(ValueError, match="layers go from 0 to 1, heads from 0 to 3, and one must"):
        model.prune_heads({1: [1], **gone})
    assert model.config.pruned_heads == {}
    for name, values in wing.weights(model).items():
        np.testing.assert_array_equal(values, before[name])


def test_pruning_leaves_the_configuration_of_the_caller_alone(wing: Wing) -> None:
    config = tiny()
    model = wing.fresh(Head.CAUSAL_LM, config)
    model.prune_heads({0: [1]})
    assert config.pruned_heads == {}
