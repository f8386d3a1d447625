"""The weight table: what every model's tensors are, and how a checkpoint is matched with them."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.weights import (
    EMBEDDING_NAME,
    INTO,
    LM_HEAD_NAME,
    OUT,
    CheckpointMismatch,
    CheckpointWarning,
    Fit,
    Head,
    Kind,
    Weight,
    count_parameters,
    fit,
    head_in,
    initial,
    stored_name,
    table,
)
from tests.cases import SWITCHES, tiny

LAYER = "model.decoder.layers.1"


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor source in memory."""

    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def read(self, part: slice | None = None, *, axis: int = 0) -> NDArray[Any]:
        return self.values if part is None else np.moveaxis(self.values, axis, 0)[part]

    def map(self) -> NDArray[Any]:
        return self.values


def stored(config: OPTConfig, head: Head = Head.CAUSAL_LM) -> dict[str, Held]:
    """A checkpoint that fits."""
    random = np.random.default_rng(0)
    return {name: Held(initial(row, random)) for name, row in table(config, head).items()}


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def refused(config: OPTConfig, found: dict[str, Held], head: Head = Head.CAUSAL_LM) -> str:
    """What the refusal of a checkpoint says."""
    with pytest.raises(CheckpointMismatch, match="does not fit") as caught:
        fit(config, head, found, source="my-opt")
    return str(caught.value)


# --- names and shapes --------------------------------------------------------------------------


CONFIGS = st.builds(
    OPTConfig,
    vocab_size=st.just(30),
    hidden_size=st.sampled_from([8, 16]),
    num_attention_heads=st.sampled_from([2, 4]),
    num_hidden_layers=st.integers(1, 3),
    ffn_dim=st.sampled_from([8, 20]),
    max_position_embeddings=st.sampled_from([6, 9]),
    word_embed_proj_dim=st.sampled_from([None, 6, 20]),
    do_layer_norm_before=st.booleans(),
    _remove_final_layer_norm=st.booleans(),
    enable_bias=st.booleans(),
    layer_norm_elementwise_affine=st.booleans(),
    tie_word_embeddings=st.booleans(),
    num_labels=st.integers(1, 4),
)


@given(CONFIGS, st.sampled_from(list(Head)))
def test_names_and_shapes_are_those_of_transformers(config: OPTConfig, head: Head) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = getattr(transformers, f"OPT{head.value}")(_theirs(transformers, config))
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(LM_HEAD_NAME, None)
    rows = table(config, head).values()
    assert {stored_name(row.name, head): row.shape for row in rows} == expected
    assert count_parameters(config, head) == theirs.num_parameters()


def _theirs(transformers: Any, config: OPTConfig) -> Any:
    values = config.to_dict()
    theirs = transformers.OPTConfig(**values)
    # Drawing values for norms without weights fails there; on the meta device none are needed.
    theirs._init_weights = False
    return theirs


@pytest.mark.parametrize("head", list(Head))
def test_a_bare_model_writes_names_without_the_models_prefix(head: Head) -> None:
    name = stored_name(EMBEDDING_NAME, head)
    expected = "decoder" if head is Head.NONE else "model.decoder"
    assert name == f"{expected}.embed_tokens.weight"


def test_pruned_heads_narrow_the_projections_of_their_layer() -> None:
    rows = table(tiny(pruned_heads={1: [0, 2]}))
    assert rows[f"{LAYER}.self_attn.q_proj.weight"].shape == (8, 16)
    assert rows[f"{LAYER}.self_attn.v_proj.bias"].shape == (8,)
    assert rows[f"{LAYER}.self_attn.out_proj.weight"].shape == (16, 8)
    assert rows["model.decoder.layers.0.self_attn.q_proj.weight"].shape == (16, 16)


def test_the_size_of_a_row_is_its_number_of_values() -> None:
    assert table(tiny())[f"{LAYER}.fc1.weight"].size == 24 * 16


# --- splits and layouts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("self_attn.q_proj.weight", OUT),
        ("self_attn.q_proj.bias", OUT),
        ("self_attn.k_proj.weight", OUT),
        ("self_attn.v_proj.bias", OUT),
        ("self_attn.out_proj.weight", INTO),
        ("self_attn.out_proj.bias", None),
        ("fc1.weight", OUT),
        ("fc1.bias", OUT),
        ("fc2.weight", INTO),
        ("fc2.bias", None),
        ("final_layer_norm.weight", None),
        ("self_attn_layer_norm.bias", None),
    ],
)
def test_a_layers_tensors_are_split_where_its_parts_meet(path: str, split: int | None) -> None:
    assert table(tiny())[f"{LAYER}.{path}"].split == split


def test_the_vocabulary_is_split_and_the_small_tables_are_not() -> None:
    rows = table(tiny(word_embed_proj_dim=12, tie_word_embeddings=False))
    assert rows[EMBEDDING_NAME].split == 0
    assert rows[LM_HEAD_NAME].split == OUT
    for name in ("embed_positions", "project_in", "project_out", "final_layer_norm"):
        assert rows[f"model.decoder.{name}.weight"].split is None


@pytest.mark.parametrize("switch", SWITCHES)
def test_layers_split_in_two_compute_what_the_whole_layer_does(switch: str) -> None:
    config = tiny(**{"num_hidden_layers": 1, **SWITCHES[switch], "pruned_heads": {}})
    weights = {name: source.values for name, source in stored(config).items()}
    prefix = "model.decoder.layers.0"
    x = np.random.default_rng(1).standard_normal((5, config.hidden_size))
    rows = table(config)

    def part(name: str, half: int) -> Any:
        row = rows.get(f"{prefix}.{name}")
        if row is None:
            return 0.0
        values = weights[row.name].astype(np.float64)
        return values if row.split is None else np.split(values, 2, row.split)[half]

    def fed(half: int, *, with_bias: bool) -> Any:
        inner = np.maximum(x @ part("fc1.weight", half).T + part("fc1.bias", half), 0)
        return inner @ part("fc2.weight", half).T + (part("fc2.bias", half) if with_bias else 0)

    # The bias of a matrix that is split by its input belongs to the sum, not to each part.
    halves = fed(0, with_bias=True) + fed(1, with_bias=False)
    w = {n: weights[f"{prefix}.{n}.weight"].astype(np.float64) for n in ("fc1", "fc2")}
    b = {n: weights.get(f"{prefix}.{n}.bias", np.zeros(1)) for n in ("fc1", "fc2")}
    whole = np.maximum(x @ w["fc1"].T + b["fc1"], 0) @ w["fc2"].T + b["fc2"]
    np.testing.assert_allclose(halves, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "kind", "torch", "keras", "flax"),
    [
        ("embed_tokens.weight", Kind.EMBEDDING, "weight", "embeddings", "embedding"),
        ("layers.0.fc1.weight", Kind.MATRIX, "weight", "kernel", "kernel"),
        ("layers.0.fc1.bias", Kind.BIAS, "bias", "bias", "bias"),
        ("final_layer_norm.weight", Kind.NORM_SCALE, "weight", "gamma", "scale"),
        ("final_layer_norm.bias", Kind.NORM_BIAS, "bias", "beta", "bias"),
    ],
)
def test_a_path_ends_in_the_frameworks_own_leaf(
    name: str, kind: Kind, torch: str, keras: str, flax: str
) -> None:
    row = table(tiny())[f"model.decoder.{name}"]
    stem = row.name.rpartition(".")[0]
    assert row.kind is kind
    assert row.path("torch") == row.name == f"{stem}.{torch}"
    assert row.path("keras") == f"{stem}.{keras}"
    assert row.path("flax") == f"{stem}.{flax}"
    assert not row.transposed("torch")
    assert row.transposed("keras") == row.transposed("flax") == (kind is Kind.MATRIX)


# --- fresh values ------------------------------------------------------------------------------


def test_fresh_values_have_the_distribution_of_the_table() -> None:
    config = tiny(hidden_size=64, ffn_dim=256, init_std=0.05)
    fresh = {n: initial(r, np.random.default_rng(3)) for n, r in table(config).items()}
    for name, values in fresh.items():
        row = table(config)[name]
        assert values.dtype == np.float32
        assert values.shape == row.shape
        if row.kind in (Kind.BIAS, Kind.NORM_BIAS):
            assert not values.any(), name
        elif row.kind is Kind.NORM_SCALE:
            assert (values == 1).all(), name
    drawn = fresh[f"{LAYER}.fc1.weight"]
    assert abs(drawn.std() - 0.05) < 0.05 * 4 / np.sqrt(2 * drawn.size)
    assert abs(drawn.mean()) < 0.05 * 4 / np.sqrt(drawn.size)


def test_the_padding_row_starts_at_zero_and_only_that_one() -> None:
    values = initial(table(tiny(pad_token_id=5))[EMBEDDING_NAME], np.random.default_rng(0))
    assert [row for row in range(len(values)) if not values[row].any()] == [5]
    values = initial(table(tiny(pad_token_id=None))[EMBEDDING_NAME], np.random.default_rng(0))
    assert values.any(axis=1).all()


# --- matching a checkpoint ---------------------------------------------------------------------


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_checkpoint_that_fits_fills_every_row(switch: str, head: Head) -> None:
    config = tiny(**SWITCHES[switch])
    with silent():
        result = fit(config, head, stored(config, head), source="my-opt")
    assert list(result.sources) == list(table(config, head))
    assert result.new == []


def test_one_error_names_all_faults() -> None:
    config = tiny()
    found = stored(config)
    del found[f"{LAYER}.fc1.bias"], found["model.decoder.layers.0.fc2.weight"]
    found["model.decoder.layers.0.rotary.inv_freq"] = Held(np.zeros(4, np.float32))
    found["model.decoder.embed_positions.weight"] = Held(np.zeros((32, 16), np.float32))
    found[f"{LAYER}.fc1.weight"] = Held(np.zeros((16, 24), np.float32))
    found[f"{LAYER}.fc2.bias"] = Held(np.zeros(16, np.int64))
    said = refused(config, found).splitlines()
    expected = len(table(config))
    assert said[0] == (
        f"'my-opt' does not fit an OPT of 2 layers of width 16 ({expected} tensors expected, "
        f"{expected - 1} found)"
    )
    faults = {tuple(re.split(r"\s{2,}", line.strip(), maxsplit=2)) for line in said[1:7]}
    assert faults == {
        ("missing", f"{LAYER}.fc1.bias", "(24,)"),
        ("missing", "model.decoder.layers.0.fc2.weight", "(16, 24)"),
        ("unexpected", "model.decoder.layers.0.rotary.inv_freq", "(4,)"),
        (
            "misshapen",
            "model.decoder.embed_positions.weight",
            "expected (34, 16), found (32, 16)",
        ),
        ("misshapen", f"{LAYER}.fc1.weight", "expected (24, 16), found (16, 24)"),
        ("not floats", f"{LAYER}.fc2.bias", "found int64 values"),
    }
    assert said[7:] == [
        "2 rows short: OPT keeps that many unused rows before position 0; was this file written "
        "without them?",
        "matrices are stored [out, in]; this file seems to hold them transposed",
    ]


def test_many_faults_are_counted_and_not_all_shown() -> None:
    said = refused(tiny(num_hidden_layers=9), stored(tiny()))
    assert said.splitlines()[-1] == "  … and 92 more"


def test_a_missing_last_norm_is_explained() -> None:
    config = tiny()
    found = {n: t for n, t in stored(config).items() if "decoder.final_layer_norm" not in n}
    assert "set _remove_final_layer_norm true in its configuration" in refused(config, found)
    with silent():
        fit(config.replace(_remove_final_layer_norm=True), Head.CAUSAL_LM, found, source="my-opt")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_any_floating_type_fits(kind: Any) -> None:
    config = tiny()
    found = {name: Held(t.values.astype(kind)) for name, t in stored(config).items()}
    with silent():
        fit(config, Head.CAUSAL_LM, found, source="my-opt")


@pytest.mark.parametrize(
    ("head", "new"),
    [
        (Head.SEQUENCE_CLASSIFICATION, ["score.weight"]),
        (Head.QUESTION_ANSWERING, ["qa_outputs.weight", "qa_outputs.bias"]),
    ],
)
def test_a_head_may_be_new_and_a_warning_names_it(head: Head, new: list[str]) -> None:
    said = f"'my-opt' holds no {', '.join(new)}: the new head starts from random values and must"
    with pytest.warns(CheckpointWarning, match=said):
        result = fit(tiny(), head, stored(tiny()), source="my-opt")
    assert result.new == new


def test_a_head_of_another_number_of_labels_is_misshapen() -> None:
    head = Head.SEQUENCE_CLASSIFICATION
    found = stored(tiny(num_labels=3), head)
    assert "expected (2, 16), found (3, 16)" in refused(tiny(), found, head)


@pytest.mark.parametrize("head", list(Head))
def test_a_base_model_leaves_heads_out(head: Head) -> None:
    config = tiny(tie_word_embeddings=False)
    with silent():
        result = fit(config, Head.NONE, stored(config, head), source="my-opt")
    assert list(result.sources) == list(table(config, Head.NONE))


@pytest.mark.parametrize("head", [Head.SEQUENCE_CLASSIFICATION, Head.QUESTION_ANSWERING])
def test_other_heads_leave_an_untied_language_model_head_out(head: Head) -> None:
    config = tiny(tie_word_embeddings=False)
    with pytest.warns(CheckpointWarning, match="holds no"):
        result = fit(config, head, stored(config), source="my-opt")
    assert LM_HEAD_NAME not in result.sources


@pytest.mark.parametrize("head", [Head.SEQUENCE_CLASSIFICATION, Head.QUESTION_ANSWERING])
def test_a_language_model_takes_no_other_head(head: Head) -> None:
    assert "unexpected" in refused(tiny(), stored(tiny(), head))


def off(**values: float) -> tuple[OPTConfig, dict[str, Held]]:
    """A model without biases and norm weights, and a file that holds some all the same."""
    config = tiny(enable_bias=False, layer_norm_elementwise_affine=False)
    found = stored(config)
    given = {"bias": 0.0, "norm_bias": 0.0, "norm_weight": 1.0, **values}
    found[f"{LAYER}.fc1.bias"] = Held(np.full(24, given["bias"], np.float32))
    for leaf in ("bias", "weight"):
        norm = np.full(16, given[f"norm_{leaf}"], np.float32)
        found[f"model.decoder.final_layer_norm.{leaf}"] = Held(norm)
    return config, found


def test_switched_off_biases_and_norms_may_be_there_if_they_change_nothing() -> None:
    config, found = off()
    with silent():
        result = fit(config, Head.CAUSAL_LM, found, source="my-opt")
    assert list(result.sources) == list(table(config))


@pytest.mark.parametrize("which", ["bias", "norm_bias", "norm_weight"])
def test_switched_off_biases_and_norms_that_would_change_something_are_refused(which: str) -> None:
    config, found = off(**{which: 0.5})
    assert "unexpected" in refused(config, found)


def test_a_switched_off_bias_of_another_shape_is_refused() -> None:
    config, found = off()
    found[f"{LAYER}.fc1.bias"] = Held(np.zeros(25, np.float32))
    assert "unexpected" in refused(config, found)


# --- the tied head -----------------------------------------------------------------------------


def test_a_tied_head_may_be_in_the_file_alone_or_beside_the_embedding() -> None:
    config = tiny()
    both = stored(config)
    both[LM_HEAD_NAME] = Held(both[EMBEDDING_NAME].values.copy())
    alone = {name: t for name, t in both.items() if name != EMBEDDING_NAME}
    for found in (both, alone):
        with silent():
            result = fit(config, Head.CAUSAL_LM, found, source="my-opt")
        assert set(result.sources) == set(table(config))
        np.testing.assert_array_equal(
            result.sources[EMBEDDING_NAME].map(), both[LM_HEAD_NAME].values
        )


def differing(config: OPTConfig) -> tuple[Fit, str, dict[str, Held]]:
    found = stored(config)
    found[LM_HEAD_NAME] = Held(found[EMBEDDING_NAME].values + np.float32(1))
    with pytest.warns(CheckpointWarning) as caught:
        result = fit(config, Head.CAUSAL_LM, found, source="my-opt")
    return result, str(caught[0].message), found


def test_a_tied_head_that_differs_loses_to_the_embedding_with_a_warning() -> None:
    result, said, found = differing(tiny())
    assert said == (
        "'my-opt': lm_head.weight differs from model.decoder.embed_tokens.weight, but the "
        "configuration ties them: the embedding is used for both; set tie_word_embeddings false "
        "to use the head"
    )
    assert result.sources[EMBEDDING_NAME] is found[EMBEDDING_NAME]


def test_a_tied_head_of_another_type_or_shape_differs() -> None:
    for changed in (np.float16, slice(1, None)):
        found = stored(tiny())
        values = found[EMBEDDING_NAME].values
        part = values[changed] if isinstance(changed, slice) else values.astype(changed)
        found[LM_HEAD_NAME] = Held(part)
        with pytest.warns(CheckpointWarning, match="differs from"):
            fit(tiny(), Head.CAUSAL_LM, found, source="my-opt")


def test_an_untied_head_must_be_in_the_file() -> None:
    config = tiny(tie_word_embeddings=False)
    assert re.search(f"missing +{LM_HEAD_NAME}", refused(config, stored(tiny())))


def test_a_row_without_a_standard_deviation_is_constant() -> None:
    row = Weight("norm.weight", Kind.NORM_SCALE, (3,), mean=1.0)
    assert initial(row, np.random.default_rng(0)).tolist() == [1, 1, 1]


# --- the head of a checkpoint ------------------------------------------------------------------


@pytest.mark.parametrize("head", list(Head))
def test_the_head_is_the_one_that_the_configuration_names(head: Head) -> None:
    named = tiny(architectures=["SomethingElse", f"OPT{head.value}"])
    assert head_in(named, ["model.decoder.version"]) is head
    assert head_in(tiny(architectures=None), []) is Head.CAUSAL_LM


@pytest.mark.parametrize("head", [Head.SEQUENCE_CLASSIFICATION, Head.QUESTION_ANSWERING])
def test_tensors_of_a_head_count_for_more_than_the_configuration(head: Head) -> None:
    config = tiny(architectures=["OPTForCausalLM"])
    assert head_in(config, table(config, head)) is head
