"""Checkpoints in the hub's format: sharded or not, tokenizer files, nothing executed, damage named."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import dqx
from dqx.models.checkpoint import CheckpointError, inspect, load_weights, locate, tensor_names
from dqx.models.tokenizer import load_tokenizer

FAMILIES = ["llada", "dream"]


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_single_file_are_the_same_model(tiny_checkpoint, family):
    single, sharded = tiny_checkpoint(family), tiny_checkpoint(family, max_shard_bytes=100_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    ids = torch.arange(12)[None]
    first, second = (load_weights(inspect(str(folder)))(ids) for folder in (single, sharded))
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_the_hubs(tiny_checkpoint, family):
    stored = set(load_file(tiny_checkpoint(family) / "model.safetensors"))
    assert stored == set(tensor_names(inspect(str(tiny_checkpoint(family))).arch).values())
    expected = {
        "llada": {"model.transformer.blocks.0.ff_out.weight", "model.transformer.ff_out.weight"},
        "dream": {"model.layers.0.self_attn.q_proj.bias", "lm_head.weight"},
    }[family]
    assert expected <= stored


def test_down_projection_and_head_are_not_confused(tiny_checkpoint):
    folder = tiny_checkpoint("llada")
    stored = load_file(folder / "model.safetensors")
    model = load_weights(inspect(str(folder)))
    assert torch.equal(model.blocks[1].down.weight, stored["model.transformer.blocks.1.ff_out.weight"])
    assert torch.equal(model.blocks[1].gate.weight, stored["model.transformer.blocks.1.ff_proj.weight"])
    assert torch.equal(model.head.weight, stored["model.transformer.ff_out.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_python_is_never_imported(tiny_checkpoint, family, monkeypatch):
    folder = tiny_checkpoint(family)
    trap = folder / "executed"
    names = {"llada": ["configuration_llada", "modeling_llada"], "dream": ["modeling_dream", "tokenization_dream"]}[
        family
    ]
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(trap)!r}, 'w').close()\nraise SystemExit('executed')\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [f"{names[-1]}.DreamTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm = dqx.load(str(folder))
    lm.generate("hello", gen_length=4)
    assert not trap.exists()
    assert not any(name.rpartition(".")[2] in names for name in sys.modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_reads_back_any_text(tiny_checkpoint, family):
    tokenizer = load_tokenizer(inspect(str(tiny_checkpoint(family))))
    text = "Wie groß? 12+7\n\tdef f(x): # ✓"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.convert_tokens_to_ids("<|mdm_mask|>") == 257
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    ).endswith("<assistant>")


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_close(tiny_checkpoint, family):
    checkpoint = inspect(str(tiny_checkpoint(family)))
    ids = torch.arange(12)[None]
    exact = load_weights(checkpoint)(ids)
    half = load_weights(checkpoint, torch.bfloat16)(ids)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).pow(2).mean() < 1e-2 * exact.pow(2).mean()


def test_fingerprint_tells_weights_and_configs_apart(tiny_checkpoint):
    one, same, other = (
        inspect(str(tiny_checkpoint(seed=seed, max_shard_bytes=size))).fingerprint()
        for seed, size in ((0, 10**9), (0, 10**9), (1, 10**9))
    )
    assert one == same != other
    assert inspect(str(tiny_checkpoint(rope_theta=1e4))).fingerprint() != one


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


UP = "model.transformer.blocks.1.up_proj.weight"


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def nan_inside(tensors):
    tensors[UP][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["model.safetensors", "corrupt or truncated"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"not a safetensors file"), ["corrupt or truncated"]),
        (lambda f: rewrite(f, lambda t: t.pop(UP)), ["1 tensors of", "missing", UP]),
        (lambda f: rewrite(f, lambda t: t.update({UP: torch.zeros(3, 4)})), [UP, "[3, 4]", "[192, 64]"]),
        (lambda f: rewrite(f, lambda t: t.update({"model.extra": torch.zeros(1)})), ["no place for", "model.extra"]),
        (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
        (lambda f: (f / "config.json").write_text("{"), ["not valid JSON"]),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["no *.safetensors", "pickled"]),
    ],
)
def test_damage_is_named_before_weights_are_read(tiny_checkpoint, damage, words):
    folder = tiny_checkpoint("llada")
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        inspect(str(folder))
    assert all(word in str(error.value) for word in words), error.value


def test_values_that_are_not_finite_are_named(tiny_checkpoint):
    folder = tiny_checkpoint("llada")
    rewrite(folder, nan_inside)
    with pytest.raises(CheckpointError, match=f"{UP}.*not finite"):
        load_weights(inspect(str(folder)))


def test_missing_shard_is_named(tiny_checkpoint):
    folder = tiny_checkpoint("dream", max_shard_bytes=100_000)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name}' is named in .* there is no such file"):
        inspect(str(folder))


def test_index_that_points_outside_the_folder_is_refused(tiny_checkpoint):
    folder = tiny_checkpoint("llada", max_shard_bytes=100_000)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][UP] = "../other.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="there is no such file in the folder"):
        inspect(str(folder))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mask_token_id", 5000, "mask_token_id=5000 lies outside the vocabulary of 320"),
        ("model_type", "gpt2", "model_type is 'gpt2'; dqx has 'Dream', 'Fast_dLLM_Qwen', 'llada', "),
        ("alibi", True, "alibi=True is not supported"),
        ("n_heads", 5, "5 heads do not divide the hidden size 64"),
        ("n_layers", "three", "n_blocks='three' is not a whole number from 1 to 1000"),
    ],
)
def test_configs_that_cannot_work(tiny_checkpoint, key, value, words):
    folder = tiny_checkpoint("llada")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=words):
        inspect(str(folder))


def test_neither_folder_nor_hub_id():
    with pytest.raises(CheckpointError, match="does not exist; give a folder, or a hub id"):
        locate("./nowhere")
