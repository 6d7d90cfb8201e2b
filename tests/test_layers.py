"""The shape of the tree: no ring among files, few rooms, and the README names each of them.

The direction of imports between rooms is a contract in pyproject.toml, which `lint-imports` checks.
"""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
MOST_ENTRIES = 24


def entries() -> set[str]:
    """The files and folders directly below dqx/, as paths."""
    return {
        f"dqx/{path.name}{'/' if path.is_dir() else ''}"
        for path in (ROOT / "dqx").iterdir()
        if path.name not in ("__pycache__", "__init__.py")
    }


def test_no_files_import_each_other_in_a_ring():
    """Imports inside functions count, those for types alone do not. graphlib raises CycleError with the ring."""
    graph = grimp.build_graph("dqx", exclude_type_checking_imports=True, cache_dir=None)
    TopologicalSorter({file: graph.find_modules_directly_imported_by(file) for file in graph.modules}).prepare()


def test_a_stranger_has_few_rooms_to_look_into():
    assert len(entries()) < MOST_ENTRIES  # and __init__.py


def test_the_readme_shows_the_tree_as_it_is():
    section = (ROOT / "README.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    named = set(re.findall(r"\bdqx/[\w./]+", section))
    assert sorted(entries() - named) == []
    assert sorted(path for path in named if not (ROOT / path).exists()) == []
