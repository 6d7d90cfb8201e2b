"""dqx verify: files of every format are equal to the bit, and one wrong number, key or tensor is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

import dqx
from dqx.engines import llama_cpp
from dqx.export import compressed_tensors, dequantized
from dqx.export.comparison import Verification, agreement, masked_windows, verify
from dqx.export.gguf import write
from dqx.study.verify import told

WITHOUT = ("the package llama-cpp-python is missing",)


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without it, wherever this runs; `test_llama_cpp.py` has it."""
    monkeypatch.setattr(llama_cpp, "problems", lambda: WITHOUT)


def gguf_file(folder: Path, dtype: str = "f16") -> tuple[dqx.DiffusionLM, Path]:
    lm = dqx.load("nano_dream", device="cpu")
    write(lm, folder / "a.gguf", dtype)
    return lm, folder / "a.gguf"


def damage(path: Path, tensor: str) -> None:
    """Turn one bit of a tensor's second byte, which for two bytes a number is the sign of the first."""
    [stored] = [each for each in GGUFReader(path).tensors if each.name == tensor]
    content = bytearray(path.read_bytes())
    content[stored.data_offset + 1] ^= 128
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_a_gguf_file_is_equal_and_what_was_not_looked_at_is_told(tmp_path: Path, dtype: str) -> None:
    lm, path = gguf_file(tmp_path, dtype)
    found = verify(path, lm)
    assert found.different == []
    assert found.kinds[dtype.upper()] >= 2
    assert found.unchecked == [f"logits: {WITHOUT[0]}"]
    assert found.logits == []
    assert any("equal to the bit" in line for line in told(found))


def test_one_bit_of_a_gguf_file(tmp_path: Path) -> None:
    lm, path = gguf_file(tmp_path)
    damage(path, "blk.1.ffn_up.weight")
    [line] = verify(path, lm).different
    assert line.startswith("blk.1.ffn_up.weight: 1 of 131,072 numbers differ, by ")


def test_the_metadata_of_a_gguf_file(tmp_path: Path) -> None:
    """Weights are equal; the base of the rotation and the logit shift are not."""
    lm, path = gguf_file(tmp_path)
    content = path.read_bytes()
    key = b"dream.rope.freq_base"
    at = content.index(key) + len(key) + 4  # behind the value's type
    path.write_bytes(content[:at] + b"\x00\x50\xc3\x47" + content[at + 4 :])
    assert verify(path, lm).different == ["dream.rope.freq_base: not what dqx writes for this model"]


def test_a_gguf_file_cut_off(tmp_path: Path) -> None:
    lm, path = gguf_file(tmp_path)
    path.write_bytes(path.read_bytes()[:100_000])
    [line] = verify(path, lm).different
    assert line.startswith(f"the package gguf cannot read {path}")


def test_tensors_of_another_model(tmp_path: Path) -> None:
    _, path = gguf_file(tmp_path)
    found = verify(path, dqx.load("nano_llada", device="cpu"))
    assert "blk.0.attn_q.bias: not in the model" in found.different
    assert "blk.0.attn_k.weight: [128, 256] in the file, [256, 256] in the model" in found.different
    assert found.unchecked == ["logits: they would be those of another model"]


@pytest.mark.parametrize("kind", ["compressed_tensors", "dequantized"])
def test_folders(tmp_path: Path, kind: str) -> None:
    lm = dqx.load("nano_llada", device="cpu")
    lm.quantize("rtn", "w4a16")
    {"compressed_tensors": compressed_tensors, "dequantized": dequantized}[kind].write(lm, tmp_path / "out")
    found = verify(tmp_path / "out", lm)
    assert found.different == found.unchecked == []
    assert found.logits[-1].same == found.logits[-1].positions == 320
    assert found.logits[-1].max_kl < 1e-6
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "scale" in name or "ff_proj" in name)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    found = verify(tmp_path / "out", lm)
    assert len(found.different) == 1
    assert "numbers differ" in found.different[0]
    file.write_bytes(file.read_bytes()[:1000])
    [line] = verify(tmp_path / "out", lm).different
    assert "cannot be read" in line


def test_what_is_no_exported_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file, and no folder with a config"):
        verify(tmp_path, dqx.load("nano_llada", device="cpu"))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="is quantized by gptq"):
        verify(tmp_path, dqx.load("nano_llada", device="cpu"))


def test_agreement_is_the_divergence_from_the_simulation() -> None:
    ours, theirs = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    found = agreement("all", ours, theirs)
    p = torch.sigmoid(torch.tensor(2.0, dtype=torch.float64))
    assert (found.positions, found.same, found.largest) == (2, 1, 2.0)
    assert found.max_kl == pytest.approx(float(2 * (2 * p - 1)))
    assert found.mean_kl == pytest.approx(found.max_kl / 2)


def test_windows_are_masked_at_every_ratio() -> None:
    lm = dqx.load("nano_llada", device="cpu")
    masks = (masked_windows(lm) == lm.model.arch.mask_token_id).sum(1)
    assert masks.tolist() == [6, 19, 32, 45, 58]


def test_many_differences_are_counted() -> None:
    lines = list(told(Verification("gguf", different=[f"t{i}: x" for i in range(7)])))
    assert lines == [*(f"  ! t{i}: x" for i in range(5)), "  ! and 2 more"]


def test_exit_codes(tmp_path: Path) -> None:
    _, path = gguf_file(tmp_path)
    command = [sys.executable, "-m", "dqx", "verify", str(path), "--against"]
    assert subprocess.run([*command, "nano_dream"], capture_output=True).returncode == 0
    damage(path, "output.weight")
    said = subprocess.run([*command, "nano_dream"], capture_output=True, text=True)
    assert said.returncode == 1
    assert "! output.weight: 1 of 131,072 numbers differ" in said.stdout
    said = subprocess.run([*command, "nano_drem"], capture_output=True, text=True)
    assert said.returncode == 2
    assert "nano_drem is no name in conf/model" in said.stderr
