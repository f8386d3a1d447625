"""The Trainer of transformers trains, evaluates, saves and resumes opt_torch models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from opt_core.weights import Head
from tests.cases import HEADS, Batch, labels, random_weights, tiny, words
from tests.wings import Wing

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Rows(Dataset[dict[str, Any]]):
    """Texts with what a head needs to compute its loss, and a column that nobody takes."""

    def __init__(self, head: Head, config: Any) -> None:
        ids = words(8, 6)
        self.columns = {"input_ids": ids, **labels(head, config, Batch(ids, None))}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: torch.tensor(values[row]) for name, values in self.columns.items()}


def trainer(model: Any, folder: Path, head: Head, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        **options,
    }
    rows = Rows(head, model.config)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=rows,
        eval_dataset=rows,
    )


def build(wing: Wing, head: Head, **changes: Any) -> Any:
    config = tiny(dropout=0.0, num_labels=3, **changes)
    return wing.build(head, config, random_weights(config, head))


@pytest.mark.parametrize("head", HEADS[1:])
def test_the_trainer_trains_every_head(wing: Wing, tmp_path: Path, head: Head) -> None:
    model = build(wing, head)
    before = wing.weights(model)
    assert trainer(model, tmp_path, head).train().global_step == 2
    after = wing.weights(model)
    assert all(not np.array_equal(after[name], values) for name, values in before.items())


@pytest.mark.parametrize("head", HEADS[1:])
def test_the_trainer_evaluates_and_predicts(wing: Wing, tmp_path: Path, head: Head) -> None:
    model = build(wing, head)
    training = trainer(model, tmp_path, head)
    before = training.evaluate()["eval_loss"]
    training.train()
    assert training.evaluate()["eval_loss"] < before
    predictions = training.predict(Rows(head, model.config)).predictions
    first = predictions[0] if isinstance(predictions, tuple) else predictions
    assert len(first) == 8


@pytest.mark.parametrize("tied", [True, False])
def test_the_trainer_saves_what_loads_again(wing: Wing, tmp_path: Path, tied: bool) -> None:
    model = build(wing, Head.CAUSAL_LM, tie_word_embeddings=tied)
    trainer(model, tmp_path, Head.CAUSAL_LM).train()
    saved = tmp_path / "checkpoint-2"
    assert (saved / "model.safetensors").is_file()
    again = wing.load(Head.CAUSAL_LM, saved, config=model.config)
    for name, values in wing.weights(model).items():
        np.testing.assert_array_equal(wing.weights(again)[name], values)


def test_the_trainer_resumes_from_its_checkpoint(wing: Wing, tmp_path: Path) -> None:
    whole = build(wing, Head.CAUSAL_LM)
    trainer(
        whole, tmp_path / "whole", Head.CAUSAL_LM, max_steps=4, lr_scheduler_type="constant"
    ).train()
    half = build(wing, Head.CAUSAL_LM)
    trainer(half, tmp_path / "half", Head.CAUSAL_LM, lr_scheduler_type="constant").train()
    resumed = build(wing, Head.CAUSAL_LM)
    training = trainer(
        resumed, tmp_path / "half", Head.CAUSAL_LM, max_steps=4, lr_scheduler_type="constant"
    )
    training.train(resume_from_checkpoint=str(tmp_path / "half/checkpoint-2"))
    assert training.state.global_step == 4
    expected = wing.weights(whole)
    for name, values in wing.weights(resumed).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6)


def test_the_trainer_switches_checkpointing_on(wing: Wing, tmp_path: Path) -> None:
    model = build(wing, Head.CAUSAL_LM)
    trainer(model, tmp_path, Head.CAUSAL_LM, activation_checkpointing=True).train()
    assert model.is_gradient_checkpointing


def test_the_trainer_smooths_labels_of_a_language_model(wing: Wing, tmp_path: Path) -> None:
    model = build(wing, Head.CAUSAL_LM)
    training = trainer(model, tmp_path, Head.CAUSAL_LM, label_smoothing_factor=0.1)
    assert training.train().global_step == 2
