"""Other people's checkpoint files, read and written as NumPy arrays without any framework."""

from conversion.converting import Conversion, TargetExists, carry_out, check_target, convert
from conversion.formats import FORMATS, WEIGHT_FILES, Format, format_named, open_checkpoint
from conversion.losses import LOSSES, LossyConversion
from conversion.names import canonical_name, stored_names
from conversion.planning import Plan, plan
from conversion.pretrained import COMPANIONS, Pretrained, located, open_pretrained
from conversion.torch_file import read_torch_file
from conversion.verifying import Verification, verify

__all__ = [
    "COMPANIONS",
    "FORMATS",
    "LOSSES",
    "WEIGHT_FILES",
    "Conversion",
    "Format",
    "LossyConversion",
    "Plan",
    "Pretrained",
    "TargetExists",
    "Verification",
    "canonical_name",
    "carry_out",
    "check_target",
    "convert",
    "format_named",
    "located",
    "open_checkpoint",
    "open_pretrained",
    "plan",
    "read_torch_file",
    "stored_names",
    "verify",
]
