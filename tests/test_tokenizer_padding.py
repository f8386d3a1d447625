"""Rows that are tokenized already are brought to one length, as data collators ask for it."""

from typing import Any

import numpy as np
import pytest

from opt_core.tokenizer import OPTTokenizer
from tests.tiny_tokenizer import tiny


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return tiny()


def test_a_list_of_rows_becomes_columns_of_one_length(tokenizer: OPTTokenizer) -> None:
    rows = [{"input_ids": [2, 5, 6], "label": 1}, {"input_ids": [2], "label": 0}]
    assert tokenizer.pad(rows) == {
        "input_ids": [[2, 5, 6], [2, 1, 1]],
        "label": [1, 0],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_every_known_column_is_padded_with_its_own_filler(tokenizer: OPTTokenizer) -> None:
    row = {
        "input_ids": [2],
        "attention_mask": [1],
        "token_type_ids": [1],
        "special_tokens_mask": [0],
        "offset_mapping": [(3, 4)],
    }
    found = tokenizer.pad([row], padding="max_length", max_length=2, padding_side="left")
    assert found == {
        "input_ids": [[1, 2]],
        "attention_mask": [[0, 1]],
        "token_type_ids": [[0, 1]],
        "special_tokens_mask": [[1, 0]],
        "offset_mapping": [[(0, 0), [3, 4]]],
    }


def test_one_row_stays_one_row(tokenizer: OPTTokenizer) -> None:
    found = tokenizer.pad({"input_ids": [2, 5, 6]}, pad_to_multiple_of=4)
    assert found == {"input_ids": [2, 5, 6, 1], "attention_mask": [1, 1, 1, 0]}


def test_the_result_of_a_call_is_padded_to_arrays(tokenizer: OPTTokenizer) -> None:
    found = tokenizer.pad(tokenizer(["b", "bb"]), return_tensors="np")
    assert found.input_ids.shape == found.attention_mask.shape == (2, 3)


def test_arrays_of_any_framework_are_read(tokenizer: OPTTokenizer) -> None:
    class Eager:
        """Like TensorFlow's tensors: an array to NumPy, without `tolist`."""

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
            return np.array([2, 5])

    torch = pytest.importorskip("torch")
    rows = [{"input_ids": torch.tensor([2])}, {"input_ids": np.array([2, 5, 5])}]
    rows.append({"input_ids": Eager()})
    assert tokenizer.pad(rows).input_ids == [[2, 1, 1], [2, 5, 5], [2, 5, 1]]


def test_labels_keep_their_kind_as_arrays(tokenizer: OPTTokenizer) -> None:
    rows = [{"input_ids": [2], "labels": 0.5, "flag": True}]
    found = tokenizer.pad(rows, return_tensors="np", return_attention_mask=False)
    assert {name: array.dtype.name for name, array in found.items()} == {
        "input_ids": "int64",
        "labels": "float32",
        "flag": "bool",
    }


def test_padding_can_be_left_out(tokenizer: OPTTokenizer) -> None:
    rows = [{"input_ids": [2, 5]}, {"input_ids": [2]}]
    assert tokenizer.pad(rows, padding=False).input_ids == [[2, 5], [2]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [2]}, {"labels": 1}], "row 1 of 2 lacks 'input_ids', others have it"),
        ([2, 5], r"a list of dictionaries of token ids, not \[2, 5\]"),
        ({"labels": [1]}, "there are no 'input_ids' to pad, only labels"),
        ([], "there are no 'input_ids' to pad, only nothing"),
    ],
)
def test_what_cannot_be_padded_is_named(tokenizer: OPTTokenizer, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.pad(rows)


def test_the_collators_of_transformers_take_the_tokenizer(tokenizer: OPTTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    padded = transformers.DataCollatorWithPadding(tokenizer)([tokenizer("b"), tokenizer("bbb")])
    assert padded["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    modelling = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = modelling([tokenizer("b"), tokenizer("bbb")])
    assert batch["labels"][0].tolist()[-2:] == [-100, -100]
