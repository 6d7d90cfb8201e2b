"""What llama.cpp has to know of a model besides its tensors: its shape, how it denoises, its tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from transformers import PreTrainedTokenizerBase

from dqx.api import DiffusionLM
from dqx.models.architecture import Architecture

#: llama.cpp's name for how a family's tokenizer cuts text before merging (LLaDA has Ling's tokenizer).
PRE = {"llada": "bailingmoe", "dream": "qwen2"}
#: A file without merges is refused: two bytes that no text has, whose union is no token.
NO_MERGE = "\u0100 \u0100"
FILE_TYPES = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S", "Q3_K": "MOSTLY_Q3_K_S"}  # others: MOSTLY_ and the name


def add_model(writer: GGUFWriter, lm: DiffusionLM, kinds: Iterable[GGMLQuantizationType]) -> None:
    """The model as a whole and its shape; `kinds` are those of its matrices."""
    arch = lm.model.arch
    most = Counter(kind.name for kind in kinds).most_common(1)[0][0]
    writer.add_name(lm.config.name)
    writer.add_description("; ".join(lm.facts().values()))
    writer.add_file_type(LlamaFileType[FILE_TYPES.get(most, f"MOSTLY_{most}")])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_shape(writer, arch)
    writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(arch.logit_shift)


def add_shape(writer: GGUFWriter, arch: Architecture) -> None:
    writer.add_vocab_size(arch.vocab_size)
    writer.add_context_length(arch.max_length)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_block_count(arch.n_blocks)
    writer.add_feed_forward_length(arch.mlp_size)
    writer.add_head_count(arch.n_heads)
    writer.add_head_count_kv(arch.n_kv_heads)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_rope_dimension_count(arch.head_size)
    writer.add_layer_norm_rms_eps(arch.norm_eps)


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, arch: Architecture) -> None:
    """The byte-level tokenizer, with a name for every row of the embedding."""
    names, types = tokens(tokenizer, arch.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE[arch.family])
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(merges(tokenizer) or [NO_MERGE])
    writer.add_mask_token_id(arch.mask_token_id)
    writer.add_eos_token_id(arch.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # dqx adds nothing to a text
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[TokenType]]:
    """The text of every token id below `size`, and what kind of token it is."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder

    def kind(index: int) -> TokenType:
        if index not in texts:
            return TokenType.UNUSED
        if index not in added:
            return TokenType.NORMAL
        return TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED

    return [texts.get(index, f"[PAD{index}]") for index in range(size)], [kind(index) for index in range(size)]


def backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the tokenizer's own library says of its model."""
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return described


def merges(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The merges of a byte-level tokenizer, each as its two parts with a blank between."""
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in backend(tokenizer).get("merges", ())]
