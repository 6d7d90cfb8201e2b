"""A small but complete record of a run, for the tests of what reads and writes records."""

import math
from dataclasses import replace
from types import SimpleNamespace

import torch
from tiny import PLAIN, random_model

from dqx.common.environment import environment
from dqx.diagnostics.activations import measure_activations
from dqx.evaluate.results import DocumentRow, TaskResult
from dqx.record.folder import Record

SIZES = {"vocab_size": 32, "hidden_size": 16, "mlp_size": 24, "n_blocks": 2, "n_heads": 2, "n_kv_heads": 2}
ARCH = replace(PLAIN, mask_token_id=31, max_length=32, **SIZES)


def task_result(name, scores, category="math", **more):
    rows = [
        DocumentRow(
            f"{name}/{i}",
            float(s),
            prediction=f"line\n{i} \u2028 é",
            target=str(i),
            log_likelihoods=[-1.5, -math.inf],
            truncated=i,
        )
        for i, s in enumerate(scores)
    ]
    return TaskResult(name, category, "acc", sum(scores) / len(scores), len(rows), rows, **more)


def outlier_stats(seed=0, gain=1.0):
    net = random_model(ARCH, seed)
    net.requires_grad_(False).eval()
    net.blocks[1].mlp_norm.weight[3] = gain
    return measure_activations(net, [SimpleNamespace(ids=torch.arange(1, 25).view(2, 12))])


def fidelity():
    """Predictions of a model of two blocks, at two mask ratios and at two steps."""
    near, far = ({"positions": 32, "divergence": d, "agreement": a} for d, a in ((0.0123, 0.96875), (1.5, 0.5)))
    return {
        "by_mask_ratio": [{"mask_ratio": 0.1, **near}, {"mask_ratio": 0.9, **far}],
        "by_step": [
            {"step": 0, "mask_ratio": 1.0, **far, "commit_flips": 0.25, "commit_delays": 0.5},
            {"step": 12, "mask_ratio": 0.25, **near, "commit_flips": 0.0, "commit_delays": 0.0},
        ],
        "layers": {"steps": [0, 12], "mask_ratios": [1.0, 0.25], "sqnr_db": [[None, 41.5], [18.25, 22.0]]},
        "answers": {
            "documents": 3,
            "tokens": 16,
            "steps": 16,
            "agreement": 0.75,
            "first_diverging_step": [4, None, 9],
        },
    }


def record(**changes):
    fp = {"nano_sums": task_result("nano_sums", [1, 1, 1, 0], seconds=2.0, n_forwards=8, tokens=900)}
    q = {
        "nano_sums": task_result(
            "nano_sums", [1, 0, 0, 0], seconds=3.0, n_forwards=8, tokens=900, notes=["one prompt was cut"]
        )
    }
    fp["group/code"], q["group/code"] = (
        task_result("group/code", [1, 1], "code"),
        task_result("group/code", [1, 0], "code"),
    )
    basics = {
        "config": {
            "seed": 0,
            "model": {"name": "nano_llada"},
            "method": {"name": "gptq"},
            "bits": {"name": "w3a16"},
            "calib": {"masking": "clean", "text": "nano", "samples": 128, "length": 256},
            "steps": {"count": None},
            "task": {"limit": None},
            "wandb": {"mode": "offline", "project": "dqx", "group": None, "entity": None, "tags": []},
        },
        "environment": environment("cpu"),
        "model": {"name": "nano_llada", "fingerprint": "0123456789abcdef"},
        "full_precision": fp,
        "quantized": q,
        "quantization": {
            "method": "gptq",
            "average_bits": 3.15,
            "seconds": 1.5,
            "notes": [],
            "linears": [{"name": "blocks.0.q"}],
        },
        "outliers": {"full_precision": outlier_stats(), "quantized": outlier_stats(gain=30.0)},
        "fidelity": fidelity(),
        "timings": {"load": 0.5, "quantize": 1.5},
        "sources": {"full_precision": {"nano_sums": "reused"}},
        "choices": {"model": "nano_llada", "method": "gptq", "bits": "w3"},
        "command": "python launch.py method=gptq bits=3",
    }
    return Record(**(basics | changes))


def contrast(one, other):
    """Of two colours `#rrggbb`, by WCAG: 1 to 21."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
