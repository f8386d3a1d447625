"""Where a `config.json` lies and how its text is read."""

import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"


def config_path(source: Path) -> Path:
    """Where the `config.json` of a folder, or of a weight file in it, must be.

    Raises:
        CheckpointNotFound: it is not there.
    """
    from opt_core.checkpoint import CheckpointNotFound

    path = source / CONFIG_FILE if source.is_dir() else source
    if path.suffix != ".json" or path.name.endswith(".index.json"):
        path = path.parent / CONFIG_FILE
    if not path.is_file():
        raise CheckpointNotFound(
            f"{path.parent} has no {CONFIG_FILE}: without it nobody knows the model's shape; "
            "copy it from where the weights come from, or pass config="
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the text is not UTF-8, not JSON or no object; names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as fault:
        raise ValueError(f"{path} is not UTF-8 text: {fault}") from fault
    except (json.JSONDecodeError, RecursionError) as fault:
        raise ValueError(f"{path} is not JSON: {fault}") from fault
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values
