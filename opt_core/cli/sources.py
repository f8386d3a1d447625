"""The CHECKPOINT of a command line: a path, a repository of the hub, or the one that ships."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_core.tokenizer import OPTTokenizer

#: What a command line calls the checkpoint that ships; a path of that name comes first.
SHIPPED = "tiny-opt"


def add_options(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT, and where in the hub it is looked for."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=f"a folder, a file, a repository of the hub, or {SHIPPED}",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--subfolder", default="", help="folder inside the folder or repository")
    parser.add_argument(
        "--local-files-only",
        action="store_true",
        help="take a repository from the cache, and ask nobody",
    )


def locate(options: argparse.Namespace) -> Path:
    """The local folder or file that holds the weights, fetched from the hub if need be.

    Raises:
        HubError: there is no such path, or the repository cannot be read.
    """
    from conversion import WEIGHT_FILES
    from opt_core import hub
    from opt_core.config import CONFIG_FILE
    from opt_core.generation import GENERATION_FILE

    return hub.resolve(
        _source(options),
        files=[CONFIG_FILE],
        optional=[GENERATION_FILE],
        one_of=WEIGHT_FILES,
        **_hub_options(options),
    )


def tokenizer(options: argparse.Namespace) -> OPTTokenizer:
    """The tokenizer that lies beside the weights.

    Raises:
        TokenizerError: there is none, or its files are damaged.
        HubError: the repository cannot be read.
    """
    from opt_core.tokenizer import OPTTokenizer

    return OPTTokenizer.from_pretrained(_source(options), **_hub_options(options))


def _source(options: argparse.Namespace) -> str | Path:
    named: str = options.checkpoint
    if named != SHIPPED or Path(named).exists():
        return named
    from opt_core.assets import TINY_OPT

    return TINY_OPT


def _hub_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("revision", "subfolder", "local_files_only")
    return {name: getattr(options, name) for name in names}
