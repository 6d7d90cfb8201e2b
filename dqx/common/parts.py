"""Parts: mappings with a `_target_` (a class) and its options, as `method.rounding` or `model.sampler` are.

A configuration may come from somebody else, so only two kinds of classes are ever imported and built: dqx's own parts,
which are the dataclasses of `PACKAGES`, and classes of modules that were named as trusted: in the setting `parts`, or
by an installed package in its entry points `dqx.parts`. `part_problems` checks names and types of all options before
anything is built, because a typo in one should not hide a typo in another.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Union, get_args, get_origin, get_type_hints

from dqx.common.names import did_you_mean

RESERVED = ("_target_", "_convert_")
SIMPLE = (bool, int, float, str)
#: Where dqx's parts are defined.
PACKAGES = ("dqx.quant", "dqx.diffusion.samplers")
#: Entry points by which an installed package names a module with parts: `my_team = "my_team.methods"`.
ENTRY_POINTS = "dqx.parts"
#: Modules and packages that the setting `parts` named in this process.
TRUSTED: set[str] = set()
#: Where classes are that older configurations, bundles and quantized folders name: former `_target_` -> present one.
MOVED = {
    "dqx.diffusion.llada.LLaDASampler": "dqx.diffusion.samplers.llada.LLaDASampler",
    "dqx.diffusion.dream.DreamSampler": "dqx.diffusion.samplers.dream.DreamSampler",
}


def trust(modules: Iterable[str]) -> None:
    """Let the classes of modules, or of whole packages, be parts: in this process, from now on."""
    TRUSTED.update(modules)


def build_part(part: Mapping[str, Any]) -> Any:
    """The object a part describes, its own parts included. Call `part_problems` first to hear of mistakes.

    Raises Untrusted for a class that may not be built.
    """
    cls = locate(part["_target_"])
    return cls(**{key: _built(value) for key, value in part.items() if key not in RESERVED})


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build_part(value)
        return {key: _built(inner) for key, inner in value.items()}
    return [_built(inner) for inner in value] if isinstance(value, list | tuple) else value


def part_problems(part: Any, where: str) -> list[str]:
    """What keeps the part at config key `where`, and the parts inside it, from being built."""
    if not isinstance(part, Mapping):
        if part is None:
            return []
        return [f"{where}={part!r} is not a part; a part is a mapping with a _target_ (a class) and its options"]
    if "_target_" not in part:
        return [f"{where} has no _target_, the class to build; see conf/ for examples"]
    target = part["_target_"]
    try:
        cls = locate(target)
        accepted = inspect.signature(cls).parameters
    except Untrusted as error:
        return [f"{where}._target_={target} {error}"]
    except Exception as error:  # whatever the import of a trusted module raises
        return [f"{where}._target_={target} cannot be imported: {str(error).splitlines()[0]}"]
    problems = []
    options = {key: value for key, value in part.items() if key not in RESERVED}
    hints = get_type_hints(cls)
    for key, value in options.items():
        if key not in accepted:
            problems.append(f"{where}.{key} is no option of {cls.__name__}; {did_you_mean(key, accepted)}")
        elif not fits(value, hints.get(key, Any)):
            problems.append(f"{where}.{key}={value!r} is not of type {type_name(hints[key])}")
        else:
            problems += _inner_problems(value, f"{where}.{key}")
    for name, parameter in accepted.items():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and name not in options:
            problems.append(f"{where}.{name} must be set; {cls.__name__} has no default for it")
    return problems


def _inner_problems(value: Any, where: str) -> list[str]:
    """Problems of the parts in an option: the part itself, parts by name, or a list that may hold some."""
    if isinstance(value, Mapping):
        inner = {where: value} if "_target_" in value else {f"{where}.{name}": node for name, node in value.items()}
        return [problem for place, node in inner.items() for problem in part_problems(node, place)]
    if isinstance(value, list | tuple):
        items = [(node, f"{where}[{i}]") for i, node in enumerate(value)]
        return [problem for node, place in items for problem in _inner_problems(node, place)]
    return []


class Untrusted(ValueError):
    """A `_target_` that is neither a part of dqx nor in a trusted module."""


def locate(target: str) -> type:
    """The class at a dotted path. Raises Untrusted before anything is imported, else what the import raises."""
    module, _, name = MOVED.get(target, str(target)).rpartition(".")
    own = {*TRUSTED, *(entry.value for entry in entry_points(group=ENTRY_POINTS))}
    if not _within(module, (*PACKAGES, *own)):
        raise Untrusted(f"is no part of dqx; of your own parts, name the module: parts=[{module or 'MODULE'}]")
    cls = getattr(import_module(module), name)
    ours = is_dataclass(cls) and _within(module, PACKAGES) and _within(cls.__module__, PACKAGES)
    if not isinstance(cls, type) or not (ours or _within(cls.__module__, own)):
        raise Untrusted("is no class that describes a part; see conf/ for examples")
    return cls


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value can be an option annotated `hint`. Of parts inside parts: that they are no number or text."""
    options = _options(hint)
    if Any in options:
        return True
    if value is None:
        return type(None) in options
    if isinstance(value, SIMPLE):
        return type(value) in options or (float in options and type(value) is int)
    return any(option not in (*SIMPLE, type(None)) for option in options)


def type_name(hint: Any) -> str:
    """`int or null` for `int | None`."""
    return " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in _options(hint))


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
