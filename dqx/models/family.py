"""Model families: what tells one from another, one `Family` per file of `dqx/models/families`.

A family of somebody's own is a module that calls `register`. Importing it is enough; for the command line, which
imports nothing of its own accord, a package names the module as an entry point of the group `dqx.families`.
Nothing here imports torch: `conf/` reads from it, and `--help` must answer at once.
"""

from __future__ import annotations

import math
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from dqx.models import families as built_in
from dqx.models.architecture import Architecture, Yarn

ENTRY_POINTS = "dqx.families"
#: Keys of `config.json` that hold settings of rotary embeddings, and those inside that say nothing.
ROPE = ("rope_parameters", "rope_scaling")
PLAIN_ROPE = (("partial_rotary_factor", 1.0), ("factor", None), ("original_max_position_embeddings", None))


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind: what their `config.json` and tensors are called, and how they sample."""

    name: str  # what `model.family` says
    model_type: str  # the key of that name in `config.json`; case does not matter
    block_prefix: str  # of the tensors of a block, `{}` for its number: "model.layers.{}."
    block_names: Mapping[str, str]  # the tensors of a block, linears by role and norms: our name -> theirs
    outer_names: Mapping[str, str]  # the tensors outside the blocks, likewise
    architecture: Callable[[Mapping[str, Any]], Architecture]  # reads a `config.json`; KeyError for a missing key
    config: Callable[[Architecture], dict[str, Any]]  # writes it, with the keys of the published checkpoints
    sampler: Mapping[str, Any]  # the part that answers with a checkpoint of which nothing but the folder is known
    #: Keys of `config.json` that would change the function computed, and the values that are understood.
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()  # its keys that say nothing about the function: of training, of files
    example: str | None = None  # a choice of the config group `model`
    published: tuple[str, Architecture] | None = None  # name and shape, for estimates without a checkpoint at hand
    sizes: Mapping[str, Architecture] = field(default_factory=dict)  # others that are published, by a name like its
    traits: frozenset[str] = frozenset()  # what `conf/` asks by (`${by_trait:...}`), for settings of published code
    architecture_class: type[Architecture] = Architecture  # what `architecture` returns; of other roles a subclass

    def shape_of(self, path: str) -> tuple[str, Architecture] | None:
        """Name and shape of the published checkpoint whose size (`4B`) stands in a path; else those of `published`."""
        parts = re.split("[-_/]", path)
        return next(((name, arch) for name, arch in self.sizes.items() if name.split("-")[-1] in parts), self.published)


def read_keys(config: Mapping[str, Any], keys: Mapping[str, str], *, yarn: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a `config.json` by field of `Architecture`, of the `keys` by field.

    `yarn` are the keys that the family reads of a stretched rope, besides those of plain ones; none: it has none.
    Raises KeyError for a missing key, ValueError for a value that has another meaning than those computed here.
    """
    values = {name: config[key] for name, key in keys.items() if name != "rope_theta"}
    ends = values["eos_token_id"] if isinstance(values["eos_token_id"], list) else [values["eos_token_id"]]
    if not ends:
        raise ValueError(f"{keys['eos_token_id']} is empty")
    theta, stretched = _rope(config, keys["rope_theta"], yarn)
    return values | {
        "rope_theta": theta,
        "yarn": stretched,
        "norm_eps": _number(values["norm_eps"], keys["norm_eps"]),
        "eos_token_id": ends[0],
        "end_token_ids": tuple(ends[1:]),
    }


#: The keys of YaRN that transformers reads, and the one of Llama 4's scale of queries.
YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
QUERY_SCALE = "llama_4_scaling_beta"


def _rope(config: Mapping[str, Any], key: str, yarn: tuple[str, ...]) -> tuple[float, Yarn | None]:
    """The base of rotary embeddings, a key of its own or one in `rope_parameters` (transformers 5), and their YaRN."""
    thetas = [_number(config[key], key)] if key in config else []
    stretched = None
    for name in ROPE:
        inside = config.get(name)
        if inside is None:
            continue
        if not isinstance(inside, Mapping):
            raise ValueError(f"{name} is no mapping")
        kind = inside.get("rope_type", inside.get("type", "default"))
        known = ("rope_type", "type", key, *(yarn if kind == "yarn" else ()))
        others = [k for k, v in inside.items() if k not in known and (k, v) not in PLAIN_ROPE]
        if others or kind != ("yarn" if yarn and kind == "yarn" else "default"):
            told = f"rope_type={kind!r}" if kind not in ("default", "yarn") or not yarn else ""
            told = told or f"{others[0]}={inside[others[0]]!r}"
            only = "only plain rotary embeddings (rope_type 'default') are computed"
            raise ValueError(f"{name} has {told}; {only if not yarn else only + ', and YaRN'}")
        thetas += [_number(inside[key], key)] if key in inside else []
        stretched = _yarn(inside) if kind == "yarn" else stretched
    if not thetas:
        raise KeyError(key)
    if thetas[1:] and thetas[0] != thetas[-1]:
        raise ValueError(f"{key} has several values: {', '.join(map(str, thetas))}")
    return thetas[0], stretched


def _yarn(inside: Mapping[str, Any]) -> Yarn:
    """YaRN of `rope_parameters`. Raises KeyError for a missing key, ValueError for a value that is no number."""
    values = {key: _number(inside[key], key) for key in (*YARN, QUERY_SCALE) if inside.get(key) is not None}
    factor, length = values["factor"], values["original_max_position_embeddings"]
    if factor <= 0 or length < 1 or length != int(length):
        raise ValueError(
            f"factor={factor:g} and original_max_position_embeddings={length:g} are no stretch of a length"
        )

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    both = values.get("mscale"), values.get("mscale_all_dim")
    return Yarn(
        factor=factor,
        original_length=int(length),
        beta_fast=values.get("beta_fast") or 32.0,
        beta_slow=values.get("beta_slow") or 1.0,
        attention_factor=scale(both[0]) / scale(both[1]) if both[0] and both[1] else scale(1.0),
        query_scale=values.get(QUERY_SCALE, 0.0),
    )


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{key}={value!r} is no number")
    return float(value)


_registered: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known by its name, and return it."""
    _registered[family.name] = family
    return family


@cache
def families() -> Mapping[str, Family]:
    """All families by name, once the modules that register the built-in and installed packages' ones are imported."""
    for module in pkgutil.iter_modules(built_in.__path__, f"{built_in.__name__}."):
        import_module(module.name)
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    return _registered


def family_of(name: str) -> Family:
    """The family of that name. Raises ValueError for one that is not known."""
    if name not in families():
        raise ValueError(f"model.family={name} is unknown; it is one of {', '.join(families())}")
    return families()[name]
