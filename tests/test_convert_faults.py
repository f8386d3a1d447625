"""Conversions that are killed, that run out of room, or whose source changes under them."""

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import conversion.converting as converting
from conversion import Plan, convert, open_checkpoint, plan
from conversion.staging import open_staging
from opt_core.checkpoint import CheckpointDamaged
from tests.test_convert import NAMES, assert_same, contents, make, read

STAGING = ".b.converting"

#: Converts, and dies by SIGKILL at the n-th look at, or change of, a file, or block of a tensor.
DIES = """
import os, signal, sys
from conversion import convert
left, source, target, to, size, force = int(sys.argv[1]), *sys.argv[2:]
def step(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
watched = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}
sys.addaudithook(lambda event, _: event in watched and step())
convert(source, target, to=to, max_shard_size=size or None, force=bool(force), count=step)
print(left)
"""


def run_and_die(
    steps: int, source: Path, target: Path, to: str, *, size: str = "", force: str = ""
) -> int | None:
    """The steps that were left when it was done, or None if it was killed.

    It is done, too, when an earlier run was killed after its last step.
    """
    arguments: list[Any] = [sys.executable, "-c", DIES, str(steps), source, target, to, size, force]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        return None
    if "is there already" in done.stderr and not (target.parent / STAGING).exists():
        return 0
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def tidy(folder: Path) -> bool:
    return sorted(path.name for path in folder.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("to", "size"),
    [
        ("safetensors", "2KB"),
        ("keras", ""),
        *(pytest.param(*case, marks=pytest.mark.deep) for case in (("tf", "2KB"), ("numpy", ""))),
    ],
)
def test_a_kill_leaves_no_target_and_the_next_run_goes_on(
    to: str, size: str, tmp_path: Path
) -> None:
    weights = make(tmp_path / "a")
    source, target, limit = tmp_path / "a", tmp_path / "b", 1_000_000
    left = run_and_die(limit, source, tmp_path / "whole", to, size=size)
    assert left is not None
    (tmp_path / "whole").rename(tmp_path.parent / f"{tmp_path.name}-whole")
    whole = contents(tmp_path.parent / f"{tmp_path.name}-whole")
    moments = random.Random(to)
    kills = 0
    while run_and_die(moments.randint(1, limit - left), source, target, to, size=size) is None:
        assert contents(target) == whole if target.exists() else True
        kills += 1
        assert kills < 100
    assert contents(target) == whole
    assert tidy(tmp_path)
    assert_same(read(tmp_path / "a"), weights)


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    source, target, limit = tmp_path / "a", tmp_path / "b", 1_000_000
    make(source)
    convert(source, tmp_path / "new", to="safetensors")
    convert(source, tmp_path / "old", to="pytorch")
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    (tmp_path / "old").rename(target)
    left = run_and_die(limit, source, target, "safetensors", force="yes")
    assert left is not None
    moments = random.Random(1)
    for _ in range(16):
        if target.exists() and contents(target) == new:
            convert(source, target, to="pytorch", force=True)
        # The last steps are those that replace.
        steps = moments.randint((limit - left) * 2 // 3, limit - left)
        run_and_die(steps, source, target, "safetensors", force="yes")
        aside = tmp_path / ".b.replaced"
        found = contents(target if target.exists() else aside)
        assert found in (old, new)
    convert(source, target, to="safetensors", force=True)
    assert contents(target) == new
    assert not aside.exists()


def parts_in(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / STAGING / "files").iterdir())


def converted_in_part(tmp_path: Path, **changes: Any) -> list[str]:
    """Stops a conversion into shards halfway; the shards that were finished."""
    make(tmp_path / "a", **changes)
    blocks = 0

    def stop(count: int) -> None:
        nonlocal blocks
        blocks += count > 0
        if blocks == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        convert(tmp_path / "a", tmp_path / "b", to="pytorch", max_shard_size="2KB", count=stop)
    assert "finished files are kept in" in "".join(caught.value.__notes__)
    return parts_in(tmp_path)


def test_finished_shards_are_not_written_again(tmp_path: Path) -> None:
    finished = converted_in_part(tmp_path)
    assert len(finished) > 3
    counted: list[int] = []
    done = convert(
        tmp_path / "a", tmp_path / "b", to="pytorch", max_shard_size="2KB", count=counted.append
    )
    kept = sum(piece.size for piece in done.plan.pieces if piece.name in finished)
    assert done.written == done.plan.size - kept
    assert counted[0] == kept  # the bar starts where the other run ended
    assert sum(counted) == done.plan.size
    assert tidy(tmp_path)


@pytest.mark.parametrize("change", ["size", "type", "source"])
def test_another_conversion_starts_afresh(change: str, tmp_path: Path) -> None:
    converted_in_part(tmp_path)
    if change == "source":
        os.utime(tmp_path / "a" / "model.safetensors")
    done = convert(
        tmp_path / "a",
        tmp_path / "b",
        to="pytorch",
        max_shard_size="4KB" if change == "size" else "2KB",
        dtype="bfloat16" if change == "type" else None,
    )
    assert done.written == done.plan.size
    assert tidy(tmp_path)


def test_a_damaged_journal_starts_afresh(tmp_path: Path) -> None:
    converted_in_part(tmp_path)
    (tmp_path / STAGING / "journal.json").write_text("[1")
    done = convert(tmp_path / "a", tmp_path / "b", to="pytorch", max_shard_size="2KB")
    assert done.written == done.plan.size


def test_losses_that_an_earlier_run_found_are_told_and_must_still_be_allowed(
    tmp_path: Path,
) -> None:
    make(tmp_path / "a")
    weights = read(tmp_path / "a")
    first = next(iter(plan(tmp_path / "a", tmp_path / "b", to="pytorch").tensors))
    weights[first][0, 0] = float("nan")
    spoiled: dict[str, Any] = {first: weights[first]}
    make(tmp_path / "a", **spoiled)

    def stop(count: int) -> None:
        if (tmp_path / STAGING / "files").is_dir() and len(parts_in(tmp_path)) == 4:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"to": "pytorch", "max_shard_size": "2KB"}
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a", tmp_path / "b", allow=["not-finite"], count=stop, **options)
    with pytest.raises(ValueError, match="converted by an earlier run; --allow not-finite"):
        convert(tmp_path / "a", tmp_path / "b", **options)
    done = convert(tmp_path / "a", tmp_path / "b", allow=["not-finite"], **options)
    assert done.written < done.plan.size
    assert done.plan.losses.found == {"not-finite": {first: 1}}


def test_two_conversions_into_one_target_do_not_meet(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with (
        open_staging(tmp_path / "b"),
        pytest.raises(OSError, match=r"another conversion into .*b is running"),
    ):
        convert(tmp_path / "a", tmp_path / "b", to="pytorch")
    convert(tmp_path / "a", tmp_path / "b", to="pytorch")


# Room


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a")
    monkeypatch.setattr(Plan, "free", property(lambda self: 1000))
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, and 1,000 are free") as caught:
        convert(tmp_path / "a", tmp_path / "b", to="pytorch")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


FULL = """
import resource, sys
from conversion import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
try:
    convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
except OSError as fault:
    print(fault)
"""


@pytest.mark.parametrize("to", [name for name in NAMES if name != "orbax"])
def test_a_disk_that_fills_up_is_told_and_nothing_is_left(to: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    before = contents(tmp_path)
    command: list[Any] = [sys.executable, "-c", FULL, tmp_path / "a", tmp_path / "b", to]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"[Errno {errno.EFBIG}] there is too little room for"), (
        done.stderr
    )
    kept = [path for path in contents(tmp_path) if path not in before]
    assert to == "numpy" or kept == []
    assert {path: data for path, data in contents(tmp_path).items() if path in before} == before


# A source that changes


@pytest.mark.parametrize("to", NAMES)
def test_a_source_that_changes_underneath_is_noticed(to: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    changed = False

    def change(count: int) -> None:
        nonlocal changed
        if count and not changed:
            changed = True
            os.utime(file, ns=(1, 1))

    with pytest.raises(CheckpointDamaged, match=r"model\.safetensors has changed since"):
        convert(tmp_path / "a", tmp_path / "b", to=to, count=change)
    assert not (tmp_path / "b").exists()


def test_a_check_that_fails_leaves_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a")

    def tampered(path: Path) -> Any:
        with (path / "pytorch_model.bin").open("r+b") as handle:
            middle = handle.seek(0, os.SEEK_END) // 2
            handle.seek(middle)
            (byte,) = handle.read(1)
            handle.seek(middle)
            handle.write(bytes([byte ^ 1]))
        return open_checkpoint(path)

    monkeypatch.setattr(converting, "open_checkpoint", tampered)
    with pytest.raises(CheckpointDamaged, match="does not read back as it was written"):
        convert(tmp_path / "a", tmp_path / "b", to="pytorch", check=True)
    assert not (tmp_path / "b").exists()
