"""The Python API: load a model, look at logits, generate, score, quantize, evaluate. The command line uses it too.

    language_model.py  `DiffusionLM`: a model with its tokenizer and sampler, and what can be done with it
    loading.py         `load`: from a name in `conf/model`, a checkpoint, a saved model, or a file for llama.cpp

    import dqx

    lm = dqx.load("nano_llada")                       # a name from conf/model, a folder or a hub id
    lm.generate("Question: 5-4+2+4+2-6+6=?\\nAnswer:", gen_length=16, block_length=8)  # " 1 3 7 9 3 9 = 9"
    lm.log_likelihood("Question: What is the job of Anna?\\nAnswer:", " baker", samples=16)
    report = lm.quantize("gptq", "w3a16")             # in place; names from conf/method and conf/bits
    results = lm.evaluate("nano_facts", limit=32)     # names from conf/task
    lm.save("nano_llada-w3"); dqx.load("nano_llada-w3")

Where a text is asked for, its token ids do as well: a list of integers, or a tensor [T] or [1, T]. Log-likelihoods are
in nats. Everything random follows `seed` alone, not batch sizes or devices.
"""

from dqx.api.language_model import SETTINGS, DiffusionLM, Quantization, quantize
from dqx.api.loading import load, load_configured

__all__ = ["SETTINGS", "DiffusionLM", "Quantization", "load", "load_configured", "quantize"]
