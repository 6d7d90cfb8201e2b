"""What people type, and what Hydra wants to hear.

Hydra takes `bits=3` for an integer and refuses integers as group choices; a list of tasks is a suite only in
brackets; and it cannot read `~`, which shells leave as it is behind a `=`. `normalize` rewrites exactly these and
leaves everything else alone:

    bits=3,4            ->  bits=w3,w4
    steps=64,128        ->  steps=s64,s128        (steps=48, no such file: steps.count=48)
    task=gsm8k,mmlu     ->  task=[gsm8k,mmlu]     one run with both tasks; with -m it stays a sweep
    data_root=~/data    ->  data_root=/home/me/data
    +experiment=NAME    ->  experiment=NAME       the group has a place already (it is null), where + adds one
    method.rounding=rtn ->  method/rounding=rtn   a part by its name: a file in conf/method/rounding
    +method.transforms.x=smooth  ->  +method/transforms@method.transforms.x=smooth
    method.rounding.levels=daq   ->  method/levels@method.rounding.levels=daq    a part inside a part
    model.sampler=llada ->  model/sampler=llada   likewise: a file in conf/model/sampler
    bits.blocks.b0-3.weight=8    ->  ++bits.blocks.b0-3.weight=8    no block has widths of its own before
    bits.overrides.router.weight=8  ->  ++bits.overrides.router.weight=8    likewise, of a role that few models have
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dqx.common.names import did_you_mean, natural
from dqx.config.schema import CONF_DIR, GROUPS, ConfigProblems, choices
from dqx.formats.bits import DENSE_ROLES

MULTIRUN = ("-m", "--multirun", "hydra.mode=MULTIRUN")
LIST = re.compile(r"(\+{0,2})(bits|steps|task)=([\w,\- ]+)")
OVERRIDE = re.compile(r"bits\.overrides\.(\w+)[.=]")
HOME = re.compile(r"(\+{0,2}[\w.]+=)(~/.*)")
PART = re.compile(r"(\+{0,2})(method|model)\.(\w+)(\.\w+)?=([A-Za-z]\w*(?:,[A-Za-z]\w*)*)")
INNER = re.compile(r"(\+{0,2})method\.([\w.]+\.(levels|allocation))=([A-Za-z]\w*(?:,[A-Za-z]\w*)*)")
NAMED_PARTS = {"transforms": "transforms", "corrections": "corrections", "rounding_by_role": "rounding"}
PARTS = ("method.rounding", "method.clip", "method.activation", "method.kv", "model.sampler")
VALUES = {"null", "true", "false"}
SINGLE = re.compile(r"\+{0,2}(model|method|bits|calib|steps)=\[")


def normalize(argv: Sequence[str]) -> list[str]:
    """The command line as Hydra understands it. Raises ConfigProblems for a list where one choice is wanted."""
    lists = [a for a in argv if SINGLE.match(a)]
    if lists:
        raise ConfigProblems([f"{a}: a run has one choice of this group; write it without brackets" for a in lists])
    sweep = any(a in MULTIRUN for a in argv)
    return [_normalize(argument, sweep) for argument in argv]


def as_typed(override: str) -> str:
    """An override as people type it: `bits=3` for Hydra's `bits=w3`, `task=gsm8k,mmlu` for `task=[gsm8k,mmlu]`."""
    typed = re.fullmatch(r"(bits=)w(\d+)|(steps=)s(\d+)|(task=)\[([\w,\-]+)\]", override)
    return "".join(filter(None, typed.groups())) if typed else override


def _normalize(argument: str, sweep: bool) -> str:
    if argument.startswith("+experiment="):
        return argument.removeprefix("+")
    override = OVERRIDE.match(argument)
    if argument.startswith(("bits.blocks.", "bits.blocks=")) or (override and override[1] not in DENSE_ROLES):
        return f"++{argument}"
    home = HOME.fullmatch(argument)
    if home:
        return home[1] + str(Path(home[2]).expanduser())
    inner = INNER.fullmatch(argument)
    if inner and not VALUES & set(inner[4].split(",")):
        return f"{inner[1]}method/{inner[3]}@method.{inner[2]}={inner[4]}"
    part = PART.fullmatch(argument)
    if part:
        return _part(argument, *part.groups())
    match = LIST.fullmatch(argument)
    if not match:
        return argument
    plus, group, text = match.groups()
    values = [v.strip() for v in text.split(",")]
    if group == "task":
        return f"{plus}task=[{','.join(values)}]" if len(values) > 1 and not sweep else argument
    if group == "bits":
        return f"{plus}bits={','.join(_width(v) for v in values)}"
    files = ["s" + v if v.isdigit() else v for v in values]
    if set(files) <= set(choices("steps")):
        return f"{plus}steps={','.join(files)}"
    counts = ["null" if v == "default" else v.removeprefix("s") for v in values]
    if all(re.fullmatch(r"-?\d+|null", c) for c in counts):
        return f"steps.count={','.join(counts)}"
    return f"{plus}steps={','.join(files)}"


def _part(argument: str, plus: str, group: str, slot: str, name: str | None, values: str) -> str:
    """A part that is given by the name of its file instead of as a mapping; null and true are values."""
    if VALUES & set(values.split(",")):
        return argument
    if f"{group}.{slot}" in PARTS and name is None:
        return f"{plus}{group}/{slot}={values}"
    if group == "method" and slot in NAMED_PARTS and name is not None:
        return f"{plus}method/{NAMED_PARTS[slot]}@method.{slot}{name}={values}"
    return argument


def _width(value: str) -> str:
    return "w16a16" if value == "16" else f"w{value}" if value.isdigit() else value


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
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = choices(group) if error.options is None and group in GROUPS else error.options or []
        return [f"{group}={name} is no choice; {did_you_mean(name, _visible(options))}"]
    if isinstance(error, OverrideParseException):
        return [f"{error.override} cannot be read, it is not NAME=VALUE ({_plain(str(error))})"]
    several = re.match(r"Ambiguous value for argument '(.*)'", str(error))
    if several:
        return [f"{several[1]} gives several values for one run; add -m to run one after the other"]
    missing = re.match(r"provider=.*, path=(.*) is not available", str(error))
    if missing:
        return [f"the config folder {missing[1]} (hydra.searchpath or DQX_CONFIG_PATH) does not exist"]
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        key, parent = str(cause.full_key or cause.key or ""), cause.parent_node
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and OmegaConf.is_dict(parent):
            known = [] if parent._is_none() else [str(k) for k in parent]
            if not known and not parent._is_none():
                return [f"{key} is not set; a + before its name adds it"]
            elsewhere = _with_setting("model/sampler", str(cause.key)) if key.startswith("model.sampler.") else []
            if elsewhere:
                return [f"{key} is no setting of this sampler; model.sampler={' and '.join(elsewhere)} has it"]
            return [f"{key} is no setting; {did_you_mean(str(cause.key), known)}"]
        message = _plain((cause.msg or str(cause)).splitlines()[0])
        return [message if not key or message.startswith(key) else f"{key}: {message}"]
    return [_plain(str(error))]


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
        if line.startswith(("Config search path", "See https://hydra.cc")):
            break
        lines.append(line.strip())
    return " ".join(line for line in lines if line)
