"""`export=...`: a run leaves its model as a file, with a card that says what was measured; verifying adds to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dqx
from dqx.config.compose import compose, resolve
from dqx.export.formats import FORMATS
from dqx.record.folder import RunFolder
from dqx.study import verify
from dqx.study.run import run

SMALL = ("task=nano_facts", "task.limit=2", "outliers.samples=0", "fidelity.samples=0", "wandb.mode=disabled")


def settings(folder: Path, *overrides: str) -> Any:
    return resolve(compose([f"cache_dir={folder / 'cache'}", "model.device=cpu", *SMALL, *overrides]))


def test_a_run_leaves_a_file_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(settings(tmp_path, "method=rtn", "bits=w4a16", "export=dequantized"), tmp_path / "run")
    out = tmp_path / "run" / "dequantized"
    other = dqx.load("nano_llada", device="cpu")
    other.quantize("rtn", "w4a16")
    assert torch.equal(dqx.load(str(out), device="cpu").logits("a"), other.logits("a"))
    card = (out / "README.md").read_text()
    assert "# nano_llada, rtn w4a16, 4.16 bits per weight on average" in card
    assert "base_model: nano_llada\n" in card
    assert "| `nano_facts` | 2 | 100.0 |" in card
    assert "dqx verify dequantized --against RUN" in card
    for _ in range(2):  # a second look takes the place of the first
        monkeypatch.setattr(sys, "argv", ["dqx verify", str(out), "--against", str(tmp_path / "run")])
        assert verify.main() == 0
    card = (out / "README.md").read_text()
    assert card.count("## Read back") == 1
    assert "equal to the bit" in card.partition("## Read back")[2]


def test_what_cannot_be_written_costs_no_finished_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(FORMATS["gguf"]), "write", no_space)
    run(settings(tmp_path, "method=rtn", "bits=gguf_q8_0", "export=gguf"), tmp_path / "run")
    record = RunFolder(tmp_path / "run").read()
    assert record.quantized["nano_facts"].documents
    assert "no model.gguf: no space left" in record.warnings


def test_nothing_quantized_is_written_at_full_precision(tmp_path: Path) -> None:
    run(settings(tmp_path, "method=fp16", "export=gguf", "export.dtype=f32"), tmp_path / "run")
    assert (tmp_path / "run" / "model.gguf").is_file()
    assert "Nothing: no run of dqx" not in (tmp_path / "run" / "model.md").read_text()
