"""A family that dqx has never heard of: new files alone, in a package that names them as an entry point.

Its MLP has a linear more, `side`, so that roles, widths and reports must come from the model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_tokenizer

FAMILY = """
from dqx.models.architecture import Architecture
from dqx.models.family import Family, register

NAMES = {name: name for name in ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "side", "down")}


class Sided(Architecture):
    sites = Architecture.sites | {"mlp_in": ("gate", "up", "side")}
    block = "sided_block.SidedBlock"


def architecture(config):
    fixed = {"family": "sided", "rope_theta": 1e4, "norm_eps": 1e-6, "qkv_bias": False, "logit_shift": False}
    return Sided(**fixed, **{key: value for key, value in config.items() if key != "model_type"})


register(
    Family(
        name="sided",
        model_type="Sided",
        block_prefix="layers.{}.",
        block_names=NAMES,
        outer_names={f"{name}.weight": f"{name}.weight" for name in ("embed", "norm", "head")},
        architecture=architecture,
        config=lambda arch: {"model_type": "Sided", **{key: getattr(arch, key) for key in SIZES}},
        sampler={"_target_": "dqx.diffusion.samplers.llada.LLaDASampler"},
        architecture_class=Sided,
    )
)
SIZES = (
    "vocab_size", "hidden_size", "mlp_size", "n_blocks", "n_heads", "n_kv_heads",
    "mask_token_id", "eos_token_id", "max_length",
)
"""
BLOCK = """
from torch.nn.functional import silu

from dqx.models.transformer import Block


class SidedBlock(Block):
    def mlp(self, x):
        x = self.inputs["mlp_in"](x)
        return self.down(self.inputs["mlp_out"](silu(self.gate(x)) * self.up(x) + self.side(x)))
"""
USE = """
import json, sys
from pathlib import Path

import dqx
import torch
from dqx.config.schema import ConfigProblems
from dqx.diagnostics.activations import measure_activations
from dqx.models.checkpoint import save
from dqx.models.family import family_of
from dqx.models.transformer import MaskedDiffusionTransformer, initialise
from dqx.data.calibration import CalibBatch

folder, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
family = family_of("sided")
arch = family.architecture(sizes)
model = MaskedDiffusionTransformer(arch)
initialise(model, torch.Generator().manual_seed(0))
save(model, family.config(arch), folder)

lm = dqx.load(str(folder))
ids = torch.arange(32)[None]
before = lm.logits(ids)
told = ["bits.weight.group_size=32", "bits.overrides.side.weight=8"]
try:
    lm.quantize("rtn", "w4a16", overrides=[*told, "bits.overrides.sied.weight=8"])
except ConfigProblems as error:
    refused = error.problems
report = lm.quantize("gptq", "w4a16", overrides=told, calib=[ids])
again = dqx.load(lm.save(folder / "quantized"))
answer = {
    "refused": refused,
    "bits": {row.role: row.bits for row in report.linears},
    "name": report.bits,
    "change": float((lm.logits(ids) - before).abs().max()),
    "loaded": bool(torch.equal(again.logits(ids), lm.logits(ids))),
    "sites": list(measure_activations(lm.model, [CalibBatch(ids, 0.0)]).sites),
    "answer": lm.generate("hello", gen_length=4),
}
print(json.dumps(answer))
"""
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "mlp_size": 96, "n_blocks": 2, "n_heads": 4, "n_kv_heads": 2,
    "mask_token_id": 257, "eos_token_id": 256, "max_length": 64,
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What an installed package is to Python: modules, and metadata that names the entry point."""
    (tmp_path / "sided_family.py").write_text(FAMILY)
    (tmp_path / "sided_block.py").write_text(BLOCK)
    info = tmp_path / "sided-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sided\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dqx.families]\nsided = sided_family\n")
    return tmp_path


def test_a_new_family_is_loaded_quantized_and_sampled(package: Path) -> None:
    folder = package / "checkpoint"
    folder.mkdir()
    write_tokenizer(folder, "llada")
    path = os.pathsep.join([str(package), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", USE, str(folder), json.dumps(SIZES)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["refused"] == ["bits.overrides.sied is no linear of the model; did you mean side?"]
    assert told["bits"] == dict.fromkeys(("q", "k", "v", "o", "gate", "up"), 4) | {"side": 8, "down": 4}
    assert told["name"] == "w4a16-side8"
    assert 0 < told["change"] < 10
    assert told["loaded"]
    assert told["sites"] == ["attn_in", "attn_out", "mlp_in", "mlp_out"]
    assert isinstance(told["answer"], str)
