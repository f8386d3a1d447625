"""OPTConfig: its fields, its sizes, its file, and what other libraries ask of it."""

import copy
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core.checkpoint import CheckpointNotFound
from opt_core.config import ACTIVATIONS, DTYPES, PRESETS, OPTConfig, config_path
from opt_core.hub import SourceMissing
from opt_core.weights import count_parameters

#: Parameters of `OPTForCausalLM`, the tied head counted once.
PARAMETERS = {
    "125m": 125239296,
    "350m": 331196416,
    "1.3b": 1315758080,
    "2.7b": 2651596800,
    "6.7b": 6658473984,
    "13b": 12853473280,
    "30b": 29974540288,
    "66b": 65719701504,
    "175b": 174604468224,
}

WHOLE = ["three", 2.0, True, None, 0, -1, 2**40]
FLAG = [1, "yes", None]
RATE = ["0.1", -0.1, 1.1, math.nan, True, None]
TOKEN = [-1, 1.5, "2", True, 2**40]

#: Values that a field may not hold, and what the error says it must be.
BAD: dict[str, tuple[list[Any], str]] = {
    "vocab_size": (WHOLE, "a whole number from 1 to 16777216"),
    "hidden_size": (WHOLE, "a whole number from 1 to 1048576"),
    "num_hidden_layers": (WHOLE, "a whole number from 1 to 16384"),
    "ffn_dim": (WHOLE, "a whole number from 1 to 16777216"),
    "max_position_embeddings": (WHOLE, "a whole number from 1 to 16777216"),
    "word_embed_proj_dim": (
        [v for v in WHOLE if v is not None],
        "a whole number from 1 to 1048576",
    ),
    "num_attention_heads": (WHOLE, "a whole number from 1 to 65536"),
    "do_layer_norm_before": (FLAG, "True or False"),
    "_remove_final_layer_norm": (FLAG, "True or False"),
    "use_cache": (FLAG, "True or False"),
    "enable_bias": (FLAG, "True or False"),
    "layer_norm_elementwise_affine": (FLAG, "True or False"),
    "tie_word_embeddings": (FLAG, "True or False"),
    "output_attentions": (FLAG, "True or False"),
    "output_hidden_states": (FLAG, "True or False"),
    "return_dict": (FLAG, "True or False"),
    "dropout": (RATE, "a number from 0 to 1"),
    "attention_dropout": (RATE, "a number from 0 to 1"),
    "layerdrop": (RATE, "a number from 0 to 1"),
    "init_std": (["0.02", -1, math.inf, None], "a number of at least 0"),
    "activation_function": (["rleu", None, 3], f"one of {', '.join(ACTIVATIONS)}"),
    "pad_token_id": (TOKEN, "a whole number from 0 to 16777216 or None"),
    "bos_token_id": (TOKEN, "a whole number from 0 to 16777216 or None"),
    "eos_token_id": ([*TOKEN, [], [2, -1]], "a token id, a list of token ids or None"),
    "id2label": (
        ["ab", {}, {1: "a"}, {0: "a", 2: "b"}, {0: 1}, {"x": "a"}],
        "a mapping from 0, 1, 2, … to names",
    ),
    "label2id": ([{"a": "0"}, {0: "a"}, ["a"]], "a mapping from names to whole numbers"),
    "problem_type": (
        ["regresion", 1],
        "one of regression, single_label_classification, multi_label_classification, or None",
    ),
    "pruned_heads": (
        [[1], {0: 1}, {0: [[1]]}, {"first": [1]}, {0: ["a", 1]}],
        "a mapping from layer numbers to lists of head numbers",
    ),
    "dtype": (["int8", "float31"], "one of float32, float16, bfloat16, float64, or None"),
}


def small(**changes: Any) -> OPTConfig:
    return OPTConfig(
        **{"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, **changes}
    )


# --- fields -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (vs, _) in BAD.items() for v in vs])
def test_a_bad_value_is_refused_naming_field_value_and_remedy(name: str, value: Any) -> None:
    words = f"OPTConfig.{name} is {value!r}; it must be {BAD[name][1]}"
    with pytest.raises(ValueError, match="it must be") as caught:
        OPTConfig(**{name: value})
    assert words in str(caught.value).splitlines()


@pytest.mark.parametrize(("name", "value"), [(n, vs[0]) for n, (vs, _) in BAD.items()])
def test_a_bad_value_is_refused_on_assignment_and_leaves_the_old_one(name: str, value: Any) -> None:
    config = OPTConfig()
    before = config.to_dict()
    with pytest.raises(ValueError, match=f"OPTConfig.{name} is .* it must be"):
        setattr(config, name, value)
    assert config.to_dict() == before


def test_every_field_has_a_bad_value_in_these_tests() -> None:
    metadata = {"architectures", "model_type", "torch_dtype"}
    assert set(OPTConfig().to_dict()) - metadata <= set(BAD)


def test_one_error_names_all_bad_fields() -> None:
    with pytest.raises(ValueError, match="hidden_size") as caught:
        OPTConfig(hidden_size="32", dropout=3, ffn_dim=None)  # type: ignore[arg-type]
    fields = [line.split()[0] for line in str(caught.value).splitlines()]
    assert sorted(fields) == ["OPTConfig.dropout", "OPTConfig.ffn_dim", "OPTConfig.hidden_size"]


def test_heads_must_divide_the_width() -> None:
    said = (
        "OPTConfig.hidden_size is 768, which num_attention_heads (7) does not divide; "
        "choose a multiple of it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        OPTConfig(num_attention_heads=7)
    config = OPTConfig()
    with pytest.raises(ValueError, match="does not divide"):
        config.num_attention_heads = 7
    assert config.num_attention_heads == 12


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_a_token_must_be_in_the_vocabulary(name: str) -> None:
    tokens: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, name: 50}
    with pytest.raises(ValueError, match=f"{name} is 50, outside the vocabulary of 50; give an id"):
        OPTConfig(vocab_size=50, **tokens)
    assert getattr(OPTConfig(vocab_size=50, **{**tokens, name: None}), name) is None


def test_each_of_several_stop_tokens_must_be_in_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="eos_token_id is 60, outside the vocabulary of 50"):
        OPTConfig(vocab_size=50, eos_token_id=[2, 60])
    assert OPTConfig(eos_token_id=[2, 60]).eos_token_id == [2, 60]


@pytest.mark.parametrize("pruned", [{2: [0]}, {-1: [0]}, {0: [4]}, {0: [0, 1, 2, 3]}])
def test_pruned_heads_must_be_there_and_one_must_stay(pruned: dict[int, list[int]]) -> None:
    with pytest.raises(ValueError, match=r"pruned_heads has .*layers go from 0 to 1, heads from 0"):
        small(pruned_heads=pruned)


def test_pruned_heads_are_kept_in_order_and_counted() -> None:
    config = small(pruned_heads={"1": (3, 0, 3)})
    assert config.pruned_heads == {1: [0, 3]}
    assert [config.heads(layer) for layer in range(2)] == [4, 2]


def test_an_unknown_argument_raises_with_the_nearest_name() -> None:
    said = "OPTConfig has no argument 'hiden_size'; did you mean 'hidden_size'?"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        OPTConfig(hiden_size=3)
    with pytest.raises(ValueError, match=r"no argument 'zzz'$"):
        OPTConfig(zzz=3)


def test_an_unknown_attribute_raises_both_ways() -> None:
    config = OPTConfig()
    with pytest.raises(ValueError, match="OPTConfig has no field 'n_layer'"):
        config.n_layer = 3
    with pytest.raises(AttributeError, match="no field 'num_hidden_layer'; did you mean 'num_hid"):
        config.num_hidden_layer  # noqa: B018


def test_the_embedding_is_as_wide_as_the_model_unless_told_otherwise() -> None:
    assert not OPTConfig(hidden_size=24).has_projections
    assert OPTConfig(hidden_size=24, word_embed_proj_dim=12).has_projections
    assert not OPTConfig().replace(hidden_size=24).has_projections
    assert OPTConfig.preset("350m").replace(hidden_size=2048).word_embed_proj_dim == 512


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"do_layer_norm_before": False}, False),
        ({"_remove_final_layer_norm": True}, False),
    ],
)
def test_only_pre_norm_models_end_in_a_norm(changes: dict[str, Any], expected: bool) -> None:
    assert OPTConfig(**changes).has_final_layer_norm is expected


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("bfloat16", "bfloat16"),
        ("torch.float16", "float16"),
        (np.float32, "float32"),
        (np.dtype(np.float64), "float64"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (None, None),
    ],
)
def test_a_type_may_come_from_any_library(value: Any, name: str | None) -> None:
    assert OPTConfig(dtype=value).dtype == name
    assert OPTConfig(torch_dtype=value).torch_dtype == name


def test_a_torch_dtype_is_kept_by_its_name() -> None:
    torch = pytest.importorskip("torch")
    config = OPTConfig(dtype=torch.bfloat16)
    config.torch_dtype = torch.float16
    assert config.dtype == config.torch_dtype == "float16"


# --- labels -----------------------------------------------------------------------------------


def test_labels_follow_from_any_way_of_giving_them() -> None:
    two = OPTConfig()
    assert (two.num_labels, two.label2id) == (2, {"LABEL_0": 0, "LABEL_1": 1})
    assert OPTConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert OPTConfig(id2label={0: "no", 1: "yes"}).label2id == {"no": 0, "yes": 1}
    assert OPTConfig(label2id={"yes": 1, "no": 0}).id2label == {0: "no", 1: "yes"}
    assert OPTConfig(num_labels=2, id2label={"0": "no", "1": "yes"}).num_labels == 2  # type: ignore[dict-item]


def test_numbers_of_labels_must_agree() -> None:
    said = "num_labels is 3, but 1 labels are named; give one of the two, or make them agree"
    with pytest.raises(ValueError, match=said):
        OPTConfig(num_labels=3, id2label={0: "a"})


@pytest.mark.parametrize("count", [0, -1, 2.0, "3", True])
def test_a_bad_number_of_labels_is_refused(count: Any) -> None:
    with pytest.raises(ValueError, match=r"num_labels is .*; it must be a whole number from 1 to"):
        OPTConfig(num_labels=count)


def test_setting_the_number_of_labels_renames_them() -> None:
    config = OPTConfig(id2label={0: "no", 1: "yes"})
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


# --- copies -----------------------------------------------------------------------------------


def test_replace_changes_a_copy_and_validates_it() -> None:
    config = OPTConfig(dtype="float16", id2label={0: "a", 1: "b"}, name_or_path="here")
    other = config.replace(num_labels=3, dtype=None, dropout=0.0)
    assert (other.num_labels, other.dtype, other.dropout) == (3, None, 0.0)
    assert other.name_or_path == "here"
    assert (config.num_labels, config.dtype, config.dropout) == (2, "float16", 0.1)
    assert config.replace(id2label={0: "x"}).label2id == {"x": 0}
    with pytest.raises(ValueError, match="dropout is 2"):
        config.replace(dropout=2)
    with pytest.raises(ValueError, match="has no field 'vocabsize'; did you mean 'vocab_size'"):
        config.replace(vocabsize=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 60000),
        ("hidden_size", 24),
        ("num_hidden_layers", 3),
        ("enable_bias", False),
        ("tie_word_embeddings", False),
        ("activation_function", "gelu"),
        ("num_labels", 5),
        ("pruned_heads", {0: [1]}),
    ],
)
def test_what_shapes_weights_stays_on_a_built_models_configuration(name: str, value: Any) -> None:
    config = OPTConfig()
    own = config.locked()
    shown = "id2label" if name == "num_labels" else name
    said = (
        f"OPTConfig.{shown} cannot change from .*: the model is built and its weights depend on "
        "it; build a new model, or use resize_token_embeddings or prune_heads"
    )
    with pytest.raises(ValueError, match=said):
        setattr(own, name, value)
    assert own == config
    assert own.locked() is own


def test_behaviour_may_change_on_a_built_models_configuration() -> None:
    own = OPTConfig().locked()
    own.use_cache = False
    own.output_attentions = True
    own.pad_token_id = 5
    own.eos_token_id = [2, 7]
    own.dropout = 0.0
    own.id2label = {0: "bad", 1: "good"}
    own.vocab_size = 50272
    assert (own.use_cache, own.pad_token_id, own.dropout) == (False, 5, 0.0)


def test_a_model_does_not_share_its_callers_configuration() -> None:
    config = OPTConfig(eos_token_id=[2], id2label={0: "a"})
    own = config.locked()
    config.use_cache = False
    config.id2label[0] = "b"
    assert own.use_cache
    assert own.id2label == {0: "a"}


def test_lists_and_mappings_are_copied_in() -> None:
    stops, labels = [2], {"a": 0}
    config = OPTConfig(eos_token_id=stops, label2id=labels)
    stops.append(3)
    labels["b"] = 1
    assert config.eos_token_id == [2]
    assert config.label2id == {"a": 0}


def test_configurations_copy_and_pickle_and_compare() -> None:
    config = OPTConfig.preset("350m", num_labels=3)
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
    assert config != OPTConfig()
    assert config != "opt"
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_its_number_of_parameters(name: str) -> None:
    assert count_parameters(OPTConfig.preset(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", [*PARAMETERS, "galactica-125m", "galactica-120b"])
def test_transformers_counts_as_many_parameters(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = OPTConfig.preset(name)
    with torch.device("meta"):
        theirs = transformers.OPTForCausalLM(transformers.OPTConfig(**_for_transformers(config)))
    assert theirs.num_parameters() == count_parameters(config)


def test_presets_take_changes_and_unknown_ones_are_named() -> None:
    assert OPTConfig.preset("125m") == OPTConfig()
    assert OPTConfig.preset("125m", dropout=0.0).dropout == 0.0
    with pytest.raises(ValueError, match=r"there is no preset '126m'; there are 125m, 350m, 1\.3b"):
        OPTConfig.preset("126m")


def test_the_published_sizes_are_there() -> None:
    assert list(PRESETS)[:9] == list(PARAMETERS)
    assert OPTConfig.preset("galactica-1.3b").vocab_size == 50000
    assert not OPTConfig.preset("galactica-1.3b").enable_bias


# --- files ------------------------------------------------------------------------------------


CONFIGS = st.builds(
    OPTConfig,
    vocab_size=st.integers(3, 99999),
    num_hidden_layers=st.integers(1, 99),
    do_layer_norm_before=st.booleans(),
    word_embed_proj_dim=st.none() | st.integers(1, 99),
    dropout=st.floats(0, 1),
    activation_function=st.sampled_from(list(ACTIVATIONS)),
    init_std=st.floats(0, 1e9),
    pad_token_id=st.none() | st.integers(0, 2),
    eos_token_id=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), min_size=1),
    num_labels=st.integers(1, 9),
    problem_type=st.sampled_from([None, "regression"]),
    pruned_heads=st.dictionaries(st.just(0), st.lists(st.integers(0, 11), max_size=3)),
    dtype=st.sampled_from([None, *DTYPES]),
    architectures=st.none() | st.just(["OPTForCausalLM"]),
)


@given(CONFIGS)
def test_json_gives_back_an_equal_configuration(config: OPTConfig) -> None:
    assert OPTConfig.from_dict(json.loads(config.to_json_string())) == config
    assert OPTConfig.from_dict(config.to_dict()) == config


@given(CONFIGS)
def test_transformers_reads_what_we_write(config: OPTConfig) -> None:
    transformers = pytest.importorskip("transformers")
    values = _for_transformers(config)
    theirs = transformers.OPTConfig(**values).to_dict()
    values["dtype"] = values.pop("torch_dtype", None)
    for name, value in values.items():
        assert theirs.get(name) == value, name


def _for_transformers(config: OPTConfig) -> dict[str, Any]:
    """What transformers takes: it knows no pruned heads for OPT."""
    values = config.to_dict()
    values.pop("pruned_heads", None)
    return values


def test_a_saved_file_is_sorted_utf8_json_that_ends_with_a_line_break(tmp_path: Path) -> None:
    config = OPTConfig(id2label={0: "größer"})
    config.save_pretrained(tmp_path / "new")
    text = (tmp_path / "new/config.json").read_text(encoding="utf-8")
    assert text == config.to_json_string()
    assert text.endswith("}\n")
    assert "größer" in text
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


def test_unknown_keys_are_kept_readable_and_written_back(tmp_path: Path) -> None:
    values = {**OPTConfig().to_dict(), "some_future_field": 3, "_commit_hash": "abc"}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = OPTConfig.from_pretrained(tmp_path)
    assert config.some_future_field == 3
    config.some_future_field = 4
    assert config.to_dict()["some_future_field"] == 4
    assert config.replace(some_future_field=5, dropout=0.0).some_future_field == 5
    assert config.to_dict()["_commit_hash"] == "abc"


def test_a_file_may_say_dtype_or_torch_dtype() -> None:
    assert OPTConfig.from_dict({"dtype": "float16"}).torch_dtype == "float16"
    assert OPTConfig.from_dict({"torch_dtype": "float16"}).dtype == "float16"
    assert "torch_dtype" not in OPTConfig().to_dict()


@pytest.mark.parametrize("source", ["folder", "file", "weights", "index"])
def test_the_file_is_found_beside_the_weights(tmp_path: Path, source: str) -> None:
    OPTConfig(dropout=0.5).save_pretrained(tmp_path)
    path = {
        "folder": tmp_path,
        "file": tmp_path / "config.json",
        "weights": tmp_path / "model.safetensors",
        "index": tmp_path / "model.safetensors.index.json",
    }[source]
    path.touch() if path.suffix else None
    assert config_path(path) == tmp_path / "config.json"
    config = OPTConfig.from_pretrained(path, dropout=0.25)
    assert (config.dropout, config.name_or_path) == (0.25, str(path))


def test_a_change_that_no_field_has_is_refused_on_loading(tmp_path: Path) -> None:
    OPTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no field 'hiden_size'; did you mean 'hidden_size'"):
        OPTConfig.from_pretrained(tmp_path, hiden_size=3)


def test_a_folder_without_a_configuration_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"has no config\.json: without it nobody knows"):
        OPTConfig.from_pretrained(tmp_path)
    with pytest.raises(SourceMissing, match="there is no file or folder"):
        OPTConfig.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b'{"vocab_size": 3', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b"[1]", "holds a list, expected a JSON object"),
        (b'{"hidden_size": "big"}', "hidden_size is 'big'; it must be a whole number"),
        (b'{"model_type": "gpt2"}', "no OPT configuration: model_type is 'gpt2', expected 'opt'"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        OPTConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("config_hidden_not_divisible_by_heads", "hidden_size is 16, which num_attention_heads"),
        ("config_negative_layers", "num_hidden_layers is -"),
        ("config_zero_heads", "num_attention_heads is 0"),
        ("config_hidden_size_is_text", "hidden_size is 'sixteen'"),
        ("config_layers_is_float", "num_hidden_layers is 1.5"),
        ("config_ffn_is_null", "ffn_dim is None"),
        ("config_unknown_activation", "activation_function is"),
        ("config_dropout_out_of_range", "dropout is"),
        ("config_pad_token_outside_vocabulary", "pad_token_id is .* outside the vocabulary of 48"),
        ("config_absurdly_large", "is .*; it must be a whole number from 1 to"),
        ("config_other_model_type", "this is no OPT configuration"),
        ("config_empty_file", "is not JSON"),
        ("config_not_utf8", "is not UTF-8 text"),
        ("config_truncated", "is not JSON"),
    ],
)
def test_every_bad_configuration_of_the_reference_gets_its_answer(
    shared: Path, case: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        OPTConfig.from_pretrained(shared / "reference/bad" / case)
    assert str(shared / "reference/bad" / case / "config.json") in str(caught.value)


def test_the_control_case_of_the_reference_loads(shared: Path) -> None:
    config = OPTConfig.from_pretrained(shared / "reference/bad/config_unknown_field")
    assert config.some_future_field == 3


# --- what other libraries ask ------------------------------------------------------------------


def test_trainer_and_peft_find_and_note_what_they_need() -> None:
    config = OPTConfig().locked()
    assert config.model_type == "opt"
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True) is config
    assert config.use_return_dict is True
    assert "past_key_values" in config.keys_to_ignore_at_inference
    assert {"model_type", "vocab_size", "tie_word_embeddings"} <= set(config.to_dict())
    assert getattr(config, "is_encoder_decoder", False) is False
    config.use_cache = False
    config.name_or_path = "facebook/opt-125m"
    config._attn_implementation = "eager"
    config.architectures = ["OPTForCausalLM"]
    config.tokenizer_class = "OPTTokenizer"
    assert config.name_or_path == "facebook/opt-125m"
    assert "_attn_implementation" not in config.to_dict()
    assert "name_or_path" not in config.to_dict()


def test_the_text_of_a_configuration_is_its_file() -> None:
    assert repr(OPTConfig()) == f"OPTConfig {OPTConfig().to_json_string()}"
