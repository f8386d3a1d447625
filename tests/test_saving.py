"""Saving: what a model writes loads back the same, and other programs find what they expect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig
from opt_core.weights import Head, stored_name
from tests.cases import HEADS, SWITCHES, configs, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

TYPES = ["float32", "float16", "bfloat16"]


def saved(wing: Wing, folder: Path, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    """A model with random weights that was saved into a folder."""
    config = tiny(**changes)
    model = wing.build(head, config, random_weights(config, head))
    model.save_pretrained(folder)
    return model


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            names |= set(file.keys())
    return names


@given(
    head=st.sampled_from(HEADS), config=configs(), dtype=st.sampled_from(TYPES), whole=st.booleans()
)
@pytest.mark.filterwarnings("ignore:the model has pruned heads:UserWarning")
def test_loading_what_was_saved_gives_the_same_bits(
    wing: Wing,
    tmp_path_factory: pytest.TempPathFactory,
    head: Head,
    config: OPTConfig,
    dtype: str,
    whole: bool,
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    model = wing.build(head, config, random_weights(config, head), dtype)
    model.save_pretrained(folder, max_shard_size="5GB" if whole else "3KB")
    again = wing.load(head, folder, dtype="auto")
    assert again.config == model.config.replace(architectures=[f"OPT{head.value}"], dtype=dtype)
    before, after = wing.weights(model), wing.weights(again)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert after[name].dtype.name == dtype
        assert after[name].tobytes() == values.tobytes(), name
    ids = words(2, 5)
    for one, other in zip(
        wing.call(model, input_ids=ids, return_dict=False, use_cache=False),
        wing.call(again, input_ids=ids, return_dict=False, use_cache=False),
        strict=True,
    ):
        # Kernels add in another order where the memory of a file is aligned in another way.
        assert_near(one, other, "half" if dtype != "float32" else "same program")


@pytest.mark.parametrize("head", HEADS)
def test_files_hold_the_names_of_the_table_and_a_tied_head_once(
    wing: Wing, tmp_path: Path, head: Head
) -> None:
    saved(wing, tmp_path, head)
    names = names_in(tmp_path)
    assert names == {stored_name(name, head) for name in random_weights(tiny(), head)}
    assert ("decoder.embed_tokens.weight" in names) is (head is Head.NONE)
    assert "lm_head.weight" not in names


def test_an_untied_head_is_stored(wing: Wing, tmp_path: Path) -> None:
    saved(wing, tmp_path, tie_word_embeddings=False)
    assert {"lm_head.weight", "model.decoder.embed_tokens.weight"} <= names_in(tmp_path)


@pytest.mark.parametrize("size", ["5GB", "3KB", 3000])
def test_files_say_that_their_layout_is_pytorchs(
    wing: Wing, tmp_path: Path, size: int | str
) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny())
    model.save_pretrained(tmp_path, max_shard_size=size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) is (size != "5GB")
    for path in files:
        with safe_open(path, framework="numpy") as file:
            assert file.metadata()["format"] == "pt"


def test_shards_hold_what_one_file_holds(wing: Wing, tmp_path: Path) -> None:
    model = saved(wing, tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="3KB")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names_in(tmp_path / "one") == names_in(tmp_path / "many")
    total = sum(values.nbytes for values in wing.weights(model).values())
    assert index["metadata"]["total_size"] == total
    for name in set(index["weight_map"].values()):
        assert (tmp_path / "many" / name).is_file()


def test_saving_again_replaces_what_was_there(wing: Wing, tmp_path: Path) -> None:
    model = saved(wing, tmp_path)
    for size in ("3KB", "6KB", "5GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        loaded = wing.load(Head.CAUSAL_LM, tmp_path)
        found, right = (wing.call(one, input_ids=words(1, 4)).logits for one in (loaded, model))
        assert_near(found, right, "same program")
    expected = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_model_may_be_saved_where_it_was_loaded_from(wing: Wing, tmp_path: Path) -> None:
    before = wing.weights(saved(wing, tmp_path))
    model = wing.load(Head.CAUSAL_LM, tmp_path)
    for size in ("5GB", "3KB", "5GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
    after = wing.weights(wing.load(Head.CAUSAL_LM, tmp_path))
    held = wing.weights(model)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
        np.testing.assert_array_equal(held[name], values)


@pytest.mark.parametrize("size", ["huge", 0, "-1GB"])
def test_a_bad_shard_size_is_refused_before_anything_is_written(
    wing: Wing, tmp_path: Path, size: int | str
) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny())
    with pytest.raises(ValueError, match="max_shard_size is a positive number of bytes or a text"):
        model.save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


# The configurations beside the weights


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_configuration_tells_other_programs_what_they_ask(
    wing: Wing, tmp_path: Path, head: Head, dtype: str
) -> None:
    model = wing.build(head, tiny(), random_weights(tiny(), head), dtype)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["model_type"] == "opt"
    assert told["architectures"] == [f"OPT{head.value}"]
    assert told["torch_dtype"] == dtype
    assert told["hidden_size"] == 16
    assert model.config.architectures is None


def test_keys_of_a_configuration_that_nobody_knows_are_written_back(
    wing: Wing, tmp_path: Path
) -> None:
    saved(wing, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prefix": "</s>", "_odd": [1]}))
    wing.load(Head.CAUSAL_LM, tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert (again["prefix"], again["_odd"]) == ("</s>", [1])


def test_generation_options_are_saved_and_loaded(wing: Wing, tmp_path: Path) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny())
    options: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "eos_token_id": [2, 7]}
    model.generation_config = GenerationConfig.from_dict({**options, "someone_elses": {"a": 1}})
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "generation_config.json").read_text())
    assert told["top_p"] == 0.9
    again = wing.load(Head.CAUSAL_LM, tmp_path)
    assert again.generation_config == model.generation_config
    assert again.generation_config.someone_elses == {"a": 1}


def test_without_a_file_the_options_are_the_token_ids_of_the_model(
    wing: Wing, tmp_path: Path
) -> None:
    saved(wing, tmp_path, eos_token_id=[2, 9], pad_token_id=5)
    (tmp_path / "generation_config.json").unlink()
    options = wing.load(Head.CAUSAL_LM, tmp_path).generation_config
    assert (options.eos_token_id, options.pad_token_id, options.bos_token_id) == ([2, 9], 5, 2)


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "pruned"])
def test_only_pruned_heads_make_saving_warn(wing: Wing, tmp_path: Path, switch: str) -> None:
    saved(wing, tmp_path, **SWITCHES[switch])
    with pytest.warns(UserWarning, match="has pruned heads: only optlm loads the saved files"):
        saved(wing, tmp_path / "pruned", **SWITCHES["pruned"])


def test_an_option_that_saving_does_not_know_is_refused(wing: Wing, tmp_path: Path) -> None:
    model = saved(wing, tmp_path)
    with pytest.raises(ValueError, match="save_pretrained has no option safe_serialization"):
        model.save_pretrained(tmp_path, safe_serialization=False)


def test_options_that_contradict_each_other_are_not_saved(wing: Wing, tmp_path: Path) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny())
    model.generation_config = GenerationConfig(num_beams=2, penalty_alpha=0.5, top_k=4)
    with pytest.raises(ValueError, match="num_beams is above 1 and penalty_alpha"):
        model.save_pretrained(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
