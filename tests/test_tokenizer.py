"""Text to model inputs: equal to the reference data and to transformers where both must agree."""

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core.tokenizer import BatchEncoding, OPTTokenizer
from tests.tiny_tokenizer import ids, tiny

TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.sampled_from(["</s>", "<pad>", "<s>", " ", "  ", "\n", "hello world", "'s", "ã\x81"]),
    ),
    max_size=6,
).map("".join)
ALL_COLUMNS: dict[str, Any] = {
    "return_token_type_ids": True,
    "return_special_tokens_mask": True,
    "return_offsets_mapping": True,
    "return_length": True,
}
CALLS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "add_special_tokens": st.booleans(),
        "padding": st.sampled_from([True, False, "longest", "max_length"]),
        "truncation": st.sampled_from([True, False, "only_first", "only_second"]),
        "max_length": st.integers(2, 9),
        "pad_to_multiple_of": st.sampled_from([2, 4]),
        "padding_side": st.sampled_from(["left", "right"]),
        "return_overflowing_tokens": st.booleans(),
        "return_attention_mask": st.booleans(),
        "return_token_type_ids": st.booleans(),
        "return_special_tokens_mask": st.booleans(),
        "return_offsets_mapping": st.booleans(),
        "return_length": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return tiny()


@pytest.fixture(scope="module")
def real(shared: Path) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(shared / "data" / "opt_tokenizer")


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Any]:
    path = shared / "reference" / "tokenizer" / "opt.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    data["options"] = json.loads(path.with_name("opt_options.json").read_text(encoding="utf-8"))
    return data


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("oracle")
    tiny().save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def outcome(call: Any, *arguments: Any, **options: Any) -> Any:
    """What a call returns, or that it raises; what it warns about is not the question here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return dict(call(*arguments, **options).items())
        except Exception:  # transformers lets the library's own types through
            return "raises"


def test_ids_and_offsets_of_the_reference_strings_are_met(
    real: OPTTokenizer, reference: dict[str, Any]
) -> None:
    for case in reference["strings"]:
        if not case["text"].isprintable() and any("\ud800" <= c <= "\udfff" for c in case["text"]):
            continue
        found = real(case["text"], return_offsets_mapping=True)
        assert found.input_ids == case["ids"], case["text"]
        if "fast_offsets" in case:
            assert [list(pair) for pair in found.offset_mapping] == case["fast_offsets"]


def test_batches_of_the_reference_are_met(real: OPTTokenizer, reference: dict[str, Any]) -> None:
    for case in reference["batches"]:
        expected = case.get("fast_only") or case["slow"]
        if case["kwargs"].get("max_length") == 1 or case.get("fast", {}).get("error"):
            expected = case["fast"] if "error" not in case["fast"] else "raises"
        found = outcome(real, case["texts"], case["text_pairs"], **case["kwargs"])
        assert json.loads(json.dumps(found)) == expected, case["kwargs"]


def test_options_of_the_reference_are_met(
    shared: Path, real: OPTTokenizer, reference: dict[str, Any]
) -> None:
    folder = shared / "data" / "opt_tokenizer"
    spaced = OPTTokenizer.from_pretrained(folder, add_prefix_space=True)
    bare = OPTTokenizer.from_pretrained(folder, add_bos_token=False)
    for case in reference["options"]["options"]:
        assert spaced(case["text"]).input_ids == case["add_prefix_space"]
        assert bare(case["text"]).input_ids == case["add_bos_token_false"]
    for case in reference["options"]["words"]:
        assert real(case["words"], is_split_into_words=True).input_ids == case["ids"]


def test_truncation_on_the_left_of_the_reference_is_met(
    shared: Path, reference: dict[str, Any]
) -> None:
    left = OPTTokenizer.from_pretrained(
        shared / "data" / "opt_tokenizer", padding_side="left", truncation_side="left"
    )
    case = reference["options"]["truncation_side_left"]
    assert dict(left(case["texts"], **case["kwargs"])) == case["slow"]


@given(text=TEXTS, pair=st.none() | TEXTS)
def test_every_column_of_any_text_or_pair_is_that_of_transformers(
    tokenizer: OPTTokenizer, oracle: Any, text: str, pair: str | None
) -> None:
    # A lone empty second text is none to transformers' fast tokenizer; in a batch it is one.
    batch = [text] if pair is None else [(text, pair)]
    ours, theirs = tokenizer(batch, **ALL_COLUMNS), oracle(batch, **ALL_COLUMNS)
    assert dict(ours) == dict(theirs)
    assert ours.sequence_ids() == theirs.sequence_ids(0)
    assert ours.word_ids() == theirs.word_ids(0)
    assert tokenizer.tokenize(text) == oracle.tokenize(text)


@given(batch=TEXTS | st.lists(TEXTS, min_size=1, max_size=3), options=CALLS, left=st.booleans())
def test_single_texts_are_padded_and_cut_as_by_transformers(
    tokenizer: OPTTokenizer, oracle: Any, batch: Any, options: dict[str, Any], left: bool
) -> None:
    tokenizer.truncation_side = oracle.truncation_side = "left" if left else "right"
    assert outcome(tokenizer, batch, **options) == outcome(oracle, batch, **options)


@given(first=TEXTS, second=TEXTS, stride=st.integers(0, 2), left=st.booleans())
def test_windows_over_the_second_text_are_those_of_transformers(
    tokenizer: OPTTokenizer, oracle: Any, first: str, second: str, stride: int, left: bool
) -> None:
    tokenizer.truncation_side = oracle.truncation_side = "left" if left else "right"
    length = len(tokenizer(first).input_ids) + 4
    options = {"truncation": "only_second", "max_length": length, "stride": stride}
    options |= {"return_overflowing_tokens": True, **ALL_COLUMNS}
    pair = [(first, second)]
    assert outcome(tokenizer, pair, **options) == outcome(oracle, pair, **options)


@pytest.mark.parametrize(
    ("lengths", "max_length", "kept"),
    [
        ((5, 5), 7, (3, 2)),  # even texts: the second gives first
        ((5, 5), 8, (3, 3)),
        ((6, 2), 7, (3, 2)),
        ((2, 6), 7, (2, 3)),
        ((6, 2), 5, (2, 1)),
        ((3, 0), 4, (2, 0)),
        ((2, 2), 1, (0, 0)),  # the two special tokens stay
    ],
)
def test_pairs_are_cut_from_the_longer_text_then_in_turn(
    tokenizer: OPTTokenizer, lengths: tuple[int, int], max_length: int, kept: tuple[int, int]
) -> None:
    texts = ("b" * lengths[0], "c" * lengths[1])
    tokenizer.truncation_side = "right"
    found = tokenizer(*texts, truncation=True, max_length=max_length).input_ids
    assert found == ids("</s>", *"b" * kept[0], "</s>", *"c" * kept[1])


def test_a_pair_that_the_slow_tokenizer_leaves_uncut_is_left_with_a_warning(
    tokenizer: OPTTokenizer,
) -> None:
    with pytest.warns(UserWarning, match="'only_first' cannot take 2 tokens from a text of 2"):
        found = tokenizer("bb", "cc", truncation="only_first", max_length=4)
    assert found.input_ids == ids("</s>", "b", "b", "</s>", "c", "c")


def test_words_begin_with_a_space_and_have_offsets_in_themselves(tokenizer: OPTTokenizer) -> None:
    options: dict[str, Any] = {"is_split_into_words": True, "return_offsets_mapping": True}
    found = tokenizer(["world", "hi"], **options)
    assert found.input_ids == ids("</s>", "Ġworld", "Ġ", "h", "i")
    assert found.offset_mapping == [(0, 0), (0, 5), (0, 0), (0, 1), (1, 2)]
    assert found.word_ids() == [None, 0, 1, 1, 1]
    batch = tokenizer([["world"], ["hi"]], is_split_into_words=True)
    assert batch.input_ids[0] == ids("</s>", "Ġworld")
    pair = tokenizer([(["world"], ["world"])], is_split_into_words=True)
    assert pair.input_ids == [ids("</s>", "Ġworld") * 2]


def test_a_batch_of_pairs_may_be_given_as_tuples(tokenizer: OPTTokenizer) -> None:
    assert tokenizer([("b", "c")]) == tokenizer(["b"], ["c"])
    assert tokenizer([]) == {"input_ids": [], "attention_mask": []}


def test_encode_gives_the_ids_alone(tokenizer: OPTTokenizer) -> None:
    assert tokenizer.encode("b", "c") == ids("</s>", "b", "</s>", "c")
    assert tokenizer.encode("b", return_tensors="np").tolist() == [ids("</s>", "b")]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((5,), {}, "a text is a str, a batch a list of str or of pairs of str; found int: 5"),
        ((["a", 5],), {}, "entry 1 is 5"),
        (([("a", 5)],), {}, r"the pair 0 is \('a', 5\)"),
        (("a", 5), {}, "text is one text, so text_pair should be one, not 5"),
        ((["a", "b"], ["c"]), {}, "text is a batch of 2, so text_pair should be a list as long"),
        (("a",), {"is_split_into_words": True}, "a text is a list of str, a batch a list of those"),
        (([["a"], "b"],), {"is_split_into_words": True}, "entry 1 is 'b'"),
        (("a\ud800",), {}, r"lone surrogate U\+D800 at character 1"),
        ((["a", "\udfff"],), {}, r"lone surrogate U\+DFFF at character 0"),
        (
            ("a",),
            {"truncation": "both", "max_length": 3},
            "or one of 'longest_first', 'only_first'",
        ),
        (("a",), {"truncation": True, "max_length": 0}, "a whole number from 1, not 0"),
        (("a",), {"padding": "all"}, "padding should be True, False, 'longest', .* not 'all'"),
        (("a",), {"padding": True, "padding_side": "top"}, "'left' or 'right', not 'top'"),
        (("a",), {"padding": True, "pad_to_multiple_of": 0}, "should be at least 1, not 0"),
        (
            ("a",),
            {"padding": True, "truncation": True, "max_length": 5, "pad_to_multiple_of": 4},
            "cut to max_length=5, which is not a multiple of pad_to_multiple_of=4",
        ),
        (
            ("bbb",),
            {"truncation": True, "max_length": 3, "stride": 2},
            r"less than the 2 tokens of text in a row \(max_length 3\), not 2",
        ),
        (
            ("bbb", "ccc"),
            {"truncation": True, "max_length": 4, "stride": 1},
            "stride should be less than the 1 tokens of a text",
        ),
        (
            ("bbb",),
            {"truncation": "only_second", "max_length": 3},
            "to max_length=3: there is no second text. Use truncation='longest_first'",
        ),
        (
            ("bbb", "c"),
            {"truncation": "only_second", "max_length": 3},
            "to max_length=3: the second text has only 1",
        ),
        (("a",), {"return_tensors": "mlx"}, "one of 'np', 'pt', 'tf', 'jax', not 'mlx'"),
        (
            (["b", "bbb"],),
            {"return_tensors": "np"},
            "rows of 'input_ids' have 2 to 4 entries and cannot be one array: pass padding=True",
        ),
    ],
)
def test_an_impossible_call_says_what_is_wrong(
    tokenizer: OPTTokenizer, arguments: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": True}, "truncation=True does nothing: there is no max_length"),
        ({"padding": "max_length"}, "padding='max_length' does nothing: there is no max_length"),
        ({"padding": True, "max_length": 9}, "max_length=9 does nothing with padding=True"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 does nothing with padding=False"),
    ],
)
def test_an_option_without_effect_warns(
    tokenizer: OPTTokenizer, options: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        found = tokenizer("b", **options)
    assert found.input_ids == ids("</s>", "b")


def test_model_max_length_is_the_limit_where_none_is_given() -> None:
    limited = tiny()
    limited.model_max_length = 4
    assert limited("bbbbb", truncation=True).input_ids == ids("</s>", *"bbb")
    assert limited("b", padding="max_length").attention_mask == [1, 1, 0, 0]


def test_arrays_are_int64_in_numpy_and_torch(tokenizer: OPTTokenizer) -> None:
    torch = pytest.importorskip("torch")
    options: dict[str, Any] = {"padding": True, "return_offsets_mapping": True}
    arrays = tokenizer(["b", ""], return_tensors="np", **options)
    assert arrays.input_ids.dtype == np.int64
    assert arrays.offset_mapping.shape == (2, 2, 2)
    tensors = tokenizer(["b", ""], return_tensors="pt", **options).to("cpu")
    assert tensors.input_ids.dtype == torch.int64
    assert tensors.input_ids.tolist() == arrays.input_ids.tolist()
    empty = tokenizer("", add_special_tokens=False, return_tensors="pt")
    assert empty.input_ids.shape == (1, 0)
    assert empty.input_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("framework", "module", "function"),
    [("tf", "tensorflow", "convert_to_tensor"), ("jax", "jax.numpy", "asarray")],
)
def test_tensorflow_and_jax_are_given_int32(
    tokenizer: OPTTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    framework: str,
    module: str,
    function: str,
) -> None:
    stand_in = ModuleType(module)
    setattr(stand_in, function, lambda array: (module, array.dtype.name, array.tolist()))
    monkeypatch.setitem(sys.modules, module.partition(".")[0], ModuleType("parent"))
    monkeypatch.setitem(sys.modules, module, stand_in)
    found = tokenizer("b", return_tensors=framework)
    assert found.input_ids == (module, "int32", [ids("</s>", "b")])


@pytest.mark.parametrize(
    ("framework", "module", "extra"),
    [("pt", "torch", "torch"), ("tf", "tensorflow", "tensorflow"), ("jax", "jax.numpy", "flax")],
)
def test_a_missing_framework_names_its_extra(
    tokenizer: OPTTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    framework: str,
    module: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'optlm\[{extra}\]'"):
        tokenizer("b", return_tensors=framework)


def test_importing_the_tokenizer_imports_no_framework() -> None:
    script = (
        "import sys, opt_core.tokenizer;"
        "heavy = {'torch', 'tensorflow', 'jax', 'transformers', 'huggingface_hub'};"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_result_is_a_dictionary_read_by_attribute_too(tokenizer: OPTTokenizer) -> None:
    found = tokenizer("b", "c")
    assert found["input_ids"] == found.input_ids
    assert dict(**found) == found
    assert found.sequence_ids(-1) == [None, 0, None, 1]
    with pytest.raises(AttributeError, match="BatchEncoding has no 'labels'; it has input_ids, "):
        _ = found.labels
    with pytest.raises(ValueError, match="there is no row 1: 1 are known"):
        found.word_ids(1)


def test_results_and_tokenizers_travel_to_other_processes(tokenizer: OPTTokenizer) -> None:
    found = tokenizer("b")
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert isinstance(again, BatchEncoding)
    assert pickle.loads(pickle.dumps(tokenizer))("b") == found


def test_padding_columns_shows_in_every_view_of_a_row(tokenizer: OPTTokenizer) -> None:
    found = tokenizer(["b", "bb"], padding=True, padding_side="left", **ALL_COLUMNS)
    assert found.input_ids[0] == ids("<pad>", "</s>", "b")
    assert found.special_tokens_mask[0] == [1, 1, 0]
    assert found.sequence_ids(0) == [None, None, 0]
    assert found.length == [3, 3]
