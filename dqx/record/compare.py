"""Two runs against each other: settings that differ, deltas, documents whose score changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from dqx.config.schema import PLACES
from dqx.evaluate.results import DocumentRow, TaskResult
from dqx.evaluate.spec import NLL
from dqx.record import deltas
from dqx.record.folder import SIDES, Record

ABSENT = "not set"


@dataclass(frozen=True)
class Flip:
    """A document whose score changed."""

    before: DocumentRow
    after: DocumentRow
    lost: bool  # the second one is worse


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """The settings that differ, `model.sampler.threshold: null -> 0.9`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys((*before, *after)):
            if path or key not in PLACES:
                inner = f"{path}.{key}" if path else str(key)
                yield from differences(before.get(key, ABSENT), after.get(key, ABSENT), inner)
    elif before != after and not (path.endswith("_target_") and _class(before) == _class(after)):
        if isinstance(before, Mapping) or isinstance(after, Mapping):
            before, after = ("set" if isinstance(v, Mapping) else v for v in (before, after))
        yield f"{path}: {_text(before)} -> {_text(after)}"


def compare(before: Record, after: Record) -> dict[str, list[deltas.Delta]]:
    """The deltas of the tasks that both runs have, by side; of sides that are one model and the same results, one.

    Raises ValueError where no task is in both, or a task's documents are not the same.
    """
    tasks = [name for name in before.quantized if name in after.quantized]
    if not tasks:
        raise ValueError(f"no task is in both runs: {', '.join(before.quantized)}; {', '.join(after.quantized)}")
    by_side: dict[str, list[deltas.Delta]] = {}
    for side in SIDES:
        sides = [{name: getattr(run, side)[name] for name in tasks} for run in (before, after)]
        for name in tasks:
            here, there = ({row.doc_id for row in results[name].documents} for results in sides)
            if here != there:
                raise ValueError(
                    f"task {name}: {len(here)} and {len(there)} documents, {len(here & there)} of them in both; "
                    "evaluate both runs with the same task.limit and data"
                )
        rows = deltas.compare(*sides)
        if rows not in by_side.values():
            by_side[side] = rows
    return by_side


def costs(before: Mapping[str, TaskResult], after: Mapping[str, TaskResult]) -> Iterator[str]:
    """What the tasks took: `nano_sums: sequences 384 -> 101, tokens computed 17k -> 5k, seconds 2.1 -> 0.9`."""
    for name in (name for name in before if name in after):
        counts = [
            f"{what} {_ratio(getattr(before[name], field), getattr(after[name], field))}"
            for what, field in (("sequences", "n_forwards"), ("tokens computed", "n_tokens"))
        ]
        yield f"{name}: {', '.join(counts)}, {before[name].seconds:.3g} s -> {after[name].seconds:.3g} s"


def flips(before: TaskResult, after: TaskResult) -> list[Flip]:
    """The documents whose score changed: lost and gained ones in turn, each in the order of the documents."""
    changed = [(row, other) for row, other in deltas.paired(before, after) if other.score != row.score]
    flipped = [Flip(row, other, (other.score < row.score) != (before.metric == NLL)) for row, other in changed]
    lost, gained = ([flip for flip in flipped if flip.lost == worse] for worse in (True, False))
    return [flip for flip in chain.from_iterable(zip_longest(lost, gained)) if flip is not None]


def _ratio(before: int, after: int) -> str:
    return f"{before} -> {after}" + (f" ({before / after:.2f}x)" if after else "")


def _class(path: Any) -> str:
    """The name of a part's class, wherever its module lies."""
    return str(path).rpartition(".")[2]


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
