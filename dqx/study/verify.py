"""Whether an exported file is the model it was made from: `dqx verify FILE --against SOURCE`.

    dqx verify model.gguf --against runs/2026-11-20/12-00-00-000000-nano_llada-gptq-w4a16

Exit code 0; 1 where weights or metadata differ or the file cannot be read; 2 where SOURCE is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dqx.export.comparison import Verification

NAMED = 5  # tensors that differ and are told by name


def told(found: Verification) -> Iterator[str]:
    """What is printed beside the table of logits."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.most_common() if kind)
    if found.kinds:
        yield f"weights   {sum(found.kinds.values())} tensors ({kinds})"
    for line in found.different[:NAMED]:
        yield f"  ! {line}"
    if len(found.different) > NAMED:
        yield f"  ! and {len(found.different) - NAMED} more"
    if found.kinds and not found.different:
        yield "          equal to the bit" + (", and the metadata" if found.format == "gguf" else "")
    for line in found.unchecked:
        yield f"not checked: {line}"
    if found.engine:
        yield f"logits    of {found.engine} beside the simulation's, a window of text at each mask ratio"


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Whether an exported file is the model it was made from: its weights to the bit, and what an "
        "engine answers with them.",
        epilog="Example: dqx verify model.gguf --against RUN",
    )
    parser.add_argument("file", metavar="FILE", help="a .gguf file, or a folder that dqx export has written")
    parser.add_argument("--against", required=True, metavar="SOURCE", help="what it was exported from")
    arguments = parser.parse_args()
    from rich.console import Console

    from dqx.export.card import add_verification
    from dqx.export.comparison import verify
    from dqx.report.tables import Entry, Table
    from dqx.report.terminal import errors_end, print_lines, show
    from dqx.study.source import loaded

    with errors_end():
        found, console = verify(arguments.file, loaded(arguments.against)), Console(highlight=False, emoji=False)
        lines = list(told(found))
        print_lines(console, lines)
        logits = None
        if found.logits:
            columns = ("masked", "positions", "same top token", "mean KL", "median KL", "max KL", "max difference")
            rows = [
                [r.masked, str(r.positions), str(r.same)]
                + [f"{x:.2g}" for x in (r.mean_kl, r.median_kl, r.max_kl, r.largest)]
                for r in found.logits
            ]
            logits = Table("Logits", columns, [[Entry(cell) for cell in row] for row in rows])
            show(logits, console)
        add_verification(Path(arguments.file).expanduser(), lines, logits)
    return 1 if found.different else 0
