"""Whatever a checkpoint's files hold, they are read or refused with a CheckpointError, at once."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dqx.common.files import ASSETS
from dqx.models.checkpoint import CheckpointError, inspect

FUZZED = settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
NUMBERS = st.integers(-(10**20), 10**20) | st.floats() | st.sampled_from([0, 1, 2, 64, 2**24, 10**9])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta", "factor"]) | st.text(max_size=4), inside)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the bundled checkpoints: one per family."""
    folders = {}
    for name in ("nano_llada", "nano_dream"):
        folders[name] = tmp_path_factory.mktemp("fuzzed") / name
        shutil.copytree(ASSETS / name, folders[name])
    return folders


def read_or_refused(folder: Path) -> None:
    told = ""
    try:
        inspect(str(folder))
    except CheckpointError as error:
        told = str(error)
    assert len(told) < 3000


def keys_of(name: str) -> list[str]:
    return [*json.loads((ASSETS / name / "config.json").read_text()), "rope_parameters", "head_dim", "layer_types", "x"]


@pytest.mark.parametrize("name", ["nano_llada", "nano_dream"])
@FUZZED
@given(data=st.data())
def test_config(name: str, originals: dict[str, Path], data: st.DataObject) -> None:
    path = originals[name] / "config.json"
    original = path.read_text()
    changes = data.draw(st.dictionaries(st.sampled_from(keys_of(name)), VALUES, min_size=1, max_size=4))
    try:
        path.write_text(json.dumps(json.loads(original) | changes))
        read_or_refused(originals[name])
    finally:
        path.write_text(original)


def with_file(folder: Path, name: str, content: bytes, check: Callable[[Path], Any]) -> None:
    """`check` the folder while a file of it holds something else."""
    path = folder / name
    kept = path.read_bytes() if path.exists() else None
    try:
        path.write_bytes(content)
        check(folder)
    finally:
        path.unlink() if kept is None else path.write_bytes(kept)


@FUZZED
@given(content=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 50_000)
def test_any_bytes_as_config(originals: dict[str, Path], content: bytes) -> None:
    with_file(originals["nano_llada"], "config.json", content, read_or_refused)


HEADERS = st.dictionaries(
    st.sampled_from(["lm_head.weight", "model.norm.weight", "__metadata__"]) | st.text(max_size=5),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["BF16", "F32", "I8", "F8_E4M3", "X"]),
            "shape": st.lists(st.integers(-1, 2**63), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 2**63), max_size=3),
        }
    )
    | VALUES,
    max_size=3,
)


@FUZZED
@given(
    header=HEADERS.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=80),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_of_a_safetensors_file(originals: dict[str, Path], header: bytes, length: int | None) -> None:
    content = struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * 64
    with_file(originals["nano_dream"], "model.safetensors", content, read_or_refused)


INDEX = st.fixed_dictionaries(
    {
        "weight_map": st.dictionaries(
            st.sampled_from(["lm_head.weight", "model.norm.weight"]) | st.text(max_size=4),
            st.sampled_from(["model.safetensors", "../x.safetensors", "/dev/zero", "a/b.safetensors", ".", ""])
            | st.text(max_size=300),
        )
        | VALUES
    }
)


@FUZZED
@given(content=(INDEX | VALUES).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=80))
def test_any_index(originals: dict[str, Path], content: bytes) -> None:
    with_file(originals["nano_dream"], "model.safetensors.index.json", content, read_or_refused)
