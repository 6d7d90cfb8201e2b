"""Fixtures that several test files share: tiny checkpoints in the hub's format, and their documents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import TINY, tiny_config
from tiny import random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dqx.formats.bits import BitsConfig
from dqx.models.checkpoint import save
from dqx.models.family import family_of
from dqx.quant.method import Method
from dqx.quant.protocols import Context

torch.set_num_threads(1)  # the models here are tiny: threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the commands that tests start as well

TESTS = Path(__file__).parent
DATA = TESTS / "data"  # a few real documents per benchmark, in the hub's layout
SPECIAL = {"<|endoftext|>": 256, "<|mdm_mask|>": 257, "<|eot_id|>": 258}
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if not (loop.last and m.role == 'assistant') %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TinyCheckpoint = Callable[..., Path]


def write_tokenizer(folder: Path, family: str) -> None:
    """A tokenizer with one token per byte: `tokenizer.json` for LLaDA, Qwen2's files for Dream."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    settings: dict[str, Any] = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    if family == "llada":
        tokenizer = Tokenizer(models.BPE(alphabet | SPECIAL, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.save(str(folder / "tokenizer.json"))
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    else:
        (folder / "vocab.json").write_text(json.dumps(alphabet))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        added = {str(i): {"content": text, "special": True} for text, i in SPECIAL.items()}
        settings |= {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(autouse=True)
def _no_full_errors() -> None:
    """`dqx.launch.main.main` sets this for Hydra, in a process of its own; commands of other tests must not see it."""
    os.environ.pop("HYDRA_FULL_ERROR", None)


@pytest.fixture
def setting() -> Context:
    """Where parts are judged: the small Dream model, 16 bits, an empty method."""
    config = json.loads((TESTS / "golden" / "dream_tiny" / "config.json").read_text())
    arch = family_of("dream").architecture(config)
    return Context(arch, BitsConfig().resolve(arch).usual, Method("empty"))


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> TinyCheckpoint:
    """`tiny_checkpoint(family, **config)`: a random checkpoint with a byte tokenizer, and the folder it is in.

    Keyword arguments replace keys of its config.json; `max_shard_bytes` and `seed` are taken out first.
    """

    def make(family: str = "llada", *, max_shard_bytes: int = 10**9, seed: int = 0, **changes: Any) -> Path:
        config = tiny_config(family)
        if family in TINY:
            config |= {"vocab_size": 320}  # for the tokenizer's bytes
        length = "max_sequence_length" if family == "llada" else "max_position_embeddings"
        config |= {"eos_token_id": 256, "pad_token_id": 256, "mask_token_id": 257, length: 1024, **changes}
        model = random_model(family_of(family).architecture(config), seed)
        folder = tmp_path / f"{family}_{len(list(tmp_path.iterdir()))}"
        save(model, config, folder, max_shard_bytes)
        write_tokenizer(folder, family)
        return folder

    return make
