"""Options of generation, their file, and plans, without any framework."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.config import OPTConfig
from opt_core.generation import (
    DEFAULT_NEW_TOKENS,
    NEUTRAL,
    OPTIONS,
    GenerationConfig,
    Plan,
    bucket,
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


def plan_of(width: int = 4, rows: list[int] | None = None, **options: Any) -> Plan:
    generation = GenerationConfig(**options)
    return plan(generation, CONFIG, prompt_length=width, row_lengths=rows or [width])


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
    with pytest.raises(ValueError, match=r"num_beams=4 is not honoured; .* give 1 or None"):
        GenerationConfig(num_beams=4)


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_option_that_is_not_honoured_may_hold_what_asks_nothing(name: str) -> None:
    for value in NEUTRAL[name]:
        generation = GenerationConfig(**{name: value})
        assert getattr(generation, name) == NEUTRAL[name][0]
        assert generation.to_dict() == {}


def test_an_array_is_no_neutral_value() -> None:
    with pytest.raises(ValueError, match="bad_words_ids"):
        GenerationConfig(bad_words_ids=np.zeros((2, 1)))


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
    assert base.merged(max_length=9, max_new_tokens=3).max_new_tokens == 3
    assert base.merged(max_length=None).max_new_tokens == 50


def test_a_sampling_option_without_sampling_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="temperature and top_k changes nothing without do_sampl"):
        GenerationConfig().merged(temperature=0.5, top_k=3)


def test_what_follows_a_stop_token_is_the_pad_id_or_the_first_stop_token() -> None:
    assert GenerationConfig(eos_token_id=[7, 2], pad_token_id=1).fill == 1
    assert GenerationConfig(eos_token_id=[7, 2]).fill == 7
    assert GenerationConfig().fill == 0


def test_only_a_pad_id_that_stops_nothing_marks_padding() -> None:
    assert GenerationConfig(eos_token_id=2, pad_token_id=1).padding_id == 1
    assert GenerationConfig(eos_token_id=[1, 2], pad_token_id=1).padding_id is None
    assert GenerationConfig(eos_token_id=2).padding_id is None


# Files


def test_keys_nobody_knows_are_kept_and_written_back() -> None:
    values = {"_from_model_config": True, "transformers_version": "4.53.3", "eos_token_id": 2}
    generation = GenerationConfig.from_dict(values)
    assert generation.to_dict() == values
    assert generation.transformers_version == "4.53.3"
    generation.transformers_version = "5.0"
    assert generation.to_dict()["transformers_version"] == "5.0"


def test_a_file_that_asks_for_beams_can_be_read_but_not_generated_by() -> None:
    generation = GenerationConfig.from_dict({"num_beams": 4})
    assert generation.to_dict() == {"num_beams": 4}
    with pytest.raises(ValueError, match="num_beams=4 is not honoured"):
        generation.merged()
    with pytest.raises(ValueError, match="num_beams=4 is not honoured"):
        plan(generation, CONFIG, prompt_length=4, row_lengths=[4])
    assert generation.merged(num_beams=1).to_dict() == {}


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


# Plans


def test_without_a_length_twenty_tokens_follow_the_prompt() -> None:
    assert plan_of(4).max_new_tokens == DEFAULT_NEW_TOKENS


def test_without_a_length_the_positions_end_the_text() -> None:
    assert plan_of(30).max_new_tokens == 2


def test_max_new_tokens_wins_over_max_length() -> None:
    assert plan_of(4, max_length=6, max_new_tokens=9).max_new_tokens == 9
    assert plan_of(4, max_length=6).max_new_tokens == 2


def test_the_larger_minimum_counts() -> None:
    assert plan_of(4, min_length=9, min_new_tokens=2).min_new_tokens == 5
    assert plan_of(4, min_length=3).min_new_tokens == 0


def test_the_last_position_may_be_used_and_the_next_may_not() -> None:
    assert plan_of(4, max_new_tokens=28).max_new_tokens == 28
    with pytest.raises(ValueError, match=r"has 4 tokens .* 29: together 33, but .* is 32; ask for"):
        plan_of(4, max_new_tokens=29)
    with pytest.raises(ValueError, match="max_length 33 leaves 29 new ones: together 33"):
        plan_of(4, max_length=33)


def test_a_prompt_that_fills_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the longest prompt has 32 tokens .*; shorten"):
        plan_of(32)


def test_padding_takes_no_position() -> None:
    planned = plan_of(40, [4, 12], max_new_tokens=20)
    assert planned.max_new_tokens == 20
    assert planned.capacity >= 60


def test_a_max_length_within_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length is 4, but the prompt is 4 tokens wide"):
        plan_of(4, max_length=4)


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 5 new tokens, but max_new_tokens is 3"):
        plan_of(4, min_new_tokens=5, max_new_tokens=3)


def test_a_row_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 of the prompt has no token to continue"):
        plan_of(4, [4, 0])


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="eos_token_id is 60, outside the vocabulary of 60"):
        plan_of(4, eos_token_id=[2, 60])
    with pytest.raises(ValueError, match="pad_token_id is 61, outside the vocabulary of 60"):
        plan_of(4, pad_token_id=61)


def test_several_greedy_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="num_return_sequences is 2, but greedy choice gives the"):
        plan_of(4, num_return_sequences=2)
    assert plan_of(4, num_return_sequences=2, do_sample=True).max_new_tokens == 20


def test_few_programs_serve_all_lengths() -> None:
    lengths = range(1, 2049)
    assert all(bucket(n) >= n for n in lengths)
    assert all(bucket(n) - n < max(64, n / 8) for n in lengths)
    assert len({bucket(n) for n in lengths}) == 24


@pytest.mark.parametrize("length", [1, 8, 9, 17, 33, 64, 65, 200, 1025, 2000])
def test_a_compiled_first_pass_has_room_for_the_prompt_within_the_cache(length: int) -> None:
    config = OPTConfig()
    planned = plan(
        GenerationConfig(max_new_tokens=1), config, prompt_length=length, row_lengths=[length]
    )
    assert length <= planned.prompt_room <= planned.capacity
    assert planned.prompt_room <= max(8, 2 * length)
