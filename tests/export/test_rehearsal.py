"""What a format cannot hold is told from the configuration: a small random model is refused as the real one is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dqx
from dqx.config.compose import compose, resolve
from dqx.config.schema import ConfigProblems, ExportConfig
from dqx.export.formats import FORMATS
from dqx.export.rehearsal import export_problems, small
from dqx.models.architecture import Architecture
from dqx.models.checkpoint import inspect
from dqx.study.experiment import Experiment

SETTINGS = [
    ("rtn", "w4a16"), ("gptq", "gguf_q4_k"), ("gptq", "fp8"), ("quarot", "w4a16"), ("d2quant", "w2a16"),
]  # fmt: skip
FAST = "task=nano_facts", "outliers.samples=0", "fidelity.samples=0", "model.device=cpu"


@pytest.mark.parametrize(("method", "bits"), SETTINGS)
@pytest.mark.parametrize("model", ["nano_dream", "nano_block"])
def test_the_small_model_is_refused_as_the_real_one(model: str, method: str, bits: str) -> None:
    lm = dqx.load(model, device="cpu")
    lm.quantize(method, bits, calib=[torch.arange(64)[None]])
    assert lm.quantization is not None
    for name, form in FORMATS.items():
        done = lm.quantization
        told = export_problems(ExportConfig(name), done.method, done.bits, lm.model.arch, lm.model.dtype)
        assert [counted(problem.partition(": ")[2]) for problem in told] == list(map(counted, form.problems(lm))), name


def counted(problem: str) -> str:
    """Without how many linears it is of, which a model with more blocks has more of."""
    return re.sub(r" and \d+ more", "", problem)


def test_a_run_is_refused_before_it_starts() -> None:
    with pytest.raises(ConfigProblems) as refused:
        Experiment.of(resolve(compose(["method=duquant", "bits=w4a4", "export=gguf", "export.dtype=int8", *FAST])))
    told = str(refused.value)
    assert "export.dtype int8 is no choice of gguf; it is one of f16, bf16, f32" in told
    assert "BlockRotation" in told
    with pytest.raises(ConfigProblems, match=r"export\.format=ggml is unknown"):
        Experiment.of(resolve(compose(["export.format=ggml", *FAST])))
    Experiment.of(resolve(compose(["export=dequantized", *FAST])))


def test_widths_of_large_models_keep_their_powers_of_two() -> None:
    nano = inspect(resolve(compose(["model=nano_dream"])).model.path).arch
    large = Architecture(**{**vars(nano), "hidden_size": 3584, "mlp_size": 18944, "n_heads": 28, "n_kv_heads": 4})
    narrow = small(large, every_block=False)
    assert (narrow.hidden_size, narrow.mlp_size, narrow.n_heads, narrow.head_size) == (512, 512, 4, 128)
    assert (narrow.n_blocks, small(large, every_block=True).n_blocks) == (1, large.n_blocks)
    assert narrow.n_kv_heads < narrow.n_heads


def test_card_path_of_files_and_folders(tmp_path: Path) -> None:
    from dqx.export.card import card_path

    assert card_path(tmp_path) == tmp_path / "README.md"
    assert card_path(tmp_path / "model.gguf") == tmp_path / "model.md"
