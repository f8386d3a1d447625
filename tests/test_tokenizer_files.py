"""A tokenizer's files: opened in every layout, saved whole, refused by name when damaged."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors

from opt_core import hub
from opt_core.tokenizer import (
    OPTTokenizer,
    TokenizerError,
    TokenizerNotFound,
    TokenizerSettings,
    byte_level_bpe,
)
from tests.tiny_tokenizer import MERGES, TOKENS, VOCABULARY, ids, tiny, write_files

TEXT = "hello</s> world  ☃☃new_token<ctrl>あ"
FILES = {
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path)


def grown(settings: TokenizerSettings | None = None) -> OPTTokenizer:
    tokenizer = tiny(settings)
    tokenizer.add_tokens(["new_token", "☃☃"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<ctrl>"]})
    return tokenizer


def write_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites a JSON file after a change to its object."""
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(state)
    path.write_text(json.dumps(state), encoding="utf-8")


def test_vocabulary_and_merges_alone_give_opts_tokenizer(folder: Path) -> None:
    tokenizer = OPTTokenizer.from_pretrained(folder)
    assert tokenizer("hello world").input_ids == ids("</s>", "hello", "Ġworld")
    assert tokenizer.settings == TokenizerSettings()


def test_a_file_of_the_folder_stands_for_the_folder(folder: Path) -> None:
    assert len(OPTTokenizer.from_pretrained(str(folder / "vocab.json"))) == len(TOKENS)


def test_merges_with_carriage_returns_and_without_a_header_are_read(folder: Path) -> None:
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().split(b"\n", 1)[1].replace(b"\n", b"\r\n"))
    assert OPTTokenizer.from_pretrained(folder)("hello").input_ids == ids("</s>", "hello")


@pytest.mark.parametrize("without", [(), ("tokenizer.json",), ("vocab.json", "merges.txt")])
@pytest.mark.parametrize(
    "settings",
    [
        TokenizerSettings(),
        TokenizerSettings(
            eos_token="<s>",
            add_bos_token=False,
            add_prefix_space=True,
            errors="ignore",
            model_max_length=77,
            padding_side="left",
            truncation_side="left",
            other={"chat_template": "{{ messages }}"},
        ),
    ],
)
def test_what_is_saved_opens_with_identical_behaviour(
    tmp_path: Path, settings: TokenizerSettings, without: tuple[str, ...]
) -> None:
    tokenizer = grown(settings)
    paths = tokenizer.save_pretrained(tmp_path / "new" / "folder")
    assert {os.path.basename(path) for path in paths} == FILES
    for name in without:
        (tmp_path / "new" / "folder" / name).unlink()
    again = OPTTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.settings == tokenizer.settings
    assert again(TEXT, TEXT) == tokenizer(TEXT, TEXT)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.all_special_ids == tokenizer.all_special_ids
    assert again.decode(range(len(again))) == tokenizer.decode(range(len(again)))


def test_transformers_opens_what_is_saved_with_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = grown()
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GPT2Tokenizer"
    for arguments in ((TEXT,), (TEXT, TEXT)):
        assert dict(tokenizer(*arguments)) == dict(theirs(*arguments))
    assert theirs.all_special_ids == tokenizer.all_special_ids
    assert (theirs.pad_token_id, len(theirs)) == (1, len(tokenizer))


def test_what_transformers_saves_is_opened_with_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    grown().save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for switch in (True, False):
        theirs.add_bos_token = switch
        theirs.save_pretrained(tmp_path / "theirs")
        again = OPTTokenizer.from_pretrained(tmp_path / "theirs")
        assert dict(again(TEXT, TEXT)) == dict(theirs(TEXT, TEXT))
        assert again.decode(range(9), True) == theirs.decode(range(9), skip_special_tokens=True)


def test_the_real_vocabulary_is_saved_byte_for_byte(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "opt_tokenizer"
    OPTTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["add_bos_token"] is True
    assert config["tokenizer_class"] == "GPT2Tokenizer"
    assert (config["bos_token"], config["pad_token"]) == ("</s>", "<pad>")


def test_a_save_that_is_stopped_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stopped(*_: object) -> None:
        raise OSError("stopped")

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(OSError, match="stopped"):
        grown().save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_pipeline_of_byte_level_bpe_keeps_its_own_rules(tmp_path: Path) -> None:
    backend = byte_level_bpe(VOCABULARY, MERGES)
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.save(str(tmp_path / "tokenizer.json"))
    galactica = OPTTokenizer.from_pretrained(tmp_path)
    assert galactica("hello").input_ids == ids("hello")  # the file has no first token
    galactica.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert OPTTokenizer.from_pretrained(tmp_path / "again").tokenize("12") == ["1", "2"]


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (processors.ByteLevel(trim_offsets=True), ["hello"]),
        (processors.TemplateProcessing("</s> $A", None, [("</s>", 2)]), ["</s>", "hello"]),
        (
            processors.Sequence(
                [
                    processors.ByteLevel(trim_offsets=True),
                    processors.TemplateProcessing("<s> $A", None, [("<s>", 0)]),
                ]
            ),
            ["<s>", "hello"],
        ),
    ],
)
def test_a_pipeline_file_alone_says_what_comes_first(
    tmp_path: Path, processor: Any, expected: list[str]
) -> None:
    backend = byte_level_bpe(VOCABULARY, MERGES)
    backend.post_processor = processor
    backend.save(str(tmp_path / "tokenizer.json"))
    found = OPTTokenizer.from_pretrained(tmp_path)("hello world", return_offsets_mapping=True)
    assert found.input_ids == ids(*expected, "Ġworld")
    assert found.offset_mapping[-1] == (5, 11)  # the space belongs to the word


def test_tokens_that_older_versions_keep_apart_are_added(folder: Path) -> None:
    size = len(TOKENS)
    write_json(
        folder / "added_tokens.json", lambda state: state.update({"☃": size, "77": size + 1})
    )
    write_json(
        folder / "special_tokens_map.json",
        lambda state: state.update(
            pad_token={"content": "☃", "lstrip": True}, additional_special_tokens=["77"]
        ),
    )
    tokenizer = OPTTokenizer.from_pretrained(folder)
    assert tokenizer("h ☃77").input_ids == [*ids("</s>", "h"), size, size + 1]  # lstrip
    assert tokenizer.pad_token_id == size
    assert tokenizer.additional_special_tokens == ["77"]


def test_further_special_tokens_may_have_names(folder: Path) -> None:
    named = {"extra_special_tokens": {"image_token": "<s>"}}
    write_json(folder / "tokenizer_config.json", lambda state: state.update(named))
    assert OPTTokenizer.from_pretrained(folder).additional_special_tokens == ["<s>"]


def test_settings_of_the_call_replace_those_of_the_files(folder: Path) -> None:
    write_json(
        folder / "tokenizer_config.json",
        lambda state: state.update(padding_side="left", model_max_length=9e2, pad_token=None),
    )
    assert OPTTokenizer.from_pretrained(folder).padding_side == "left"
    assert OPTTokenizer.from_pretrained(folder).model_max_length == 900
    asked = OPTTokenizer.from_pretrained(folder, padding_side="right", model_max_length=5)
    assert (asked.padding_side, asked.model_max_length) == ("right", 5)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("merges_line_with_one_part", r"merges.txt', line 3: expected two tokens .* found 'ab'"),
        ("merges_not_utf8", r"merges.txt' should be UTF-8, but line 2 has the byte 0xff"),
        ("vocab_not_json", r"vocab.json' should be a JSON object: .* line 1 column 9"),
        ("vocab_two_tokens_one_id", r"vocab.json': the tokens 'a' and 'b' have the same id 4"),
        ("vocab_without_special_tokens", r"vocab.json' lacks special tokens: '</s>' .*'<pad>'"),
    ],
)
def test_the_broken_files_of_the_reference_are_refused(
    shared: Path, case: str, message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        OPTTokenizer.from_pretrained(shared / "reference" / "bad" / f"tokenizer_{case}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "[]", "vocab.json' should be a JSON object, not list"),
        ("vocab.json", "{}", "vocab.json' should map tokens to ids, and has no token"),
        ("vocab.json", "[" * 99999, "vocab.json' should be a JSON object: .* Was it copied whole"),
        (
            "vocab.json",
            '{"a": 1.5}',
            "the id of token 'a' should be a whole number from 0, not 1.5",
        ),
        ("vocab.json", '{"a": -1}', "the id of token 'a' should be a whole number from 0, not -1"),
        ("merges.txt", "h e\nx yz", "merges.txt', line 2: 'yz' is not in the vocabulary"),
        ("merges.txt", "#version: 0.2\nx y", "merges.txt', line 2: 'xy' is not in the vocabulary"),
        ("merges.txt", "x  y", "merges.txt', line 1: expected two tokens with one space"),
        ("tokenizer_config.json", "5", "tokenizer_config.json' should be a JSON object, not int"),
        ("tokenizer_config.json", '{"padding_side": 1}', "config.json': padding_side should be"),
        ("tokenizer_config.json", '{"pad_token": {"a": 1}}', "config.json': pad_token should be"),
        ("tokenizer_config.json", '{"extra_special_tokens": [5]}', "should name a token, not 5"),
        ("tokenizer_config.json", '{"extra_special_tokens": ["?!"]}', r"'\?!' \(extra_special_tok"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}', "each added token its id, not 5"),
        ("added_tokens.json", '{"new": 7}', "gives the token 'new' the id 7, but its place in"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(
    folder: Path, name: str, content: str, message: str
) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=message):
        OPTTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(model=None), "a BPE model with a ByteLevel decoder.* found None with"),
        (lambda s: s["model"].update(type="Unigram"), "found Unigram with ByteLevel"),
        (lambda s: s["model"].update(vocab=[]), "should map tokens to ids, and has no token"),
        (lambda s: s["model"].update(merges={}), "should list the merges of its model"),
        (lambda s: s["model"].update(merges=[["h"]]), "merge 0: expected two tokens .* found 'h'"),
        (lambda s: s["model"].update(merges=["h e", "h ee"]), "merge 1: 'ee' is not in the vocab"),
        (lambda s: s.update(normalizer={"type": "?"}), "tokenizer.json' cannot be opened by token"),
        (
            lambda s: s.update(
                post_processor={
                    "type": "RobertaProcessing",
                    "sep": ["</s>", 2],
                    "cls": ["<s>", 0],
                    "trim_offsets": True,
                    "add_prefix_space": True,
                }
            ),
            r"adds special tokens as OPT does not \(RobertaProcessing\): expected nothing, or",
        ),
    ],
)
def test_a_damaged_pipeline_is_named_with_its_fault(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    tiny().save_pretrained(tmp_path)
    write_json(tmp_path / "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=message):
        OPTTokenizer.from_pretrained(tmp_path)


def test_merges_written_as_strings_are_read(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    old = [" ".join(pair) for pair in MERGES]
    write_json(tmp_path / "tokenizer.json", lambda state: state["model"].update(merges=old))
    assert OPTTokenizer.from_pretrained(tmp_path).tokenize("hello") == ["hello"]


@pytest.mark.parametrize("present", [(), ("vocab.json",), ("merges.txt",)])
def test_missing_files_are_listed(folder: Path, present: tuple[str, ...]) -> None:
    for name in {"vocab.json", "merges.txt"}.difference(present):
        (folder / name).unlink()
    expected = r"no tokenizer files in '.*': expected tokenizer.json or vocab.json and merges.txt"
    with pytest.raises(TokenizerNotFound, match=expected):
        OPTTokenizer.from_pretrained(folder)


def test_a_repository_is_asked_for_the_tokenizer_files_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def resolve(source: str, **options: Any) -> Path:
        asked.update(options, source=source)
        return folder

    monkeypatch.setattr(hub, "resolve", resolve)
    OPTTokenizer.from_pretrained(
        "someone/model",
        revision="v1",
        token="t",
        cache_dir="c",
        local_files_only=True,
        force_download=True,
        subfolder="s",
    )
    assert asked == {
        "source": "someone/model",
        "one_of": (("tokenizer.json",), ("vocab.json", "merges.txt")),
        "optional": ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        "revision": "v1",
        "token": "t",
        "cache_dir": "c",
        "local_files_only": True,
        "force_download": True,
        "subfolder": "s",
    }


def test_a_repository_without_a_tokenizer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(source: str, **options: Any) -> Path:
        raise hub.FileMissing("nothing of the kind")

    monkeypatch.setattr(hub, "resolve", resolve)
    with pytest.raises(TokenizerNotFound, match="no tokenizer files in 'someone/model': expected"):
        OPTTokenizer.from_pretrained("someone/model")


def test_a_backend_with_its_own_padding_and_truncation_is_taken_over() -> None:
    backend: Tokenizer = byte_level_bpe(VOCABULARY, MERGES)
    backend.enable_padding(length=9)
    backend.enable_truncation(3)
    assert OPTTokenizer(backend)("hello world world").input_ids == ids(
        "</s>", "hello", "Ġworld", "Ġworld"
    )
