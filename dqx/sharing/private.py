"""What in a run's record belongs to one machine or person, and what stands in its place in a bundle.

Settings that say where things are (`dqx.config.schema.PLACES`) are left out: whoever runs it again has their own.
Local folders and files that the results depend on become `<data_root>`, `<model.path>`, ...: they must be given anew.
In all other text absolute paths become `<path>`, and the names of this machine and user `<host>` and `<user>`.
"""

from __future__ import annotations

import getpass
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dqx.config.schema import PLACES
from dqx.record.settings import RunSettings
from dqx.record.words import ABSOLUTE

PACKAGED = "pkg://"
PLACE = re.compile(rf"[+~]*(?:{'|'.join(PLACES)})(?:\.\w+)?=|DQX_CONFIG_PATH=")
QUOTED = re.compile(r"([^=]+)='(.*)'", re.DOTALL)  # a text with characters that Hydra would not read otherwise


def local_paths(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that name a local folder or file which the results depend on, with their values."""
    texts = [f"task.suite.{name}.text" for name in RunSettings.of(config).tasks]
    named = ("model.path", "calib.text", *texts)
    return {
        key: value
        for key, value in _strings(without_places(config))
        if key == "data_root" or value.startswith(("/", "~/", "file://")) or (key in named and _is_local(value))
    }


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a configuration, with its dotted name."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))


def _is_local(path: str) -> bool:
    """Neither a hub id (`owner/name`), nor a registered name, nor inside dqx."""
    if path.startswith(PACKAGED):
        return False
    file = Path(path).suffix in (".txt", ".jsonl", ".parquet")
    return file or path.startswith(".") or path.count("/") > 1 or ("/" in path and Path(path).exists())


def placeholder(key: str) -> str:
    """What stands for a setting that must be given anew."""
    return f"<{key}>"


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the settings that only say where things are."""
    return {key: value for key, value in config.items() if key not in PLACES}


class Cleaner:
    """Takes paths and names out of texts; `taken` says what it put in their place, once each."""

    def __init__(self, paths: Mapping[str, str]):
        longest = sorted(((k, v) for k, v in paths.items() if "/" in v), key=lambda item: -len(item[1]))
        self._paths = [(value, placeholder(key)) for key, value in longest]
        self._names = [(re.compile(rf"(?<!\w){re.escape(name)}(?!\w)"), mark) for name, mark in _names()]
        self.taken: set[str] = set()

    def text(self, text: str) -> str:
        """The text without what belongs to this machine."""
        cleaned = text
        for value, mark in self._paths:
            cleaned = re.sub(rf"(?<![\w./-]){re.escape(value)}(?![\w-])", mark, cleaned)
        cleaned = ABSOLUTE.sub("<path>", cleaned)
        for pattern, mark in self._names:
            cleaned = pattern.sub(mark, cleaned)
        if cleaned != text:
            self.taken.update(re.findall(r"<[\w.]+>", cleaned))
        return cleaned

    def command(self, command: str) -> str:
        """A command line without the settings that only say where things are, and without a team's folder."""
        try:
            words = shlex.split(command)
        except ValueError:  # no command that dqx has recorded
            return self.text(command)
        return " ".join(self._word(word) for word in words if not PLACE.match(word))

    def _word(self, word: str) -> str:
        quoted = QUOTED.fullmatch(word)
        plain = f"{quoted[1]}={quoted[2]}".replace("\\'", "'") if quoted else word
        cleaned = self.text(plain)
        return shlex.quote(word) if cleaned == plain else cleaned

    def value(self, value: Any) -> Any:
        """The same for every string in lists and mappings, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(inner) for key, inner in value.items()}
        return [self.value(inner) for inner in value] if isinstance(value, list) else value


def _names() -> Iterator[tuple[str, str]]:
    """This machine's and this user's names, where they are long enough to mean nothing else."""
    for find, mark in ((socket.gethostname, "<host>"), (getpass.getuser, "<user>")):
        try:
            name = find()
        except (OSError, KeyError):
            continue
        if len(name) > 3 and name not in ("root", "localhost", "user"):
            yield name, mark
