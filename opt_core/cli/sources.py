"""The CHECKPOINT of a command line: a path, a repository of the hub, or the one that ships."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
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
    _add_local_files_only(parser)


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Two checkpoints, A and B, each as CHECKPOINT."""
    for letter in "ab":
        parser.add_argument(
            letter,
            metavar=letter.upper(),
            help=f"a folder, a file, a repository of the hub, or {SHIPPED}",
        )
    for letter in "ab":
        side = letter.upper()
        parser.add_argument(
            f"--revision-{letter}",
            metavar="REVISION",
            help=f"branch, tag or commit of {side}, if that is a repository",
        )
    _add_local_files_only(parser)


def _add_local_files_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local-files-only",
        action="store_true",
        help="take a repository from the cache, and ask nobody",
    )


def locate(
    options: argparse.Namespace,
    *,
    companions: Sequence[str] = (),
    before: Callable[[Mapping[str, int]], object] | None = None,
) -> Path:
    """The local folder or file that holds the weights, fetched from the hub if need be.

    Of a repository come `companions` too, if it has them; `before` is told what will be
    downloaded, bytes by file.

    Raises:
        HubError: there is no such path, or the repository cannot be read.
    """
    from conversion import located
    from opt_core.generation import GENERATION_FILE

    return located(
        named_source(options.checkpoint),
        companions=[GENERATION_FILE, *companions],
        before=before,
        options=_hub_options(options),
    )


def locate_pair(options: argparse.Namespace) -> tuple[Path, Path]:
    """As `locate`, of A and B, with the files of their tokenizers.

    Raises:
        HubError: there is no such path, or the repository cannot be read.
    """
    from conversion import located

    only = options.local_files_only
    a, b = (
        located(named_source(named), options={"revision": revision, "local_files_only": only})
        for named, revision in ((options.a, options.revision_a), (options.b, options.revision_b))
    )
    return a, b


def tokenizer(options: argparse.Namespace) -> OPTTokenizer:
    """The tokenizer that lies beside the weights.

    Raises:
        TokenizerError: there is none, or its files are damaged.
        HubError: the repository cannot be read.
    """
    from opt_core.tokenizer import OPTTokenizer

    return OPTTokenizer.from_pretrained(named_source(options.checkpoint), **_hub_options(options))


def named_source(named: str) -> str | Path:
    """What a command line names: as it is, or the checkpoint that ships."""
    if named != SHIPPED or Path(named).exists():
        return named
    from opt_core.assets import TINY_OPT

    return TINY_OPT


def _hub_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("revision", "subfolder", "local_files_only")
    return {name: getattr(options, name) for name in names}
