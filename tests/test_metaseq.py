"""Checkpoints of metaseq: files, parts and flat shards give the weights they were made from."""

import argparse
import enum
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import convert, format_named, open_checkpoint, open_pretrained
from conversion.metaseq import config_of, without_padding
from opt_core.checkpoint import (
    Checkpoint,
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
    StoredTensor,
)
from opt_core.config import OPTConfig
from opt_core.weights import Head, fit
from tests import metaseq_files as made
from tests.cases import HEADS, SWITCHES, Arrays, random_weights, tiny
from tests.fuzz.metaseq import target
from tests.fuzz.mutating import fuzz
from tests.test_weights_table import Held

torch = pytest.importorskip("torch")

EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
TYPES = [np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16)]
CONFIG = tiny(vocab_size=48, hidden_size=24, ffn_dim=36, num_attention_heads=12)
WEIGHTS = random_weights(CONFIG, Head.CAUSAL_LM)
STATE = made.metaseq_state(WEIGHTS)


def assert_holds(checkpoint: Checkpoint, weights: Arrays) -> None:
    """The weights bit by bit, however they are read."""
    assert checkpoint.format == "metaseq"
    assert checkpoint.tensors.keys() == weights.keys()
    for name, values in weights.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.shape, tensor.dtype) == (values.shape, values.dtype), name
        assert tensor.read().tobytes() == values.tobytes(), name
        assert tensor.map().tobytes() == values.tobytes(), name
        for axis, length in enumerate(values.shape):
            part = slice(length // 3, length - length // 4)
            window = (slice(None),) * axis + (part,)
            assert tensor.read(part, axis=axis).tobytes() == values[window].tobytes(), name


# The reference checkpoints


@pytest.mark.parametrize(
    ("file", "case"),
    [
        ("", "lm_base"),
        ("restored.pt", "lm_base"),
        ("consolidated_fused.pt", "lm_base"),
        ("consolidated_fused_fp16.pt", "lm_base"),
        ("consolidated_fused_args_namespace.pt", "lm_base"),
        ("mp2", "lm_base"),
        ("mp2/reshard-model_part-1.pt", "lm_base"),
        ("mp2_separate_kvq", "lm_base"),
        ("post_ln_proj", "lm_post_ln_proj"),
    ],
)
def test_a_reference_file_holds_the_weights_of_its_case(shared: Path, file: str, case: str) -> None:
    path = shared / "reference/metaseq" / file
    original = open_checkpoint(shared / "reference/opt" / case)
    wanted = {name: tensor.read() for name, tensor in original.tensors.items()}
    if "fp16" in file:
        wanted = {name: values.astype(np.float16) for name, values in wanted.items()}
    opened = open_checkpoint(path)
    if HEAD in opened.tensors:  # a copy of the embedding, which the weight table drops
        assert file.startswith(("consolidated", "post_ln_proj"))
        wanted[HEAD] = wanted[EMBEDDING]
    assert_holds(opened, wanted)
    config = OPTConfig.from_pretrained(shared / "reference/opt" / case)
    assert fit(config, Head.CAUSAL_LM, opened.tensors, source="it").new == []
    fields = config_of(path)
    assert fields is not None
    assert {name: getattr(config, name) for name in fields} == fields


def test_opening_reads_no_tensor(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(StoredTensor, "read")
    for path in ("restored.pt", "consolidated_fused.pt", "mp2"):
        assert open_checkpoint(shared / "reference/metaseq" / path).tensors


# Parts and shards


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_parts_are_joined_in_the_order_of_their_numbers(
    tmp_path: Path, count: int, is_fused: bool
) -> None:
    states = made.parts_of(STATE, count)
    folder = made.save_parts(tmp_path, [made.fused(s) if is_fused else s for s in states])
    opened = open_checkpoint(folder)
    assert_holds(opened, WEIGHTS)
    assert [file.name for file in opened.files] == [
        f"reshard-model_part-{number}.pt" for number in range(count)
    ]
    kind = "qkv_proj" if is_fused else "k_proj"
    name = "model.decoder.layers.1.self_attn.k_proj.bias"
    assert opened.original_names[name] == f"decoder.layers.1.self_attn.{kind}.bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("parts", "shards"), [(1, 1), (1, 3), (1, 4), (1, 7), (1, 50), (2, 2), (2, 5), (3, 4), (12, 1)]
)
def test_flat_shards_give_the_tensors_they_were_cut_from(
    tmp_path: Path, parts: int, shards: int, dtype: Any
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    states = [made.fused(part) for part in made.parts_of(state, parts)]
    folder = made.save_shards(tmp_path, states, shards)
    kind = TYPES[[torch.float32, torch.float16, torch.bfloat16].index(dtype)]
    wanted = {name: values.astype(kind) for name, values in WEIGHTS.items()}
    opened = open_checkpoint(folder)
    assert_holds(opened, wanted)
    assert len(opened.files) == parts * shards


def test_a_tensor_within_one_shard_is_mapped_from_its_file(tmp_path: Path) -> None:
    folder = made.save_shards(tmp_path, [made.fused(STATE)], 2)
    tensors = open_checkpoint(folder).tensors
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    assert isinstance(tensors[name], StoredTensor)
    assert not all(isinstance(tensor, StoredTensor) for tensor in tensors.values())


def test_a_shared_parameter_of_flat_shards_is_one_tensor(tmp_path: Path) -> None:
    for rank, content in enumerate(made.shards_of(STATE, 2, tied=True)):
        made.save(content, tmp_path / f"checkpoint_last-shard{rank}.pt")
    assert_holds(open_checkpoint(tmp_path), WEIGHTS)


def test_one_file_of_several_stands_for_all_of_its_checkpoint(tmp_path: Path) -> None:
    states = made.parts_of(STATE, 2)
    made.save_parts(tmp_path, states, "checkpoint_1_100")
    made.save_shards(tmp_path, made.parts_of(made.metaseq_state(OTHER), 2), 2, "checkpoint_1_200")
    for file in ("checkpoint_1_100-model_part-0.pt", "checkpoint_1_100-model_part-1.pt"):
        assert_holds(open_checkpoint(tmp_path / file), WEIGHTS)
    assert_holds(open_checkpoint(tmp_path / "checkpoint_1_200-model_part-1-shard0.pt"), OTHER)
    with pytest.raises(CheckpointError, match=r"several checkpoints, 'checkpoint_1_100' and 'che"):
        open_checkpoint(tmp_path)


OTHER = random_weights(CONFIG, Head.CAUSAL_LM, seed=1)


@pytest.mark.parametrize(
    ("removed", "fault"),
    [
        ("model_part-1-shard0", r"lacks reshard-model_part-1-shard0\.pt, though it holds later"),
        ("model_part-0-shard1", r"shard 1 is missing beside .*reshard-model_part-0-shard0\.pt"),
        ("model_part-2-shard[01]", r"part 2 is missing beside .*part-0-shard0\.pt, .*part-1-shar"),
        ("model_part-1-shard[01]", r"lacks reshard-model_part-1-shard0\.pt, though it holds later"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, removed: str, fault: str) -> None:
    made.save_shards(tmp_path, made.parts_of(STATE, 3), 2, "reshard")
    for file in tmp_path.glob(f"*{removed}.pt"):
        file.unlink()
    with pytest.raises(CheckpointNotFound, match=fault):
        open_checkpoint(tmp_path)


def test_files_that_are_no_one_checkpoint_are_refused(tmp_path: Path) -> None:
    made.save_parts(tmp_path / "a", made.parts_of(STATE, 2))
    shutil.copy(tmp_path / "a/reshard-model_part-0.pt", tmp_path / "a/reshard-model_part-00.pt")
    with pytest.raises(CheckpointDamaged, match=r"part-0\.pt and .*part-00\.pt cannot be of one"):
        open_checkpoint(tmp_path / "a")
    made.save_parts(tmp_path / "b", made.parts_of(STATE, 2))
    shutil.copy(tmp_path / "b/reshard-model_part-0.pt", tmp_path / "b/reshard-shard0.pt")
    with pytest.raises(CheckpointDamaged, match=r"cannot be of one checkpoint: remove one"):
        open_checkpoint(tmp_path / "b")
    made.save_parts(tmp_path / "c", made.parts_of(STATE, 2))
    shutil.copy(tmp_path / "c/reshard-model_part-0.pt", tmp_path / "c/reshard-model_part-2.pt")
    with pytest.raises(CheckpointDamaged, match=r"are 3 parts, but .* is one of 2"):
        open_checkpoint(tmp_path / "c")


def changed(number: int, name: str, change: Any) -> list[dict[str, Any]]:
    """Three fused parts, one tensor of one of them changed; None takes it out."""
    states = [made.fused(state) for state in made.parts_of(STATE, 3)]
    tensor = change(states[number].pop(name))
    return [
        *states[:number],
        states[number] | ({} if tensor is None else {name: tensor}),
        *states[number + 1 :],
    ]


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        (
            "decoder.layer_norm.weight",
            lambda t: None,
            r"part-0\.pt holds 'decoder\.layer_norm\.w.*",
        ),
        (
            "decoder.layer_norm.weight",
            lambda t: t.half(),
            r"is of shape \(24,\) and type float32 in",
        ),
        (
            "decoder.layers.0.fc1.weight",
            lambda t: t[1:],
            r"\(11, 24\) and type float32 in .*part-1",
        ),
        ("decoder.layers.0.fc2.weight", lambda t: t[1:], r"but of shape \(23, 12\)"),
        ("decoder.layers.0.fc2.weight", lambda t: t[0], r"but of shape \(12,\)"),
        ("decoder.layers.0.self_attn.qkv_proj.bias", lambda t: t[1:], r"but of shape \(23,\)"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused_with_the_tensors_name(
    tmp_path: Path, name: str, change: Any, fault: str
) -> None:
    made.save_parts(tmp_path, changed(1, name, change))
    with pytest.raises(CheckpointDamaged, match=fault) as caught:
        open_checkpoint(tmp_path)
    assert name in str(caught.value)


def test_rows_that_three_does_not_divide_are_no_fused_projection(tmp_path: Path) -> None:
    name = "decoder.layers.0.self_attn.qkv_proj.bias"
    cut = [state | {name: state[name][1:]} for state in map(made.fused, made.parts_of(STATE, 2))]
    with pytest.raises(CheckpointDamaged, match=r"\(35,\) should hold K, V and Q"):
        open_checkpoint(made.save_parts(tmp_path / "two", cut))
    file = made.save({"model": {name: torch.zeros(4)}}, tmp_path / "restored.pt")
    with pytest.raises(CheckpointDamaged, match=r"\(4,\) should hold K, V and Q"):
        open_checkpoint(file)
    scalar = [
        state | {name: torch.tensor(1.0)} for state in map(made.fused, made.parts_of(STATE, 2))
    ]
    with pytest.raises(CheckpointDamaged, match=r"\(\) in .* should be split on its axis 0"):
        open_checkpoint(made.save_parts(tmp_path / "scalar", scalar))


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("decoder.layers.1.fc2.bias", "model.decoder.layers.1.fc2.bias"),
        (
            "decoder.layers.1.self_attn.out_proj.bias",
            "model.decoder.layers.1.self_attn.out_proj.bias",
        ),
        ("decoder.layer_norm.weight", "model.decoder.final_layer_norm.weight"),
        ("decoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
    ],
)
def test_what_every_part_holds_must_be_the_same_in_all_of_them_wherever_it_is_read(
    tmp_path: Path, name: str, canonical: str
) -> None:
    def spoil(tensor: Any) -> Any:
        tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(9.0))
        return tensor

    opened = open_checkpoint(made.save_parts(tmp_path, changed(2, name, spoil)))
    tensor = opened.tensors[canonical]
    last = slice(tensor.shape[0] - 1, None)
    for read in (tensor.read, tensor.map, lambda: tensor.read(last)):
        with pytest.raises(
            CheckpointDamaged, match=r"is not the same in .*part-0.* and in .*part-2"
        ):
            read()
    assert tensor.read(slice(0, 1)).size
    with pytest.raises(CheckpointDamaged, match=f"'{name}' is not the same"):
        tensor.read()


# Flat shards whose metadata lie


def described(shard: dict[str, Any], number: int = 1) -> dict[str, Any]:
    """The metadata of one module's flat run."""
    run: dict[str, Any] = shard["shard_metadata"]["param_metadata"][number]["params"][
        "flat_param_0"
    ]
    return run


def set_first(shards: list[dict[str, Any]], key: str, value: Any) -> None:
    """Changes the first of the names or shapes of a run, alike in all shards."""
    for shard in shards:
        run = described(shard)
        run[key] = [value, *run[key][1:]]


def add_shape(shards: list[dict[str, Any]], shape: tuple[int, ...]) -> None:
    """Puts one more tensor at the end of a run, alike in all shards."""
    for shard in shards:
        run = described(shard)
        run["names"], run["shapes"] = [*run["names"], "more"], [*run["shapes"], shape]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s[1].pop("shard_metadata"), "do not describe the same 'flat_param_0'"),
        (
            lambda s: [x.pop("shard_metadata") for x in s],
            "one of 3 shards, but has no shard_metadata",
        ),
        (lambda s: s[1]["model"].pop("flat_param_0"), "do not describe the same 'flat_param_0'"),
        (
            lambda s: described(s[1])["names"].reverse(),
            "do not describe the same 'decoder.layers.0",
        ),
        (lambda s: [described(x)["names"].pop() for x in s], "do not fit each other"),
        (lambda s: set_first(s, "names", "fc1.bias"), "fc1.bias' twice"),
        (lambda s: set_first(s, "names", 3), "found a int, expected a str"),
        (lambda s: set_first(s, "shapes", (9, 9)), "metadata tell of"),
        (
            lambda s: set_first(s, "shapes", (1 << 62, 9)),
            "is missing beside",
        ),
        (lambda s: set_first(s, "shapes", (1 << 63,)), "that is no number"),
        (lambda s: set_first(s, "shapes", (-1, -1)), "that is no number"),
        (lambda s: set_first(s, "shapes", (1,) * 65), "no list of numbers"),
        (lambda s: add_shape(s, (0, 1 << 60)), "no array can be: of 2 axes"),
        (lambda s: set_first(s, "shapes", 7), "a shape is no list of numb"),
        (lambda s: described(s[0]).update(padding=10**9), "should be one flat run with 1000000000"),
        (lambda s: described(s[0]).update(padding=-1), "do not fit each other"),
        (lambda s: described(s[0]).update(padding=None), "found a NoneType, expected a int"),
        (lambda s: described(s[0]).update(padding=3), "shard_metadata tell of"),
        (lambda s: s[0].update(shard_metadata=[]), "found a list, expected a dict"),
        (lambda s: s[0].update(shard_metadata={}), "found a NoneType, expected a list"),
        (
            lambda s: s[0]["model"].update(flat_param_0=s[0]["model"]["flat_param_0"][None]),
            "should be one flat run",
        ),
        (
            lambda s: s[0]["shard_metadata"]["param_metadata"][0].update(shared_param_info=[1]),
            "a shared parameter has no two names",
        ),
        (
            lambda s: [
                x["shard_metadata"]["param_metadata"][0].update(shared_param_info=[("a", "b")])
                for x in s
            ],
            "'b' is said to be 'a', which is not there",
        ),
        (
            lambda s: s[0]["shard_metadata"]["param_metadata"][0].update(shared_param_info=3),
            "found a int, expected a list",
        ),
    ],
)
def test_flat_shards_that_contradict_their_metadata_are_refused(
    tmp_path: Path, change: Any, fault: str
) -> None:
    shards = made.shards_of(made.fused(STATE), 3)
    change(shards)
    for rank, content in enumerate(shards):
        made.save(content, tmp_path / f"checkpoint_last-shard{rank}.pt")
    with pytest.raises((CheckpointDamaged, CheckpointNotFound), match=fault) as caught:
        open_checkpoint(tmp_path)
    assert "checkpoint_last-shard" in str(caught.value)


# The output projection and the vocabulary


def test_an_output_projection_that_is_the_embedding_is_no_tensor_of_its_own(tmp_path: Path) -> None:
    shared = STATE | {made.HEAD: STATE["decoder.embed_tokens.weight"]}
    assert_holds(open_checkpoint(made.save({"model": shared}, tmp_path / "restored.pt")), WEIGHTS)


def test_a_slice_of_the_embedding_is_no_output_projection(tmp_path: Path) -> None:
    cut = STATE | {made.HEAD: STATE["decoder.embed_tokens.weight"][:24].clone()}
    assert_holds(open_checkpoint(made.save({"model": cut}, tmp_path / "restored.pt")), WEIGHTS)


def test_parts_are_tied_whatever_slice_of_the_output_projection_they_keep(tmp_path: Path) -> None:
    states = [state | {made.HEAD: torch.zeros(3, 24)} for state in made.parts_of(STATE, 2)]
    assert_holds(open_checkpoint(made.save_parts(tmp_path, states)), WEIGHTS)


def test_another_output_projection_is_left_for_the_configuration_to_judge(tmp_path: Path) -> None:
    head = np.ones_like(WEIGHTS[EMBEDDING])
    state = STATE | {made.HEAD: torch.tensor(head)}
    opened = open_checkpoint(made.save({"model": state}, tmp_path / "restored.pt"))
    assert_holds(opened, WEIGHTS | {HEAD: head})


@pytest.mark.parametrize("parts", [1, 2])
def test_padding_of_the_vocabulary_is_left_out_once_a_configuration_says_so(
    tmp_path: Path, parts: int
) -> None:
    padded = WEIGHTS | {EMBEDDING: np.concatenate([WEIGHTS[EMBEDDING], np.ones((16, 24), "f4")])}
    made.save_parts(tmp_path, made.parts_of(made.metaseq_state(padded), parts))
    opened = open_checkpoint(tmp_path)
    assert_holds(opened, padded)
    with pytest.warns(
        UserWarning, match="rows from 48 to 63 of .*embed_tokens.weight are left out"
    ):
        assert_holds(without_padding(opened, CONFIG), WEIGHTS)
    (tmp_path / "config.json").write_text(CONFIG.to_json_string())
    with pytest.warns(UserWarning, match="as the vocabulary has 48 words; a larger vocab_size"):
        checkpoint = open_pretrained(tmp_path, options={}).checkpoint
    assert_holds(checkpoint, WEIGHTS)
    other = CONFIG.replace(vocab_size=64)
    assert without_padding(opened, other) is opened
    assert without_padding(opened, CONFIG.replace(vocab_size=2000)) is opened


# Configuration


def settings(**changes: Any) -> dict[str, Any]:
    """What metaseq keeps of a model's settings, those that no shape tells."""
    return {
        "decoder_attention_heads": 12,
        "activation_fn": "gelu_accurate",
        "dropout": 0.2,
        "attention_dropout": 0,
        "decoder_normalize_before": True,
        **changes,
    }


class Choices(enum.Enum):
    gelu = "gelu"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """By its value, as most versions of Python do; 3.11.2 writes a call of getattr."""
        return type(self), (self.value,)


def omegaconf(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Classes that are pickled as OmegaConf's are."""
    classes = {}
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    for path, name in [("dictconfig", "DictConfig"), ("nodes", "AnyNode"), ("base", "Metadata")]:
        module = types.ModuleType(f"omegaconf.{path}")
        classes[name] = type(name, (), {"__module__": module.__name__})
        setattr(module, name, classes[name])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return types.SimpleNamespace(**classes)


def node(classes: types.SimpleNamespace, value: Any) -> Any:
    """A value, or a dict, within OmegaConf's nodes, which know what they lie in."""
    made_of = classes.DictConfig() if isinstance(value, dict) else classes.AnyNode()
    made_of.__dict__["_metadata"] = classes.Metadata()
    made_of.__dict__["_metadata"].__dict__.update(ref_type=Any, object_type=dict, flags=None)
    made_of.__dict__["_parent"] = made_of
    content = {k: node(classes, v) for k, v in value.items()} if isinstance(value, dict) else value
    made_of.__dict__["_content" if isinstance(value, dict) else "_val"] = content
    return made_of


@pytest.mark.parametrize("kind", ["cfg", "args", "namespace within cfg", "omegaconf"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_configuration_comes_from_shapes_and_from_the_settings_kept_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, protocol: int, zipped: bool
) -> None:
    namespace = argparse.Namespace(**settings())
    cases: dict[str, dict[str, Any]] = {
        "cfg": {"cfg": {"_name": None, "model": settings()}, "args": None},
        "args": {"args": namespace},
        "namespace within cfg": {"cfg": {"model": namespace, "task": {"_name": Path("x")}}},
        "omegaconf": {"cfg": node(omegaconf(monkeypatch), {"model": settings(), "task": {}})},
    }
    path = tmp_path / "restored.pt"
    content = {"model": STATE, **cases[kind]}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    fields = config_of(path)
    assert fields is not None
    assert (
        OPTConfig(**fields).to_dict()
        == CONFIG.replace(
            activation_function="gelu_new", dropout=0.2, attention_dropout=0.0
        ).to_dict()
    )
    assert_holds(open_checkpoint(path), WEIGHTS)


def test_an_enumerations_member_is_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("metaseq", "metaseq.dataclass", "metaseq.dataclass.constants"):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Choices, "__module__", module.__name__)
    module.Choices = Choices  # type: ignore[attr-defined]
    chosen = {"model": settings(activation_fn=Choices.gelu)}
    fields = config_of(made.save({"model": STATE}, tmp_path / "restored.pt", cfg=chosen))
    assert fields is not None
    assert fields["activation_function"] == "gelu"


@pytest.mark.parametrize(
    ("taken", "changes", "expected"),
    [
        ("layer_norm", {}, {"do_layer_norm_before": True, "_remove_final_layer_norm": True}),
        (
            "layer_norm",
            {"decoder_normalize_before": False},
            {"do_layer_norm_before": False, "_remove_final_layer_norm": False},
        ),
        ("", {"decoder_normalize_before": False}, {"do_layer_norm_before": True}),
        ("nothing", {"share_decoder_input_output_embed": False}, {"tie_word_embeddings": True}),
    ],
)
def test_switches_come_from_the_tensors_that_are_there(
    tmp_path: Path, taken: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    state = {k: v for k, v in STATE.items() if not k.startswith(f"decoder.{taken}.")}
    path = made.save({"model": state}, tmp_path / "x.pt", cfg={"model": settings(**changes)})
    fields = config_of(path)
    assert fields is not None
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"args": None, "cfg": None},
        {"cfg": {"model": {"decoder_attention_heads": "4"}}},
        {"cfg": 3},
    ],
)
def test_there_is_no_configuration_without_the_number_of_heads(
    tmp_path: Path, beside: dict[str, Any]
) -> None:
    assert config_of(made.save({"model": STATE}, tmp_path / "restored.pt", **beside)) is None


def test_there_is_no_configuration_without_the_tensors_that_tell_the_sizes(tmp_path: Path) -> None:
    state = {k: v for k, v in STATE.items() if "embed_positions" not in k}
    path = made.save({"model": state}, tmp_path / "restored.pt", cfg={"model": settings()})
    assert config_of(path) is None


def test_a_conversion_needs_no_configuration_where_the_files_tell_it(tmp_path: Path) -> None:
    states = made.parts_of(STATE, 2)
    made.save_parts(tmp_path / "told", states, cfg={"model": settings()})
    convert(tmp_path / "told", tmp_path / "made", to="safetensors")
    config = OPTConfig.from_pretrained(tmp_path / "made")
    assert (config.num_attention_heads, config.hidden_size, config.vocab_size) == (12, 24, 48)
    made.save_parts(tmp_path / "silent", states)
    with pytest.raises(CheckpointNotFound, match=r"config\.json.*--config takes a file"):
        convert(tmp_path / "silent", tmp_path / "other", to="safetensors")


# What else is in a file


def test_training_state_beside_the_tensors_is_read_past(tmp_path: Path) -> None:
    path = made.save(
        {"model": STATE},
        tmp_path / "checkpoint_last.pt",
        last_optimizer_state={
            "state": {0: {"step": 3, "exp_avg": torch.zeros(4)}},
            "param_groups": [],
        },
        extra={
            "seen": {1, 2},
            "loss": np.float64(1.5),
            "device": torch.device("cpu"),
            "t": (Path("x"),),
        },
    )
    assert_holds(open_checkpoint(path), WEIGHTS)
    assert_holds(open_checkpoint(tmp_path), WEIGHTS)


class Runs:
    """Unpickling this calls `call(*arguments)`."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("place", ["args", "cfg", "extra_state", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_runs_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = argparse.Namespace(decoder_attention_heads=Runs(os.mkdir, "ran"))
    path = tmp_path / "restored.pt"
    content = {"model": STATE, "args": argparse.Namespace(), place: namespace}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointUnsafe, match=r"restored\.pt asks for 'posix\.mkdir'.*nothing was"
    ):
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            {"model": {"x": argparse.Namespace()}},
            r"'x' is no tensor but an object of argparse\.Namespace;",
        ),
        (
            {"model": {"x": argparse.Namespace}},
            r"'x' is no tensor but an object of argparse\.Namespace;",
        ),
        ({"model": {"x": {}}}, "'x' is no tensor but a dict of 0 entries"),
        ({"model": {3: torch.zeros(1)}}, "an entry is called 3, expected the name"),
        ({"model": argparse.Namespace()}, "'model' is no tensor but an object of argparse"),
        (
            argparse.Namespace(),
            "holds an object of argparse.Namespace, expected a state dict of tensors",
        ),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, fault: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointDamaged, match=fault):
        open_checkpoint(tmp_path / "x.pt")


def test_a_part_that_is_no_checkpoint_of_metaseqs_is_refused(tmp_path: Path) -> None:
    made.save_parts(tmp_path, made.parts_of(STATE, 2))
    torch.save(STATE, tmp_path / "reshard-model_part-1.pt")
    with pytest.raises(CheckpointDamaged, match=r"part-1\.pt is no checkpoint of metaseq's"):
        open_checkpoint(tmp_path)
    (tmp_path / "reshard-model_part-1.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointDamaged, match=r"part-1\.pt is cut short or damaged"):
        open_checkpoint(tmp_path)


def test_mutated_checkpoints_are_read_or_refused(tmp_path: Path) -> None:
    report = fuzz(target(), tmp_path, count=150, seed=7)
    assert report.failures == []
    assert {"read", "CheckpointDamaged", "CheckpointUnsafe"} <= report.outcomes.keys()


# Writing


@given(
    data=st.data(),
    switch=st.sampled_from(sorted(SWITCHES)),
    head=st.sampled_from(HEADS),
    dtype=st.sampled_from(TYPES),
)
def test_a_written_checkpoint_reads_back_bit_for_bit(
    data: st.DataObject,
    switch: str,
    head: Head,
    dtype: np.dtype[Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("written")
    config, row = tiny(**SWITCHES[switch]), format_named("metaseq")
    seed = data.draw(st.integers(0, 99))
    weights = {k: v.astype(dtype) for k, v in random_weights(config, head, seed).items()}
    held = {name: Held(values) for name, values in weights.items()}
    for piece in row.pieces(row.rule.stored(held, config, head), 1, config, head):
        piece.make(folder / piece.name, lambda size: None)
    assert_holds(open_checkpoint(folder), weights)
    fields = config_of(folder)
    assert fields is not None
    if not config.pruned_heads:
        expected = {name: getattr(config, name) for name in fields}
        if config.tie_word_embeddings or head is Head.CAUSAL_LM:
            assert fields == expected


def test_a_written_file_is_what_other_tools_expect(tmp_path: Path) -> None:
    row = format_named("metaseq")
    held = {name: Held(values) for name, values in WEIGHTS.items()}
    (piece,) = row.pieces(row.rule.stored(held, CONFIG, Head.CAUSAL_LM), 1, CONFIG, Head.CAUSAL_LM)
    piece.make(tmp_path / piece.name, lambda size: None)
    assert piece.name == "restored.pt"
    found = torch.load(tmp_path / "restored.pt", weights_only=True)
    assert found["cfg"]["model"]["decoder_attention_heads"] == 12
    state = found["model"]
    assert state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize(("parts", "shards"), [(1, 1), (1, 2), (2, 2)])
def test_a_large_checkpoint_is_read_in_parts_that_lie_anywhere(
    tmp_path: Path, parts: int, shards: int
) -> None:
    config = tiny(vocab_size=4000, hidden_size=64, ffn_dim=4000, max_position_embeddings=3000)
    weights = random_weights(config, Head.CAUSAL_LM)
    states = made.parts_of(made.metaseq_state(weights), parts)
    made.save_shards(tmp_path, [made.fused(state) for state in states], shards)
    assert_holds(open_checkpoint(tmp_path), weights)
