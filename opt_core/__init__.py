"""What OPT is, for every framework: configuration, weights, files, text, decoding, reference."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from opt_core.version import __version__

if TYPE_CHECKING:
    from opt_core.config import OPTConfig
    from opt_core.generation import GenerationConfig, TextIteratorStreamer, TextStreamer
    from opt_core.tokenizer import OPTTokenizer

__all__ = [
    "GenerationConfig",
    "OPTConfig",
    "OPTTokenizer",
    "TextIteratorStreamer",
    "TextStreamer",
    "__version__",
]

# Where each name lives. They are imported when they are first asked for: the tokenizer's library
# alone takes longer than everything that `import opt_core` needs.
_HOMES = {
    "GenerationConfig": "opt_core.generation",
    "OPTConfig": "opt_core.config",
    "OPTTokenizer": "opt_core.tokenizer",
    "TextIteratorStreamer": "opt_core.generation",
    "TextStreamer": "opt_core.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
