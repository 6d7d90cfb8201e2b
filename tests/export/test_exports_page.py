"""The page of what goes into which format, dqx/export/EXPORTS.md, is what `tests/exports.py` finds."""

from __future__ import annotations

from pathlib import Path

import exports
import pytest


def page() -> dict[str, dict[str, dict[str, str]]]:
    """Cells by model, bits and method."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for part in exports.PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        model, *lines = part.splitlines()
        rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
        methods = rows[0][1:]
        found[model] = {row[0]: dict(zip(methods, row[1:], strict=True)) for row in rows[1:]}
    return found


def test_every_method_and_width_is_there() -> None:
    found = page()
    assert list(found) == list(exports.MODELS)
    for rows in found.values():
        assert list(rows) == exports.BITS
        assert all(list(row) == list(exports.METHODS) for row in rows.values())


@pytest.mark.parametrize(
    ("model", "method", "bits"),
    [("nano_llada", "rtn", "w4a16"), ("nano_dream", "gptq", "gguf_q4_k"), ("nano_block", "quarot", "w8a8")],
)
def test_some_cells_again(model: str, method: str, bits: str, tmp_path: Path) -> None:
    assert exports.cell(model, method, bits, tmp_path) == page()[model][bits][method]


@pytest.mark.slow
def test_all_cells_again() -> None:
    assert "\n".join(exports.tables()) == exports.PAGE.read_text(encoding="utf-8")
