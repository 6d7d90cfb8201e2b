"""Tokenizers of hub-format checkpoints, from their data files alone.

LLaDA ships a plain `tokenizer.json`. Dream ships Qwen2's `vocab.json` and `merges.txt` plus a Python class that
repeats Qwen2's tokenizer; the class is ignored and transformers' own Qwen2 tokenizer reads the files.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dqx.models.checkpoint import Checkpoint
from dqx.models.hub_config import CheckpointError, read_json
from dqx.models.vocabulary import limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JINJA = "chat_template.jinja"
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.json")
DEFAULT = "default"
LARGEST_FILE = 64 * 2**20  # bytes


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
    tokenizer.chat_template = default_template(chat_templates(folder))
    try:
        limit(tokenizer, checkpoint.arch.vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return tokenizer


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a checkpoint by name, "default" where it has but one; of several files the newest kind.

    Files are chat_template.jinja, tokenizer_config.json and chat_template.json. One that cannot be read has none.
    """
    if (folder / JINJA).is_file():
        return {DEFAULT: (folder / JINJA).read_text(encoding="utf-8")}
    for name in TEMPLATE_FILES:
        with suppress(CheckpointError, AttributeError, KeyError, TypeError):
            given = read_json(folder / name, LARGEST_FILE).get("chat_template")
            if isinstance(given, str):
                return {DEFAULT: given}
            if given:
                return {str(entry["name"]): str(entry["template"]) for entry in given}
    return {}


def default_template(templates: dict[str, str]) -> str | None:
    """The template to use: the one called default, or the only one."""
    return templates.get(DEFAULT) or (next(iter(templates.values())) if len(templates) == 1 else None)


def chat_template_problem(folder: Path) -> str | None:
    """Why a checkpoint has no chat template to use, or None."""
    templates = chat_templates(folder)
    if default_template(templates):
        return None
    if templates:
        return f"{folder} has the chat templates {', '.join(templates)} and no default; copy one to {JINJA} there"
    return f"{folder} has no chat template (chat_template in {TEMPLATE_FILES[0]}, or {JINJA})"
