"""The command line before Hydra reads it: options in front of settings, and what is neither.

Hydra takes settings only where they stand in one row (not `method=rtn -m seed=1,2`), of several values for a setting
the last, without a word, and answers `--method gptq` with its own usage.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence

from hydra._internal.utils import get_args_parser

from dqx.common.names import SHOWN, alternatives, did_you_mean
from dqx.config.schema import GROUPS, ConfigProblems, choices, setting_names

OPTION = re.compile(r"--?([A-Za-z_][\w.-]+)(?:=(.*))?")
SETTING = re.compile(r"\+{0,2}([^=~]+)=(.*)", re.DOTALL)
HELP = "--help lists the choices"


def arranged(argv: Sequence[str], *own: str) -> list[str]:
    """The options, then the settings. `own` are options, each with a value, that Hydra does not have.

    Raises ConfigProblems for options that do not exist, for words that set nothing, and for a setting that is given
    two values.
    """
    _raise(_settings_with_dashes(argv))
    parser = _parser(own)
    given, strange = parser.parse_known_intermixed_args(argv)
    words: list[str] = given.overrides
    names = re.findall(r"--[a-z-]+", parser.format_usage())
    _raise(f"{a} is no option; {did_you_mean(a.partition('=')[0], names)}" for a in strange if a.startswith("-"))
    _raise([*_stray_words(words), *_set_twice(words)])
    left, options = list(words), []
    for argument in argv:
        if left and argument == left[0]:
            left.pop(0)
        else:
            options.append(argument)
    return [*options, *words]


def _raise(problems: Iterator[str] | Sequence[str]) -> None:
    if told := list(problems):
        raise ConfigProblems(told)


def _parser(own: Sequence[str]) -> argparse.ArgumentParser:
    """Hydra's, with a mistake as an exception."""

    def error(message: str) -> None:
        raise ConfigProblems([f"{message}; {HELP}"])

    parser: argparse.ArgumentParser = get_args_parser()
    for option in own:
        parser.add_argument(option)
    parser.error = error  # type: ignore[method-assign, assignment]
    return parser


def _settings_with_dashes(argv: Sequence[str]) -> Iterator[str]:
    """`--method gptq`, `-method gptq`, `--bits=4`: settings written as other programs' options."""
    for at, argument in enumerate(argv):
        option = OPTION.fullmatch(argument)
        meant = _meant(option[1]) if option else []
        if option and meant:
            follows = "".join(argv[at + 1 : at + 2])
            value = follows if option[2] is None and not re.search(r"^-|=|^$", follows) else option[2]
            typed = argument if value in (None, option[2]) else f"{argument} {value}"
            yield f"{typed}: settings are written without dashes, {_set(meant, value)}"


def _stray_words(words: Sequence[str]) -> Iterator[str]:
    """Words without a `=`: `gptq` for `method=gptq`, `method gptq`, `method= gptq`."""
    passed = False  # a word that the one before has told of
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if passed or "=" in word or word.startswith("~"):
            passed = False
        elif re.fullmatch(r"[+\w./@]+=", before):
            yield f"{before} {word}: there must be no blank around the =; write {before}{word}"
        elif ":" in word and (meant := _meant(word.partition(":")[0])):
            yield f"{word} sets nothing; write {_set(meant, word.partition(':')[2])}"
        elif meant := _meant(word):
            passed = bool(after) and "=" not in after
            typed = f"{word} {after}" if passed else word
            yield f"{typed} sets nothing; write {_set(meant, after if passed else None)}"
        else:
            of = [f"{group}={word}" for group in GROUPS if word in choices(group)]
            yield f"{word} sets nothing; " + (f"write {alternatives(of)}" if of else f"write NAME=VALUE ({HELP})")


def _set_twice(words: Sequence[str]) -> Iterator[str]:
    """`bits=4 bits=3`, of which Hydra would take the last."""
    values: dict[str, list[str]] = {}
    for word in words:
        if setting := SETTING.fullmatch(word):
            values.setdefault(setting[1], []).append(setting[2])
    for name, given in values.items():
        if len(set(given)) > 1:
            row = " ".join(f"{name}={value}" for value in given)
            each = "" if name.startswith("hydra") else f", or -m {name}={','.join(given)} for a run with each"
            both = f", or {name}={','.join(given)} for one run with all" if name == "task" else ""
            yield f"{row} gives {name} {len(given)} values; write one{each}{both}"


def _meant(name: str) -> list[str]:
    """The settings that a name stands for: a group, or a setting by its whole name or its end, shortest first."""
    name = name.replace("-", "_")
    if name in GROUPS:
        return [name]
    known = [k for k in setting_names() if f".{k}".endswith(f".{name}") or k.replace(".", "_") == name]
    return sorted(known, key=len)[:SHOWN]


def _set(names: Sequence[str], value: str | None) -> str:
    return alternatives([f"{name}={'VALUE' if value is None else value}" for name in names])
