"""`config.json` of a hub-format checkpoint: read, judged by what is understood, and checked for sense.

A key that dqx does not understand may change the function that the weights compute, so it is refused, whatever its
name. Understood are the keys that the family reads, those of which it knows the values that change nothing
(`Family.required`), and those that are about training, sampling or files (`WITHOUT_EFFECT`, `Family.ignored`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dqx.models.architecture import Architecture
from dqx.models.family import ROPE, Family, families

QUANTIZED = "quantized.json"  # in the folder of a quantized checkpoint, see dqx/quant/checkpoint/folder.py
LARGEST_CONFIG = 2**20  # bytes
MOST_BLOCKS, WIDEST = 1000, 2**24  # beyond every model, and far below what makes a skeleton slow
#: Keys of transformers' configurations that say nothing about the function computed.
WITHOUT_EFFECT = frozenset(
    """
    _name_or_path _attn_implementation attn_implementation _attn_implementation_autoset architectures auto_map
    transformers_version model_type torch_dtype dtype use_cache initializer_range tokenizer_class pad_token_id
    bos_token_id sep_token_id decoder_start_token_id return_dict output_attentions output_hidden_states torchscript
    use_bfloat16 tf_legacy_loss task_specific_params problem_type finetuning_task id2label label2id prefix
    attention_dropout hidden_dropout attention_probs_dropout_prob hidden_dropout_prob max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values suppress_tokens exponential_decay_length_penalty begin_suppress_tokens pretraining_tp
    ignore_keys_at_rope_validation
    """.split()  # noqa: SIM905
)
#: Keys of transformers' configurations by the values that change nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the tensor or key."""


class _Read(Mapping[str, Any]):
    """A configuration that notes which of its keys are read."""

    def __init__(self, values: Mapping[str, Any]):
        self.values_read: set[str] = set()
        self._values = values

    def __getitem__(self, key: str) -> Any:
        self.values_read.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def read_json(path: Path, largest: int) -> Any:
    """The content of a JSON file of at most `largest` bytes. Raises CheckpointError for any other file."""
    if not path.is_file():
        raise CheckpointError(f"{path} {'is no regular file' if path.exists() else 'is missing'}")
    if path.stat().st_size > largest:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; more than {largest} are not read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} has lists inside lists without end") from error


def read_config(folder: Path, mask_token_id: int | None = None) -> tuple[dict[str, Any], Architecture]:
    """Parse and check `config.json`; `mask_token_id` takes the place of the file's own.

    Raises CheckpointError naming the key.
    """
    path = folder / "config.json"
    if (folder / QUANTIZED).is_file():
        raise CheckpointError(f"{folder} holds a quantized model; read it with dqx.quant.load_quantized")
    if not path.exists():
        raise CheckpointError(f"{path} is missing; a checkpoint folder holds config.json and *.safetensors")
    config = read_json(path, LARGEST_CONFIG)
    family = _family(path, config)
    seen = _Read(config if mask_token_id is None else config | {"mask_token_id": mask_token_id})
    try:
        arch = family.architecture(seen)
    except KeyError as error:
        hint = "; set model.mask_token_id=ID" if error.args == ("mask_token_id",) else ""
        raise CheckpointError(f"{path}: key {error} is missing{hint}") from error
    except (TypeError, ValueError, OverflowError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{path}: a key has the wrong type or value ({error})") from error
    problems = [*_key_problems(config, family, arch, seen.values_read), *_geometry_problems(arch, mask_token_id)]
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    return config, arch


def _family(path: Path, config: Any) -> Family:
    model_type = config.get("model_type") if isinstance(config, dict) else None
    by_type = {family.model_type.lower(): family for family in families().values()}
    family = by_type.get(str(model_type)[:100].lower())
    if family is None:
        known = ", ".join(repr(f.model_type) for f in families().values())
        raise CheckpointError(f"{path}: model_type is {str(model_type)[:100]!r}; dqx has {known}")
    return family


def _key_problems(config: Mapping[str, Any], family: Family, arch: Architecture, read: set[str]) -> Iterator[str]:
    """What the file says that dqx does not compute."""
    neutral = {
        **NEUTRAL,
        "head_dim": (arch.head_size, None) if _is_size(arch.n_heads) and _is_size(arch.hidden_size) else (None,),
        "layer_types": (None, ["full_attention"] * arch.n_blocks if _is_size(arch.n_blocks, MOST_BLOCKS) else None),
        **family.required,
    }
    for key, value in config.items():
        if key in neutral:
            if value not in neutral[key]:
                only = f"only {neutral[key][0]!r}" if key != "layer_types" else "only full attention"
                yield f"{key}={_short(value)} is not supported ({only}); the logits would be wrong"
        elif value is not None and not (key in read or key in WITHOUT_EFFECT or key in family.ignored or key in ROPE):
            yield (
                f"{key[:100]}={_short(value)} is not understood, and may change what the weights compute; where it "
                "does not, take it out of config.json"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_size(value: Any, most: int = WIDEST) -> bool:
    return type(value) is int and 0 < value <= most


def _geometry_problems(arch: Architecture, mask_token_id: int | None) -> list[str]:
    """Sizes, constants and ids with which nothing can be computed; a mask token that was set is judged elsewhere."""
    limits = dict.fromkeys(("vocab_size", "hidden_size", "mlp_size", "n_heads", "n_kv_heads", "max_length"), WIDEST)
    problems = [
        f"{name}={_short(getattr(arch, name))} is not a whole number from 1 to {most}"
        for name, most in {**limits, "n_blocks": MOST_BLOCKS}.items()
        if not _is_size(getattr(arch, name), most)
    ]
    for name in ("rope_theta", "norm_eps"):
        value = getattr(arch, name)
        if not (math.isfinite(value) and value > 0):
            problems.append(f"{name}={value} is not a positive number")
    if problems:
        return problems
    if arch.head_dim is not None and not _is_size(arch.head_dim):
        return [f"head_dim={_short(arch.head_dim)} is not a whole number from 1 to {WIDEST}"]
    if arch.block_length is not None and not _is_size(arch.block_length):
        problems.append(f"block_length={_short(arch.block_length)} is not a whole number from 1 to {WIDEST}")
    if arch.head_dim is None and arch.hidden_size % arch.n_heads:
        problems.append(f"{arch.n_heads} heads do not divide the hidden size {arch.hidden_size}")
    elif arch.head_size % 2:
        problems.append(f"heads of {arch.head_size} channels cannot be rotated in pairs")
    if arch.n_heads % arch.n_kv_heads:
        problems.append(f"{arch.n_kv_heads} key/value heads do not divide {arch.n_heads} heads")
    ids = [("mask_token_id", arch.mask_token_id)] if mask_token_id is None else []
    for name, value in [*ids, *(("eos_token_id", value) for value in (arch.eos_token_id, *arch.end_token_ids))]:
        if type(value) is not int or not 0 <= value < arch.vocab_size:
            problems.append(f"{name}={_short(value)} lies outside the vocabulary of {arch.vocab_size}")
    return problems
