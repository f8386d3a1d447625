"""Mutated Orbax folders: python -m tests.fuzz.orbax --count N --seed S."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from conversion.flax_file import read_orbax, write_orbax
from conversion.flax_file.orbax_folder import MANIFEST_FILE
from opt_core.checkpoint import read_safetensors, save
from tests.fuzz.checksums import mended
from tests.fuzz.msgpack import ARRAYS
from tests.fuzz.mutating import Files, Target, main


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by the path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def seeds(folder: Path) -> list[Files]:
    """One database, without compression as we write it and with it, and plain zarr arrays."""
    import tensorstore as ts

    save(folder / "plain", ARRAYS)
    tensors = read_safetensors(folder / "plain/model.safetensors")
    write_orbax(folder / "ours", tensors, lambda size: None)
    found: list[Files] = [files_of(folder / "ours")]
    tree = (folder / "ours/_METADATA").read_text()
    for driver, database in (("zarr", True), ("zarr", False), ("zarr3", False)):
        place = folder / f"{driver} {database}"
        for name, array in ARRAYS.items():
            base = {"driver": "file", "path": f"{place}/"}
            inner = name.replace("/", ".") + "/"
            kvstore = (
                {"driver": "ocdbt", "base": base, "path": inner, "config": {"compression": None}}
                if database
                else {**base, "path": f"{place}/{inner}"}
            )
            spec = {"driver": driver, "kvstore": kvstore}
            store = ts.open(spec, create=True, shape=array.shape, dtype=array.dtype.name).result()
            store.write(array).result()
        said = tree if driver == "zarr" else tree.replace('"use_zarr3": false', '"use_zarr3": true')
        (place / "_METADATA").write_text(said)
        found.append(files_of(place))
    assert MANIFEST_FILE in found[1]
    return found


def target() -> Target:
    """The reader of Orbax's folders."""
    with tempfile.TemporaryDirectory() as folder:
        made = seeds(Path(folder))
    return Target("orbax", made, lambda place: read_orbax(place), mended)


if __name__ == "__main__":
    sys.exit(main(target()))
