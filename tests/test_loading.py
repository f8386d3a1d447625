"""Loading: every name and place of a checkpoint, types, heads that are new, and what is refused."""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from conversion import convert
from opt_core.checkpoint import CheckpointDamaged, CheckpointError, CheckpointNotFound, save
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig
from opt_core.weights import CheckpointMismatch, CheckpointWarning, Head
from tests.cases import HEADS, SWITCHES, Arrays, expected, random_weights, tiny, words
from tests.hub_server import serve
from tests.tolerances import assert_near
from tests.wings import Wing

EMBEDDING, LM_HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
HALF = {"float16", "bfloat16"}


def write(
    folder: Path, config: OPTConfig, tensors: Mapping[str, Any], *, shards: str = "5GB"
) -> Path:
    """A checkpoint by Hugging Face's names."""
    extra = {"config.json": config.to_json_string().encode()}
    save(folder, tensors, max_shard_size=shards, extra_files=extra)
    return folder


def assert_weights(wing: Wing, model: Any, weights: Arrays) -> None:
    found = wing.weights(model)
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.fixture
def weights() -> Arrays:
    return random_weights(tiny(), Head.CAUSAL_LM)


@pytest.fixture
def folder(tmp_path: Path, weights: Arrays) -> Path:
    return write(tmp_path / "tiny-opt", tiny(), weights)


# Names and places


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", ""])
@pytest.mark.parametrize("held", ["embedding", "both", "head"])
@pytest.mark.parametrize("head", [Head.NONE, Head.CAUSAL_LM])
def test_a_tied_checkpoint_loads_under_every_name(
    wing: Wing, tmp_path: Path, weights: Arrays, prefix: str, held: str, head: Head
) -> None:
    stored = {name.replace("model.decoder.", prefix): v for name, v in weights.items()}
    if held != "embedding":
        stored[LM_HEAD] = weights[EMBEDDING]
    if held == "head":
        del stored[EMBEDDING.replace("model.decoder.", prefix)]
    write(tmp_path, tiny(), stored)
    assert_weights(wing, wing.load(head, tmp_path), weights)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("head", HEADS)
def test_every_class_loads_every_architecture(
    wing: Wing, tmp_path: Path, switch: str, head: Head
) -> None:
    config = tiny(**SWITCHES[switch])
    weights = random_weights(config, head)
    model = wing.load(head, write(tmp_path, config, weights))
    assert_weights(wing, model, weights)
    ids = words(2, 5)
    found, right = wing.call(model, input_ids=ids), expected(head, config, weights, input_ids=ids)
    for name in ("last_hidden_state", "logits", "start_logits", "end_logits"):
        if name in right:
            assert_near(found[name], right[name])


@pytest.mark.parametrize("shards", ["5GB", "4KB"])
def test_a_checkpoint_is_a_folder_a_file_or_an_index(
    wing: Wing, tmp_path: Path, weights: Arrays, shards: str
) -> None:
    folder = write(tmp_path, tiny(), weights, shards=shards)
    GenerationConfig(max_new_tokens=3, eos_token_id=7).save_pretrained(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    assert single.exists() is (shards == "5GB")
    file = single if single.exists() else index
    for source in (folder, str(folder), file, str(file)):
        model = wing.load(Head.CAUSAL_LM, source)
        assert_weights(wing, model, weights)
        assert model.generation_config.max_new_tokens == 3
        assert model.generation_config.eos_token_id == 7
        assert model.name_or_path == str(source)


@pytest.mark.parametrize("hint", ["from_pt", "from_tf", "from_flax"])
def test_hints_about_the_format_are_taken_and_not_needed(
    wing: Wing, folder: Path, weights: Arrays, hint: str
) -> None:
    assert_weights(wing, wing.load(Head.CAUSAL_LM, folder, **{hint: True}), weights)


@pytest.mark.parametrize(("hint", "name"), [("from_tf", "tf"), ("from_flax", "flax")])
def test_a_hint_chooses_where_a_folder_holds_several_formats(
    wing: Wing, folder: Path, weights: Arrays, tmp_path: Path, hint: str, name: str
) -> None:
    convert(folder, tmp_path / name, to=name)
    (single,) = (path for path in (tmp_path / name).iterdir() if path.suffix in (".h5", ".msgpack"))
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"not looked at")
    single.rename(folder / single.name)
    assert_weights(wing, wing.load(Head.CAUSAL_LM, folder, **{hint: True}), weights)
    with pytest.raises(CheckpointDamaged):
        wing.load(Head.CAUSAL_LM, folder, from_pt=True)


def test_a_repository_of_the_hub_loads_like_its_folder(
    wing: Wing, folder: Path, weights: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    GenerationConfig(max_new_tokens=3).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    nested = {f"inner/{name}": content for name, content in files.items()}
    with serve(
        {"facebook/opt-tiny": {**files, "pytorch_model.bin": b"not fetched", **nested}}
    ) as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        model = wing.load(Head.CAUSAL_LM, "facebook/opt-tiny")
        inner = wing.load(Head.CAUSAL_LM, "facebook/opt-tiny", subfolder="inner", revision="main")
        huggingface_hub.close_session()
        assert "pytorch_model.bin" not in {request.file for request in hub.requests}
    for one in (model, inner):
        assert_weights(wing, one, weights)
        assert one.generation_config.max_new_tokens == 3
    assert model.config.name_or_path == model.name_or_path == "facebook/opt-tiny"


# huggingface_hub hands files to httpx in a way that httpx deprecates; not ours to change.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_what_a_model_pushes_to_the_hub_loads_from_there(
    wing: Wing, weights: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wing.build(Head.CAUSAL_LM, tiny(), weights)
    with serve({}) as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        address = model.push_to_hub("me/opt", token="may-write", commit_message="Add weights")
        model.save_pretrained(tmp_path / "opt-too", push_to_hub=True, token="may-write")
        loaded = [wing.load(Head.CAUSAL_LM, name) for name in ("me/opt", "me/opt-too")]
        huggingface_hub.close_session()
    assert "/me/opt/commit/" in address
    for one in loaded:
        assert_weights(wing, one, weights)


def test_nothing_there_is_named(wing: Wing, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder '.*nowhere'"):
        wing.load(Head.CAUSAL_LM, tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointNotFound, match=r"no weights in .*tiny-opt: looked for model\.saf"
    ):
        wing.load(Head.CAUSAL_LM, folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointNotFound, match=r"tiny-opt has no config\.json"):
        wing.load(Head.CAUSAL_LM, folder)


# The configuration


def test_the_configuration_may_be_given_as_an_object_or_as_a_place(
    wing: Wing, folder: Path, tmp_path: Path, weights: Arrays
) -> None:
    config = tiny(output_attentions=True)
    config.save_pretrained(tmp_path / "elsewhere")
    (folder / "config.json").unlink()
    for given in (config, tmp_path / "elsewhere", str(tmp_path / "elsewhere/config.json")):
        model = wing.load(Head.CAUSAL_LM, folder, config=given)
        assert model.config.output_attentions is True
        assert_weights(wing, model, weights)


def test_a_given_configuration_stays_as_it_was(wing: Wing, folder: Path) -> None:
    config = tiny()
    wing.load(Head.CAUSAL_LM, folder, config=config, dtype="float16")
    assert config == tiny()
    assert config.name_or_path == ""


def test_models_never_share_a_configuration(wing: Wing, folder: Path) -> None:
    one = wing.load(Head.CAUSAL_LM, folder)
    other = wing.load(Head.CAUSAL_LM, folder, config=one.config)
    third = wing.fresh(Head.CAUSAL_LM, one.config)
    other.config.use_cache = False
    third.config.output_attentions = True
    assert one.config.use_cache is third.config.use_cache is True
    assert one.config.output_attentions is other.config.output_attentions is False


def test_fields_of_the_configuration_may_be_changed_on_loading(wing: Wing, folder: Path) -> None:
    model = wing.load(Head.CAUSAL_LM, folder, use_cache=False, dropout=0.5)
    assert (model.config.use_cache, model.config.dropout) == (False, 0.5)
    with pytest.warns(CheckpointWarning, match=r"holds no score\.weight"):
        model = wing.load(Head.SEQUENCE_CLASSIFICATION, folder, num_labels=5)
    assert wing.call(model, input_ids=words(2, 4)).logits.shape == (2, 5)


def test_an_unknown_option_is_named_with_the_nearest_known_one(wing: Wing, folder: Path) -> None:
    with pytest.raises(ValueError, match="'hidden_sise'; did you mean 'hidden_size'"):
        wing.load(Head.CAUSAL_LM, folder, hidden_sise=16)


# Types


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [None, "auto", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_a_model_computes_in_float32_or_as_it_is_told(
    wing: Wing, tmp_path: Path, stored: str, wanted: str | None, option: str
) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM)
    wing.build(Head.CAUSAL_LM, tiny(), weights, stored).save_pretrained(tmp_path)
    options = {} if wanted is None else {option: wanted}
    model = wing.load(Head.CAUSAL_LM, tmp_path, **options)
    right = {None: "float32", "auto": stored}.get(wanted, wanted)
    assert wing.dtype(model) == model.config.dtype == right
    bound = "half" if {stored, right} & HALF else "float32"
    ids = words(2, 5)
    logits = expected(Head.CAUSAL_LM, tiny(), weights, input_ids=ids)["logits"]
    assert_near(wing.call(model, input_ids=ids).logits, logits, bound)


def test_an_unknown_type_is_refused(wing: Wing, folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be auto or one of float32, flo"):
        wing.load(Head.CAUSAL_LM, folder, dtype="int8")


# Heads


@pytest.mark.parametrize(
    ("head", "new"),
    [
        (Head.SEQUENCE_CLASSIFICATION, r"score\.weight"),
        (Head.QUESTION_ANSWERING, r"qa_outputs\.weight, qa_outputs\.bias"),
    ],
)
@pytest.mark.parametrize("base", [Head.NONE, Head.CAUSAL_LM])
def test_a_new_head_on_a_loaded_decoder_is_named_in_a_warning(
    wing: Wing, tmp_path: Path, head: Head, new: str, base: Head
) -> None:
    weights = random_weights(tiny(), base)
    write(tmp_path, tiny(), weights)
    with pytest.warns(CheckpointWarning, match=f"holds no {new}: the new head starts from random"):
        model = wing.load(head, tmp_path)
    found = wing.weights(model)
    for name, values in weights.items():
        np.testing.assert_array_equal(found[name], values)
    fresh = found["score.weight" if "score" in new else "qa_outputs.weight"]
    assert 0 < np.abs(fresh).max() < 0.2


@pytest.mark.parametrize("head", HEADS[1:])
def test_the_base_model_leaves_a_head_in_the_file(wing: Wing, tmp_path: Path, head: Head) -> None:
    config = tiny(tie_word_embeddings=False)
    weights = random_weights(config, head)
    write(tmp_path, config, weights)
    inner = {n: v for n, v in weights.items() if n.startswith("model.")}
    assert_weights(wing, wing.load(Head.NONE, tmp_path), inner)


def test_a_language_model_loads_from_a_base_model_only_where_the_head_is_tied(
    wing: Wing, tmp_path: Path
) -> None:
    weights = random_weights(tiny(), Head.NONE)
    write(tmp_path, tiny(), weights)
    assert_weights(wing, wing.load(Head.CAUSAL_LM, tmp_path), weights)
    with pytest.raises(CheckpointMismatch, match=r"missing +lm_head\.weight"):
        wing.load(Head.CAUSAL_LM, tmp_path, tie_word_embeddings=False)


# What does not fit


def test_everything_that_does_not_fit_is_one_error(
    wing: Wing, tmp_path: Path, weights: Arrays
) -> None:
    layer = "model.decoder.layers.1."
    stored: dict[str, Any] = dict(weights)
    del stored[layer + "fc1.bias"]
    stored[layer + "rotary"] = np.zeros(3, np.float32)
    stored[layer + "fc2.weight"] = np.zeros((3, 3), np.float32)
    stored["model.decoder.final_layer_norm.bias"] = np.zeros(16, np.int32)
    write(tmp_path / "odd", tiny(), stored)
    with pytest.raises(CheckpointMismatch, match=r"odd' does not fit an OPT of 2 layers") as caught:
        wing.load(Head.CAUSAL_LM, tmp_path / "odd")
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    assert "missing model.decoder.layers.1.fc1.bias (24,)" in lines
    assert "unexpected model.decoder.layers.1.rotary (3,)" in lines
    assert "misshapen model.decoder.layers.1.fc2.weight expected (16, 24), found (3, 3)" in lines
    assert "not floats model.decoder.final_layer_norm.bias found int32 values" in lines


def test_a_position_table_without_the_unused_rows_is_explained(
    wing: Wing, tmp_path: Path, weights: Arrays
) -> None:
    name = "model.decoder.embed_positions.weight"
    write(tmp_path, tiny(), weights | {name: weights[name][2:]})
    with pytest.raises(CheckpointMismatch, match="2 rows short: OPT keeps that many unused rows"):
        wing.load(Head.CAUSAL_LM, tmp_path)


def test_transposed_matrices_are_explained(wing: Wing, tmp_path: Path, weights: Arrays) -> None:
    name = "model.decoder.layers.0.fc1.weight"
    write(tmp_path, tiny(), weights | {name: np.ascontiguousarray(weights[name].T)})
    with pytest.raises(CheckpointMismatch, match="this file seems to hold them transposed"):
        wing.load(Head.CAUSAL_LM, tmp_path)


def test_a_tied_head_that_differs_loses_to_the_embedding_with_a_warning(
    wing: Wing, tmp_path: Path, weights: Arrays
) -> None:
    write(tmp_path, tiny(), weights | {LM_HEAD: weights[EMBEDDING] + 1})
    with pytest.warns(
        CheckpointWarning, match=r"lm_head\.weight differs from .*: the embedding is"
    ):
        model = wing.load(Head.CAUSAL_LM, tmp_path)
    assert_weights(wing, model, weights)


def test_nan_in_a_weight_warns_unless_nobody_wants_to_know(
    wing: Wing, tmp_path: Path, weights: Arrays
) -> None:
    weights["model.decoder.layers.0.fc1.bias"][3] = np.nan
    write(tmp_path, tiny(), weights)
    with pytest.warns(CheckpointWarning, match=r"NaN values in model\.decoder\.layers\.0\.fc1\.bi"):
        wing.load(Head.CAUSAL_LM, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wing.load(Head.CAUSAL_LM, tmp_path, check=False)


@pytest.mark.parametrize("spoiled", [False, True])
def test_biases_and_norms_that_are_switched_off_may_be_in_the_file_if_they_do_nothing(
    wing: Wing, tmp_path: Path, spoiled: bool
) -> None:
    config = tiny(enable_bias=False, layer_norm_elementwise_affine=False)
    weights = random_weights(config, Head.CAUSAL_LM)
    on = random_weights(tiny(), Head.CAUSAL_LM)
    extra = {n: np.full_like(v, "norm.weight" in n) for n, v in on.items() if n not in weights}
    if spoiled:
        extra["model.decoder.layers.1.fc2.bias"][0] = 0.5
    write(tmp_path, config, {**weights, **extra})
    if spoiled:
        with pytest.raises(CheckpointMismatch, match=r"unexpected +model\.decoder\.layers\.1\.fc2"):
            wing.load(Head.CAUSAL_LM, tmp_path)
    else:
        assert_weights(wing, wing.load(Head.CAUSAL_LM, tmp_path), weights)


def test_a_broken_generation_configuration_is_named(wing: Wing, folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"temperature": "hot"}))
    with pytest.raises(ValueError, match=r"generation_config\.json: .* temperature is 'hot'"):
        wing.load(Head.CAUSAL_LM, folder)


def test_a_text_that_is_no_checkpoint_is_refused(wing: Wing, folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "weights.txt")
    with pytest.raises(CheckpointError, match=r"weights\.txt is in no format that can be read"):
        wing.load(Head.CAUSAL_LM, folder / "weights.txt")
