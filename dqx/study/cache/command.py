"""List, verify and prune a cache.

    dqx cache [list]                        what is there, by kind, used longest ago first
    dqx cache verify                        compare everything with its checksum, name what is damaged
    dqx cache prune --max-gb 50             remove what was not used for longest until the rest fits
    dqx cache prune --older-than 30 --kind quantized    remove these that were not used for 30 days

`--dir` is the cache's folder, `runs/cache` by default. What a run computes or reads at this moment is not removed. Exit
code 0, or 1 where `verify` found damage; `prune` without a condition changes nothing and is a mistake, 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dqx.common.digest import digest
from dqx.common.tensors import tensor_digest
from dqx.quant.checkpoint import PARTIAL
from dqx.study.cache import space
from dqx.study.cache.owned import cache_problem
from dqx.study.cache.space import Entry

DAY = 24 * 3600.0


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says (None: the process's own)."""
    parser = argparse.ArgumentParser(
        prog="dqx cache",
        description="List, verify and prune what runs share.",
        epilog="Example: dqx cache prune --max-gb 50",
    )
    parser.add_argument("action", nargs="?", choices=("list", "verify", "prune"), default="list")
    parser.add_argument("--dir", type=Path, default=Path("runs/cache"), help="the cache's folder")
    parser.add_argument("--kind", help="only these: results, quantized, outliers, predictions, fidelity, ...")
    parser.add_argument("--max-gb", type=float, help="prune: 10^9 bytes that may stay")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="prune: only what was not used for so long")
    options = parser.parse_args(argv)
    if not options.dir.is_dir():
        parser.error(f"{options.dir} is no folder; give the cache's with --dir")
    if problem := cache_problem(options.dir):
        parser.error(f"{options.dir} is no cache of dqx: {problem}")
    conditions = (options.kind, options.max_gb, options.older_than)
    if options.action == "prune" and all(condition is None for condition in conditions):
        parser.error("prune removes nothing without --max-gb, --older-than or --kind")
    there = [entry for entry in space.entries(options.dir) if options.kind in (None, entry.kind)]
    if options.action == "list":
        listed(there)
    elif options.action == "verify":
        sys.exit(verified(there))
    else:
        pruned(there, options.max_gb, options.older_than)


def listed(there: Sequence[Entry]) -> None:
    """Print a table of entries and their sum by kind."""
    table = Table("kind", "name", "MB", "used", box=None)
    for entry in sorted(there, key=lambda entry: (entry.kind, entry.used)):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        table.add_row(entry.kind, entry.path.name, f"{entry.bytes / 1e6:.3f}", used)
    for kind in sorted({entry.kind for entry in there}):
        members = [entry for entry in there if entry.kind == kind]
        table.add_row(kind, f"{len(members)} in all", f"{space.total(members) / 1e6:.3f}", "")
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def verified(there: Sequence[Entry]) -> int:
    """Print what is damaged; 1 where anything is."""
    damaged = {entry.path: reason for entry in there if (reason := damage(entry))}
    for path, reason in damaged.items():
        print(f"{path} is damaged and will be computed again: {reason}")
    print(f"{len(there) - len(damaged)} of {len(there)} are whole, {space.total(there) / 1e9:.3f} GB")
    return 1 if damaged else 0


def damage(entry: Entry) -> str | None:
    """What is wrong with an entry; None: nothing. Unfinished ones are looked at when a run goes on with them."""
    from safetensors.torch import load_file

    from dqx.quant.checkpoint.folder import read_recipe, verify_shards

    if ".journal." in entry.path.name or entry.path.suffix == PARTIAL:
        return None
    try:
        if entry.path.is_dir():
            verify_shards(entry.path, read_recipe(entry.path))
            return None
        stored = json.loads(entry.path.with_suffix(".json").read_text(encoding="utf-8"))
        name = entry.path.stem.rpartition("-")[2]
        if digest(stored["content"]) != stored["digest"]:
            return "its content does not match its checksum"
        if not digest(stored["facts"]).startswith(name):
            return "it was made with other settings than its name says"
        if entry.path.suffix == ".safetensors":
            same = tensor_digest(sorted(load_file(entry.path).items())) == stored["content"]["tensors"]
            return None if same else "its content does not match its checksum"
    except Exception as error:  # whatever the bytes of a damaged file may lead to
        return f"{type(error).__name__}: {error}"
    return None


def pruned(there: Sequence[Entry], max_gb: float | None, older_than: float | None) -> None:
    """Remove entries, least recently used first, and print how much came free."""
    old = [e for e in there if older_than is None or e.used < time.time() - older_than * DAY]
    excess = space.total(there) - max_gb * 1e9 if max_gb is not None else float("inf")
    removed, kept = space.remove_oldest(old, excess)
    text = f"{len(removed)} removed, {space.total(removed) / 1e6:.3f} MB"
    print(text + (f"; {kept} are in use and were left" if kept else ""))
