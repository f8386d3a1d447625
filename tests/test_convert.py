"""Conversion from any format into any: what is written, what comes along, what stops it."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import (
    FORMATS,
    LossyConversion,
    TargetExists,
    convert,
    open_checkpoint,
    plan,
    verify,
)
from opt_core.assets import TINY_OPT
from opt_core.checkpoint import CheckpointNotFound, save
from opt_core.config import OPTConfig
from opt_core.weights import EMBEDDING_NAME, CheckpointMismatch, Head, stored_name, table
from tests.cases import SWITCHES, Arrays, configs, random_weights, tiny
from tests.hub_server import serve

DTYPES = [np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16)]
FILES_OF_THE_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    "special_tokens_map.json",
)
#: The formats, without those whose library is not here.
NAMES = [row.name for row in FORMATS if row.extra is None or find_spec("tensorstore")]
SHARDED = [row.name for row in FORMATS if any(name.endswith("index.json") for name in row.files)]


def make(
    folder: Path,
    config: OPTConfig | None = None,
    head: Head = Head.CAUSAL_LM,
    dtype: Any = np.float32,
    **changes: Any,
) -> Arrays:
    """A checkpoint of random weights in a folder; the weights by canonical name."""
    config = tiny() if config is None else config
    weights = {k: v.astype(dtype) for k, v in random_weights(config, head).items()}
    weights |= {name: values for name, values in changes.items()}
    save(folder, {stored_name(name, head): values for name, values in weights.items()})
    config.replace(architectures=[f"OPT{head.value}"]).save_pretrained(folder)
    return weights


def read(path: Path) -> Arrays:
    return {name: tensor.read() for name, tensor in open_checkpoint(path).tensors.items()}


def assert_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """The same tensors, bit by bit."""
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {
        n: (v.shape, v.dtype) for n, v in wanted.items()
    }
    assert [n for n in wanted if found[n].tobytes() != wanted[n].tobytes()] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What is written


def round_trip(
    folder: Path, config: OPTConfig, head: Head, dtype: Any, there: str, back: str, *, small: bool
) -> None:
    """Through the format `there` and on into the format `back`, in shards of 4 kB if `small`."""
    weights = make(folder / "a", config, head, dtype)
    size = {name: "4KB" if small and name in SHARDED else None for name in (there, back)}
    convert(folder / "a", folder / "b", to=there, max_shard_size=size[there])
    convert(folder / "b", folder / "c", to=back, max_shard_size=size[back], check=True)
    rows = table(config, head)
    found = {name: values for name, values in read(folder / "c").items() if name in rows}
    assert_same(found, weights)
    assert OPTConfig.from_pretrained(folder / "c") == OPTConfig.from_pretrained(folder / "b")


@pytest.mark.parametrize("there", NAMES)
@pytest.mark.parametrize("back", NAMES)
def test_a_round_trip_through_any_two_formats_changes_no_bit(
    there: str, back: str, tmp_path: Path
) -> None:
    number = NAMES.index(there) * len(NAMES) + NAMES.index(back)
    switches = list(SWITCHES.values())
    config = tiny(**switches[number % len(switches)])
    head, dtype = list(Head)[number % 4], DTYPES[number % 3]
    round_trip(tmp_path, config, head, dtype, there, back, small=number % 2 == 0)


@given(
    config=configs(),
    head=st.sampled_from(Head),
    dtype=st.sampled_from(DTYPES),
    formats=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    small=st.booleans(),
)
def test_a_round_trip_of_any_model_changes_no_bit(
    config: OPTConfig, head: Head, dtype: Any, formats: tuple[str, str], small: bool
) -> None:
    with TemporaryDirectory() as folder:
        round_trip(Path(folder), config, head, dtype, *formats, small=small)


@pytest.mark.parametrize("to", NAMES)
def test_every_source_gives_the_same_files(to: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "direct", to=to)
    for name in NAMES:
        convert(tmp_path / "a", tmp_path / name, to=name)
        convert(tmp_path / name, tmp_path / f"{name}-{to}", to=to)
        if to != "orbax":  # whose store numbers its writes
            assert contents(tmp_path / f"{name}-{to}") == contents(tmp_path / "direct")


def test_tokenizer_and_generation_options_come_along(tmp_path: Path) -> None:
    convert(TINY_OPT, tmp_path / "b", to="pytorch")
    for name in (*FILES_OF_THE_TOKENIZER, "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == Path(TINY_OPT, name).read_bytes()
    assert OPTConfig.from_pretrained(tmp_path / "b").to_dict() == (
        OPTConfig.from_pretrained(TINY_OPT).to_dict()
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_another_type_is_the_nearest_value_of_it(dtype: str, tmp_path: Path) -> None:
    weights = make(tmp_path / "a")
    done = convert(tmp_path / "a", tmp_path / "b", to="pytorch", dtype=dtype, check=True)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert_same(read(tmp_path / "b"), {k: v.astype(kind) for k, v in weights.items()})
    assert OPTConfig.from_pretrained(tmp_path / "b").dtype == dtype
    rounded = any("rounded, from float32" in note for note in done.plan.notes)
    assert rounded == (dtype in ("float16", "bfloat16"))


def test_bytes_are_counted_as_they_are_written_and_checked(tmp_path: Path) -> None:
    weights = make(tmp_path / "a")
    counted: list[int] = []
    convert(tmp_path / "a", tmp_path / "b", to="safetensors", check=True, count=counted.append)
    assert sum(counted) == 2 * sum(values.nbytes for values in weights.values())


def test_a_file_and_an_index_are_sources_too(tmp_path: Path) -> None:
    weights = make(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="pytorch", max_shard_size="4KB")
    convert(tmp_path / "a" / "model.safetensors", tmp_path / "c", to="pytorch")
    convert(tmp_path / "b" / "pytorch_model.bin.index.json", tmp_path / "d", to="pytorch")
    assert contents(tmp_path / "c") == contents(tmp_path / "d")
    assert_same(read(tmp_path / "d"), weights)


def test_a_repository_is_a_source_and_a_side_to_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make(tmp_path / "a")
    (tmp_path / "a" / "merges.txt").write_text("#version: 0.2")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with serve({"facebook/opt-tiny": files}) as server:
        server.connect(monkeypatch, tmp_path / "home")
        convert("facebook/opt-tiny", tmp_path / "b", to="flax")
        assert verify("facebook/opt-tiny", tmp_path / "b").sentence.startswith("identical")
        huggingface_hub.close_session()
    assert_same(read(tmp_path / "b"), weights)
    assert (tmp_path / "b" / "merges.txt").is_file()


def test_a_configuration_may_come_from_elsewhere(tmp_path: Path) -> None:
    make(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    config.rename(tmp_path / "config.json")
    with pytest.raises(CheckpointNotFound, match=r"has no config\.json.*--config takes .*125m"):
        convert(tmp_path / "a", tmp_path / "b", to="pytorch")
    convert(tmp_path / "a", tmp_path / "b", to="pytorch", config=tmp_path / "config.json")
    convert(tmp_path / "a", tmp_path / "c", to="pytorch", config=tiny())
    assert open_checkpoint(tmp_path / "b").tensors.keys() == table(tiny()).keys()
    with pytest.raises(CheckpointMismatch, match="of 12 layers of width 768"):
        convert(tmp_path / "a", tmp_path / "d", to="pytorch", config="125m")


def test_a_plan_reads_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    weights = make(tmp_path / "a")
    planned = plan(tmp_path / "a", tmp_path / "b", to="pytorch", max_shard_size="4KB")
    assert planned.size == sum(values.nbytes for values in weights.values())
    assert planned.pieces[0].name.startswith("pytorch_model-00001-of-")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# What stops it


def spoiled(tmp_path: Path, **changes: Any) -> Path:
    make(tmp_path / "a", **changes)
    return tmp_path / "a"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stop_it(value: float, tmp_path: Path) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM)
    weights[EMBEDDING_NAME][3, 5] = value
    source = spoiled(tmp_path, **{EMBEDDING_NAME: weights[EMBEDDING_NAME]})
    said = f"tensor '{EMBEDDING_NAME}' holds 1 values that are NaN or infinite.*allow not-finite"
    with pytest.raises(LossyConversion, match=said):
        convert(source, tmp_path / "b", to="pytorch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    done = convert(source, tmp_path / "b", to="pytorch", allow=["not-finite"], check=True)
    assert done.plan.losses.found == {"not-finite": {EMBEDDING_NAME: 1}}
    assert_same(read(tmp_path / "b"), weights)


def test_values_too_large_for_the_new_type_stop_it(tmp_path: Path) -> None:
    values = random_weights(tiny(), Head.CAUSAL_LM)[EMBEDDING_NAME]
    values[0, :2] = 70000, -1e9
    source = spoiled(tmp_path, **{EMBEDDING_NAME: values})
    said = f"2 values of tensor '{EMBEDDING_NAME}' are too large for float16.* 1e\\+09.*overflow"
    with pytest.raises(LossyConversion, match=said):
        convert(source, tmp_path / "b", to="pytorch", dtype="float16")
    convert(source, tmp_path / "c", to="pytorch", dtype="bfloat16")  # which has room for them
    done = convert(source, tmp_path / "b", to="pytorch", dtype="float16", allow=["overflow"])
    assert done.plan.losses.found == {"overflow": {EMBEDDING_NAME: 2}}
    assert read(tmp_path / "b")[EMBEDDING_NAME][0, :2].tolist() == [np.inf, -np.inf]


def test_unknown_and_missing_tensors_stop_it(tmp_path: Path) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM)
    missing = "model.decoder.layers.1.fc1.bias"
    del weights[missing]
    save(tmp_path / "a", weights | {"model.decoder.layers.0.rotary": np.ones(3, np.float32)})
    tiny().save_pretrained(tmp_path / "a")
    for allowed in ([], ["missing"], ["unknown"]):
        with pytest.raises(CheckpointMismatch) as caught:
            convert(tmp_path / "a", tmp_path / "b", to="pytorch", allow=allowed)
        assert (missing in str(caught.value)) == ("missing" not in allowed)
        assert ("layers.0.rotary" in str(caught.value)) == ("unknown" not in allowed)
        assert "--allow missing and --allow unknown" in "".join(caught.value.__notes__)
    allowed = ["missing", "unknown"]
    done = convert(tmp_path / "a", tmp_path / "b", to="pytorch", allow=allowed)
    assert done.plan.losses.found == {
        "missing": {missing: 24},
        "unknown": {"model.decoder.layers.0.rotary": 3},
    }
    assert_same(read(tmp_path / "b"), weights)


def test_a_tied_head_that_differs_stops_it(tmp_path: Path) -> None:
    head = np.zeros((40, 16), np.float32)
    source = spoiled(tmp_path, **{"lm_head.weight": head})
    with pytest.raises(LossyConversion, match=r"lm_head\.weight differs.*--allow tied-head"):
        convert(source, tmp_path / "b", to="pytorch")
    convert(source, tmp_path / "b", to="pytorch", allow=["tied-head"])
    assert_same(read(tmp_path / "b"), random_weights(tiny(), Head.CAUSAL_LM))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "gguf"}, "there is no format 'gguf'; known are safetensors, pytorch"),
        ({"to": "pytorch", "dtype": "int8"}, "dtype is 'int8'; expected one of float64"),
        ({"to": "pytorch", "allow": ["all"]}, "there is no loss all to allow; known are missing"),
        ({"to": "pytorch", "max_shard_size": "big"}, "max_shard_size is a positive number"),
        ({"to": "metaseq", "max_shard_size": "5GB"}, "the format metaseq has no shards"),
    ],
)
def test_a_bad_option_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "a", tmp_path / "b", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# The target


def test_a_target_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="pytorch")
    before = contents(tmp_path / "b")
    with pytest.raises(TargetExists, match=r"is there already; --force"):
        convert(tmp_path / "a", tmp_path / "b", to="safetensors")
    assert contents(tmp_path / "b") == before
    convert(tmp_path / "a", tmp_path / "b", to="safetensors", force=True)
    assert sorted(contents(tmp_path / "b")) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    for name, stranger in (("b", "thesis.tex"), ("file", "file"), ("link", "link")):
        with pytest.raises(TargetExists, match=f"not all of it is a checkpoint: {stranger}"):
            convert(tmp_path / "a", tmp_path / name, to="pytorch", force=True)
    assert (tmp_path / "b" / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "b").mkdir()
    convert(tmp_path / "a", tmp_path / "b", to="pytorch")
    assert (tmp_path / "b" / "pytorch_model.bin").is_file()


@pytest.mark.parametrize("target", ["a", "a/.", "link", "a/inside", ".", "b/../a"])
def test_source_and_target_may_not_lie_in_one_another(target: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="lie in one another"):
        convert(tmp_path / "a", tmp_path / target, to="pytorch", force=True)
    assert contents(tmp_path) == before


def test_a_file_may_be_converted_into_a_folder_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    convert("model.safetensors", "converted", to="pytorch")
    assert_same(read(tmp_path / "converted"), weights)
    for target in (".", "..", "../" + tmp_path.name):
        with pytest.raises(ValueError, match="lie in one another"):
            convert("model.safetensors", target, to="pytorch", force=True)


def test_folders_above_the_target_are_made(tmp_path: Path) -> None:
    make(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "x" / "y" / "b", to="pytorch")
    assert json.loads((tmp_path / "x/y/b/config.json").read_text())["model_type"] == "opt"


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_of_the_architecture_is_kept(switch: str, tmp_path: Path) -> None:
    config = tiny(**SWITCHES[switch])
    make(tmp_path / "a", config)
    convert(tmp_path / "a", tmp_path / "b", to="pytorch")
    written = OPTConfig.from_pretrained(tmp_path / "b")
    assert written.replace(architectures=None, dtype=None) == config
