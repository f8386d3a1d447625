"""The checkpoint that ships: what it holds, what it was trained on, and how well it predicts."""

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion import open_checkpoint
from opt_core.assets import TINY_OPT
from opt_core.cli.backends import NumpyReference
from opt_core.config import OPTConfig
from opt_core.evaluation import Evaluation, evaluate, windows
from opt_core.generation import GenerationConfig
from opt_core.tokenizer import OPTTokenizer
from opt_core.weights import Head, fit

LOSSES = Path(__file__).resolve().parents[1] / "docs" / "images" / "tiny-opt-loss.csv"
TEXTS = [
    "ROMEO:\nBut, soft! what light through yonder window breaks?\n",
    "  two  spaces,\ttabs\r\nand </s> or <s> in a text",
    "naïve façade, 東京, 🎭 — and \x00 too",
    "",
]

# From Hamlet, which is not in the text that the checkpoint was trained on.
HAMLET = """\
HAMLET:
To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles
And by opposing end them. To die--to sleep,
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to: 'tis a consummation
Devoutly to be wish'd.
"""


@pytest.fixture(scope="module")
def config() -> OPTConfig:
    return OPTConfig.from_pretrained(TINY_OPT)


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(TINY_OPT)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((TINY_OPT / "training.json").read_text("utf-8"))
    return values


@pytest.fixture(scope="module")
def training_text(shared: Path, record: dict[str, Any]) -> str:
    file: str = record["text"]["file"]
    data = (shared / "data" / file).read_bytes()
    assert hashlib.sha256(data).hexdigest() == record["text"]["sha256"]
    return data.decode("utf-8")


def score(text: str, tokenizer: OPTTokenizer) -> Evaluation:
    """The figures of a text by the float64 reference, in the windows of `optlm eval`."""
    reference = NumpyReference(TINY_OPT)
    context = reference.config.max_position_embeddings
    ids = tokenizer.encode(text)
    cuts = windows(len(ids), window=context, stride=context // 2)
    return evaluate(text, ids, reference.logits, cuts)


def test_the_weights_fit_the_configuration_and_are_few(config: OPTConfig) -> None:
    checkpoint = open_checkpoint(TINY_OPT)
    fitted = fit(config, Head.CAUSAL_LM, checkpoint.tensors, source=str(TINY_OPT))
    assert len(fitted.sources) == len(checkpoint.tensors)
    assert sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()) <= 2_400_000


def test_the_weights_are_one_small_file_of_half_precision() -> None:
    checkpoint = open_checkpoint(TINY_OPT)
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {np.dtype(np.float16)}
    assert (TINY_OPT / "model.safetensors").stat().st_size < 5_000_000


def test_the_architecture_is_that_of_the_published_models(config: OPTConfig) -> None:
    assert config.architectures == ["OPTForCausalLM"]
    assert config.do_layer_norm_before
    assert config.has_final_layer_norm
    assert config.activation_function == "relu"
    assert config.tie_word_embeddings
    assert config.enable_bias
    assert config.layer_norm_elementwise_affine
    assert config.ffn_dim == 4 * config.hidden_size


def test_special_tokens_have_the_ids_of_opt(config: OPTConfig, tokenizer: OPTTokenizer) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    assert [tokenizer.convert_tokens_to_ids(token) for token in special] == [0, 1, 2, 3]
    generation = GenerationConfig.from_pretrained(TINY_OPT)
    for holder in (config, generation, tokenizer):
        ids = holder.pad_token_id, holder.bos_token_id, holder.eos_token_id
        assert ids == (1, 2, 2)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens(
    text: str, config: OPTConfig, tokenizer: OPTTokenizer
) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert max(ids) < len(tokenizer) == config.vocab_size
    assert tokenizer.decode(ids[1:]) == text


def test_vocabulary_and_merges_give_the_same_tokens_as_the_single_file(
    tmp_path: Path, tokenizer: OPTTokenizer
) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((TINY_OPT / name).read_bytes())
    parts = OPTTokenizer.from_pretrained(tmp_path)
    assert [parts.encode(text) for text in (*TEXTS, HAMLET)] == [
        tokenizer.encode(text) for text in (*TEXTS, HAMLET)
    ]


def test_transformers_opens_the_same_tokenizer(tokenizer: OPTTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY_OPT)
    assert len(theirs) == len(tokenizer)
    assert theirs.pad_token_id == tokenizer.pad_token_id
    for text in (*TEXTS, HAMLET):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_lines_like_those_it_was_trained_on_are_far_from_a_uniform_guess(
    tokenizer: OPTTokenizer,
) -> None:
    result = score(HAMLET, tokenizer)
    assert result.perplexity < len(tokenizer) / 10
    assert result.bits_per_character < 3


def test_the_readme_says_what_the_record_says(record: dict[str, Any]) -> None:
    readme = (TINY_OPT / "README.md").read_text("utf-8")
    assert record["text"]["sha256"] in readme
    assert record["text"]["source"] in readme
    assert f"--steps {record['recipe']['steps']} --seed {record['recipe']['seed']}" in readme
    for part in ("held_out", "excerpt"):
        assert f"{record[part]['nats_per_token']:.4f}" in readme
        assert f"{record[part]['bits_per_character']:.4f}" in readme
    assert record["sample"] in readme


def test_the_weights_are_those_of_the_lowest_held_out_loss(record: dict[str, Any]) -> None:
    with open(LOSSES, encoding="utf-8", newline="") as file:
        points = list(csv.DictReader(file))
    assert len(points) == record["points"]
    best = min(points, key=lambda point: float(point["validation"]))
    assert int(best["step"]) == record["chosen"]["step"]
    assert float(best["validation"]) == pytest.approx(record["chosen"]["validation"], abs=1e-6)


def test_the_record_divides_the_text_as_the_recipe_says(
    training_text: str, record: dict[str, Any]
) -> None:
    cut = record["text"]["train_characters"]
    assert len(training_text) == cut + record["text"]["held_out_characters"]
    assert cut == pytest.approx(0.9 * len(training_text), rel=1e-3)
    assert HAMLET.splitlines()[1] not in training_text


def test_the_recorded_loss_of_an_excerpt_is_what_the_reference_finds(
    training_text: str, record: dict[str, Any], tokenizer: OPTTokenizer
) -> None:
    held_out = training_text[record["text"]["train_characters"] :]
    result = score(held_out[: record["excerpt"]["characters"]], tokenizer)
    assert result.tokens == record["excerpt"]["tokens"]
    assert result.nats_per_token == pytest.approx(record["excerpt"]["nats_per_token"], rel=1e-2)


@pytest.mark.deep
def test_the_recorded_loss_of_the_held_out_text_is_what_the_reference_finds(
    training_text: str, record: dict[str, Any], tokenizer: OPTTokenizer
) -> None:
    result = score(training_text[record["text"]["train_characters"] :], tokenizer)
    assert result.tokens == record["held_out"]["tokens"]
    assert result.nats_per_token == pytest.approx(record["held_out"]["nats_per_token"], rel=1e-2)
