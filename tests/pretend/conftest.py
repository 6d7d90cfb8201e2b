"""Models small enough for a device that computes in Python, and the device itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TinyCheckpoint

from pretend.device import State, accelerator

#: By family, what of the golden configurations is made smaller: two blocks, width 32.
SMALL = {
    "llada": {"d_model": 32, "mlp_hidden_size": 64, "n_layers": 2},
    "dream": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.fixture
def small_checkpoint(tiny_checkpoint: TinyCheckpoint, family: str) -> Path:
    """The folder of a random checkpoint of two blocks; tests give the `family`."""
    return tiny_checkpoint(family, **SMALL[family])


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage() -> None:
    """Memory is counted after collecting garbage, which without this looks through all libraries every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def pretend() -> Iterator[State]:
    """The machine has the device, and the state of its first one is given."""
    with accelerator() as state:
        yield state
