"""Whatever a bundle holds, it is run, or refused with ConfigProblems, at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import records
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dqx.common.files import jsonable
from dqx.config.compose import compose, resolve
from dqx.config.schema import ConfigProblems
from dqx.sharing import bundle
from dqx.sharing.replay import replayed
from dqx.sharing.share import contents

FUZZED = settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("${oc.env:HOME}"),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=4), inside, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bundle.Bundle]:
    path = tmp_path_factory.mktemp("bundles") / "a.dqx.zip"
    members, facts, _ = contents(records.record(config=jsonable(asdict(resolve(compose([]))))))
    bundle.write(path, facts, members)
    return path, bundle.read(path)


def run_or_refused(path: Path) -> None:
    try:
        arguments = replayed(["--from", str(path)])
    except ConfigProblems:
        return
    assert arguments[0].startswith("--config-name=")


@FUZZED
@given(content=VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode()) | st.binary(max_size=100))
@example(content=b"bits: {<<: [x]}")
@example(content=b"bits: {}\n? [1]\n: 2")
def test_any_configuration(shared: tuple[Path, bundle.Bundle], content: bytes) -> None:
    path, original = shared
    changed = path.with_name("config.dqx.zip")
    bundle.write(changed, original.manifest, original.members | {"config.yaml": content})
    run_or_refused(changed)


@FUZZED
@given(
    key=st.sampled_from(["bits", "model", "method", "task", "calib", "parts", "wandb", "defaults", "x"]), value=VALUES
)
def test_any_value_of_a_setting(shared: tuple[Path, bundle.Bundle], key: str, value: Any) -> None:
    path, original = shared
    config = yaml.load(original.members["config.yaml"], Loader=bundle.LOADER) | {key: value}
    changed = path.with_name("setting.dqx.zip")
    text = json.dumps(config).encode()  # YAML as well
    bundle.write(changed, original.manifest, original.members | {"config.yaml": text})
    run_or_refused(changed)


@FUZZED
@given(changes=st.dictionaries(st.sampled_from(["give_anew", "data", "dqx", "x"]), VALUES, min_size=1))
def test_any_manifest(shared: tuple[Path, bundle.Bundle], changes: dict[str, Any]) -> None:
    path, original = shared
    changed = path.with_name("manifest.dqx.zip")
    try:
        bundle.write(changed, original.manifest | json.loads(json.dumps(changes)), original.members)
    except ValueError:  # numbers that JSON lacks
        return
    run_or_refused(changed)


@FUZZED
@given(data=st.data())
def test_damaged_files(shared: tuple[Path, bundle.Bundle], data: st.DataObject) -> None:
    path, _ = shared
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    changed = path.with_name("damaged.dqx.zip")
    changed.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    run_or_refused(changed)
