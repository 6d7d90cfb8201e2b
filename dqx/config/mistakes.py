"""What Hydra and OmegaConf say of a mistake, in plain words: what was set, why it cannot be, what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dqx.common.names import SHOWN, alternatives, did_you_mean, enumerated, natural, nearest
from dqx.config import schema
from dqx.config.schema import CONF_DIR, GROUPS, ConfigProblems, choices, setting_names

#: Sections that are turned off by one of their settings.
OFF = {"wandb": "wandb.mode=disabled", "outliers": "outliers.samples=0", "fidelity": "fidelity.samples=0"}
#: What OmegaConf calls the types that a text on the command line is converted to.
TYPES = {"Integer": "whole number", "Float": "number"}
QUOTES = """inside a list, ( ) [ ] {{ }} = # ' and letters beyond ASCII need quotes: '{}=["my(text)"]'"""


def explain(error: BaseException) -> list[str]:
    """A mistake on the command line or in a config file as plain words, one string per problem, nearest names included.

    Hydra's and OmegaConf's own messages, without the advice that does not hold here ("append with +": the schema
    has no place for new keys) and without the search path.
    """
    if isinstance(error, ConfigProblems):
        return error.problems
    extra = _missing_launcher(error)
    if extra:
        return [f"hydra/launcher={extra} needs a package that is not installed: pip install -e '.[{extra}]'"]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return [_unknown_choice(error.missing_cfg_file, error.options)]
    if isinstance(error, OverrideParseException):
        name, equals, _ = str(error.override).partition("=")
        return [f"{error.override} cannot be read; {QUOTES.format(name) if equals else 'it is not NAME=VALUE'}"]
    several = re.match(r"Ambiguous value for argument '([^=]*)=(.*)'", str(error))
    if several:
        name, value = several.groups()
        text = "" if name in GROUPS else f"""; a text with a comma needs quotes: '{name}="{value}"'"""
        return [f"{name}={value} gives several values for one run; add -m to run one after the other{text}"]
    missing = re.match(r"provider=.*, path=(.*) is not available", str(error))
    if missing:
        return [f"the config folder {missing[1]} (hydra.searchpath or DQX_CONFIG_PATH) does not exist"]
    there = re.match(r"Could not append to config. An item is already at '(.*)'", str(error))
    if there:
        return [f"+{there[1]} adds a setting, but {there[1]} is one already; leave out the +"]
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return [_of_omegaconf(cause)]
    group = re.match(r"Could not override '(.*)'. No match in the defaults list", str(error))
    if group:
        return [f"{group[1]} is no setting; {did_you_mean_setting(group[1], GROUPS, setting_names())}"]
    return [_plain(str(error))]


def _unknown_choice(file: str, options: Sequence[str] | None) -> str:
    """What is said of a file that a group does not have."""
    group, _, name = file.rpartition("/")
    if group.split("/")[0] == "model" and not (CONF_DIR / group).is_dir():
        path = file.removeprefix("model/")
        return (
            f"model={path} is no choice; a folder or a hub id goes with the choice that it is a copy of, "
            f"for example model=llada_8b_base model.path={path}"
        )
    known = choices(group) if options is None and group in GROUPS else options or []
    more = ", or a whole number" if group == "steps" else ""
    return f"{group}={name} is no choice; {did_you_mean(name, _visible(known))}{more}"


def _of_omegaconf(cause: OmegaConfBaseException) -> str:
    """A key that is not there, or a value that does not fit."""
    key, parent = str(cause.full_key or cause.key or ""), cause.parent_node
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and isinstance(parent, DictConfig):
        if not parent._is_none() and not parent:
            return f"{key} is not set; a + before its name adds it"
        elsewhere = _with_setting("model/sampler", str(cause.key)) if key.startswith("model.sampler.") else []
        if elsewhere:
            choices = enumerated([f"model.sampler={name}" for name in elsewhere])
            return f"{key} is no setting of this sampler; {choices} {'has' if len(elsewhere) == 1 else 'have'} it"
        beside = [] if parent._is_none() else [str(name) for name in parent]
        root = parent._get_root()
        known = [*GROUPS, *_leaves(root)] if isinstance(root, DictConfig) and "model" in root else beside
        return f"{key} is no setting; {did_you_mean_setting(key, beside, known)}"
    message = _plain((cause.msg or str(cause)).splitlines()[0])
    section = re.match(r"Invalid type assigned: .* is not a subclass of (\w+)\. value: (.*)", message)
    if section:
        names = [f"{key}.{f.name}" for f in fields(getattr(schema, section[1]))] if hasattr(schema, section[1]) else []
        off = f" (to turn it off: {OFF[key]})" if key in OFF else ""
        value = section[2].lower() if section[2] in ("True", "False") else section[2]
        return f"{key}={value}: {key} stands for several settings; write one of {', '.join(names)}{off}"
    number = re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", message)
    if number and number[2] in TYPES:
        node = parent._get_node(cause.key) if isinstance(parent, DictConfig) else None
        optional = ", or null" if isinstance(node, Node) and node._is_optional() else ""
        return f"{key}={number[1]} is no {TYPES[number[2]]}; write one{optional}"
    truth = re.match(r"Value '(.*)' is not a valid bool", message)
    if truth:
        return f"{key}={truth[1]} is neither true nor false; write one of them"
    if re.match(r"Invalid value assigned: \w+ is not a ListConfig", message):
        return f"{key} is a list; write its items in brackets, '{key}=[ONE,TWO]'"
    return message if not key or message.startswith(key) else f"{key}: {message}"


def did_you_mean_setting(key: str, beside: Iterable[str], known: Iterable[str]) -> str:
    """The settings that one which does not exist may stand for: of that name elsewhere, or beside it; or all beside it.

    `known` are whole names; `beside` are names as they stand in the same section.
    """
    path, _, name = key.rpartition(".")
    names = list(known)
    here = [other for other in beside if not other.startswith("_") and (path or other != "hydra")]
    ending = sorted((other for other in names if f".{other}".endswith(f".{name}")), key=len)[:SHOWN]
    near = ending or [f"{path}.{other}" if path else other for other in nearest(name, here)]
    near = near or ([] if path else nearest(name, names))
    return f"did you mean {alternatives(near)}?" if near else f"there are {', '.join(here) or 'none'}"


def _leaves(cfg: DictConfig, path: str = "") -> Iterator[str]:
    """The whole names of all settings of a composed configuration, but for Hydra's own."""
    if cfg._is_none() or cfg._is_missing() or cfg._is_interpolation():
        return
    for key in map(str, cfg):
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and (path or key != "hydra"):
            yield from _leaves(node, f"{path}{key}.")
        elif not key.startswith("_"):
            yield f"{path}{key}"


def _with_setting(group: str, key: str) -> list[str]:
    """The choices of the group whose file names that setting."""
    return [name for name in choices(group) if key in OmegaConf.load(CONF_DIR / group / f"{name}.yaml")]


def _missing_launcher(error: BaseException) -> str | None:
    """The choice of hydra/launcher whose engine, an optional package, is not there."""
    if isinstance(error, MissingConfigException):
        return {"hydra/launcher/submitit_slurm": "slurm", "hydra/launcher/submitit_local": "local_gpus"}.get(
            error.missing_cfg_file or ""
        )
    return "ray" if "hydra_plugins.dqx.RayLauncher" in str(error) else None


def _visible(options: Iterable[str]) -> list[str]:
    return sorted({o for o in options if not o.startswith("_")}, key=natural)


def _plain(message: str) -> str:
    """Hydra's message without its search path and its pointers to Hydra's documentation."""
    if message.startswith(("Unsupported item value in defaults", "Config group override must be a string")):
        return "a group takes one of its names, no number and no null; in files widths and steps are written w3 and s64"
    message = re.sub(r"^field '.*' is not Optional$", "it cannot be null", message)
    message = re.sub(r"^\w+ raised while resolving interpolation: ", "", message)
    lines = []
    for line in message.splitlines():
        if line.startswith(("Config search path", "See https://hydra.cc", "To append to your")):
            break
        lines.append(line.strip())
    return " ".join(line for line in lines if line)
