"""Classes that are known by a name: statistics of a site's input, and what a quantized checkpoint can hold.

A class joins where it is defined, in dqx or in a module of your own, which is imported as soon as a method names a part
of it. A name belongs to one class; defining that class again, in a notebook, replaces it.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

#: What a block may hold besides the parameters of its checkpoint, by the names of the classes.
STORABLE: dict[str, type] = {}


def register(table: dict[str, type], name: str, cls: type) -> None:
    """Enter a class into a table. Raises ValueError where its name is that of another class."""
    there = table.setdefault(name, cls)
    if (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{name} is {there.__module__}.{there.__qualname__} already; choose another name")
    table[name] = cls


def storable(cls: T) -> T:
    """Let quantized checkpoints hold objects of a class: a module or a dataclass. For use as a decorator.

    An object is built again from the arguments of its class, which it must have as attributes of the same names (a
    dataclass does), or as `options`, a mapping.
    """
    register(STORABLE, cls.__name__, cls)
    return cls


def storable_class(name: str) -> type | None:
    """The class of that name, or None. Of modules that are not imported yet, only those of dqx are looked through."""
    if name not in STORABLE:
        package: Any = import_module("dqx.quant")
        for module in pkgutil.walk_packages(package.__path__, "dqx.quant."):
            import_module(module.name)
    return STORABLE.get(name)
