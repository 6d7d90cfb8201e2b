"""Parts: mappings with a `_target_` (a class) and its options, as `method.rounding` or `model.sampler` are.

A part is usually a dataclass, whose fields are the options. `part_problems` checks names and types of all options
before anything is built, because a typo in one should not hide a typo in another.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import instantiate

from dqx.common.names import did_you_mean

RESERVED = ("_target_", "_convert_")
SIMPLE = (bool, int, float, str)
#: Where classes are that older configurations, bundles and quantized folders name: former `_target_` -> present one.
MOVED = {
    "dqx.diffusion.llada.LLaDASampler": "dqx.diffusion.samplers.llada.LLaDASampler",
    "dqx.diffusion.dream.DreamSampler": "dqx.diffusion.samplers.dream.DreamSampler",
}


def build_part(part: Mapping[str, Any]) -> Any:
    """The object a part describes, its own parts included. Call `part_problems` first to hear of mistakes."""
    return instantiate(_present(part), _convert_="all")


def _present(part: Any) -> Any:
    """A part, and the parts inside it, with the classes where they are now."""
    if not isinstance(part, Mapping):
        return part
    target = part.get("_target_")
    renamed = {} if target is None else {"_target_": MOVED.get(target, target)}
    return {key: _present(value) for key, value in part.items()} | renamed


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
        cls = locate(str(target))
        accepted = inspect.signature(cls).parameters
    except Exception as error:  # whatever the import of somebody's module raises
        return [f"{where}._target_={target} cannot be imported: {str(error).splitlines()[0]}"]
    problems = []
    options = {key: value for key, value in part.items() if key not in RESERVED}
    hints = get_type_hints(cls)
    for key, value in options.items():
        if key not in accepted:
            problems.append(f"{where}.{key} is no option of {cls.__name__}; {did_you_mean(key, accepted)}")
        elif not fits(value, hints.get(key, Any)):
            problems.append(f"{where}.{key}={value!r} is not of type {type_name(hints[key])}")
        elif isinstance(value, Mapping):
            inner = {"": value} if "_target_" in value else {f".{name}": node for name, node in value.items()}
            for name, node in inner.items():
                problems += part_problems(node, f"{where}.{key}{name}")
    for name, parameter in accepted.items():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and name not in options:
            problems.append(f"{where}.{name} must be set; {cls.__name__} has no default for it")
    return problems


def locate(target: str) -> Any:
    """The class at a dotted path. Raises whatever its import raises."""
    module, _, name = MOVED.get(target, target).rpartition(".")
    return getattr(import_module(module), name)


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
