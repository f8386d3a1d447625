"""The configuration: every field, what it may be, the published sizes, and its JSON file."""

from opt_core.config.files import CONFIG_FILE, config_path
from opt_core.config.opt import OPTConfig
from opt_core.config.presets import PRESETS
from opt_core.config.rules import ACTIVATIONS, DTYPES, DecoderConfig

__all__ = [
    "ACTIVATIONS",
    "CONFIG_FILE",
    "DTYPES",
    "PRESETS",
    "DecoderConfig",
    "OPTConfig",
    "config_path",
]
