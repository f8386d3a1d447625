"""A byte-level BPE vocabulary small enough to read, laid out as OPT's: special tokens first."""

import json
from pathlib import Path

from tokenizers import pre_tokenizers

from opt_core.tokenizer import OPTTokenizer, TokenizerSettings, byte_level_bpe

MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "w"),
    ("o", "r"),
    ("Ġw", "or"),
    ("Ġwor", "l"),
    ("Ġworl", "d"),
    ("Ġ", "a"),
    ("Ġ", "Ġ"),
    ("'", "s"),
    ("ã", "ģ"),  # the first two bytes of hiragana: a token that is no whole character
    ("Ġ", "hello"),
]
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
TOKENS = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES))
VOCABULARY = {token: token_id for token_id, token in enumerate(TOKENS)}


def tiny(settings: TokenizerSettings | None = None) -> OPTTokenizer:
    """A fresh tokenizer over the small vocabulary."""
    return OPTTokenizer(byte_level_bpe(VOCABULARY, MERGES), settings)


def write_files(folder: Path) -> Path:
    """`vocab.json` and `merges.txt` alone, as the oldest checkpoints have them."""
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY), encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    return folder


def ids(*tokens: str) -> list[int]:
    """The ids of tokens as the vocabulary writes them."""
    return [VOCABULARY[token] for token in tokens]
