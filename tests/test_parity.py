"""Every class of a wing against the float64 reference: outputs, modules, losses and gradients."""

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
    Arrays,
    Batch,
    batches,
    configs,
    expected,
    labels,
    random_weights,
    tiny,
    vanishing,
    words,
)
from tests.tolerances import assert_gradients_near, assert_near
from tests.wings import Wing

heads = st.sampled_from(HEADS)
seeds = st.integers(0, 2**16)
#: What a call returns besides the values of each place; `score` is computed where it is read only.
PER_ROW = ("loss", "logits")


def compare(head: Head, found: Any, right: Arrays, shown: Any, bound: str) -> None:
    """Every output, each place of it that the mask shows."""
    per_row = PER_ROW if head is Head.SEQUENCE_CLASSIFICATION else ("loss",)
    for name in ("last_hidden_state", "loss", "logits", "start_logits", "end_logits"):
        if name in right:
            where = ... if name in per_row else shown
            assert_near(found[name], right[name], bound, where=where, what=name)


@given(head=heads, config=configs(), batch=batches(), seed=seeds)
def test_outputs_and_losses_are_those_of_the_reference(
    wing: Wing, head: Head, config: OPTConfig, batch: Batch, seed: int
) -> None:
    weights = random_weights(config, head, seed)
    inputs = {**batch.inputs, **labels(head, config, batch, seed)}
    found = wing.call(wing.build(head, config, weights), **inputs)
    compare(head, found, expected(head, config, weights, **inputs), batch.shown, "float32")


@given(head=heads, config=configs(), batch=batches(), seed=seeds)
def test_every_modules_output_is_that_of_the_reference(
    wing: Wing, head: Head, config: OPTConfig, batch: Batch, seed: int
) -> None:
    weights = random_weights(config, head, seed)
    right: Any = expected(head, config, weights, **batch.inputs)["modules"]
    found = wing.modules(wing.build(head, config, weights), **batch.inputs)
    # The head of a classifier runs on one place of each row, the reference's on all.
    right.pop("score", None), found.pop("score", None)
    assert found.keys() == right.keys()
    for path, values in right.items():
        # Without padding one row of positions serves all rows of the batch.
        whole = np.broadcast_to(found[path], values.shape)
        assert_near(whole, values, where=batch.shown, what=path)


@given(config=configs(), batch=batches(), seed=seeds)
def test_hidden_states_and_attention_weights_are_those_of_the_reference(
    wing: Wing, config: OPTConfig, batch: Batch, seed: int
) -> None:
    weights = random_weights(config, Head.NONE, seed)
    right: Any = expected(Head.NONE, config, weights, **batch.inputs)
    model = wing.build(Head.NONE, config, weights)
    found = wing.call(model, **batch.inputs, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == config.num_hidden_layers + 1
    assert len(found.attentions) == config.num_hidden_layers
    for place, values in enumerate(right["hidden_states"]):
        assert_near(found.hidden_states[place], values, where=batch.shown, what=f"state {place}")
    for layer, values in enumerate(right["attentions"]):
        seen = found.attentions[layer].swapaxes(1, 2)  # [B, T, H, S]
        assert_near(seen, values.swapaxes(1, 2), where=batch.shown, what=f"weights {layer}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("side", [None, "left"])
def test_half_precision_stays_near_the_reference(
    wing: Wing, switch: str, dtype: str, side: str | None
) -> None:
    config = tiny(**SWITCHES[switch])
    weights = random_weights(config, Head.CAUSAL_LM)
    model = wing.build(Head.CAUSAL_LM, config, weights, dtype)
    mask = None if side is None else np.array([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    batch = Batch(words(2, 7), mask)
    found = wing.call(model, **batch.inputs)
    right = expected(Head.CAUSAL_LM, config, weights, **batch.inputs)
    assert np.isfinite(found.logits).all()
    compare(Head.CAUSAL_LM, found, right, batch.shown, "half")


@given(seed=seeds, factors=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=8, max_size=8))
def test_a_head_mask_multiplies_the_attention_weights(
    wing: Wing, seed: int, factors: list[float]
) -> None:
    config = tiny()
    weights = random_weights(config, Head.CAUSAL_LM, seed)
    inputs = {"input_ids": words(2, 6, seed), "head_mask": np.array(factors).reshape(2, 4)}
    model = wing.build(Head.CAUSAL_LM, config, weights)
    found = wing.call(model, **inputs, output_attentions=True)
    right = expected(Head.CAUSAL_LM, config, weights, **inputs)
    assert_near(found.logits, right["logits"])
    for seen, values in zip(found.attentions, right["attentions"], strict=True):
        assert_near(seen, values)


@pytest.mark.parametrize("switch", ["pre_norm", "pruned"])
def test_a_head_mask_of_one_layer_counts_for_all(wing: Wing, switch: str) -> None:
    config = tiny(**SWITCHES[switch])
    weights = random_weights(config, Head.NONE)
    inputs = {"input_ids": words(2, 6), "head_mask": np.array([1.0, 0.0, 0.5, 2.0])}
    found = wing.call(wing.build(Head.NONE, config, weights), **inputs)
    right = expected(Head.NONE, config, weights, **inputs)
    assert_near(found.last_hidden_state, right["last_hidden_state"])


@given(config=configs(), batch=batches(), seed=seeds)
def test_embeddings_in_place_of_ids_give_the_same(
    wing: Wing, config: OPTConfig, batch: Batch, seed: int
) -> None:
    weights = random_weights(config, Head.CAUSAL_LM, seed)
    model = wing.build(Head.CAUSAL_LM, config, weights)
    embeds = weights["model.decoder.embed_tokens.weight"][batch.ids]
    rest = {} if batch.mask is None else {"attention_mask": batch.mask}
    found = wing.call(model, inputs_embeds=embeds, **rest).logits
    right = expected(Head.CAUSAL_LM, config, weights, **batch.inputs)["logits"]
    assert_near(found, right, where=batch.shown)


@given(seed=seeds, places=st.lists(st.integers(-1, 31), min_size=10, max_size=10))
def test_given_positions_win_over_the_mask(wing: Wing, seed: int, places: list[int]) -> None:
    config = tiny()
    weights = random_weights(config, Head.NONE, seed)
    inputs = {
        "input_ids": words(2, 5, seed),
        "attention_mask": np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "position_ids": np.array(places).reshape(2, 5),
    }
    found = wing.call(wing.build(Head.NONE, config, weights), **inputs).last_hidden_state
    right = expected(Head.NONE, config, weights, **inputs)["last_hidden_state"]
    assert_near(found, right, where=inputs["attention_mask"] == 1)


@pytest.mark.parametrize("std", [None, 0.3])
@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("switch", ["pre_norm", "post_norm_projected", "no_bias", "untied"])
def test_gradients_are_the_slopes_of_the_reference(
    wing: Wing, switch: str, head: Head, std: float | None
) -> None:
    """Every entry of every gradient, by central differences of the float64 loss."""
    config = smallest(**SWITCHES[switch])
    weights = random_weights(config, head, std=std)
    # No id is the padding id: its row gets no gradient from the lookup in some frameworks.
    batch = Batch(words(2, 5, vocab_size=12), np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    inputs = {**batch.inputs, **labels(head, config, batch)}
    found = wing.gradients(wing.build(head, config, weights), **inputs)
    right = slopes(head, config, weights, inputs)
    assert_gradients_near(found, right, vanishing(head, config))


def smallest(**switches: Any) -> OPTConfig:
    """A configuration of some 600 parameters."""
    narrow = {"word_embed_proj_dim": 6} if "word_embed_proj_dim" in switches else {}
    return tiny(
        **{**switches, **narrow},
        vocab_size=12,
        hidden_size=8,
        ffn_dim=6,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=6,
        num_labels=3,
    )


def slopes(head: Head, config: OPTConfig, weights: Arrays, inputs: Arrays) -> Arrays:
    """The gradient of the reference's loss, good to about 1e-9."""
    doubles = {name: values.astype(np.float64) for name, values in weights.items()}

    def loss() -> float:
        return float(expected(head, config, doubles, **inputs)["loss"])

    step = 1e-6
    result = {}
    for name, values in doubles.items():
        slope = np.zeros_like(values)
        for place in np.ndindex(values.shape):
            start = values[place]
            values[place] = start + step
            above = loss()
            values[place] = start - step
            slope[place] = (above - loss()) / (2 * step)
            values[place] = start
        result[name] = slope
    return result
