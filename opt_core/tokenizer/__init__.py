"""Text to token ids and back: OPT's byte-level BPE, over the `tokenizers` library."""

from opt_core.tokenizer.decoding import DecodeStream
from opt_core.tokenizer.encoding import BatchEncoding
from opt_core.tokenizer.files import byte_level_bpe
from opt_core.tokenizer.opt import OPTTokenizer
from opt_core.tokenizer.settings import TokenizerError, TokenizerNotFound, TokenizerSettings

__all__ = [
    "BatchEncoding",
    "DecodeStream",
    "OPTTokenizer",
    "TokenizerError",
    "TokenizerNotFound",
    "TokenizerSettings",
    "byte_level_bpe",
]
