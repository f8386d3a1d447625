"""Checkpoints of metaseq, where OPT comes from: single files, parts, and flat shards of them."""

from conversion.metaseq.files import FILES, config_of, is_metaseq, metaseq_pieces, read_metaseq
from conversion.metaseq.names import METASEQ
from conversion.metaseq.vocabulary import without_padding

__all__ = [
    "FILES",
    "METASEQ",
    "config_of",
    "is_metaseq",
    "metaseq_pieces",
    "read_metaseq",
    "without_padding",
]
