"""What people type, and what Hydra wants to hear.

Hydra takes `bits=3` for an integer and refuses integers as group choices; a list of tasks is a suite only in
brackets; and it cannot read `~`, which shells leave as it is behind a `=`. `normalize` rewrites exactly these and
leaves everything else alone:

    bits=3,4            ->  bits=w3,w4
    steps=64,128        ->  steps=s64,s128        (steps=48, no such file: steps.count=48)
    task=gsm8k,mmlu     ->  task=[gsm8k,mmlu]     one run with both tasks; with -m it stays a sweep
    data_root=~/data    ->  data_root=/home/me/data
    data_root=/my(data) ->  data_root='/my(data)' a text with what Hydra's grammar has another use for
    bits=4.5            ->  bits='4.5'            so that it is refused as a choice
    +experiment=NAME    ->  experiment=NAME       the group has a place already, where + adds one
    method.rounding=rtn ->  method/rounding=rtn   a part by its name: a file in conf/method/rounding
    +method.transforms.x=smooth  ->  +method/transforms@method.transforms.x=smooth
    method.rounding.levels=daq   ->  method/levels@method.rounding.levels=daq    a part inside a part; likewise
    method.kv.value_clip=NAME, method.rounding.levels.allocation=NAME
    model.sampler=llada ->  model/sampler=llada   likewise: a file in conf/model/sampler
    bits.blocks.b0-3.weight=8    ->  ++bits.blocks.b0-3.weight=8    no block has widths of its own before
    bits.overrides.router.weight=8  ->  ++bits.overrides.router.weight=8    likewise, of a role that few models have
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import OverrideParseException

from dqx.config.schema import GROUPS, ConfigProblems, choices
from dqx.formats.bits import DENSE_ROLES

MULTIRUN = ("-m", "--multirun", "hydra.mode=MULTIRUN")
LIST = re.compile(r"(\+{0,2})(bits|steps|task)=([\w,\-. ]+)")
OVERRIDE = re.compile(r"bits\.overrides\.(\w+)[.=]")
HOME = re.compile(r"(\+{0,2}[\w.]+=)(~/.*)")
PART = re.compile(r"(\+{0,2})(method|model)\.(\w+)(\.\w+)?=([A-Za-z]\w*(?:,[A-Za-z]\w*)*)")
INNER = re.compile(r"(\+{0,2})method\.([\w.]+\.(levels|allocation|value_clip))=([A-Za-z]\w*(?:,[A-Za-z]\w*)*)")
NAMED_PARTS = {"transforms": "transforms", "corrections": "corrections", "rounding_by_role": "rounding"}
SLOTS = ("rounding", "clip", "activation", "kv", "token_weight")
PARTS = (*(f"method.{slot}" for slot in SLOTS), "model.sampler")
VALUES = {"null", "true", "false"}
SINGLE = re.compile(r"\+{0,2}(model|method|bits|calib|steps)=\[")
CHOICE = re.compile(rf"\+{{0,2}}(({'|'.join(GROUPS)})=.*)", re.DOTALL)
NO_NAME = re.compile(r"[-+]?[\d.]+|null|true|false", re.IGNORECASE)
QUOTED = re.compile(r"([^=]+=)'(.*)'", re.DOTALL)
PLAIN = re.compile(r"[\w./,:+-]*", re.ASCII)  # certain to be read by Hydra as it stands


def normalize(argv: Sequence[str]) -> list[str]:
    """The command line as Hydra understands it. Raises ConfigProblems for a list where one choice is wanted."""
    lists = [a for a in argv if SINGLE.match(a)]
    if lists:
        raise ConfigProblems([f"{a}: a run has one choice of this group; write it without brackets" for a in lists])
    sweep = any(a in MULTIRUN for a in argv)
    return [_readable(_normalize(argument, sweep)) for argument in argv]


def as_typed(override: str) -> str:
    """An override as people type it: `bits=3` for Hydra's `bits=w3`, `task=gsm8k,mmlu` for `task=[gsm8k,mmlu]`."""
    if quoted := QUOTED.fullmatch(override):
        plain = quoted[1] + quoted[2].replace("\\'", "'")
        return plain if _readable(plain) == override else override
    typed = re.fullmatch(r"(bits=)w(\d+)|(steps=)s(\d+)|(task=)\[([\w,\-]+)\]", override)
    return "".join(filter(None, typed.groups())) if typed else override


def _normalize(argument: str, sweep: bool) -> str:
    if choice := CHOICE.fullmatch(argument):
        argument = choice[1]
    if re.fullmatch(r"plan=(yes|on|y|1|true)", argument, re.IGNORECASE):
        return "plan=true"  # which launch.py looks for itself
    override = OVERRIDE.match(argument)
    if argument.startswith(("bits.blocks.", "bits.blocks=")) or (override and override[1] not in DENSE_ROLES):
        return f"++{argument}"
    home = HOME.fullmatch(argument)
    if home:
        return home[1] + str(Path(home[2]).expanduser())
    part = part_by_name(argument)
    if part != argument:
        return part
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


def part_by_name(argument: str) -> str:
    """`method/rounding=rtn` for `method.rounding=rtn`, a part by the name of its file; anything else as it is.

    null and true are values, and a list that has one among names stays a list of values: a sweep that deals them out
    asks again for each.
    """
    inner = INNER.fullmatch(argument)
    if inner and not VALUES & set(inner[4].split(",")):
        return f"{inner[1]}method/{inner[3]}@method.{inner[2]}={inner[4]}"
    part = PART.fullmatch(argument)
    return argument if part is None else _part(argument, *part.groups())


def _part(argument: str, plus: str, group: str, slot: str, name: str | None, values: str) -> str:
    if VALUES & set(values.split(",")):
        return argument
    if f"{group}.{slot}" in PARTS and name is None:
        return f"{plus}{group}/{slot}={values}"
    if group == "method" and slot in NAMED_PARTS and name is not None:
        return f"{plus}method/{NAMED_PARTS[slot]}@method.{slot}{name}={values}"
    return argument


def _readable(argument: str) -> str:
    """A setting with those of its values in quotes that Hydra cannot read, or would take for no name of a choice."""
    name, equals, value = argument.partition("=")
    named = CHOICE.fullmatch(argument) is not None
    if not equals or name.startswith(("-", "~")) or value.startswith(("[", "{")):
        return argument
    if not named and (PLAIN.fullmatch(value) or _is_read(value)):
        return argument
    kept = [_is_read(v) and not (named and NO_NAME.fullmatch(v)) for v in value.split(",")]
    values = [v if keep else _quoted(v) for v, keep in zip(value.split(","), kept, strict=True)]
    return f"{name}={','.join(values)}"


def _is_read(value: str) -> bool:
    try:
        OverridesParser.create().parse_overrides([f"x={value}"])
    except OverrideParseException:
        return False
    return True


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _width(value: str) -> str:
    return "w16a16" if value == "16" else f"w{value}" if value.isdigit() else value
