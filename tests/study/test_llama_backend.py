"""`backend=llama_cpp`: a run measured on the GGUF file. llama.cpp's place is taken by a reader of the file; what
llama.cpp itself computes is compared in tests/export/test_llama_cpp.py, where it is installed.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import dqx
from dqx.config.compose import compose, resolve
from dqx.export.card import card_path
from dqx.export.gguf.tensors import modules
from dqx.record.folder import Record, RunFolder
from dqx.study import engine
from dqx.study.experiment import problems
from dqx.study.run import run

SMALL = ("task.limit=2", "outliers.samples=1", "outliers.steps=1", "fidelity.samples=1", "wandb.mode=disabled")
WHOLE_INPUTS = ("method=rtn", "bits=gguf_q8_0", "bits.activation.bits=16")


class FileReader:
    """The logits of a GGUF file whose tensors are read by the package gguf and which rounds no inputs."""

    def __init__(self, file: Path):
        self.file = file
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        self.model = dqx.load("nano_llada", device="cpu", dtype="float32").model
        for stored, module, rows in modules(self.model):
            for part in ("weight", "bias"):
                if isinstance(parameter := getattr(module, part, None), Tensor):
                    tensor = tensors[f"{stored}.{part}"]
                    numbers = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
                    parameter.data[slice(None) if rows is None else rows] = numbers

    def described(self) -> str:
        return "reader"

    def rows(self, ids: Tensor) -> Tensor:
        return self.model(ids[None])[0]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run with these overrides into a folder of this name; returns the record and the folder."""
    monkeypatch.setattr(engine.llama_cpp, "problems", lambda: ())
    monkeypatch.setattr(engine.llama_cpp, "version", lambda: "0")
    monkeypatch.setattr(engine.llama_cpp, "LlamaCpp", FileReader)

    def start(name: str, *overrides: str) -> tuple[Record, Path]:
        config = resolve(compose([*SMALL, f"cache_dir={tmp_path / 'cache'}", *overrides]))
        return run(config, tmp_path / name), tmp_path / name

    return start


def test_a_file_that_holds_the_model_scores_as_the_simulation(launch) -> None:
    """Without rounded inputs and with the rest in float32 both compute the same: every document, every divergence."""
    whole = (*WHOLE_INPUTS, "export=gguf", "export.dtype=f32")
    simulated, _ = launch("simulated", *whole)
    record, folder = launch("engine", *whole, "backend=llama_cpp")
    for name, result in simulated.quantized.items():
        for ours, theirs in zip(record.quantized[name].documents, result.documents, strict=True):
            assert (ours.score, ours.prediction) == (theirs.score, theirs.prediction)
            assert (ours.log_likelihoods or []) == pytest.approx(theirs.log_likelihoods or [], rel=1e-5)
    for ours, theirs in zip(record.fidelity["by_mask_ratio"], simulated.fidelity["by_mask_ratio"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-8)
    assert [row["divergence"] for row in record.fidelity["by_step"]] == pytest.approx(
        [row["divergence"] for row in simulated.fidelity["by_step"]], rel=1e-5, abs=1e-8
    )
    assert record.fidelity["layers"]["sqnr_db"] == []  # an engine shows no hidden states
    assert record.outliers["quantized"] == simulated.outliers["quantized"]
    assert RunFolder(folder).read().results() == record.results()


def test_the_record_says_what_computed_the_model(launch) -> None:
    record, folder = launch("engine", *WHOLE_INPUTS, "backend=llama_cpp", "task=nano_facts", "export=gguf")
    assert record.quantization["kernels"] == {"llama_cpp": 21}
    assert {row["kernel"] for row in record.quantization["linears"]} == {"llama_cpp"}
    assert "GGUF file (f16 where nothing is rounded) in llama-cpp-python 0" in " ".join(record.warnings)
    assert "Scores of this file, whose logits llama.cpp computed" in card_path(folder / "model.gguf").read_text()
    again, _ = launch("again", *WHOLE_INPUTS, "backend=llama_cpp", "task=nano_facts")
    assert set(again.sources["quantized"].values()) == {"reused"}
    simulated, _ = launch("simulated", *WHOLE_INPUTS, "task=nano_facts")
    assert set(simulated.sources["quantized"].values()) == {"computed"}
    other, _ = launch("other", *WHOLE_INPUTS, "backend=llama_cpp", "task=nano_facts", "export=gguf", "export.dtype=f32")
    assert set(other.sources["quantized"].values()) == {"computed"}


def test_the_file_of_a_run_is_gone_with_it(launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    _, folder = launch("engine", *WHOLE_INPUTS, "backend=llama_cpp", "task=nano_facts", "fidelity.samples=0")
    assert not list((tmp_path / "temporary").iterdir())
    assert not (folder / "model.gguf").exists()


def test_what_no_file_holds_is_told_before_weights_load() -> None:
    told = problems(resolve(compose(["method=quarot", "bits=4", "backend=llama_cpp"])))
    assert any("the input of attn_out is transformed at run time" in problem for problem in told)
    told = problems(resolve(compose(["method=rtn", "bits=gguf_q4_k", "backend=llama_cpp", "model.sampler.cache=dual"])))
    assert any("leave out its cache" in problem for problem in told)
    told = problems(resolve(compose(["method=fp16", "backend=llama_cpp"])))
    assert any("rounds no weights; write method=gptq bits=gguf_q4_k" in problem for problem in told)
    told = problems(resolve(compose(["method=rtn", "bits=gguf_q4_k", "backend=llama_cpp", "model=nano_block"])))
    assert any("does not denoise models of family" in problem for problem in told)
    assert all(problem.startswith("backend=llama_cpp") for problem in told)
