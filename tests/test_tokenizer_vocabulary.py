"""Tokens, ids and special tokens, and the way from ids back to text, at once and in a stream."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from opt_core.tokenizer import OPTTokenizer, TokenizerError, TokenizerSettings, byte_level_bpe
from tests.tiny_tokenizer import TOKENS, VOCABULARY, ids, tiny

IDS = st.lists(st.integers(0, len(TOKENS) + 5), max_size=12)


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return tiny()


@pytest.fixture
def extended() -> OPTTokenizer:
    grown = tiny()
    grown.add_tokens(["new_token", "☃☃"])
    grown.add_special_tokens({"additional_special_tokens": ["<ctrl>"]})
    return grown


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("oracle")
    tiny().save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def streamed(tokenizer: OPTTokenizer, token_ids: list[int], skip: bool = False) -> str:
    stream = tokenizer.decode_stream(skip_special_tokens=skip)
    return "".join(map(stream.step, token_ids)) + stream.finish()


def test_texts_of_the_reference_come_back_from_their_ids(shared: Path) -> None:
    real = OPTTokenizer.from_pretrained(shared / "data" / "opt_tokenizer")
    data = json.loads((shared / "reference" / "tokenizer" / "opt.json").read_text("utf-8"))
    for case in data["strings"]:
        skipped = case["decoded_skip_special"]
        clean = case.get("decoded_skip_special_clean_up", skipped)
        assert real.decode(case["ids"]) == case["decoded"]
        assert real.decode(case["ids"], skip_special_tokens=True) == skipped
        assert real.decode(case["ids"], True, clean_up_tokenization_spaces=True) == clean
        assert streamed(real, case["ids"], skip=True) == skipped
    for case in data["decode"]:
        if min(case["ids"], default=0) >= 0:
            assert real.decode(case["ids"]) == case.get("fast_decoded", case["decoded"])
            assert real.convert_ids_to_tokens(case["ids"]) == case["tokens"]
    assert (len(real), real.all_special_ids) == (50265, data["slow"]["all_special_ids"])


def test_added_tokens_of_the_reference_are_met(shared: Path) -> None:
    real = OPTTokenizer.from_pretrained(shared / "data" / "opt_tokenizer")
    path = shared / "reference" / "tokenizer" / "opt_options.json"
    assert real.add_tokens(["new_token", "☃☃"]) == 2
    assert real.add_special_tokens({"additional_special_tokens": ["<ctrl>"]}) == 1
    for case in json.loads(path.read_text("utf-8"))["added_tokens"]:
        assert real(case["text"]).input_ids == case["ids"]
        assert real.decode(case["ids"]) == streamed(real, case["ids"]) == case["decoded"]
        assert real.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]


@given(token_ids=IDS, skip=st.booleans())
def test_any_ids_decode_as_by_transformers(
    tokenizer: OPTTokenizer, oracle: Any, token_ids: list[int], skip: bool
) -> None:
    expected = oracle.decode(token_ids, skip_special_tokens=skip)
    assert tokenizer.decode(token_ids, skip_special_tokens=skip) == expected
    tokens = tokenizer.convert_ids_to_tokens([i for i in token_ids if i < len(TOKENS)])
    assert tokenizer.convert_tokens_to_string(map(str, tokens)) == tokenizer.decode(token_ids)


@given(token_ids=IDS, skip=st.booleans())
def test_the_pieces_of_a_stream_join_to_the_decoded_text(
    extended: OPTTokenizer, token_ids: list[int], skip: bool
) -> None:
    expected = extended.decode(token_ids, skip_special_tokens=skip)
    assert streamed(extended, token_ids, skip) == expected


def test_a_stream_holds_a_character_back_until_it_is_complete(tokenizer: OPTTokenizer) -> None:
    stream = tokenizer.decode_stream()
    start, end, *_ = tokenizer.encode("あ", add_special_tokens=False)
    assert [stream.step(start), stream.step(end), stream.finish()] == ["", "あ", ""]
    assert [stream.step(start), stream.finish()] == ["", "\ufffd"]


def test_added_tokens_stand_apart_unless_asked_otherwise(extended: OPTTokenizer) -> None:
    token_ids = extended("a☃☃b<ctrl>").input_ids
    assert extended.decode(token_ids) == "</s>a ☃☃ b <ctrl>"
    assert extended.decode(token_ids, spaces_between_special_tokens=False) == "</s>a☃☃b<ctrl>"
    assert extended.decode(token_ids, skip_special_tokens=True) == "a ☃☃ b"


def test_ids_come_from_any_kind_of_vector(tokenizer: OPTTokenizer) -> None:
    torch = pytest.importorskip("torch")
    token_ids = ids("h", "i")
    assert tokenizer.decode(np.array(token_ids)) == "hi"
    assert tokenizer.decode(torch.tensor(token_ids)) == "hi"
    assert tokenizer.decode(token_ids[0]) == "h"
    assert tokenizer.batch_decode(torch.tensor([token_ids, token_ids])) == ["hi", "hi"]
    assert tokenizer.batch_decode([token_ids, []]) == ["hi", ""]


def test_clean_up_follows_the_setting_unless_asked() -> None:
    tidy = tiny(TokenizerSettings(clean_up_tokenization_spaces=True))
    token_ids = tidy.encode("do n't , he 's .", add_special_tokens=False)
    assert tidy.decode(token_ids) == "don't, he's."
    assert tidy.decode(token_ids, clean_up_tokenization_spaces=False) == "do n't , he 's ."


def test_broken_bytes_are_shown_as_the_errors_setting_says() -> None:
    silent = tiny(TokenizerSettings(errors="ignore"))
    assert silent.decode(ids("ã", "h")) == streamed(silent, ids("ã", "h")) == "h"


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([5, -100], "token id -100 at place 1 is negative; if these are labels, where -100 marks"),
        ([[5], [6]], "one sequence of whole numbers.*for several sequences there is batch_decode"),
        ([0.5], "one sequence of whole numbers"),
        ("text", "one sequence of whole numbers, not 'text'"),
    ],
)
def test_what_is_no_row_of_ids_is_refused(
    tokenizer: OPTTokenizer, token_ids: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(token_ids)


def test_tokens_and_ids_translate_one_by_one_and_in_lists(tokenizer: OPTTokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids("Ġworld") == VOCABULARY["Ġworld"]
    assert tokenizer.convert_tokens_to_ids(["h", "no such token"]) == [VOCABULARY["h"], 2]
    assert tokenizer.convert_ids_to_tokens(2) == "</s>"
    assert tokenizer.convert_ids_to_tokens(np.int64(2)) == "</s>"  # type: ignore[call-overload]
    assert tokenizer.convert_ids_to_tokens([2, 10**6, 2**40]) == ["</s>", None, None]
    assert tokenizer.convert_ids_to_tokens([2, 1, 4], skip_special_tokens=True) == [TOKENS[4]]
    assert tokenizer.get_vocab() == VOCABULARY
    assert len(tokenizer) == tokenizer.vocab_size == len(TOKENS)


def test_special_tokens_are_those_of_opt(tokenizer: OPTTokenizer) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == "</s>"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == 2
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 1)
    assert tokenizer.all_special_tokens == ["</s>", "<pad>"]
    assert tokenizer.special_tokens_map["pad_token"] == "<pad>"


def test_the_first_token_can_be_switched_off_at_any_time() -> None:
    switched = tiny()
    switched.add_bos_token = False
    assert switched("h", "i").input_ids == ids("h", "i")
    switched.add_bos_token = True
    assert switched("h", "i").input_ids == ids("</s>", "h", "</s>", "i")


def test_the_space_before_a_text_does_not_shift_the_offsets() -> None:
    spaced = tiny(TokenizerSettings(add_prefix_space=True))
    found = spaced("world", return_offsets_mapping=True)
    assert found.input_ids == ids("</s>", "Ġworld")
    assert found.offset_mapping == [(0, 0), (0, 5)]


def test_special_tokens_are_set_by_token_or_by_id() -> None:
    changed = tiny()
    changed.pad_token = changed.eos_token
    assert changed.pad_token_id == 2
    changed.pad_token_id = 3
    assert changed.pad_token == "<unk>"
    assert changed("<unk>").input_ids == [2, 3]
    assert changed.decode([2, 3], skip_special_tokens=True) == ""
    assert changed.additional_special_tokens == ["<pad>"]


def test_a_byte_that_the_vocabulary_lacks_becomes_the_unknown_token() -> None:
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}
    poor = OPTTokenizer(byte_level_bpe(vocab, []), TokenizerSettings(unk_token="<unk>"))
    assert poor("aé").input_ids == [1, 3, 2, 2]


def test_a_token_that_is_not_written_in_bytes_stands_for_itself() -> None:
    mixed = OPTTokenizer(byte_level_bpe({"<pad>": 0, "</s>": 1, "日": 2, "h": 3}, []))
    assert mixed.decode([3, 2]) == "h日"


def test_tokens_that_are_there_already_are_not_new(extended: OPTTokenizer) -> None:
    size = len(TOKENS)
    assert (extended.vocab_size, len(extended)) == (size, size + 3)
    assert extended.add_tokens("new_token") == 0
    assert extended.add_tokens(AddedToken("<ctrl>"), special_tokens=True) == 0
    assert extended.add_special_tokens({"pad_token": "[PAD]"}) == 1
    assert (extended.pad_token, extended.pad_token_id) == ("[PAD]", size + 3)
    assert extended.special_tokens_map["additional_special_tokens"] == ["<pad>", "<ctrl>"]


def test_the_mask_of_special_tokens_is_made_for_ids_with_and_without_them(
    tokenizer: OPTTokenizer,
) -> None:
    assert tokenizer.get_special_tokens_mask([5, 2], [6]) == [1, 0, 0, 1, 0]
    assert tokenizer.get_special_tokens_mask([2, 5], already_has_special_tokens=True) == [1, 0]
    with pytest.raises(ValueError, match="are one list: leave out token_ids_1"):
        tokenizer.get_special_tokens_mask([2], [2], already_has_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pad_token", "[PAD]", r"lacks special tokens: '\[PAD\]' \(pad_token\)"),
        ("pad_token", None, "pad_token should be a string with at least one character, not None"),
        ("pad_token_id", 9999, "pad_token_id=9999 is not in the vocabulary of 274 tokens"),
        ("padding_side", "top", "padding_side should be 'left' or 'right', not 'top'"),
        ("add_bos_token", 1, "add_bos_token should be True or False, not 1"),
        ("model_max_length", 0, "model_max_length should be a whole number from 1, not 0"),
    ],
)
def test_a_setting_refuses_what_it_cannot_be(
    tokenizer: OPTTokenizer, name: str, value: Any, message: str
) -> None:
    before = tokenizer.settings
    with pytest.raises(TokenizerError, match=message):
        setattr(tokenizer, name, value)
    assert tokenizer.settings == before


def test_an_error_handler_must_exist() -> None:
    with pytest.raises(TokenizerError, match=r"errors should be an error handler .* not 'never'"):
        TokenizerSettings(errors="never")


def test_a_role_that_opt_has_not_is_refused(tokenizer: OPTTokenizer) -> None:
    with pytest.raises(TokenizerError, match="'mask_token' is no special token of OPT: expected"):
        tokenizer.add_special_tokens({"mask_token": "<mask>"})


def test_other_models_than_byte_level_bpe_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>"))
    with pytest.raises(TokenizerError, match="a BPE model with a ByteLevel decoder, found WordLev"):
        OPTTokenizer(words)


def test_a_vocabulary_with_missing_ids_counts_to_its_largest_and_takes_no_tokens() -> None:
    gapped = OPTTokenizer(byte_level_bpe({"<pad>": 0, "</s>": 2}, []))
    assert len(gapped) == 3
    with pytest.raises(TokenizerError, match="2 tokens with ids up to 2: while ids are missing"):
        gapped.add_tokens("new")


def test_settings_are_fields_of_the_class_too() -> None:
    assert type(OPTTokenizer.pad_token).__name__ == "Setting"
    assert type(OPTTokenizer.pad_token_id).__name__ == "SpecialTokenId"
    assert repr(tiny()).startswith("OPTTokenizer(274 tokens, TokenizerSettings(bos_token='</s>'")
