"""Options of generation, what contradicts what, and their file, without any framework."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.config import OPTConfig
from opt_core.generation import (
    NEUTRAL,
    OPTIONS,
    GenerationConfig,
    Strategy,
    plan,
)

CONFIG = OPTConfig(
    vocab_size=60,
    hidden_size=8,
    num_hidden_layers=1,
    ffn_dim=8,
    num_attention_heads=2,
    max_position_embeddings=32,
)


# Options


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_length", 0, "a whole number of at least 1 or None"),
        ("max_new_tokens", 2.5, "a whole number of at least 1 or None"),
        ("min_length", -1, "a whole number of at least 0 or None"),
        ("do_sample", 1, "True or False"),
        ("temperature", 0, "a number above 0 or None"),
        ("temperature", float("nan"), "a number above 0 or None"),
        ("top_k", -1, "a whole number of at least 0 or None"),
        ("top_p", 1.5, "a number from 0 to 1 or None"),
        ("min_p", "0.1", "a number from 0 to 1 or None"),
        ("repetition_penalty", -2.0, "a number above 0 or None"),
        ("num_return_sequences", 0, "a whole number of at least 1"),
        ("num_return_sequences", None, "a whole number of at least 1"),
        ("eos_token_id", [], "a token id, a list of token ids or None"),
        ("eos_token_id", [2, -7], "a token id, a list of token ids or None"),
        ("pad_token_id", True, "a token id or None"),
        ("use_cache", None, "True or False"),
        ("typical_p", 0, "a number above 0, at most 1 or None"),
        ("epsilon_cutoff", 1, "a number from 0 to below 1 or None"),
        ("bad_words_ids", [[]], "a list of lists of token ids or None"),
        ("bad_words_ids", [3], "a list of lists of token ids or None"),
        ("sequence_bias", [[[3], "x"]], "a list of [token ids, bias] or a mapping"),
        ("sequence_bias", [[[3], float("inf")]], "a list of [token ids, bias] or a mapping"),
        ("force_words_ids", [[[3], []]], "a list of lists of token ids (or of lists of such"),
        ("exponential_decay_length_penalty", [1], "[the new token it starts at, a factor above 0]"),
        ("early_stopping", "sometimes", 'True, False, "never" or None'),
        ("length_penalty", None, "a number"),
        ("num_beams", 0, "a whole number of at least 1"),
        ("penalty_alpha", 1.1, "a number from 0 to 1 or None"),
        ("stop_strings", [""], "a text, a list of texts or None"),
        ("seed", -1, "a whole number from 0 to 2**64 - 1"),
        ("seed", [1, 2**64], "a whole number from 0 to 2**64 - 1"),
    ],
)
def test_a_bad_value_is_refused_with_its_option_and_the_remedy(
    name: str, value: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=f"generation option {name} is ") as error:
        GenerationConfig(**{name: value})
    assert repr(value) in str(error.value)
    assert words in str(error.value)


def test_assignment_is_checked_like_construction() -> None:
    generation = GenerationConfig(top_k=3)
    with pytest.raises(ValueError, match="generation option top_k is 'many'"):
        generation.top_k = "many"  # type: ignore[assignment]
    assert generation.top_k == 3


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="no generation option 'temprature'; did you mean 'temper"):
        GenerationConfig(temprature=1.0)


def test_an_unknown_option_cannot_be_read() -> None:
    with pytest.raises(AttributeError, match="no generation option 'top_q'; did you mean 'top_"):
        _ = GenerationConfig().top_q


def test_an_option_that_is_not_honoured_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"low_memory=True is not honoured; .* give False or None"):
        GenerationConfig(low_memory=True)


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_option_that_is_not_honoured_may_hold_what_asks_nothing(name: str) -> None:
    for value in NEUTRAL[name]:
        generation = GenerationConfig(**{name: value})
        assert getattr(generation, name) == NEUTRAL[name][0]
        assert generation.to_dict() == {}


def test_an_array_is_no_neutral_value() -> None:
    with pytest.raises(ValueError, match="dola_layers"):
        GenerationConfig(dola_layers=np.zeros((2, 1)))


def test_numbers_of_numpy_are_taken_as_those_of_python() -> None:
    generation = GenerationConfig(
        eos_token_id=np.array([2, 7]), max_new_tokens=np.int32(5), temperature=np.float32(0.5)
    )
    assert (generation.eos_token_id, generation.max_new_tokens) == ([2, 7], 5)
    assert type(generation.temperature) is float
    json.dumps(generation.to_dict())


def test_an_explicit_none_is_not_the_same_as_absent() -> None:
    base = GenerationConfig(eos_token_id=2, top_p=0.9, do_sample=True)
    assert base.merged().stops == (2,)
    assert base.merged(eos_token_id=None).stops == ()
    assert base.merged(top_p=None).rules == ("top_k",)


def test_merging_leaves_the_original_alone() -> None:
    base = GenerationConfig(eos_token_id=[2, 3])
    other = base.merged(max_new_tokens=4)
    assert isinstance(other.eos_token_id, list)
    other.eos_token_id.append(9)
    assert base == GenerationConfig(eos_token_id=[2, 3])


def test_a_length_given_in_a_call_wins_over_the_other_kind_in_the_file() -> None:
    base = GenerationConfig(max_new_tokens=50)
    assert base.merged(max_length=9).max_new_tokens is None
    assert base.merged(max_length=None).max_new_tokens == 50


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.5, "eta_cutoff": 0.1}, "temperature and eta_cutoff .* do_sample=True"),
        ({"top_k": 3}, "top_k changes nothing without do_sample=True or penalty_alpha"),
        ({"length_penalty": 2.0}, "length_penalty changes nothing without num_beams above 1"),
        ({"max_length": 9, "max_new_tokens": 3}, "max_length changes nothing beside max_new_tok"),
    ],
)
def test_an_option_that_changes_nothing_is_warned_about(
    options: dict[str, Any], words: str
) -> None:
    with pytest.warns(UserWarning, match=words):
        merged = GenerationConfig().merged(**options)
    assert merged.max_new_tokens == options.get("max_new_tokens")


@pytest.mark.filterwarnings("error")
def test_options_that_others_wait_for_are_not_warned_about() -> None:
    GenerationConfig().merged(penalty_alpha=0.6, top_k=4)
    GenerationConfig(do_sample=True).merged(temperature=0.5, top_p=0.5)
    GenerationConfig(num_beams=2).merged(length_penalty=2.0, early_stopping=True)


def test_what_follows_a_stop_token_is_the_pad_id_or_the_first_stop_token() -> None:
    assert GenerationConfig(eos_token_id=[7, 2], pad_token_id=1).fill == 1
    assert GenerationConfig(eos_token_id=[7, 2]).fill == 7
    assert GenerationConfig().fill == 0


def test_only_a_pad_id_that_stops_nothing_marks_padding() -> None:
    assert GenerationConfig(eos_token_id=2, pad_token_id=1).padding_id == 1
    assert GenerationConfig(eos_token_id=[1, 2], pad_token_id=1).padding_id is None
    assert GenerationConfig(eos_token_id=2).padding_id is None


def test_a_mapping_of_biases_becomes_a_list() -> None:
    generation = GenerationConfig(sequence_bias={(3, np.int64(4)): 1.5, (5,): np.float32(-2)})
    assert generation.to_dict()["sequence_bias"] == [[[3, 4], 1.5], [[5], -2.0]]
    assert GenerationConfig.from_dict(json.loads(generation.to_json_string())) == generation


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ({}, Strategy.GREEDY),
        ({"do_sample": True}, Strategy.SAMPLING),
        ({"num_beams": 2}, Strategy.BEAMS),
        ({"num_beams": 2, "do_sample": True}, Strategy.BEAMS),
        ({"num_beams": 2, "force_words_ids": [[3]]}, Strategy.CONSTRAINED),
        ({"penalty_alpha": 0.6, "top_k": 4}, Strategy.CONTRASTIVE),
        ({"penalty_alpha": 0.0}, Strategy.GREEDY),
        ({"prompt_lookup_num_tokens": 3, "do_sample": True}, Strategy.ASSISTED),
    ],
)
def test_options_name_a_strategy(options: dict[str, Any], strategy: Strategy) -> None:
    assert GenerationConfig(**options).strategy is strategy


def test_cuts_leave_a_token_that_goes_on_to_beams() -> None:
    assert GenerationConfig(eos_token_id=[2, 3]).kept_tokens == 1
    assert GenerationConfig(num_beams=2).kept_tokens == 2
    assert GenerationConfig(num_beams=2, eos_token_id=[2, 3]).kept_tokens == 3


# Contradictions


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3 and num_beams 2"),
        ({"num_beams": 2, "penalty_alpha": 0.5}, "num_beams is above 1 and penalty_alpha"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 2}, "num_beams is above 1 and prompt_look"),
        ({"num_return_sequences": 2}, "greedy choice gives the same sequence every time"),
        ({"diversity_penalty": 0.5}, "diversity_penalty acts between groups"),
        ({"num_beam_groups": 2, "num_beams": 3, "diversity_penalty": 1.0}, "num_beams is 3, which"),
        ({"num_beam_groups": 2, "num_beams": 4}, "num_beam_groups is above 1 without a diversity"),
        (
            {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 1.0, "do_sample": True},
            "groups are searched, not drawn",
        ),
        ({"force_words_ids": [[3]]}, "force_words_ids needs beams"),
        ({"force_words_ids": [[3]], "num_beams": 2, "do_sample": True}, "words are forced by sea"),
        (
            {
                "force_words_ids": [[3]],
                "num_beams": 2,
                "num_beam_groups": 2,
                "diversity_penalty": 1.0,
            },
            "force_words_ids and num_beam_groups",
        ),
        ({"force_words_ids": [[[3], [3, 4]]], "num_beams": 2}, "of which one begins another"),
        ({"penalty_alpha": 0.5, "do_sample": True}, "which draws nothing"),
        ({"penalty_alpha": 0.5, "top_k": 1}, "give a top_k of at least 2"),
        ({"penalty_alpha": 0.5, "prompt_lookup_num_tokens": 2}, "and prompt_lookup_num_tokens"),
        ({"penalty_alpha": 0.5, "use_cache": False}, "penalty_alpha works on the cache"),
        ({"prompt_lookup_num_tokens": 2, "use_cache": False}, "tokens works on the cache"),
        ({"prompt_lookup_num_tokens": 2, "guidance_scale": 2.0}, "tokens and guidance_scale"),
        (
            {"force_words_ids": [[7, 8]], "num_beams": 2, "bad_words_ids": [[7, 8]]},
            "force_words_ids asks for [7, 8], which bad_words_ids or suppress_tokens forbid",
        ),
        (
            {"force_words_ids": [[7, 8]], "num_beams": 2, "eos_token_id": [2, 8]},
            "force_words_ids asks for [7, 8], which holds a stop token",
        ),
        ({"forced_eos_token_id": 7, "suppress_tokens": [7]}, "forced_eos_token_id is 7, which"),
        ({"forced_bos_token_id": 7, "bad_words_ids": [[7]]}, "forced_bos_token_id is 7, which"),
        ({"output_scores": True}, "output_scores needs the record"),
        ({"output_hidden_states": True}, "output_hidden_states needs the record"),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_their_names(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    generation = GenerationConfig(**options)
    with pytest.raises(ValueError, match=f"(?s)contradict each other:.*{re.escape(words)}"):
        generation.validate()
    with pytest.raises(ValueError, match="contradict each other"):
        plan(generation, CONFIG, prompt_length=4, row_lengths=[4])
    with pytest.raises(ValueError, match="contradict each other"):
        generation.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_contradictions_are_listed_at_once() -> None:
    generation = GenerationConfig(num_beams=3, num_beam_groups=2, num_return_sequences=4)
    with pytest.raises(ValueError, match="contradict") as error:
        generation.validate()
    assert len(str(error.value).splitlines()) == 4


def test_what_goes_together_is_accepted() -> None:
    words = [[3, 4], [[5], [6, 7]]]
    for options in (
        {"num_beams": 4, "num_return_sequences": 4, "do_sample": True},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "force_words_ids": words, "guidance_scale": 1.5},
        {"num_beams": 2, "force_words_ids": [[[3, 4], [5]]], "bad_words_ids": [[3, 4], [5, 3]]},
        {"num_beams": 2, "force_words_ids": [[[3, 4], [5]]], "eos_token_id": 4},
        {"forced_eos_token_id": [6, 7], "suppress_tokens": [7], "begin_suppress_tokens": []},
        {"forced_eos_token_id": 7, "bad_words_ids": [[7]], "eos_token_id": 7},
        {"penalty_alpha": 0.5, "top_k": 4, "repetition_penalty": 1.2},
        {"prompt_lookup_num_tokens": 3, "do_sample": True, "top_p": 0.9},
        {"output_scores": True, "return_dict_in_generate": True},
    ):
        GenerationConfig(**options).validate()


# Files


def test_keys_nobody_knows_are_kept_and_written_back() -> None:
    values = {"_from_model_config": True, "transformers_version": "4.53.3", "eos_token_id": 2}
    generation = GenerationConfig.from_dict(values)
    assert generation.to_dict() == values
    assert generation.transformers_version == "4.53.3"
    generation.transformers_version = "5.0"
    assert generation.to_dict()["transformers_version"] == "5.0"


def test_a_file_that_asks_for_what_is_not_honoured_can_be_read_but_not_generated_by() -> None:
    generation = GenerationConfig.from_dict({"dola_layers": "low"})
    assert generation.to_dict() == {"dola_layers": "low"}
    with pytest.raises(ValueError, match="dola_layers='low' is not honoured"):
        generation.merged()
    with pytest.raises(ValueError, match="dola_layers='low' is not honoured"):
        plan(generation, CONFIG, prompt_length=4, row_lengths=[4])
    assert generation.merged(dola_layers=None).to_dict() == {}


def test_a_null_in_a_file_is_absent_where_none_is_no_value() -> None:
    generation = GenerationConfig.from_dict({"do_sample": None, "top_k": None})
    assert generation.do_sample is False
    assert generation.top_k is None


def test_options_survive_a_file(tmp_path: Path) -> None:
    generation = GenerationConfig(
        eos_token_id=[2, 7], top_k=0, do_sample=True, seed=[1, 2], _from_model_config=True
    )
    generation.save_pretrained(tmp_path / "made")
    assert GenerationConfig.from_pretrained(tmp_path / "made") == generation
    changed = GenerationConfig.from_pretrained(tmp_path / "made", seed=3)
    assert changed.seed == 3


def test_a_rule_that_is_off_is_saved_in_a_form_that_transformers_reads_as_off() -> None:
    saved = GenerationConfig(top_k=None, temperature=None).to_dict()
    assert saved == {"top_k": 0, "temperature": None}


def test_options_survive_pickling() -> None:
    generation = GenerationConfig(eos_token_id=[2, 7], _from_model_config=True)
    assert pickle.loads(pickle.dumps(generation)) == generation


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(ValueError, match=r"generation_config.json: .* top_p is 7"):
        GenerationConfig.from_pretrained(tmp_path)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no generation_config\.json; .*from_model_config"):
        GenerationConfig.from_pretrained(tmp_path)


def test_a_model_configuration_gives_its_token_ids() -> None:
    config = OPTConfig(eos_token_id=[2, 9], pad_token_id=None)
    generation = GenerationConfig.from_model_config(config)
    assert (generation.stops, generation.pad_token_id, generation.bos_token_id) == ((2, 9), None, 2)


def test_every_option_is_an_annotated_field() -> None:
    assert set(OPTIONS) <= set(GenerationConfig.__annotations__)
    assert not set(OPTIONS) & set(NEUTRAL)


def test_the_text_of_a_configuration_is_its_file() -> None:
    assert repr(GenerationConfig(top_k=3)) == 'GenerationConfig {\n  "top_k": 3\n}\n'
