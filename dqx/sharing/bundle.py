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

FORMAT, SCHEMA_VERSION = "dqx bundle", 1
SUFFIX = ".dqx.zip"
MANIFEST, REPORT = "bundle.json", "REPORT.md"
RECORD = ("config.yaml", "environment.json", "results.json", "quantization.json", "outliers.json")
ALLOWED = re.compile(r"documents/[\w+-][\w.+-]*\.jsonl")
LARGEST = 512 * 2**20  # bytes of a member, and of all of them, unpacked
MOST = 1000  # members
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
        try:
            return json.loads(self.members[name])
        except ValueError as error:
            raise BundleError(f"{name} is no JSON: {error}") from error

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
        with archive.open(entry) as file:
            contents[entry.filename] = file.read(left + 1)  # whatever size the entry claims
        left -= len(contents[entry.filename])
        if left < 0:
            raise BundleError(f"it is larger than any bundle ({LARGEST >> 20} MiB unpacked)")
    return contents


def _manifest(content: bytes | None) -> dict[str, Any]:
    if content is None:
        raise BundleError(f"it is a zip file without {MANIFEST}: no bundle of dqx")
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is no JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{MANIFEST} does not say that this is a {FORMAT}")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"it has schema version {version}, written by dqx {manifest.get('dqx')}; this dqx reads {SCHEMA_VERSION}"
        )
    return manifest


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
