"""Which method and width goes into which format, tried: `python tests/exports.py` writes dqx/export/EXPORTS.md anew.

Every method at every choice of `bits` is asked of each format. Where one takes it, the bundled model is quantized, from
few calibration tokens, written, read back by the format's library and compared to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import dqx
from dqx.config.compose import build, compose, resolve
from dqx.config.schema import CONF_DIR, choices
from dqx.export.formats import FORMATS
from dqx.export.rehearsal import rehearsed

PAGE = CONF_DIR.parent / "dqx" / "export" / "EXPORTS.md"
MODELS = ("nano_llada", "nano_dream", "nano_block")
METHODS = ("rtn", "gptq", "gptaq", "awq", "smoothquant", "quarot", "duquant", "d2quant", "quant_dllm")
BITS = [name for name in choices("bits") if name != "w16a16" and not re.fullmatch(r"w\d", name)]
LETTERS = {"gguf": "G", "compressed-tensors": "C", "dequantized": "D"}
INTRODUCTION = """# What goes into which format

Written by `python tests/exports.py`. **G** is gguf, **C** compressed-tensors, **D** dequantized: the bundled model was
quantized, written, and read back by the format's library (`gguf`, `compressed-tensors`, `safetensors`), all weights
equal to the bit. A dot is a model that no format holds, for the reasons in [README.md](README.md), an empty cell a
width that the method does not have. A star: with `bits.activation.bits=16`, since the method rounds weights only.
`export=...` in a configuration says before the run what keeps a model out and what to write instead.
"""


def cell(model: str, method: str, bits: str, folder: Path) -> str:
    """The letters of the formats that hold the model; a dot for none, nothing where the method has no such width."""
    lm = dqx.load(model, device="cpu")
    for more in ([], ["bits.activation.bits=16"] if bits.startswith("gguf") else []):
        config = resolve(compose([f"model={model}", f"method={method}", f"bits={bits}", *more]))
        part = build(config.method)
        if not part.problems(config.bits, lm.model.arch):
            break
    else:
        return ""
    trial = rehearsed(part, config.bits, lm.model.arch, lm.model.dtype)
    takers = [form for form in FORMATS.values() if not form.problems(trial)]
    if not takers:
        return "."
    lm.quantize(part, config.bits, calib=[torch.arange(256).remainder(lm.model.arch.vocab_size - 8).view(2, 128)])
    for form in takers:
        out = folder / f"{model}-{method}-{bits}-{form.file}"
        form.write(lm, out)
        reader = import_module(f"dqx.export.readers.{form.name.replace('-', '_')}")
        different = [pair.name for pair in reader.tensors(lm, out) if pair.difference]
        if different:
            raise AssertionError(f"{model} {method} {bits}: {form.name} differs in {different[0]}")
    return "".join(sorted(LETTERS[form.name] for form in takers)) + ("*" if more else "")


def tables(models: tuple[str, ...] = MODELS) -> Iterator[str]:
    """The page, part by part."""
    yield INTRODUCTION
    with TemporaryDirectory() as folder:
        for model in models:
            rows = {bits: [cell(model, method, bits, Path(folder)) for method in METHODS] for bits in BITS}
            yield f"## {model}\n"
            yield "| bits | " + " | ".join(f"`{method}`" for method in METHODS) + " |"
            yield "|---|" + ":-:|" * len(METHODS)
            yield from (f"| `{bits}` | " + " | ".join(cells) + " |" for bits, cells in rows.items())
            yield ""


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    lines = []
    for line in tables():
        print(line, flush=True)
        lines.append(line)
    PAGE.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
