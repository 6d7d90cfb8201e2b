"""A model as files that other programs read: `dqx export FORMAT SOURCE --out PATH`.

    dqx export gguf runs/2026-11-20/12-00-00-000000-nano_llada-gptq-w4a16 --out nano_llada.gguf

A format is a module with two functions, `problems(lm)`: all reasons why the format cannot hold the model, each with
what to use instead, and `write(lm, out)`. One with choices of a dtype for what stays in 16 bit takes `dtype` as well,
and one that has to say what readers of the file do differently has `notes(lm)`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path


@dataclass(frozen=True)
class Format:
    """The module that writes a format, what it is for, and the dtypes to choose from, the default first."""

    module: str
    what: str
    dtypes: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "gguf": Format("dqx.export.gguf", "one file for llama.cpp: LLaDA and Dream", ("f16", "bf16", "f32")),
    "dequantized": Format("dqx.export.dequantized", "the rounded weights as a checkpoint like the source's, 16 bit"),
    "compressed-tensors": Format("dqx.export.compressed_tensors", "weights at their true widths, for transformers"),
}


def export(format: str, source: str, out: str | Path, dtype: str | None = None) -> list[str]:
    """Write the model of `source` to `out`, which must not exist yet; what to know of the file.

    Raises ConfigProblems where the format cannot hold the model, FileExistsError for an `out` that exists.
    """
    from dqx.common.problems import raise_if
    from dqx.export.source import loaded

    known, out = FORMATS[format], Path(out).expanduser()
    if dtype not in (None, *known.dtypes):
        choices = f"it is one of {', '.join(known.dtypes)}" if known.dtypes else "leave it out"
        raise_if([f"--dtype {dtype} is no choice of {format}; {choices}"])
    if out.exists():
        raise FileExistsError(f"{out} exists already; name a new one")
    module = import_module(known.module)
    lm = loaded(source)
    raise_if(module.problems(lm))
    out.parent.mkdir(parents=True, exist_ok=True)
    module.write(lm, out, **({} if dtype is None else {"dtype": dtype}))
    return list(module.notes(lm)) if hasattr(module, "notes") else []


def main() -> int:
    """The command line. Returns the exit code."""
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
