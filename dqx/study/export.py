"""A model as files that other programs read: `dqx export FORMAT SOURCE --out PATH`.

    dqx export gguf runs/2026-11-20/12-00-00-000000-nano_llada-gptq-w4a16 --out nano_llada.gguf

The formats are those of `dqx.export.formats`.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def export(format: str, source: str, out: str | Path, dtype: str | None = None) -> list[str]:
    """Write the model of `source` to `out`, which must not exist yet; what to know of the file.

    Raises ConfigProblems where the format cannot hold the model, FileExistsError for an `out` that exists.
    """
    from dqx.common.problems import raise_if
    from dqx.export.formats import FORMATS
    from dqx.study.source import loaded, record_of

    known, out = FORMATS[format], Path(out).expanduser()
    raise_if(known.dtype_problems("--dtype", dtype))
    if out.exists():
        raise FileExistsError(f"{out} exists already; name a new one")
    return known.write(loaded(source), out, dtype, record_of(source))


def main() -> int:
    """The command line. Returns the exit code."""
    from dqx.export.formats import FORMATS

    about = "\n".join(f"  {name:<20} {format.what}" for name, format in FORMATS.items())
    parser = argparse.ArgumentParser(
        description="A model as files that other programs read.",
        epilog=f"formats:\n{about}\n\nExample: dqx export gguf RUN --out model.gguf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=list(FORMATS), metavar="FORMAT", help="one of those below")
    parser.add_argument("source", metavar="SOURCE", help="folder of a run or of a saved model, or a model's name")
    parser.add_argument("--out", required=True, metavar="PATH", help="the file or folder to write; must not exist")
    parser.add_argument("--dtype", help="of what stays in 16 bit, where the format has a choice")
    arguments = parser.parse_args()
    from rich.console import Console

    from dqx.report.terminal import errors_end, print_lines

    with errors_end():
        notes = export(arguments.format, arguments.source, arguments.out, arguments.dtype)
        print_lines(Console(highlight=False, emoji=False), [arguments.out, *(f"  {note}" for note in notes)])
    return 0
