"""Other people's checkpoint files, read and written as NumPy arrays without any framework."""

from conversion.formats import FORMATS, WEIGHT_FILES, Format, format_named, open_checkpoint
from conversion.names import canonical_name, canonical_names, stored_names
from conversion.pretrained import Pretrained, open_pretrained
from conversion.torch_file import read_torch_file

__all__ = [
    "FORMATS",
    "WEIGHT_FILES",
    "Format",
    "Pretrained",
    "canonical_name",
    "canonical_names",
    "format_named",
    "open_checkpoint",
    "open_pretrained",
    "read_torch_file",
    "stored_names",
]
