"""Eight virtual devices, which JAX must know of before it computes; a count of programs."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """One entry for each program that XLA compiles."""
    found: list[str] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)
