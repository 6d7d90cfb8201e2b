"""The file that a run is handed on in: a plain zip of JSON, YAML and text, the same bytes for the same content.

    bundle.json            what this file is: schema version, dqx's version, size and SHA-256 of every other member,
                           fingerprints of the data, what was taken out, and the settings to give anew
    REPORT.md              for people
    config.yaml, environment.json, results.json, quantization.json, outliers.json, documents/TASK.jsonl
                           as in a run's folder (`dqx/record/folder.py`), so that what reads runs reads an unpacked
                           bundle

Nothing here imports torch. A reader trusts nothing: names outside those above, sizes beyond the limits, and content
that does not have its checksum are refused before a byte is used. Checksums tell damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FORMAT, SCHEMA_VERSION = "dqx bundle", 1
SUFFIX = ".dqx.zip"
MANIFEST, REPORT = "bundle.json", "REPORT.md"
RECORD = ("config.yaml", "environment.json", "results.json", "quantization.json", "outliers.json")
KEY = re.compile(r"[\w.+-]{1,200}")  # a setting
ALLOWED = re.compile(r"documents/[\w+-][\w.+-]*\.jsonl")
LARGEST = 128 * 2**20  # bytes of all members, unpacked
LARGEST_PARSED = 8 * 2**20  # bytes of a member that is read as a whole; documents are read line by line
LONGEST_NUMBER = 400  # digits
DEEPEST = 40  # lists and mappings inside each other
MOST = 1000  # members
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's first moment: bundles do not depend on when they were written


class BundleError(ValueError):
    """A file that is no bundle, or none that can be used; the message says why."""


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory: its manifest, and the bytes of its other members by name."""

    manifest: dict[str, Any]
    members: dict[str, bytes]

    def json(self, name: str) -> Any:
        """A member's content. Raises BundleError where it is no JSON."""
        return parsed(name, self.members[name])

    def unpack(self, folder: Path) -> Path:
        """Write the members into `folder`, which then reads like a run's. Returns it."""
        for name, content in self.members.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder


def write(path: Path, manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
    """Write a bundle, whole or not at all, in an order that depends on the names alone."""
    sums = {name: {"bytes": len(members[name]), "sha256": _sha256(members[name])} for name in sorted(members)}
    head = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **manifest, "members": sums}
    text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.part")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, content in ((MANIFEST, text.encode()), *((name, members[name]) for name in sorted(members))):
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
                archive.writestr(entry, content, compresslevel=9)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | Path) -> Bundle:
    """A bundle with every member checked. Raises BundleError for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            contents = _contents(archive)
    except FileNotFoundError as error:
        raise BundleError("the file does not exist") from error
    except IsADirectoryError as error:
        raise BundleError(f"it is a folder; `dqx share {path}` makes a bundle of a run's folder") from error
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise BundleError(f"it is no zip file, or damaged ({error})") from error
    manifest = _manifest(contents.pop(MANIFEST, None))
    _check(manifest, contents)
    return Bundle(manifest, contents)


def _contents(archive: zipfile.ZipFile) -> dict[str, bytes]:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    foreign = [name for name in names if name not in (MANIFEST, REPORT, *RECORD) and not ALLOWED.fullmatch(name)]
    if foreign:
        raise BundleError(f"it holds {foreign[0]!r}, which has no place in a bundle; nothing was unpacked")
    if len(set(names)) < len(names):
        raise BundleError("it holds two members of one name")
    if len(names) > MOST or sum(entry.file_size for entry in entries) > LARGEST:
        raise BundleError(f"it is larger than any bundle ({MOST} members, {LARGEST >> 20} MiB unpacked)")
    contents, left = {}, LARGEST
    for entry in entries:
        name, most = entry.filename, left if ALLOWED.fullmatch(entry.filename) else min(left, LARGEST_PARSED)
        with archive.open(entry) as file:
            contents[name] = file.read(most + 1)  # whatever size the entry claims
        if len(contents[name]) > most:
            raise BundleError(f"{name} is larger than in any bundle ({most >> 20} MiB unpacked)")
        left -= len(contents[name])
    return contents


def parsed(name: str, content: bytes) -> Any:
    """The JSON of a member. Raises BundleError where it is none, or nested deeper than anything that dqx writes."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise BundleError(f"{name} is no JSON: {error}") from error
    except RecursionError as error:
        raise BundleError(f"{name} has lists inside lists without end") from error


def plain_yaml(name: str, content: bytes) -> Any:
    """The YAML of a member: scalars, lists and mappings, as dqx writes them.

    Raises BundleError for anchors (a few of them can stand for 10^9 values), tags and deep nesting, before any value is
    made, and for what is no YAML.
    """
    depth = 0
    try:
        for event in yaml.parse(content, Loader=LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise BundleError(f"{name} has anchors or tags, which dqx never writes")
            number = isinstance(event, yaml.ScalarEvent) and not event.style and event.value[:1] in "+-.0123456789"
            if number and len(event.value) > LONGEST_NUMBER:  # 1:1:1:... takes time that grows with its square
                raise BundleError(f"{name} has a number of {len(event.value)} digits")
            if depth > DEEPEST:
                raise BundleError(f"{name} is nested deeper than {DEEPEST} levels")
        return yaml.load(content, Loader=LOADER)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{name} is no YAML: {str(error).splitlines()[0]}") from error


def _manifest(content: bytes | None) -> dict[str, Any]:
    if content is None:
        raise BundleError(f"it is a zip file without {MANIFEST}: no bundle of dqx")
    manifest = parsed(MANIFEST, content)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{MANIFEST} does not say that this is a {FORMAT}")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"it has schema version {version}, written by dqx {manifest.get('dqx')}; this dqx reads {SCHEMA_VERSION}"
        )
    give_anew = manifest.get("give_anew", [])
    if not isinstance(give_anew, list) or not all(isinstance(key, str) and KEY.fullmatch(key) for key in give_anew):
        raise BundleError(f"{MANIFEST}: give_anew is no list of settings")
    data = manifest.get("data", {})
    if not isinstance(data, dict) or not all(isinstance(digest, str) for digest in data.values()):
        raise BundleError(f"{MANIFEST}: data has no fingerprints")
    return manifest | {"give_anew": give_anew, "data": data}


def _check(manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
    sums = manifest.get("members")
    if not isinstance(sums, dict) or set(sums) != set(members) or not set(RECORD) <= set(members):
        listed = set(sums) if isinstance(sums, dict) else set()
        raise BundleError(
            f"its members are not those it lists: {', '.join(sorted((listed | set(RECORD)) ^ set(members)))}"
        )
    for name, content in members.items():
        if not isinstance(sums[name], dict) or sums[name].get("sha256") != _sha256(content):
            raise BundleError(f"{name} is damaged: it does not have the checksum it should have")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
