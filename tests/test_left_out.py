"""tests/README.md lists what the default suite leaves out: every marker, and each file that may skip a test."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS / "README.md").read_text()
PROJECT = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())
MAY_SKIP = re.compile(r"pytest\.skip\(|mark\.skip|pytest\.importorskip\(|shutil\.which\(")


def test_every_marker_is_explained() -> None:
    settings = PROJECT["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in settings["markers"]}
    assert {name for name in markers if f"| `{name}` |" not in TEXT} == set()
    assert set(re.findall(r"not (\w+)", settings["addopts"])) <= markers


def test_every_file_that_may_skip_is_listed() -> None:
    files = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py") if path != Path(__file__)}
    skipping = {name for name in files if MAY_SKIP.search((TESTS / name).read_text())}
    assert {name for name in skipping if f"`{name}`" not in TEXT} == set()


def test_no_package_of_dev_is_skipped_for() -> None:
    """`.[dev]` brings them: a test without its package fails, it isn't left out in silence."""
    asked = {
        name
        for path in TESTS.rglob("*.py")
        for name in re.findall(r"pytest\.importorskip\(\"(\w+)", path.read_text())
        if path != Path(__file__)
    }
    assert asked == {"ray", "hydra_plugins"}
    assert not any(entry.startswith("ray") for entry in PROJECT["project"]["optional-dependencies"]["dev"])
