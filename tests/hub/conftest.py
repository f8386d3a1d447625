"""A hub on the loopback interface with three repositories, and a client that waits for nothing."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from tests.hub_server import Server, serve

OPT = "facebook/opt-tiny"
WEIGHTS = b"w" * 100_000
FILES = {
    "config.json": b'{"model_type": "opt"}',
    "merges.txt": b"#version: 0.2",
    "README.md": b"# OPT",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"b" * 50,
    "flax_model.msgpack": b"f" * 50,
}
ONE_OF = [
    ["model.safetensors"],
    ["model.safetensors.index.json"],
    ["pytorch_model.bin"],
    ["pytorch_model.bin.index.json"],
]


def index_of(*shards: object) -> bytes:
    return json.dumps(
        {"weight_map": {f"layer.{i}": name for i, name in enumerate(shards)}}
    ).encode()


SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": index_of("part-1.safetensors", "part-2.safetensors"),
    "part-1.safetensors": b"1" * 1000,
    "part-2.safetensors": b"2" * 1000,
    "part-3.safetensors": b"3" * 1000,
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve({OPT: FILES, "opt": FILES, "facebook/opt-1.3b": SHARDED}) as server:
        server.connect(monkeypatch, tmp_path / "home")
        yield server
        huggingface_hub.close_session()


def unplug(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points the client at a port where nobody listens."""
    gone = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", gone)
    template = gone + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the client retry without waiting."""
    clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
