"""config.json: what is understood, and that everything else is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dqx.common import content
from dqx.models.checkpoint import CheckpointError, inspect, load_weights
from dqx.models.family import families
from dqx.models.tokenizer import chat_template_problem, load_tokenizer

FAMILIES = ["llada", "dream"]
Make = Callable[..., Path]


def changed(folder: Path, **changes: Any) -> Path:
    """The checkpoint with keys of config.json set, or with `...` taken out."""
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
    path.write_text(json.dumps(config))
    return folder


def restored(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The checkpoint with its tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- what config.json may say --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_the_published_configurations_is_understood(name: str, tiny_checkpoint: Make) -> None:
    family = families()[name]
    assert family.published is not None
    folder = tiny_checkpoint(name)
    arch = inspect(str(folder)).arch
    assert set(family.config(family.published[1])) <= set(json.loads((folder / "config.json").read_text()))
    assert inspect(str(changed(folder, dtype="bfloat16", temperature=0.3, _name_or_path="x"))).arch == arch


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_sinks", True),
        ("logit_scale", 0.5),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("partial_rotary_factor", 0.5),
        ("head_dim", 12),
        ("layer_types", ["sliding_attention"] * 2),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1]}),
        ("rope_parameters", "yarn"),
        ("rope_parameters", {"rope_theta": 123.0, "rope_type": "default"}),
        ("something_nobody_has_heard_of", 0),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_understood_is_refused_by_name(family: str, key: str, value: Any, tiny_checkpoint: Make) -> None:
    with pytest.raises(CheckpointError, match=rf"config.json: .*({key}|rope_theta has several)"):
        inspect(str(changed(tiny_checkpoint(family), **{key: value})))


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_as_transformers_5_writes_them(family: str, tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint(family)
    arch = inspect(str(folder)).arch
    inside = {"rope_theta": arch.rope_theta, "rope_type": "default"}
    assert inspect(str(changed(folder, rope_theta=..., rope_parameters=inside))).arch == arch
    kinds = ["full_attention"] * arch.n_blocks
    assert inspect(str(changed(folder, head_dim=arch.head_size, layer_types=kinds, id2label={"0": "x"}))).arch == arch


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1.0, "1e4", True, None, [1.0]])
def test_constants_without_sense(key: str, value: Any, tiny_checkpoint: Make) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: .*(rope_theta|rms_norm_eps|norm_eps)"):
        inspect(str(changed(tiny_checkpoint("dream"), **{key: value})))


def test_several_end_tokens(tiny_checkpoint: Make) -> None:
    arch = inspect(str(changed(tiny_checkpoint("llada"), eos_token_id=[256, 258]))).arch
    assert (arch.eos_token_id, arch.end_token_ids) == (256, (258,))
    for value in ([], [256, 5000], [256, "x"], "x"):
        with pytest.raises(CheckpointError, match="eos_token_id"):
            inspect(str(changed(tiny_checkpoint("llada"), eos_token_id=value)))


def test_the_mask_token_may_come_from_the_setting(tiny_checkpoint: Make) -> None:
    folder = changed(tiny_checkpoint("llada"), mask_token_id=...)
    with pytest.raises(CheckpointError, match=r"'mask_token_id' is missing; set model.mask_token_id=ID"):
        inspect(str(folder))
    assert inspect(str(folder), mask_token_id=257).arch.mask_token_id == 257


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 10**9},
        {"d_model": 4 * 10**18},
        {"d_model": 2**24 + 2, "n_heads": 1},
        {"mlp_hidden_size": None, "mlp_ratio": 10**300},
        {"mlp_hidden_size": None, "mlp_ratio": "4" * 10**5},
        {"mlp_hidden_size": None, "mlp_ratio": [0] * 10},
        {"vocab_size": 10**12, "embedding_size": None},
        {"n_heads": 0},
        {"n_kv_heads": -4},
        {"max_sequence_length": 1e6},
        {"model_type": ["llada"] * 1000},
    ],
)
def test_absurd_sizes_are_refused_at_once(changes: dict[str, Any], tiny_checkpoint: Make) -> None:
    folder = changed(tiny_checkpoint("llada"), **changes)
    with pytest.raises(CheckpointError) as told:
        inspect(str(folder))
    assert len(str(told.value)) < 1000


def test_files_that_are_none(tiny_checkpoint: Make) -> None:
    for name, text in (
        ("config.json", "[" * 100_000),
        ("config.json", " " * 2**21),
        ("config.json", "[]"),
        ("config.json", "\x00"),
        ("model.safetensors.index.json", '{"weight_map": ["x"]}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/passwd"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "x\\u0000"}}'),
        ("model.safetensors.index.json", "[" * 100_000),
    ):
        folder = tiny_checkpoint("llada")
        (folder / name).write_text(text)
        with pytest.raises(CheckpointError, match=name):
            inspect(str(folder))
    for name in ("config.json", "model.safetensors"):
        folder = tiny_checkpoint("llada")
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match=r"no regular file|missing"):
            inspect(str(folder))


# ---- weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_codes_are_not_taken_for_weights(dtype: torch.dtype, tiny_checkpoint: Make) -> None:
    def stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t.mul(100).to(dtype) if "q_proj" in name else t for name, t in tensors.items()}

    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor .*q_proj.* is stored as .*codes"):
        inspect(str(restored(tiny_checkpoint("dream"), stored)))


def test_norms_in_another_precision(tiny_checkpoint: Make) -> None:
    def mixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t if "norm" in name or "embed" in name else t.bfloat16() for name, t in tensors.items()}

    folder = restored(tiny_checkpoint("dream"), mixed)
    checkpoint = inspect(str(folder))
    assert checkpoint.stored_dtype == torch.bfloat16
    model = load_weights(checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(torch.arange(4)[None])).all()


def test_a_weight_beyond_float16_is_named(tiny_checkpoint: Make) -> None:
    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5

    checkpoint = inspect(str(restored(tiny_checkpoint("dream"), large)))
    load_weights(checkpoint, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"up_proj.* holds 100000, beyond torch.float16; use dtype=bfloat16"):
        load_weights(checkpoint, torch.float16)


@pytest.mark.parametrize(("family", "key"), [("dream", "tie_word_embeddings"), ("llada", "weight_tying")])
def test_a_head_in_the_file_is_used_whatever_the_flag_says(family: str, key: str, tiny_checkpoint: Make) -> None:
    ids = torch.arange(5)[None]
    expected = load_weights(inspect(str(tiny_checkpoint(family))))(ids)
    assert torch.equal(load_weights(inspect(str(changed(tiny_checkpoint(family), **{key: True}))))(ids), expected)


def test_files_beside_the_weights(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("llada")
    expected = inspect(str(folder)).fingerprint()
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")
    assert inspect(str(folder)).fingerprint() == expected
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert inspect(str(folder)).fingerprint() == expected


def test_shards_in_subfolders(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("llada", max_shard_bytes=100_000)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (folder / "parts").mkdir()
    for name in set(weight_map.values()):
        (folder / name).rename(folder / "parts" / name)
    index.write_text(json.dumps({"weight_map": {tensor: f"parts/{name}" for tensor, name in weight_map.items()}}))
    ids = torch.arange(5)[None]
    expected = load_weights(inspect(str(tiny_checkpoint("llada"))))(ids)
    assert torch.equal(load_weights(inspect(str(folder)))(ids), expected)


# ---- every byte ----------------------------------------------------------------------------------------------


def test_every_byte_counts(tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(content, "PIECE", 4096)
    folder = tiny_checkpoint("llada")
    file = folder / "model.safetensors"
    bytes_ = bytearray(file.read_bytes())
    seen = {inspect(str(folder)).fingerprint()}
    header = 8 + int.from_bytes(bytes_[:8], "little")
    places = [*range(header, len(bytes_), len(bytes_) // 7), len(bytes_) - 1]
    for place in places:
        other = bytes_.copy()
        other[place] ^= 1
        file.write_bytes(other)
        seen.add(inspect(str(folder)).fingerprint())
    assert len(seen) == len(places) + 1
    file.write_bytes(bytes_)
    assert inspect(str(folder)).fingerprint() in seen


# ---- chat templates ------------------------------------------------------------------------------------------


def test_where_chat_templates_may_lie(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("llada")
    settings = json.loads((folder / "tokenizer_config.json").read_text())

    def given(template: Any) -> str | None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        tokenizer = load_tokenizer(inspect(str(folder)))
        return tokenizer.chat_template  # type: ignore[no-any-return]

    named = [{"name": "rag", "template": "R"}, {"name": "tools", "template": "T"}]
    assert given("X") == "X"
    assert given([*named, {"name": "default", "template": "D"}]) == "D"
    assert given(named[:1]) == "R"
    assert given(named) is None
    problem = chat_template_problem(folder)
    assert problem is not None
    assert "rag, tools and no default; copy one to chat_template.jinja" in problem
    assert given(None) is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert given(None) == "J"
    assert chat_template_problem(folder) is None
