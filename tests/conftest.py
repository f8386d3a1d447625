"""Fixtures and settings that every test may use."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.wings import FRAMEWORKS, QUICK_TO_COMPILE, Wing, is_installed, open_wing

settings.register_profile(
    "ci",
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# Where each example compiles programs of its own, most of the time goes there.
settings.register_profile("compiled", parent=settings.get_profile("ci"), max_examples=6)
settings.register_profile("deep", parent=settings.get_profile("ci"), max_examples=200)
settings.load_profile("ci")

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wing",
        choices=[*FRAMEWORKS, "none"],
        default=None,
        help="the wing that tests hold to the reference, one in each process (torch if installed)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if chosen_wing(config) in ("tf", "flax") and not config.getoption("--hypothesis-profile"):
        settings.load_profile("compiled")
        os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {os.environ.get('XLA_FLAGS', '')}"
    config.addinivalue_line("markers", "wing: needs the wing that --wing chose (set by itself)")


def chosen_wing(config: pytest.Config) -> str:
    """The wing of this process; "none" if there is none."""
    given: str | None = config.getoption("--wing")
    return given or ("torch" if is_installed("torch") else "none")


def pytest_report_header(config: pytest.Config) -> str:
    return f"wing: {chosen_wing(config)}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the folders of what is native to the other wings."""
    others = {HERE / name for name in FRAMEWORKS if name != chosen_wing(config)}
    return True if collection_path in others else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    natives = {HERE / name for name in FRAMEWORKS}
    for item in items:
        if "wing" in getattr(item, "fixturenames", ()) or natives & set(item.path.parents):
            item.add_marker("wing")


@pytest.fixture(scope="session")
def wing(pytestconfig: pytest.Config) -> Wing:
    """The wing that `--wing` chose."""
    name = chosen_wing(pytestconfig)
    if name == "none":
        pytest.skip("no wing was chosen: --wing, or PyTorch, is missing")
    if not is_installed(name):
        pytest.fail(f"--wing {name} needs {FRAMEWORKS[name]}, which is not installed")
    return open_wing(name)


@pytest.fixture(autouse=True)
def _given_back(pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    if chosen_wing(pytestconfig) == "flax":
        from tests.wings.flax_wing import give_back

        give_back()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference data beside the checkout; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip("the reference data (../shared) is not beside this checkout")
    return folder
