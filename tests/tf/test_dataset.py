"""The dataset helper: batches for `fit` from what users have, with what `call` names alone."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core.weights import Head
from tests.cases import random_weights, tiny, words
from tests.tiny_tokenizer import tiny as tiny_tokenizer
from tests.wings import Wing

ROWS = [[2, 5, 6], [2, 7, 8, 9, 10], [2, 11], [2, 12, 13, 14]]


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, "num_hidden_layers": 1, **changes})
    return wing.build(head, config, random_weights(config, head))


def batches(model: Any, data: Any, **options: Any) -> list[Any]:
    options = {"batch_size": 2, "shuffle": False, **options}
    return [
        tf.nest.map_structure(lambda x: x.numpy(), batch)
        for batch in model.prepare_tf_dataset(data, **options)
    ]


class Listed:
    """A dataset as of the library `datasets`: a length, and rows by number."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def test_rows_are_padded_batch_by_batch_and_masked(wing: Wing) -> None:
    first, second = batches(build(wing), Listed([{"input_ids": row} for row in ROWS]))
    assert set(first) == {"input_ids", "attention_mask"}
    assert first["input_ids"].tolist() == [[2, 5, 6, 1, 1], [2, 7, 8, 9, 10]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert second["input_ids"].shape == (2, 4)


def test_labels_are_padded_with_what_does_not_count(wing: Wing) -> None:
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    first = batches(build(wing), rows)[0]
    assert first["labels"].tolist() == [[2, 5, 6, -100, -100], [2, 7, 8, 9, 10]]
    pair = batches(build(wing), [(row, row) for row in ROWS])[0]
    assert type(pair) is tuple
    np.testing.assert_array_equal(pair[0]["input_ids"], first["input_ids"])
    np.testing.assert_array_equal(pair[1], first["labels"])


def test_only_what_the_call_names_is_kept(wing: Wing) -> None:
    rows = [{"input_ids": row, "text": "to be", "idx": 3, "length": len(row)} for row in ROWS]
    assert set(batches(build(wing), rows)[0]) == {"input_ids", "attention_mask"}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert set(batches(build(wing), columns)[0]) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="an example holds text, of which the call takes nothing"):
        batches(build(wing), tf.data.Dataset.from_tensors({"text": "to be"}))


@pytest.mark.parametrize("form", ["rows", "columns", "tf.data"])
def test_dictionaries_tensors_and_pairs_are_examples(wing: Wing, form: str) -> None:
    ids, y = words(4, 6), np.array([0, 1, 1, 0])
    model = build(wing, Head.SEQUENCE_CLASSIFICATION)
    alone: Any
    pairs: Any
    named: Any
    if form == "rows":
        alone, pairs = list(ids), [({"input_ids": i}, k) for i, k in zip(ids, y, strict=True)]
        named = [{"input_ids": i, "labels": k} for i, k in zip(ids, y, strict=True)]
    elif form == "columns":
        alone, pairs = {"input_ids": ids}, None
        named = {"input_ids": ids, "labels": y}
    else:
        alone = tf.data.Dataset.from_tensor_slices(ids)
        pairs = tf.data.Dataset.from_tensor_slices((ids, y))
        named = tf.data.Dataset.from_tensor_slices({"input_ids": ids, "labels": y})
    np.testing.assert_array_equal(batches(model, alone)[0]["input_ids"], ids[:2])
    first = batches(model, named)[0]
    np.testing.assert_array_equal(first["input_ids"], ids[:2])
    np.testing.assert_array_equal(first["labels"], y[:2])
    if pairs is not None:
        inputs, found = batches(model, pairs)[1]
        np.testing.assert_array_equal(inputs["input_ids"], ids[2:])
        np.testing.assert_array_equal(found, y[2:])


def test_batches_may_be_shuffled_cut_and_of_another_size(wing: Wing) -> None:
    model, ids = build(wing), words(7, 4)
    keras.utils.set_random_seed(0)
    found = batches(model, ids, batch_size=3, shuffle=True)
    assert [len(batch["input_ids"]) for batch in found] == [3, 3, 1]
    rows = np.concatenate([batch["input_ids"] for batch in found])
    assert not np.array_equal(rows, ids)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, ids))
    cut = batches(model, ids, batch_size=3, drop_remainder=True)
    assert [len(batch["input_ids"]) for batch in cut] == [3, 3]
    assert len(model.prepare_tf_dataset(ids, batch_size=3)) == 3
    assert len(model.prepare_tf_dataset(ids)) == 1


def test_the_padding_id_is_the_tokenizers_if_there_is_one(wing: Wing) -> None:
    model = build(wing, pad_token_id=7)
    assert batches(model, ROWS)[0]["input_ids"][0].tolist() == [2, 5, 6, 7, 7]
    tokenizer = tiny_tokenizer()
    found = batches(model, ROWS, tokenizer=tokenizer)[0]["input_ids"][0]
    assert found.tolist() == [2, 5, 6, tokenizer.pad_token_id, tokenizer.pad_token_id]


@pytest.mark.parametrize("head", [Head.CAUSAL_LM, Head.SEQUENCE_CLASSIFICATION])
def test_fit_takes_what_comes_out(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    rows = [
        {"input_ids": row, "labels": row if head is Head.CAUSAL_LM else len(row) % 2}
        for row in ROWS
    ]
    model.compile("sgd", run_eagerly=True)
    right = float(np.mean([model(batch).loss for batch in batches(model, rows)]))
    data = model.prepare_tf_dataset(rows, batch_size=2, shuffle=False)
    assert model.evaluate(data, verbose=0) == pytest.approx(right, rel=1e-5)
    assert np.isfinite(model.fit(data, epochs=2, verbose=0, shuffle=False).history["loss"]).all()
    assert model.predict(data, verbose=0) is not None


def test_encoded_texts_are_columns(wing: Wing) -> None:
    tokenizer = tiny_tokenizer()
    model = build(wing, vocab_size=len(tokenizer))
    encoded = tokenizer(["hello world", "hello"])
    first = batches(model, encoded, tokenizer=tokenizer)[0]
    right = tokenizer(["hello world", "hello"], padding=True, return_tensors="np")
    np.testing.assert_array_equal(first["input_ids"], right["input_ids"])
    np.testing.assert_array_equal(first["attention_mask"], right["attention_mask"])
