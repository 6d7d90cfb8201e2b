"""Exported files in llama.cpp itself: the simulation's logits and answers. Where llama-cpp-python is installed."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import dqx
from dqx.common.problems import ConfigProblems
from dqx.engines import llama_cpp
from dqx.engines.model import engine_problems
from dqx.export.comparison import agreement, masked_windows, verify
from dqx.export.gguf import write
from dqx.show import command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(llama_cpp.problems()), reason="; ".join(llama_cpp.problems())),
]
#: How the tokenizers of the published checkpoints cut text: Dream's is Qwen2's, LLaDA's taken to be Ling's.
CUTS = {
    "nano_dream": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "nano_llada": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
}
TEXTS = (
    "Question: 12+345=?\nAnswer: 357",
    "We'll see, it's John's; I'VE 3 apples...  and\ttabs\n\n\n  end ",
    "def f(x):\n    return x ** 2  # square\r\n\r\nprint(f(10))",
    "naïve café — 北京 2024年, Привет мир! 😀",
)
MODELS = ("nano_llada", "nano_dream")


@cache
def simulated(name: str, bits: str) -> dqx.DiffusionLM:
    lm = dqx.load(name, device="cpu", dtype="float32")
    if bits != "f32":
        lm.quantize("rtn", f"gguf_{bits}")
    return lm


def written(name: str, bits: str, folder: Path) -> Path:
    write(simulated(name, bits), folder / "model.gguf", "f32")
    return folder / "model.gguf"


@pytest.mark.parametrize("name", MODELS)
def test_at_full_precision_every_token_is_the_same(name: str, tmp_path: Path) -> None:
    found = verify(written(name, "f32", tmp_path), simulated(name, "f32"))
    assert found.different == found.unchecked == []
    assert found.logits[-1].same == found.logits[-1].positions == 320
    assert found.logits[-1].largest < 1e-3  # of a standard deviation of 3 to 6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", ["q4_k", "q6_k"])
def test_k_types_round_inputs_as_the_simulation_does(name: str, bits: str, tmp_path: Path) -> None:
    """At most positions to 1e-9. At some an input lies on the border of two codes, which goes on through the blocks."""
    found = verify(written(name, bits, tmp_path), simulated(name, bits)).logits[-1]
    ids = masked_windows(simulated(name, bits))
    cost = agreement("all", *(simulated(name, each).logits(ids).flatten(0, 1) for each in ("f32", bits)))
    assert found.median_kl < 1e-8
    assert found.mean_kl < 0.1 * cost.mean_kl


@pytest.mark.parametrize("bits", ["q8_0", "q5_0", "q4_0", "q4_1"])
def test_blocks_of_32(bits: str, tmp_path: Path) -> None:
    found = verify(written("nano_dream", bits, tmp_path), simulated("nano_dream", bits)).logits[-1]
    assert found.mean_kl < 5e-3  # measured: 5e-4 to 1e-3
    assert found.same > 0.94 * found.positions


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_chosen_positions_change_nothing(name: str, tmp_path: Path) -> None:
    lm = simulated(name, "f32")
    model = dqx.load(name, gguf=written(name, "f32", tmp_path)).model
    ids = masked_windows(lm)[:2, :24]
    real = torch.ones_like(ids)
    real[0, :5] = 0  # padded on the left, as batches of prompts are
    alone, padded = model(ids[:1, 5:]), model(ids, real)
    assert torch.equal(padded[0, 5:], alone[0])
    where = (real == 1) & (torch.arange(24) % 3 == 0)
    assert torch.equal(model.logits_where(ids, where, real), padded[where])
    ours = lm.model.logits_where(ids, where, real)
    assert (model.logits_where(ids, where, real) - ours).abs().max() < 1e-3


@pytest.mark.parametrize("task", ["nano_facts", "nano_sums"])
def test_documents_are_answered_as_in_the_simulation(task: str, tmp_path: Path) -> None:
    lm = dqx.load("nano_llada", gguf=written("nano_llada", "q4_k", tmp_path))
    ours, theirs = (each.evaluate(task, limit=8)[task] for each in (simulated("nano_llada", "q4_k"), lm))
    assert [row.prediction for row in ours.documents] == [row.prediction for row in theirs.documents]
    assert "llama-cpp-python" in lm.facts()["precision"]


def test_what_an_engine_does_not_have(tmp_path: Path) -> None:
    path = written("nano_llada", "f32", tmp_path)
    lm = dqx.load("nano_llada", gguf=path)
    with pytest.raises(ConfigProblems, match="dqx has none of them"):
        lm.quantize("rtn")
    with pytest.raises(ConfigProblems, match="dqx has none of them"):
        lm.save(tmp_path / "saved")
    with pytest.raises(ConfigProblems, match="is a model of llada, not of dream"):
        dqx.load("nano_dream", gguf=path)
    with pytest.raises(ConfigProblems, match="logits of whole sequences and nothing else"):
        list(lm.model.hidden_states(torch.ones(1, 4, dtype=torch.long)))
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(ConfigProblems, match="cannot load"):
        dqx.load("nano_llada", gguf=path)


def test_the_test_at_loading_finds_a_causal_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("nano_llada", "f32", tmp_path)
    monkeypatch.setattr(llama_cpp.LlamaCpp, "rows", lambda self, ids: torch.cumsum(ids.float(), 0)[:, None])
    with pytest.raises(ConfigProblems, match="attention is causal"):
        llama_cpp.LlamaCpp(path)


def test_caches_are_refused() -> None:
    lm = dqx.load("nano_llada", device="cpu")
    assert engine_problems(lm.sampler) == []
    cached = dqx.load("nano_llada", device="cpu", sampler={"cache": "prefix"})
    assert "leave out its cache" in "\n".join(engine_problems(cached.sampler))


@pytest.mark.parametrize("name", MODELS)
def test_text_is_cut_as_the_tokenizer_cuts_it(name: str, tmp_path: Path) -> None:
    """A byte-level tokenizer of 500 tokens, made here, with the published one's way of cutting text before merging."""
    core = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(CUTS[name]), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|eos|>", "<|mask|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    core.train_from_iterator([text + "".join(CUTS) + __doc__ for text in TEXTS], trainer)
    lm = replace(simulated(name, "f32"), tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eos|>"))
    write(lm, tmp_path / "model.gguf", "f32")
    engine = llama_cpp.LlamaCpp(tmp_path / "model.gguf")
    for text in TEXTS:
        assert engine.tokenize(text) == core.encode(text).ids, text


def test_dqx_generate_shows_a_file_beside_full_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written("nano_llada", "q8_0", tmp_path)
    monkeypatch.setattr(sys, "argv", ["dqx generate", "nano_llada", "--gguf", str(file), "--compare"])
    assert command.main() == 0
    plain, of_file = capsys.readouterr().out.split("nano_llada, llama-cpp-python")
    assert plain.split(":", 1)[1].strip() == of_file.split(":", 1)[1].strip()
