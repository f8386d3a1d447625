"""Orbax's folders that are damaged, lie, lead outside or change; and mutated ones."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conversion import open_checkpoint
from conversion.flax_file import read_orbax
from opt_core.checkpoint import CheckpointDamaged, CheckpointNotFound, CheckpointUnsafe
from opt_core.weights import Head
from tests.cases import tiny
from tests.written import weights_of, write

pytest.importorskip("tensorstore", reason="the extra [orbax] is not installed")

from tests.fuzz.checksums import mended
from tests.fuzz.mutating import fuzz
from tests.fuzz.orbax import files_of, target

CONFIG = tiny(vocab_size=12, num_hidden_layers=1, max_position_embeddings=6)
KERNEL = "model/decoder/layers/0/fc1/kernel"


def ours(folder: Path) -> Path:
    write(folder, "orbax", weights_of(CONFIG, Head.CAUSAL_LM), CONFIG)
    return folder / "params"


def plain(folder: Path) -> Path:
    """A folder with a zarr array a tensor."""
    for name, content in target().seeds[2].items():
        (folder / "params" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "params" / name).write_bytes(content)
    return folder / "params"


def read_all(folder: Path) -> dict[str, bytes]:
    return {name: tensor.read().tobytes() for name, tensor in read_orbax(folder).items()}


@pytest.mark.parametrize("make", [ours, plain])
def test_a_file_that_is_missing_or_cut_short_never_changes_a_value(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path)
    wanted = read_all(folder)
    noticed = set()
    for name, content in files_of(folder).items():
        for shorter in (b"", content[:-1], content[: len(content) // 2], None):
            if shorter is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(shorter)
            # A database keeps what belongs to none of its tensors any more: that may go.
            try:
                assert read_all(folder) == wanted
            except (CheckpointDamaged, CheckpointNotFound):
                noticed.add(name)
        (folder / name).write_bytes(content)
    unused = {name for name in files_of(folder) if name.startswith(("_CHECK", "array_", "d/"))}
    assert noticed >= files_of(folder).keys() - unused
    assert len(noticed) >= 3


def test_missing_values_do_not_read_as_zeros(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    (folder / KERNEL.replace("/", ".") / "0.0").unlink()
    tensors = read_orbax(folder)
    with pytest.raises(CheckpointDamaged, match=r"fc1/kernel' cannot be read.* missing"):
        tensors[KERNEL].read()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"shape": [4, 7]}, r"has shape \(4, 7\), but _METADATA says \[4, 6\]"),
        ({"chunks": [2**20, 2**20]}, "is more than its files could hold"),
        ({"chunks": [4, 3]}, "cannot be read"),
        ({"dtype": "<f8"}, "cannot be read"),
        ({"dtype": "|O"}, "cannot be opened"),
        ({"dtype": [["a", "<f4"], ["b", "<f4"]]}, "cannot be opened"),
        ({"compressor": {"id": "pickle"}}, "cannot be opened"),
        ({"zarr_format": 3}, "cannot be opened"),
    ],
)
def test_an_array_that_lies_is_refused(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    folder = plain(tmp_path)
    path = folder / KERNEL.replace("/", ".") / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointDamaged, match=fault) as caught:
        read_all(folder)
    assert KERNEL in str(caught.value)
    assert "tensorstore_spec" not in str(caught.value)


def test_a_claim_of_more_than_the_files_could_hold_takes_no_memory(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    tree = (folder / "_METADATA").read_text()
    (folder / "_METADATA").write_text(tree.replace("[4, 6]", f"[{2**40}, 6]"))
    path = folder / KERNEL.replace("/", ".") / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [2**40, 6]}))
    with pytest.raises(CheckpointDamaged, match="is more than its files could hold"):
        read_orbax(folder)


def entry(*keys: object, kind: object = "np.ndarray") -> dict[str, Any]:
    parts = [{"key": key, "key_type": 2} for key in keys]
    return {"key_metadata": parts, "value_metadata": {"value_type": kind}}


@pytest.mark.parametrize(
    ("tree", "kind", "fault"),
    [
        ({}, CheckpointDamaged, "has no tree_metadata"),
        ({"tree_metadata": []}, CheckpointDamaged, "has no tree_metadata"),
        ({"tree_metadata": {"a": 1}}, CheckpointDamaged, "an entry has no keys or no type"),
        ({"tree_metadata": {"a": {}}}, CheckpointDamaged, "an entry has no keys or no type"),
        ({"tree_metadata": {"a": entry()}}, CheckpointDamaged, "an entry has keys"),
        ({"tree_metadata": {"a": entry(1)}}, CheckpointDamaged, "an entry has keys"),
        ({"tree_metadata": {"a": entry("")}}, CheckpointDamaged, "an entry has keys"),
        ({"tree_metadata": {"a": entry("x", kind="string")}}, CheckpointDamaged, "type 'string'"),
        ({"tree_metadata": {"a": entry("x"), "b": entry("x")}}, CheckpointDamaged, "'x' twice"),
        ({"tree_metadata": {"a": entry("x.y"), "b": entry("x", "y")}}, CheckpointDamaged, "twice"),
        ({"tree_metadata": {"a": entry("../../x")}}, CheckpointUnsafe, "would lead out of the"),
        ({"tree_metadata": {"a": entry(".")}}, CheckpointUnsafe, "would lead out of the folder"),
        ({"tree_metadata": {"a": entry(".", "")}}, CheckpointDamaged, "an entry has keys"),
        ({"tree_metadata": {"a": entry("a\0")}}, CheckpointUnsafe, "would lead out of the folder"),
        ({"tree_metadata": {"a": entry("absent")}}, CheckpointDamaged, "cannot be opened"),
    ],
)
def test_a_tree_that_is_none_or_leads_outside_is_refused(
    tree: Any, kind: type[Exception], fault: str, tmp_path: Path
) -> None:
    (tmp_path / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(kind, match=re.escape(fault)) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_a_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"there is no file .*params/_METADATA"):
        open_checkpoint(tmp_path)
    (tmp_path / "params/_METADATA").write_text(" " * 2**23 + "{}")
    with pytest.raises(CheckpointDamaged, match="of 8388610 bytes is no description of a tree"):
        open_checkpoint(tmp_path)
    (tmp_path / "params/_METADATA").write_text("[" * 100_000)
    with pytest.raises(CheckpointDamaged, match="_METADATA: it is no valid JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("start", ["../", "d/../../", "d/./", "d//"])
def test_a_manifest_that_points_outside_is_refused(start: str, tmp_path: Path) -> None:
    import tensorstore as ts

    folder, values = tmp_path / "a/params", plain(tmp_path / "plain")
    base = {"driver": "file", "path": f"{folder}/"}
    spec = {"driver": "ocdbt", "base": base, "config": {"compression": None}}
    with ts.Transaction() as commit:  # of one data file
        database = ts.KvStore.open(spec).result().with_transaction(commit)
        for name, content in files_of(values).items():
            database[name] = content
    shutil.copy(values / "_METADATA", folder)
    read_all(folder)
    (inside,) = (name for name in files_of(folder) if name.startswith("d/"))
    outside = start + "x" * (len(inside) - len(start))
    for name, content in files_of(folder).items():
        moved = mended(name, content.replace(inside.encode(), outside.encode()))
        (folder / name).write_bytes(moved)
        if name == inside:
            (folder / outside).resolve().write_bytes(moved)
    with pytest.raises(CheckpointDamaged, match=f"Invalid key.*{re.escape(outside)}"):
        read_all(folder)


def test_a_pipe_in_the_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    folder = ours(tmp_path)
    os.mkfifo(folder / "d/pipe")
    with pytest.raises(CheckpointUnsafe, match="d/pipe is no regular file"):
        read_orbax(folder)


def test_a_folder_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    folder = ours(tmp_path)
    tensors = read_orbax(folder)
    os.utime(folder / "manifest.ocdbt", ns=(1, 1))
    with pytest.raises(CheckpointDamaged, match=r"manifest\.ocdbt has changed since"):
        tensors[KERNEL].read()
    tensors = read_orbax(folder)
    shutil.rmtree(folder)
    with pytest.raises((CheckpointDamaged, CheckpointNotFound)):
        tensors[KERNEL].map()


def test_mutated_folders_are_refused_or_read(tmp_path: Path) -> None:
    report = fuzz(target(), tmp_path, count=100, seed=2)
    assert report.failures == []
    assert {"read", "CheckpointDamaged"} <= report.outcomes.keys()
