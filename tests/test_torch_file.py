"""Files of torch.save, read without torch: every value, and nothing but values."""

import io
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import read_torch_file

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_save(content: object, path: Path, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def assert_same(path: Path, wanted: dict[str, Any]) -> None:
    found = read_torch_file(path)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        bits = tensor.detach().view(INTEGERS[tensor.element_size()]).numpy().tobytes()
        for values in (found[name].read(), found[name].map()):
            assert values.shape == tuple(tensor.shape)
            assert values.tobytes() == bits


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Any]:
    """Tensors and views of a few storages: tied, sliced, transposed, expanded, empty, scalar."""
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    state: dict[str, Any] = OrderedDict()
    for key in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(key)).to(draw(dtypes))
        state[f"{key}.whole"] = whole
        views = draw(st.sets(st.sampled_from(["tied", "transposed", "last", "step", "expanded"])))
        if "tied" in views:
            state[f"{key}.tied"] = whole
        if "transposed" in views:
            state[f"{key}.transposed"] = whole.permute(tuple(reversed(range(whole.ndim))))
        if "last" in views and whole.ndim:
            state[f"{key}.last"] = whole[-1:]
        if "step" in views and whole.ndim:
            state[f"{key}.step"] = whole[..., ::2]
        if "expanded" in views:
            state[f"{key}.expanded"] = whole[None].expand(3, *whole.shape)
    return state


def repacked(path: Path, zip64: bool = False, method: int = zipfile.ZIP_STORED) -> Path:
    """The same archive as another program might have packed it."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in entries.items():
            with out.open(name, "w", force_zip64=zip64) as entry:
                entry.write(data)
    return path


@given(state=state_dicts(), zipped=st.booleans(), protocol=st.integers(2, 5))
def test_any_state_dict_is_read_bit_for_bit(
    state: dict[str, Any], zipped: bool, protocol: int, tmp_path: Path
) -> None:
    assert_same(torch_save(state, tmp_path / "x.bin", zipped, protocol), state)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "bool"),
        *("uint8", "uint16", "uint32", "uint64"),
    ],
)
def test_every_type_is_read(tmp_path: Path, name: str, zipped: bool) -> None:
    state = {"x": torch.arange(5).to(getattr(torch, name))}
    assert_same(torch_save(state, tmp_path / "x.bin", zipped), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_modules_state_dict_is_read_with_its_metadata_left_out(
    tmp_path: Path, zipped: bool
) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    for state in (module.state_dict(), module.state_dict(keep_vars=True)):
        assert hasattr(state, "_metadata")
        assert_same(torch_save(state, tmp_path / "x.bin", zipped), state)


def test_tied_tensors_lie_at_the_same_place(tmp_path: Path) -> None:
    shared = torch.randn(4, 5)
    path = torch_save({"a": shared, "b": shared, "c": shared.T}, tmp_path / "x.bin")
    found = read_torch_file(path)
    assert found["a"] == found["b"]
    assert (found["c"].offset, found["c"].strides) == (found["a"].offset, (1, 5))


def test_neither_the_name_nor_the_folder_inside_an_archive_matters(tmp_path: Path) -> None:
    state = {"x": torch.randn(3)}
    path = torch_save(state, tmp_path / "strange name.data")
    with zipfile.ZipFile(path) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} != {"archive"}
    assert_same(path, state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getvalue())
    assert_same(path, state)


def test_a_large_archive_with_64_bit_offsets_is_read_in_place(tmp_path: Path) -> None:
    path = repacked(torch_save({"x": torch.arange(9)}, tmp_path / "x.bin"), zip64=True)
    assert_same(path, {"x": torch.arange(9)})


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    path = torch_save({"x": torch.randn(3)}, tmp_path / "x.bin")
    code = "import sys, conversion; conversion.read_torch_file(sys.argv[1])['x'].read()\n"
    code += "assert 'torch' not in sys.modules and 'pickle' not in dir(conversion.torch_file)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=ROOT)
