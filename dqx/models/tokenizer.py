"""Tokenizers of hub-format checkpoints, from their data files alone.

LLaDA ships a plain `tokenizer.json`. Dream ships Qwen2's `vocab.json` and `merges.txt` plus a Python class that
repeats Qwen2's tokenizer; the class is ignored and transformers' own Qwen2 tokenizer reads the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dqx.models.checkpoint import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_problem(folder: Path) -> str | None:
    """What is missing in `folder` to build a tokenizer, or None."""
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if not missing or (folder / "tokenizer.json").is_file():
        return None
    return (
        f"{folder} has no tokenizer: put tokenizer.json there, or vocab.json and merges.txt "
        f"(missing: {', '.join(missing)})"
    )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises CheckpointError where files are missing, damaged or do not fit the model."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer  # a second: not where nothing is computed

    folder = checkpoint.folder
    if problem := tokenizer_problem(folder):
        raise CheckpointError(problem)
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else Qwen2Tokenizer
    try:
        tokenizer = kind.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for malformed files
        raise CheckpointError(f"{folder}: the tokenizer files cannot be read: {error}") from error
    if len(tokenizer) > checkpoint.arch.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, "
            f"the model's vocabulary only {checkpoint.arch.vocab_size}"
        )
    return tokenizer
