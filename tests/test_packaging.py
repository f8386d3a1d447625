"""The distribution: what is in it, and that it works where nothing else is installed."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from opt_core import __version__
from opt_core.cli.backends import WINGS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flax", "transformers")


def python(
    *arguments: str, program: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A Python that sees nothing of this checkout unless it is told to."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        env=kept | {"PYTHONWARNINGS": "error"} | variables,
        cwd=variables.get("PWD", "/"),
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and with the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    leave = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=leave)
    arguments = ["-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    # setuptools warns of its own future; that is not ours to mend.
    done = python(*arguments, PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def base_distributions() -> dict[str, metadata.Distribution]:
    """What `pip install optlm` brings: the dependencies without extras, and theirs."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(PROJECT["dependencies"])
    while waiting:
        requirement = Requirement(waiting.pop())
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and requirement.name not in found:
            found[requirement.name] = metadata.distribution(requirement.name)
            waiting += found[requirement.name].requires or []
    return found


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and its base dependencies, and nothing else.

    The dependencies are linked from here instead of being fetched; the deep version fetches them.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=os.name == "posix")
    program = str(folder / "bin/python")
    install = ["-m", "pip", "--python", program, "install", "--quiet", "--no-deps", "--no-index"]
    done = python(*install, str(wheel), PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    site = next((folder / "lib").glob("python*/site-packages"))
    for distribution in base_distributions().values():
        for top in {Path(file).parts[0] for file in distribution.files or ()}:
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "bin"


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


# --- what is in it -----------------------------------------------------------------------------


def test_the_wheel_holds_the_packages_with_their_types_and_the_checkpoint(wheel: Path) -> None:
    packages = [p.parent.name for p in ROOT.glob("*/py.typed")]
    assert {"opt_core", "conversion", "opt_torch"} <= set(packages)
    for package in packages:
        files = {
            str(path.relative_to(ROOT))
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert files <= names(wheel)
    shipped = {Path(name).name for name in names(wheel) if "assets/tiny-opt" in name}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= shipped


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    packages = {path.parent.name for path in ROOT.glob("*/py.typed")}
    assert tops == packages | {f"optlm-{__version__}.dist-info"}


def test_the_metadata_says_version_licence_and_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = f"optlm-{__version__}.dist-info"
        text = archive.read(f"{inside}/METADATA").decode()
        assert archive.read(f"{inside}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "optlm = opt_core.cli:main" in archive.read(f"{inside}/entry_points.txt").decode()
    head = text.partition("\n\n")[0].splitlines()
    assert f"Version: {__version__}" in head
    assert "License-Expression: Apache-2.0" in head
    assert "Requires-Python: >=3.11" in head
    for wing in WINGS.values():
        assert f"Provides-Extra: {wing.extra}" in head


def test_the_source_distribution_holds_what_a_build_needs(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("pyproject.toml", "LICENSE", "README.md", "opt_core/py.typed"):
        assert needed in inside


def test_every_dependency_is_among_the_versions_that_are_tested_together() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("==") for line in lines if not line.startswith("#")]
    tested = {canonicalize_name(name): version for name, version in rows}
    extras = PROJECT["optional-dependencies"]
    here = [*PROJECT["dependencies"], *extras["torch"], *extras["dev"], *extras["bench"]]
    for requirement in map(Requirement, here):
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(tested[name]), name


# --- a clean environment -----------------------------------------------------------------------


def test_the_command_runs_from_a_clean_installation(clean: Path) -> None:
    shown = python("--version", program=str(clean / "optlm"))
    assert (shown.returncode, shown.stdout) == (0, f"optlm {__version__}\n"), shown.stderr
    shown = python("demo", program=str(clean / "optlm"))
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert (
        "No wing is installed, so nothing is compared. pip install 'optlm[torch]'" in shown.stdout
    )


def test_the_command_continues_a_text_and_looks_into_files_without_a_framework(
    clean: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("To be, or not to be", encoding="utf-8")
    for arguments in (
        ["generate", "tiny-opt", "--prompt", "ROMEO:", "--max-new-tokens", "3"],
        ["inspect", "tiny-opt", "--check"],
        ["eval", "tiny-opt", "--text", str(tmp_path / "text")],
    ):
        shown = python(*arguments, program=str(clean / "optlm"))
        assert (shown.returncode, shown.stderr) == (0, ""), shown.stderr


def test_the_command_converts_and_verifies_without_a_framework(clean: Path, tmp_path: Path) -> None:
    source = "tiny-opt"
    for to in ("tf", "flax", "keras", "pytorch", "metaseq", "numpy"):
        shown = python(
            "convert", source, str(tmp_path / to), "--to", to, program=str(clean / "optlm")
        )
        assert (shown.returncode, shown.stderr) == (0, ""), shown.stderr
        source = str(tmp_path / to)
    shown = python("verify", "tiny-opt", source, program=str(clean / "optlm"))
    assert (shown.returncode, shown.stderr) == (0, ""), shown.stderr
    assert "identical: 100 tensors, bit for bit" in shown.stdout
    shown = python(
        "convert", source, str(tmp_path / "x"), "--to", "orbax", program=str(clean / "optlm")
    )
    assert shown.returncode == 1
    assert shown.stderr.strip().endswith("pip install 'optlm[orbax]'")


def test_the_package_comes_from_the_wheel_and_not_from_the_checkout(clean: Path) -> None:
    code = "import opt_core, conversion; print(opt_core.__file__, conversion.__file__)"
    shown = python("-c", code, program=str(clean / "python"))
    assert shown.stdout.count(str(clean.parent)) == 2, shown.stderr


def test_a_wing_without_its_framework_says_which_extra_to_install(clean: Path) -> None:
    shown = python("-c", "import opt_torch", program=str(clean / "python"))
    assert shown.returncode == 1
    said = (
        "ImportError: opt_torch needs PyTorch, which is not installed: pip install 'optlm[torch]'"
    )
    assert shown.stderr.splitlines()[-1] == said


@pytest.mark.deep
def test_pip_installs_the_wheel_with_all_that_it_needs(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=True)
    program = str(tmp_path / "bin/python")
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    for work in (["install", *constraints, str(wheel)], ["check"]):
        # What pip itself warns of is not ours to mend.
        done = python("-m", "pip", *work, program=program, PYTHONWARNINGS="default")
        assert done.returncode == 0, done.stdout + done.stderr
    shown = python("demo", program=str(tmp_path / "bin/optlm"))
    assert shown.returncode == 0, shown.stderr


# --- imports -----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["opt_core", "opt_core.cli", "conversion"])
def test_importing_the_neutral_packages_imports_no_framework(package: str) -> None:
    code = f"import sys, {package}\nprint([name for name in {FRAMEWORKS!r} if name in sys.modules])"
    shown = python("-c", code, PYTHONPATH=str(ROOT))
    assert shown.stdout == "[]\n", shown.stderr


def test_importing_opt_core_imports_no_library_at_all() -> None:
    code = (
        "import sys; before = set(sys.modules); import opt_core\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    shown = python("-c", code, PYTHONPATH=str(ROOT))
    assert shown.stdout == "['opt_core']\n", shown.stderr


def test_opt_core_gives_its_public_names_when_they_are_asked_for() -> None:
    import opt_core
    from opt_core.config import OPTConfig

    assert opt_core.OPTConfig is OPTConfig
    assert dir(opt_core) == sorted(opt_core.__all__)
    assert all(hasattr(opt_core, name) for name in opt_core.__all__)
    with pytest.raises(AttributeError, match="module 'opt_core' has no attribute 'OPTModel'"):
        opt_core.OPTModel  # noqa: B018
