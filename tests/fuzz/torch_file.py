"""Mutated files of PyTorch's: python -m tests.fuzz.torch_file --count N --seed S."""

from __future__ import annotations

import io
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conversion import open_checkpoint
from opt_core.checkpoint import TensorSource
from tests.fuzz.mutating import Files, Target, main
from tests.fuzz.reaching import forbid

torch = pytest.importorskip("torch")

#: A folder of this ending stands for the archive of what is in it: so mutations of an entry get
#: past the archive's directory.
UNPACKED = ".unpacked"
#: What mutations splice into pickles: instructions and names, safe and unsafe ones.
FRAGMENTS = b"".join(
    [
        b"ccollections\nOrderedDict\n)R" + b"cposix\nsystem\nX\x08\x00\x00\x00touch xx\x85R",
        b"cargparse\nNamespace\n)\x81}b"
        + b"c__builtin__\neval\n"
        + b"ctorch\nSize\nK\x04\x85\x85R",
        b"ctorch._utils\n_rebuild_parameter\n" + b"comegaconf.dictconfig\nDictConfig\n)\x81",
        b"]q\x00h\x00a" * 8 + b"}q\x01h\x01s" + b"(tq\x00h\x00h\x00\x86" * 8 + b"\x85" * 40,
        b"(lp0\n0a.",
        b"\x8a\x08" + b"\xff" * 8,
        b"\x8d" + b"\xff" * 8,
        b"r\xff\xff\xff\xff",
        b"K\x00K\xff\x85K\x00\x85\x89Nt",
        b"J\xff\xff\xff\xff",
        b"M\xff\xff",
        b"\x95" + b"\0" * 8,
    ]
)


def saved(content: object, **options: Any) -> bytes:
    """What torch.save writes."""
    kept = io.BytesIO()
    torch.save(content, kept, **options)
    return kept.getvalue()


def unpacked(archive: bytes, name: str) -> dict[str, bytes]:
    """The entries of an archive as files of a folder, and fragments to splice into them."""
    folder = name + UNPACKED
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        found = {
            f"{folder}/{entry.partition('/')[2]}": opened.read(entry)
            for entry in opened.namelist()
            if not entry.rpartition("/")[2].startswith((".", "serialization"))
        }
    return {**found, f"{folder}/fragments": FRAGMENTS}


def pack(place: Path) -> None:
    """Packs every unpacked archive in a folder."""
    for folder in sorted(place.glob(f"*{UNPACKED}")):
        if not folder.is_dir():
            continue
        with zipfile.ZipFile(folder.with_suffix(""), "w") as archive:
            for file in sorted(folder.rglob("*")):
                if file.is_file() and file.name != "fragments":
                    archive.write(file, f"archive/{file.relative_to(folder)}")


def opened(place: Path) -> Mapping[str, TensorSource]:
    """The tensors of the checkpoint in a folder, which is packed first."""
    pack(place)
    return open_checkpoint(place).tensors


def states() -> list[dict[str, Any]]:
    """Small state dicts: plain, tied and strided, empty, of every width, with parameters."""
    base = torch.arange(24.0).reshape(4, 6)
    module = torch.nn.Linear(2, 3)
    return [
        OrderedDict({"decoder.fc1.weight": base, "decoder.fc1.bias": base[0].half()}),
        {
            "a": base,
            "tied": base,
            "turned": base.T,
            "step": base[:, ::2],
            "same": base[:1].expand(3, 6),
        },
        {
            "none": torch.zeros(0, 3),
            "one": torch.tensor(1.0),
            "b": base.bfloat16(),
            "i": base.long(),
        },
        dict(module.state_dict(keep_vars=True)),
        {},
    ]


def seeds() -> list[Files]:
    """Every state dict in both layouts, with old and new pickles, whole and unpacked."""
    name = "pytorch_model.bin"
    found: list[Files] = []
    for state in states():
        archive = saved(state)
        found += [{name: archive}, unpacked(archive, name)]
        found.append(unpacked(saved(state, pickle_protocol=4), name))
        found += [
            {name: saved(state, _use_new_zipfile_serialization=False, pickle_protocol=protocol)}
            for protocol in (2, 4)
        ]
    shards = [saved({key: torch.ones(3)}) for key in "ab"]
    index = b'{"weight_map": {"a": "s1.bin", "b": "s2.bin"}}'
    found.append({name + ".index.json": index, "s1.bin": shards[0], "s2.bin": shards[1]})
    return found


def target() -> Target:
    """The reader of PyTorch's files."""
    return Target("torch_file", seeds(), opened)


if __name__ == "__main__":
    made_of = target()
    forbid()
    sys.exit(main(made_of))
