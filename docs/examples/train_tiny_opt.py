"""Train the small OPT that ships with optlm: tokenizer, weights, loss curve and its README.

    python docs/examples/train_tiny_opt.py --text tinyshakespeare.txt --out tiny-opt

The text is split into a part to train on and the last tenth, held out. The tokenizer is trained on
the first part alone. The weights that are kept are those with the lowest loss on the held-out part.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from tiny_opt_card import card
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from opt_core.evaluation import Evaluation, evaluate, windows
from opt_core.tokenizer import OPTTokenizer, TokenizerSettings, byte_level_bpe
from opt_torch import OPTConfig, OPTForCausalLM

KNOWN_TEXTS = {
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed": (
        "a part of Shakespeare's works, public domain: data/tinyshakespeare/input.txt of "
        "https://github.com/karpathy/char-rnn, commit 6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    )
}
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in OPT
START = SPECIAL_TOKENS.index("</s>")
END_OF_SPEECH = "\n\n"
EXCERPT_CHARACTERS = 8000
SAMPLE: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 40,
    "seed": 1,
    "max_new_tokens": 120,
}


@dataclass(frozen=True)
class Recipe:
    """Everything that is chosen."""

    steps: int
    seed: int
    vocabulary: int = 1500
    hidden_size: int = 160
    layers: int = 6
    heads: int = 4
    context: int = 256
    dropout: float = 0.2
    rows_per_step: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    largest_gradient_norm: float = 1.0
    steps_between_validations: int = 100


class Split(NamedTuple):
    """A text in two parts."""

    train: str
    held_out: str


class Point(NamedTuple):
    """The losses at one step, in nats per token: training's is a mean since the last point."""

    step: int
    train: float
    validation: float


def main() -> None:
    """Train, choose, measure, and write everything into one folder."""
    options = parse()
    recipe = Recipe(steps=options.steps, seed=options.seed)
    text = options.text.read_bytes().decode("utf-8")
    split = split_text(text)
    tokenizer = train_tokenizer(split.train, recipe.vocabulary)
    tokenizer.save_pretrained(options.out)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("medium")  # bfloat16 products, where the processor has them
    model = new_model(recipe, len(tokenizer))
    before = time.perf_counter()
    points = list(train(model, recipe, tokenizer, split, options.out))
    seconds = time.perf_counter() - before
    draw_losses(points, options.out)
    record = {
        "text": describe(options.text, text, split),
        "recipe": {**asdict(recipe), "vocabulary": len(tokenizer)},
        "points": len(points),
        "chosen": min(points, key=lambda point: point.validation)._asdict(),
        "minutes": round(seconds / 60, 1),
        **results(options.out, tokenizer, split.held_out),
        **surroundings(),
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    (options.out / "README.md").write_text(card(record, options.out.resolve().name), "utf-8")
    print(record["sample"])
    print(f"\nheld-out loss {record['held_out']['nats_per_token']:.4f} nats per token")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="in UTF-8")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write into")
    parser.add_argument("--steps", type=int, default=3000, metavar="N", help="(3000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(0)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; give at least 1")
    return options


def split_text(text: str) -> Split:
    """The first nine tenths, up to the end of a speech, and the rest."""
    tenth = len(text) * 9 // 10
    end = text.find(END_OF_SPEECH, tenth)
    cut = tenth if end < 0 else end + len(END_OF_SPEECH)
    return Split(text[:cut], text[cut:])


def describe(path: Path, text: str, split: Split) -> dict[str, Any]:
    """What was trained on, such that anyone can tell whether they hold the same."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {
        "file": path.name,
        "source": KNOWN_TEXTS.get(sha256, "not recorded: a text of the user's own"),
        "sha256": sha256,
        "bytes": len(text.encode()),
        "train_characters": len(split.train),
        "held_out_characters": len(split.held_out),
    }


def train_tokenizer(text: str, size: int) -> OPTTokenizer:
    """A byte-level BPE of at most `size` tokens, special ones first and laid out as OPT's."""
    trained = byte_level_bpe({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator([text], trainer)
    state = json.loads(trained.to_str())["model"]
    # Built anew, because the trainer makes <s> and <unk> special in texts; in OPT's they are not.
    backend = byte_level_bpe(state["vocab"], [tuple(merge) for merge in state["merges"]])
    return OPTTokenizer(backend, TokenizerSettings())


def new_model(recipe: Recipe, vocabulary: int) -> OPTForCausalLM:
    """An untrained OPT: pre-norm, ReLU, learned positions, tied embeddings."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            ffn_dim=4 * recipe.hidden_size,
            num_attention_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            dropout=recipe.dropout,
        )
    )


def tokens_of(tokenizer: OPTTokenizer, text: str) -> Tensor:
    """`[N]` ids, without anything before them."""
    ids: Tensor = tokenizer.encode(text, add_special_tokens=False, return_tensors="pt")[0]
    return ids


def train(
    model: OPTForCausalLM, recipe: Recipe, tokenizer: OPTTokenizer, split: Split, out: Path
) -> Iterator[Point]:
    """Train to the end, and write the weights whenever the held-out loss is the lowest so far."""
    draw = batches(tokens_of(tokenizer, split.train), tokenizer.encode("\n")[-1], recipe)
    held_out = held_out_rows(tokens_of(tokenizer, split.held_out), recipe.context)
    optimizer = new_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    best, losses = math.inf, []
    model.train()
    progress = tqdm(range(1, recipe.steps + 1), unit="step")
    for step in progress:
        rows = next(draw)
        loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.largest_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % recipe.steps_between_validations == 0 or step == recipe.steps:
            point = Point(step, sum(losses) / len(losses), validation_loss(model, held_out))
            progress.set_postfix(train=f"{point.train:.3f}", held_out=f"{point.validation:.3f}")
            losses.clear()
            if point.validation < best:
                best = point.validation
                copy.deepcopy(model).half().save_pretrained(out)
            yield point


def batches(ids: Tensor, newline: int, recipe: Recipe) -> Iterator[Tensor]:
    """Rows `[B, T]` without end: one half starts anywhere, the other with `</s>` and a speech.

    `</s>` stands at the start of every text that a model reads; the half without it is for
    windows from the middle of a longer text.
    """
    room = len(ids) - recipe.context
    if room < 1:
        raise ValueError(
            f"the text has {len(ids)} tokens to train on; give one with more than {recipe.context}"
        )
    after_blank_line = torch.nonzero((ids[:-2] == newline) & (ids[1:-1] == newline)).flatten() + 2
    speeches = torch.cat([torch.tensor([0]), after_blank_line])
    speeches = speeches[speeches < room]
    half = recipe.rows_per_step // 2
    offsets = torch.arange(recipe.context)
    while True:
        anywhere = torch.randint(room, (recipe.rows_per_step - half, 1))
        chosen = speeches[torch.randint(len(speeches), (half, 1))]
        started = torch.nn.functional.pad(ids[chosen + offsets[:-1]], (1, 0), value=START)
        yield torch.cat([ids[anywhere + offsets], started])


def held_out_rows(ids: Tensor, context: int) -> Tensor:
    """`[N, T]`: the held-out tokens after `</s>`, each predicted once, without the last few."""
    following = torch.nn.functional.pad(ids, (1, 0), value=START)
    if len(following) < context:
        raise ValueError(
            f"the held-out part has {len(ids)} tokens, expected at least {context - 1}: give a "
            "longer text"
        )
    return following.unfold(0, context, context - 1)


@torch.no_grad()
def validation_loss(model: OPTForCausalLM, rows: Tensor) -> float:
    """The mean loss of all rows, which are equally long."""
    model.eval()
    total = 0.0
    for part in torch.split(rows, 16):
        total += len(part) * model(part, labels=part, use_cache=False).loss.item()
    model.train()
    return total / len(rows)


def new_optimizer(model: OPTForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that pulls matrices towards zero, but neither biases nor norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def rate(step: int, recipe: Recipe) -> float:
    """The share of the learning rate at a step: a straight rise, then half a cosine to zero."""
    rise = min(1.0, (step + 1) / recipe.warmup_steps)
    share = max(0, step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return rise * 0.5 * (1 + math.cos(math.pi * share))


def results(folder: Path, tokenizer: OPTTokenizer, held_out: str) -> dict[str, Any]:
    """The figures of what was written: rounded to float16, computed in full float32."""
    torch.set_float32_matmul_precision("highest")
    model = OPTForCausalLM.from_pretrained(folder)
    return {
        "parameters": model.num_parameters(),
        "held_out": figures(measure(model, tokenizer, held_out)),
        "excerpt": figures(measure(model, tokenizer, held_out[:EXCERPT_CHARACTERS])),
        "guess": math.log(len(tokenizer)),
        "sample": sample(model, tokenizer, "ROMEO:\n"),
    }


def surroundings() -> dict[str, Any]:
    """What else the numbers depend on."""
    names = ("torch", "tokenizers", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    return {"threads": torch.get_num_threads(), "versions": versions}


def measure(model: OPTForCausalLM, tokenizer: OPTTokenizer, text: str) -> Evaluation:
    """The figures of a text as `optlm eval` gives them: windows half a context apart."""
    context = model.config.max_position_embeddings
    ids = tokenizer.encode(text)
    cuts = windows(len(ids), window=context, stride=context // 2)

    @torch.no_grad()
    def logits(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        scores: np.ndarray[Any, Any] = model(torch.from_numpy(rows)).logits.numpy()
        return scores

    return evaluate(text, ids, logits, cuts)


def figures(result: Evaluation) -> dict[str, float]:
    """What the README and the tests compare."""
    return {
        "characters": result.characters,
        "tokens": result.tokens,
        "nats_per_token": round(result.nats_per_token, 6),
        "perplexity": round(result.perplexity, 4),
        "bits_per_character": round(result.bits_per_character, 6),
    }


def sample(model: OPTForCausalLM, tokenizer: OPTTokenizer, prompt: str) -> str:
    """A drawn continuation, the same each time."""
    ids = tokenizer.encode(prompt, return_tensors="pt")
    drawn = model.generate(ids, tokenizer=tokenizer, **SAMPLE)
    text: str = tokenizer.decode(drawn[0].tolist(), skip_special_tokens=True)
    return text


def draw_losses(points: list[Point], out: Path) -> None:
    """`loss.csv`, and the same as a picture."""
    with open(out / "loss.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Point._fields)
        writer.writerows((p.step, f"{p.train:.6f}", f"{p.validation:.6f}") for p in points)
    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    best = min(points, key=lambda point: point.validation)
    steps = [p.step for p in points]
    axes.plot(steps, [p.train for p in points], label="training, with dropout")
    axes.plot(steps, [p.validation for p in points], label="held-out tenth")
    axes.plot(best.step, best.validation, "o", label=f"kept: {best.validation:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats per token", title="tiny-opt")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
