"""opt_torch in float64 against the reference; its float32 gradients against float64."""

from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests.cases import HEADS, Batch, batches, configs, expected, labels, random_weights, vanishing
from tests.tolerances import assert_gradients_near, assert_near
from tests.wings import Wing

seeds = st.integers(0, 2**16)
IMPLEMENTATIONS = st.sampled_from(["eager", "sdpa"])


@given(
    head=st.sampled_from(HEADS),
    config=configs(),
    batch=batches(),
    seed=seeds,
    attend=IMPLEMENTATIONS,
)
def test_in_float64_every_output_and_module_is_the_references(
    wing: Wing, head: Head, config: OPTConfig, batch: Batch, seed: int, attend: str
) -> None:
    weights = random_weights(config, head, seed, std=0.3)
    model = wing.build(head, config, weights, "float64", attn_implementation=attend)
    inputs = {**batch.inputs, **labels(head, config, batch, seed)}
    right: Any = expected(head, config, weights, **inputs)
    found = wing.call(model, **inputs, output_hidden_states=True)
    for name in ("last_hidden_state", "loss", "logits", "start_logits", "end_logits"):
        if name in right:
            assert_near(found[name], right[name], "float64", what=name)
    for place, values in enumerate(right["hidden_states"]):
        # Hidden places too: a query that sees nothing attends evenly, here and there.
        assert_near(found.hidden_states[place], values, "float64", what=f"state {place}")


@given(
    head=st.sampled_from(HEADS[1:]),
    config=configs(),
    batch=batches(),
    seed=seeds,
    attend=IMPLEMENTATIONS,
)
def test_gradients_in_float32_are_those_of_float64(
    wing: Wing, head: Head, config: OPTConfig, batch: Batch, seed: int, attend: str
) -> None:
    inputs = {**batch.inputs, **labels(head, config, batch, seed)}
    # One token has nothing to predict: the loss is NaN.
    assume(head is not Head.CAUSAL_LM or (inputs["labels"][:, 1:] != -100).any())
    weights = random_weights(config, head, seed)
    single, double = (
        wing.gradients(
            wing.build(head, config, weights, dtype, attn_implementation=attend), **inputs
        )
        for dtype in ("float32", "float64")
    )
    assert_gradients_near(single, double, vanishing(head, config))
