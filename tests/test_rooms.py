"""The house: who imports whom, how large a room may grow, and what a room never says."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.wings import is_installed

ROOT = Path(__file__).resolve().parents[1]
#: The package of every wing, its framework's packages, and the extra that installs them.
WINGS = {
    "opt_torch": ({"torch"}, "torch"),
    "opt_tf": ({"tensorflow", "keras"}, "tensorflow"),
    "opt_flax": ({"jax", "jaxlib", "flax", "optax", "orbax"}, "flax"),
}
FRAMEWORKS = set().union(*(packages for packages, _ in WINGS.values()))
HOUSES = [name for name in ("opt_core", "conversion", *WINGS) if (ROOT / name).is_dir()]
PRESENT = [name for name in WINGS if (ROOT / name).is_dir()]
SOURCES = [path for house in HOUSES for path in sorted((ROOT / house).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
#: What the core may import anywhere, besides the standard library and itself.
CORE_LIBRARIES = {
    *("numpy", "ml_dtypes", "safetensors", "huggingface_hub", "tokenizers", "tqdm", "rich"),
}
#: Rooms of the core that import frameworks, wings or conversion, in the function that needs them.
LATE_IMPORTERS = ("opt_core/cli", "opt_core/tokenizer")
ROOMS = {"attention", "decoder", "generation", "models", "weights"}
#: Rooms that a framework needs besides: PyTorch's private operators for CPUs, and modes that belong
#: to modules; layers that Keras and Flax do not have, or have otherwise; what Keras asks of a model
#: that it trains.
NATIVE = {
    "opt_torch": {"evaluation", "linear", "packed"},
    "opt_tf": {"layers", "training"},
    "opt_flax": {"layers"},
}
#: How TensorFlow's notes about the machine begin, which it writes past Python on being imported.
NOTE = re.compile(
    r"WARNING: All log messages before absl|[IWE]\d{4} |To enable the following instr"
)
#: A function may have this many lines behind its signature and docstring, a file this many in all.
LONGEST_FUNCTION, LONGEST_FILE = 40, 400


class Import(NamedTuple):
    """One imported module, and whether that happens when the importing file is imported."""

    module: str
    at_import: bool
    line: int

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            modules = [node.module or ""]
        else:
            continue
        yield from (Import(module, id(node) not in late, node.lineno) for module in modules)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def of(*houses: str) -> list[Path]:
    return [path for path in SOURCES if path.relative_to(ROOT).parts[0] in houses]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def said(path: Path, found: Import) -> str:
    return f"{named(path)}:{found.line} imports {found.module}"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


# Imports


def test_the_core_imports_nothing_but_its_libraries() -> None:
    allowed = {"opt_core", *CORE_LIBRARIES, *sys.stdlib_module_names}
    wrong = [
        said(path, found)
        for path in of("opt_core")
        for found in imports_of(path)
        if found.package not in allowed
        and (found.at_import or not named(path).startswith(LATE_IMPORTERS))
    ]
    assert wrong == []


def test_conversion_imports_the_core_and_no_framework() -> None:
    strangers = FRAMEWORKS | set(WINGS)
    wrong = [
        said(path, found)
        for path in of("conversion")
        for found in imports_of(path)
        if found.package in strangers
    ]
    assert wrong == []


@pytest.mark.parametrize("house", PRESENT)
def test_a_wing_imports_its_own_framework_and_only_its_weights_import_conversion(
    house: str,
) -> None:
    strangers = (FRAMEWORKS - WINGS[house][0]) | (set(WINGS) - {house})
    wrong = [
        said(path, found)
        for path in of(house)
        for found in imports_of(path)
        if found.package in strangers or (found.package == "conversion" and room(path) != "weights")
    ]
    assert wrong == []


def test_attention_and_decoder_import_no_room_that_stands_on_them() -> None:
    later = tuple(f"{house}.{name}" for house in WINGS for name in ROOMS - {"attention", "decoder"})
    wrong = [
        said(path, found)
        for path in of(*WINGS)
        if room(path) in ("attention", "decoder")
        for found in imports_of(path)
        if found.module.startswith(later)
    ]
    assert wrong == []


def test_importing_core_and_conversion_imports_no_framework() -> None:
    watched = sorted(FRAMEWORKS | set(WINGS) | {"transformers", "h5py", "msgpack", "tensorstore"})
    code = f"import opt_core, conversion, sys; print([m for m in {watched} if m in sys.modules])"
    done = run(code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("house", PRESENT)
def test_a_wing_without_its_framework_names_the_extra(house: str) -> None:
    framework, extra = WINGS[house]
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in framework)
    done = run(f"import sys; {blocked}import {house}")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert last.endswith(f"which is not installed: pip install 'optlm[{extra}]'")


@pytest.mark.parametrize("house", PRESENT)
def test_a_wing_imports_with_the_other_frameworks_uninstalled(house: str) -> None:
    framework, _ = WINGS[house]
    if not is_installed(house.removeprefix("opt_")):
        pytest.skip(f"{house} needs {', '.join(framework)}, which is not installed")
    strangers = (FRAMEWORKS - framework) | {"transformers", "accelerate", "peft"}
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in sorted(strangers))
    done = run(f"import sys; {blocked}import {house}; print('fine')")
    said = [line for line in done.stderr.splitlines() if not NOTE.match(line)]
    assert (done.stdout, said) == ("fine\n", [])


# Size and names


def test_files_stay_small() -> None:
    sizes = {named(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: size for path, size in sizes.items() if size > LONGEST_FILE} == {}


def test_files_open_with_a_sentence_that_says_what_lives_in_them() -> None:
    silent = []
    for path in SOURCES + TESTS:
        text = path.read_text()
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        if text.strip() and not first.endswith("."):
            silent.append(named(path))
    assert silent == []


def test_functions_stay_short() -> None:
    long = []
    for path in SOURCES + TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > LONGEST_FUNCTION:
                long.append(f"{named(path)}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_no_file_is_a_drawer_for_things_without_a_room() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "shared"}
    assert [named(path) for path in SOURCES + TESTS if path.stem in drawers] == []


@pytest.mark.parametrize("house", PRESENT)
def test_every_wing_has_the_same_rooms(house: str) -> None:
    found = {
        path.stem
        for path in (ROOT / house).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert found - {"__init__"} == ROOMS | NATIVE.get(house, set())


def test_rooms_of_several_files_have_the_same_files_in_every_wing() -> None:
    for name in ROOMS:
        trees = {
            house: {path.name for path in (ROOT / house / name).glob("*.py")}
            for house in PRESENT
            if (ROOT / house / name).is_dir()
        }
        assert len({frozenset(files) for files in trees.values()}) <= 1, trees


# Words


def findings(paths: list[Path], pattern: str) -> list[str]:
    return [
        f"{named(path)}: {found}"
        for path in paths
        for found in re.findall(pattern, path.read_text())
    ]


def test_attention_and_decoder_do_not_know_the_family() -> None:
    rooms = [path for path in of(*WINGS) if room(path) in ("attention", "decoder")]
    assert len(rooms) >= 2 * len(PRESENT)
    assert findings(rooms, r"\bOPT\w*|\bopt\b|\bOpt(?!ional)\w*") == []


def test_sources_hold_no_unfinished_work_and_no_blanket_ignores() -> None:
    assert findings(SOURCES, r"TODO|FIXME|XXX|NotImplementedError") == []
    assert findings(SOURCES, r"# *type: ignore(?!\[)|# *noqa(?!:)") == []
    assert findings(SOURCES, r"\*\*kwargs") == []


def test_wings_read_no_environment_and_print_nothing() -> None:
    assert findings(of(*WINGS), r"(?<!\w)print\(|os\.environ|os\.getenv|getLogger") == []


def literals(tree: ast.AST) -> list[str]:
    return [
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]


def test_every_error_of_a_wing_has_a_test_that_quotes_it() -> None:
    length = 12
    quoted: set[str] = set()
    for path in TESTS:
        for text in literals(ast.parse(path.read_text())):
            plain = text.replace("\\", "")
            quoted.update(plain[i : i + length] for i in range(len(plain) - length + 1))
    untested = [
        f"{named(path)}:{node.lineno}: {texts[0]}"
        for path in of(*WINGS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and node.exc is not None
        if (texts := [text for text in literals(node.exc) if len(text) >= length])
        and not any(
            text[i : i + length] in quoted for text in texts for i in range(len(text) - length + 1)
        )
    ]
    assert untested == []
