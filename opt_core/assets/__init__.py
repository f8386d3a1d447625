"""The small trained checkpoint that ships with the package."""

from pathlib import Path

#: A folder with weights, configuration and tokenizer: a checkpoint like any other.
TINY_OPT = Path(__file__).with_name("tiny-opt")
