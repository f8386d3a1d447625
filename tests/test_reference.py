"""The NumPy reference against reference data and against transformers' torch OPT in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import open_checkpoint
from opt_core import reference
from opt_core.config import ACTIVATIONS, OPTConfig
from opt_core.reference.inputs import Floats
from opt_core.reference.model import FUNCTIONS
from opt_core.weights import Head, table

#: The float32 files differ from float64 by rounding: 5e-6 between versions of their own maker.
FLOAT32_TOLERANCE = 2e-5
#: Two float64 computations with another order of summation.
FLOAT64_TOLERANCE = 1e-11

LANGUAGE_MODELS = [
    "lm_base",
    "lm_bf16",
    "lm_fp16",
    "lm_gelu_new",
    "lm_legacy_bin",
    "lm_no_bias_no_affine_gelu",
    "lm_no_final_ln",
    "lm_old_keys_layer_norm",
    "lm_old_keys_layer_norm_lm_head",
    "lm_old_keys_no_prefix",
    "lm_old_keys_no_prefix_lm_head",
    "lm_old_keys_proj_dim",
    "lm_old_keys_without_final_ln",
    "lm_post_ln_proj",
    "lm_sharded",
    "lm_silu",
    "lm_untied",
]
MODELS = ["model_base", "model_post_ln_proj"]
Case = tuple[OPTConfig, dict[str, Any], dict[str, Any]]


@pytest.fixture
def case(shared: Path, request: pytest.FixtureRequest) -> Case:
    """Configuration, weights and expectation of the case that the test is called with."""
    folder = shared / "reference" / "opt" / request.param
    config = OPTConfig.from_json_file(folder / "config.json")
    tensors = open_checkpoint(folder).tensors
    with np.load(folder / "expected.npz") as arrays:
        return config, {k: t.read() for k, t in tensors.items()}, dict(arrays)


def for_cases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names, indirect=True)


def near(found: Any, expected: Any, tolerance: float = FLOAT32_TOLERANCE) -> None:
    size = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size)


def last_output(case: Case, **inputs: Any) -> Floats:
    """What the case's arrays call `logits` or `last_hidden_state`."""
    config, weights, expected = case
    if "logits" in expected:
        return reference.causal_lm(config, weights, **inputs).logits
    return reference.forward(config, weights, **inputs).last_hidden_state


# Reference data: decoder and language model


@for_cases(*LANGUAGE_MODELS, *MODELS)
def test_plain_tokens_give_the_expected_scores_states_and_weights(case: Case) -> None:
    config, weights, expected = case
    passed = reference.forward(config, weights, input_ids=expected["input_ids"])
    kind = "logits" if "logits" in expected else "last_hidden_state"
    near(last_output(case, input_ids=expected["input_ids"]), expected[kind])
    for name, values in expected.items():
        words = name.split("_")
        if name.startswith("hidden_states_") and words[-1].isdigit() and len(words) == 3:
            near(passed.hidden_states[int(words[-1])], values)
        if name.startswith("attentions_") and words[-1].isdigit():
            near(passed.attentions[int(words[-1])], values)
    assert len(passed.hidden_states) == config.num_hidden_layers + 1


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@for_cases(*LANGUAGE_MODELS, *MODELS)
def test_masked_batches_give_the_expected_scores_everywhere(case: Case, side: str) -> None:
    expected = case[2]
    kind = "logits" if "logits" in expected else "last_hidden_state"
    ids = expected["input_ids" if side == "holes" else f"input_ids_{side}"]
    found = last_output(case, input_ids=ids, attention_mask=expected[f"attention_mask_{side}"])
    near(found, expected[f"{kind}_{side}"])


@for_cases("lm_base", "lm_post_ln_proj", "model_base")
def test_a_query_that_sees_nothing_attends_evenly_to_every_key(case: Case) -> None:
    config, weights, expected = case
    ids, mask = expected["input_ids_left"], expected["attention_mask_left"]
    passed = reference.forward(config, weights, input_ids=ids, attention_mask=mask)
    near(passed.attentions[-1], expected["attentions_left_last"])
    near(passed.hidden_states[1], expected["hidden_states_left_1"])
    blind = mask.cumsum(axis=1) == 0
    assert blind.any()
    weights_there = passed.attentions[0].swapaxes(1, 2)[blind]
    np.testing.assert_allclose(weights_there, 1 / ids.shape[1], rtol=1e-15)


@for_cases(*LANGUAGE_MODELS, *MODELS)
def test_embeddings_head_masks_and_positions_give_the_expected_scores(case: Case) -> None:
    expected = case[2]
    kind = "logits" if "logits" in expected else "last_hidden_state"
    embedded = last_output(case, inputs_embeds=expected["inputs_embeds"])
    near(embedded, expected[f"{kind}_inputs_embeds"])
    for name in ("head_mask", "position_ids"):
        found = last_output(case, input_ids=expected["input_ids"], **{name: expected[name]})
        near(found, expected[f"{kind}_{name}"])


@for_cases("lm_base", "lm_post_ln_proj", "lm_no_bias_no_affine_gelu", "model_base")
def test_float64_data_agree_to_float64_rounding(case: Case) -> None:
    expected = case[2]
    kind = "logits" if "logits" in expected else "last_hidden_state"
    near(
        last_output(case, input_ids=expected["input_ids"]),
        expected[f"{kind}_f64"],
        FLOAT64_TOLERANCE,
    )
    found = last_output(
        case, input_ids=expected["input_ids_left"], attention_mask=expected["attention_mask_left"]
    )
    near(found, expected[f"{kind}_left_f64"], FLOAT64_TOLERANCE)


@for_cases(*LANGUAGE_MODELS)
def test_language_model_losses_are_as_expected(case: Case) -> None:
    config, weights, expected = case
    for side in ("", "_right", "_left"):
        found = reference.causal_lm(
            config,
            weights,
            input_ids=expected[f"input_ids{side}"],
            attention_mask=expected.get(f"attention_mask{side}"),
            labels=expected[f"labels{side}"],
        )
        near(found.loss, expected[f"loss{side}"])
    found = reference.causal_lm(
        config, weights, inputs_embeds=expected["inputs_embeds"], labels=expected["labels"]
    )
    near(found.loss, expected["loss_inputs_embeds"])
    ignored = np.full_like(expected["labels"], -100)
    nothing = reference.causal_lm(config, weights, input_ids=expected["input_ids"], labels=ignored)
    assert nothing.loss is not None
    assert np.isnan(nothing.loss)
    assert np.isnan(expected["loss_all_ignored"])


# Reference data: the other heads


@for_cases("seqcls_single", "seqcls_multi", "seqcls_regression")
def test_classification_scores_and_losses_are_as_expected(case: Case) -> None:
    config, weights, expected = case
    ids, mask = expected["input_ids"], expected["attention_mask"]
    found = reference.sequence_classification(
        config, weights, input_ids=ids, attention_mask=mask, labels=expected["labels"]
    )
    near(found.logits, expected["logits"])
    near(found.loss, expected["loss"])
    without = reference.sequence_classification(config, weights, input_ids=ids)
    near(without.logits, expected["logits_no_mask"])
    embedded = reference.sequence_classification(
        config, weights, inputs_embeds=expected["inputs_embeds"], attention_mask=mask
    )
    # transformers pools embeddings at the end; here the mask decides as it does for tokens.
    near(embedded.forward.modules["score"][:, -1], expected["logits_inputs_embeds"])


@for_cases("seqcls_no_pad_id")
def test_one_row_needs_no_pad_id_and_no_mask_and_two_do(case: Case) -> None:
    config, weights, expected = case
    ids = expected["input_ids"]
    found = reference.sequence_classification(
        config, weights, input_ids=ids, labels=expected["labels"]
    )
    near(found.logits, expected["logits"])
    near(found.loss, expected["loss"])
    two = np.concatenate([ids, ids])
    with pytest.raises(ValueError, match=r"the ends of 2 rows are unknown: .* no pad_token"):
        reference.sequence_classification(config, weights, input_ids=two)
    masked = reference.sequence_classification(
        config, weights, input_ids=two, attention_mask=np.ones_like(two)
    )
    near(masked.logits, np.concatenate([expected["logits"]] * 2))


@for_cases("qa")
def test_answer_scores_and_losses_are_as_expected(case: Case) -> None:
    config, weights, expected = case
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    for name in [n for n in expected if n.startswith("loss_")]:
        kind = name.removeprefix("loss_")
        found = reference.question_answering(
            config,
            weights,
            **inputs,
            start_positions=expected[f"start_positions_{kind}"],
            end_positions=expected[f"end_positions_{kind}"],
        )
        near(found.loss, expected[name])
        near(found.start_logits, expected["start_logits"])
        near(found.end_logits, expected["end_logits"])


# transformers in float64


def fresh_weights(config: OPTConfig, seed: int, head: Head = Head.CAUSAL_LM) -> dict[str, Floats]:
    """Weights of a size that makes every path count, biases and norms included."""
    random = np.random.default_rng(seed)
    return {
        name: random.normal(row.mean, 0.4, row.shape) for name, row in table(config, head).items()
    }


def outputs_of_transformers(
    config: OPTConfig, weights: dict[str, Floats], ids: Any, mask: Any
) -> dict[str, Floats]:
    """What every module with a path in the checkpoint gives, by path."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.OPTConfig(**{**config.to_dict(), "dropout": 0.0})
    # Its eager attention has a float32 softmax.
    model = transformers.OPTForCausalLM._from_config(theirs, attn_implementation="sdpa").double()
    state = {name: torch.from_numpy(values) for name, values in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert unexpected == []
    outputs: dict[str, Floats] = {}

    def note(path: str, output: Any) -> None:
        first = output if isinstance(output, torch.Tensor) else output[0]
        outputs[path] = first.numpy()

    for path, module in model.named_modules():
        if path and not path.endswith(("activation_fn", "layers")):
            module.register_forward_hook(lambda _, __, output, path=path: note(path, output))
    with torch.no_grad():
        model.eval()(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    return outputs


configs = st.builds(
    OPTConfig,
    vocab_size=st.just(23),
    hidden_size=st.sampled_from([8, 12]),
    num_hidden_layers=st.sampled_from([1, 3]),
    ffn_dim=st.sampled_from([6, 16]),
    num_attention_heads=st.sampled_from([1, 2, 4]),
    max_position_embeddings=st.just(9),
    word_embed_proj_dim=st.sampled_from([None, 4, 16]),
    do_layer_norm_before=st.booleans(),
    _remove_final_layer_norm=st.booleans(),
    enable_bias=st.booleans(),
    layer_norm_elementwise_affine=st.booleans(),
    tie_word_embeddings=st.booleans(),
    activation_function=st.sampled_from(["relu", "gelu", "gelu_new", "silu", "tanh"]),
)


@given(config=configs, seed=st.integers(0, 2**32 - 1), masked=st.booleans())
def test_every_modules_output_is_that_of_transformers_in_float64(
    config: OPTConfig, seed: int, masked: bool
) -> None:
    random = np.random.default_rng(seed)
    ids = random.integers(3, config.vocab_size, (3, 9))
    mask = random.integers(0, 2, ids.shape) if masked else np.ones_like(ids)
    weights = fresh_weights(config, seed)
    found = reference.causal_lm(
        config, weights, input_ids=ids, attention_mask=mask if masked else None
    )
    theirs = outputs_of_transformers(config, weights, ids, mask)
    modules = dict(found.forward.modules)
    # transformers' head calls the decoder past the model around it.
    assert modules.pop("model") is modules["model.decoder"]
    assert theirs.keys() == modules.keys()
    for path, values in modules.items():
        flat = theirs[path].reshape(values.shape)
        near(values[mask == 1], flat[mask == 1], FLOAT64_TOLERANCE)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_that_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    functions = pytest.importorskip("transformers.activations").ACT2FN
    theirs = functions["gelu_pytorch_tanh" if name == "gelu_tanh" else name]
    values = np.linspace(-30, 30, 2001)
    expected = theirs(torch.from_numpy(values)).numpy()
    # transformers' gelu_fast rounds sqrt(2 / pi) to ten digits.
    np.testing.assert_allclose(FUNCTIONS[ACTIVATIONS[name]](values), expected, atol=1e-9)
