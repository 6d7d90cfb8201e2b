"""Model families: what tells LLaDA from Dream, one `Family` per file of `dqx/models/families`.

A family of somebody's own is a module that calls `register`. Importing it is enough; for the command line, which
imports nothing of its own accord, a package names the module as an entry point of the group `dqx.families`.
Nothing here imports torch: `conf/` reads from it, and `--help` must answer at once.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from dqx.models import families as built_in
from dqx.models.architecture import Architecture

ENTRY_POINTS = "dqx.families"


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind: what their `config.json` and tensors are called, and how they sample.

    Args:
        name: what `model.family` says.
        model_type: the key of that name in `config.json`; case does not matter.
        block_prefix: of the tensors of a block, `{}` for its number: "model.layers.{}.".
        block_names: the tensors of a block, linears by role and norms, in our names and theirs.
        outer_names: the tensors outside the blocks, likewise.
        required: keys of `config.json` that would change the function computed, and the values that are understood.
        architecture: reads a `config.json`. Raises KeyError for a missing key.
        config: writes the `config.json` of an architecture, with the keys of the published checkpoints.
        sampler: the part that answers with a checkpoint of which nothing but the folder is known.
        example: a choice of the config group `model`.
        published: name and shape of the published model, for estimates where no checkpoint lies at hand.
        traits: what `conf/` asks by (`${by_trait:...}`), for settings that published code had for some families.
        architecture_class: what `architecture` returns; a subclass where the family has other roles.
    """

    name: str
    model_type: str
    block_prefix: str
    block_names: Mapping[str, str]
    outer_names: Mapping[str, str]
    architecture: Callable[[Mapping[str, Any]], Architecture]
    config: Callable[[Architecture], dict[str, Any]]
    sampler: Mapping[str, Any]
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    example: str | None = None
    published: tuple[str, Architecture] | None = None
    traits: frozenset[str] = frozenset()
    architecture_class: type[Architecture] = Architecture


def read_keys(config: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The values of a `config.json` by field of `Architecture`, of the `keys` by field. Raises KeyError."""
    values = {name: config[key] for name, key in keys.items()}
    return values | {name: float(values[name]) for name in ("rope_theta", "norm_eps")}


_registered: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known by its name, and return it."""
    _registered[family.name] = family
    return family


@cache
def _import_all() -> None:
    """Import the modules that register the built-in families and those of installed packages."""
    for module in pkgutil.iter_modules(built_in.__path__, f"{built_in.__name__}."):
        import_module(module.name)
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def families() -> Mapping[str, Family]:
    """All families by name."""
    _import_all()
    return _registered


def family_of(name: str) -> Family:
    """The family of that name. Raises ValueError for one that is not known."""
    if name not in families():
        raise ValueError(f"model.family={name} is unknown; it is one of {', '.join(families())}")
    return families()[name]
