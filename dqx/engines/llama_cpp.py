"""llama.cpp through the package llama-cpp-python: the logits of a GGUF file, for token ids.

LLaDA and Dream alone: llama.cpp computes them without a cache, with attention in both directions. On the CPU, one
sequence at a time, so that a sequence's logits depend on nothing else; attention in float32 (flash attention, its
default, would round keys and values to float16). Weights stay packed, and llama.cpp rounds inputs as its kernels do.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqx.common.content import file_digests
from dqx.common.heartbeat import beat
from dqx.common.problems import ConfigProblems, raise_if
from dqx.models.architecture import Architecture

PACKAGE = "llama-cpp-python"
INSTALL = "pip install 'dqx[llama-cpp]'"
FAMILIES = ("llada", "dream")
#: What the package needs to have: llama.cpp's functions and settings used here, the newest of them last.
FUNCTIONS = (
    *("llama_backend_init", "llama_model_load_from_file", "llama_model_free", "llama_init_from_model", "llama_free"),
    *("llama_batch_init", "llama_batch_free", "llama_decode", "llama_get_logits", "llama_tokenize"),
    *("llama_model_n_layer", "llama_model_n_embd", "llama_model_get_vocab", "llama_vocab_n_tokens"),
    *("llama_model_meta_val_str", "llama_get_causal_attn", "llama_model_is_diffusion"),
)
SHORTEST = 256  # tokens that a context has room for, at least

_said: deque[str] = deque(maxlen=8)  # llama.cpp's last complaints
_listener: Any = None  # kept alive as long as the library may call it


@cache
def problems() -> tuple[str, ...]:
    """Why llama.cpp cannot be used here, with what to do, or none."""
    if find_spec("llama_cpp") is None:
        return (f"the package {PACKAGE} is missing; {INSTALL}, which builds llama.cpp (cmake and a C++ compiler)",)
    try:
        binding = import_module("llama_cpp")
    except Exception as error:  # a library that does not load, in whatever way the package says it
        built = f"pip install --force-reinstall --no-cache-dir {PACKAGE} builds it for this machine"
        return (f"{PACKAGE} is installed, but does not load ({error}); {built}",)
    missing = [name for name in FUNCTIONS if not hasattr(binding, name)]
    settings = binding.llama_context_default_params() if not missing else None
    missing += ["flash_attn_type"] if settings is not None and not hasattr(settings, "flash_attn_type") else []
    if missing:
        return (f"{PACKAGE} {version()} has no {', '.join(missing)}; {INSTALL} brings a newer one",)
    _listen(binding)
    binding.llama_backend_init()
    return ()


def version() -> str:
    """The package's version, which names one of llama.cpp."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return str(getattr(import_module("llama_cpp"), "__version__", "of unknown version"))


def _listen(binding: Any) -> None:
    """Keep llama.cpp's warnings and errors, and print none of what it says."""
    global _listener

    def heard(level: int, text: bytes, _: Any) -> None:
        if level in (3, 4):
            _said.append(text.decode("utf-8", "replace").strip())

    _listener = binding.llama_log_callback(heard)
    binding.llama_log_set(_listener, ctypes.c_void_p(0))


@dataclass
class _Held:
    """What llama.cpp has allocated."""

    binding: Any
    model: Any = None
    context: Any = None

    def free_context(self) -> None:
        if self.context:
            self.binding.llama_free(self.context)
        self.context = None

    def free(self) -> None:
        self.free_context()
        if self.model:
            self.binding.llama_model_free(self.model)
        self.model = None


class LlamaCpp:
    """A GGUF file in llama.cpp.

    Loading it runs a test: logits are finite, come out the same twice, and the first row of a text changes with its
    last token, as attention in both directions has it. `threads` are torch's own number by default, and change no
    logit. Raises ConfigProblems where the package, the file or the test fails, in plain words.
    """

    def __init__(self, file: str | Path, threads: int | None = None):
        raise_if(problems())
        self.file = Path(file).expanduser()
        if not self.file.is_file():
            raise ConfigProblems([f"{file} is no file; give one that `dqx export gguf` has written"])
        self._binding: Any = import_module("llama_cpp")
        self._threads = torch.get_num_threads() if threads is None else threads
        self._held = _Held(self._binding)
        self.close = weakref.finalize(self, self._held.free)  # frees what llama.cpp holds, at the latest at exit
        self._room = 0
        self._model = self._held.model = self._load()
        vocabulary = self._binding.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._binding.llama_vocab_n_tokens(vocabulary)
        try:
            raise_if(self._strange() or self._failed_test())
        except ConfigProblems:
            self.close()
            raise

    def _load(self) -> Any:
        settings = self._binding.llama_model_default_params()
        settings.n_gpu_layers = 0
        _said.clear()
        model = self._binding.llama_model_load_from_file(str(self.file).encode(), settings)
        if not model:
            raise ConfigProblems([f"llama.cpp cannot load {self.file}: {'; '.join(_said) or 'it does not say why'}"])
        return model

    def _strange(self) -> list[str]:
        """Whether the file is of a model that denoises here."""
        known = self.metadata("general.architecture")
        if known in FAMILIES and self._binding.llama_model_is_diffusion(self._model):
            return []
        return [f"{self.file} is a model of {known or 'no named architecture'}; dqx reads {' and '.join(FAMILIES)}"]

    def _failed_test(self) -> list[str]:
        first = torch.arange(8) % self.vocab_size
        other = first.clone()
        other[-1] = self.vocab_size - 1
        once, again, changed = self.rows(first), self.rows(first), self.rows(other)
        failed = []
        if not once.isfinite().all():
            failed.append("its logits are not finite")
        if not torch.equal(once, again):
            failed.append("the same tokens have other logits the second time")
        if torch.equal(once[0], changed[0]):
            failed.append("the first row does not see the last token: attention is causal")
        return [f"llama.cpp ({PACKAGE} {version()}) fails the test of {self.file}: {problem}" for problem in failed]

    def described(self) -> str:
        """The engine with its version, and the file with its digest."""
        return f"{PACKAGE} {version()}, {self.file.name} ({file_digests([self.file])[0][:16]})"

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text, None where it is not there."""
        text = ctypes.create_string_buffer(4096)
        found = self._binding.llama_model_meta_val_str(self._model, key.encode(), text, len(text))
        return None if found < 0 else text.value.decode("utf-8", "replace")

    def unlike(self, arch: Architecture) -> list[str]:
        """Why the file is none of a model of this architecture, or none."""
        sizes = {
            "hidden size": (self._binding.llama_model_n_embd(self._model), arch.hidden_size),
            "number of blocks": (self._binding.llama_model_n_layer(self._model), arch.n_blocks),
            "vocabulary": (self.vocab_size, arch.vocab_size),
        }
        known = self.metadata("general.architecture")
        told = [f"{self.file} is a model of {known}, not of {arch.family}"] if known != arch.family else []
        return told + [
            f"{self.file} has a {name} of {its}, not {own}" for name, (its, own) in sizes.items() if its != own
        ]

    def rows(self, ids: Tensor) -> Tensor:
        """The head's output [T, V], float32, for token ids [T]. Rows are not shifted: Dream's row i predicts i + 1."""
        tokens, binding = ids.tolist(), self._binding
        context = self._context_for(len(tokens))
        batch = binding.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                batch.seq_id[i][0] = 0
            _said.clear()
            code = binding.llama_decode(context, batch)
        finally:
            binding.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama.cpp fails on {len(tokens)} tokens (code {code}): {'; '.join(_said)}")
        beat()
        found = np.ctypeslib.as_array(binding.llama_get_logits(context), (len(tokens), self.vocab_size))
        return torch.from_numpy(found.copy())

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text by the file's own tokenizer; names of special tokens are text."""
        encoded, binding = text.encode(), self._binding
        ids = (binding.llama_token * (len(encoded) + 8))()
        vocabulary = binding.llama_model_get_vocab(self._model)
        count = binding.llama_tokenize(vocabulary, encoded, len(encoded), ids, len(ids), False, False)
        return list(ids[:count])

    def _context_for(self, length: int) -> Any:
        """A context with room for so many tokens: all of them are computed at once."""
        if length > self._room:
            self._held.free_context()
            self._room = max(SHORTEST, 1 << (length - 1).bit_length())
            settings = self._binding.llama_context_default_params()
            settings.n_ctx = settings.n_batch = settings.n_ubatch = self._room
            settings.n_threads = settings.n_threads_batch = self._threads
            settings.flash_attn_type = 0  # disabled
            self._held.context = self._binding.llama_init_from_model(self._model, settings)
            if not self._held.context:
                self._room = 0
                raise RuntimeError(f"llama.cpp has no room for {length} tokens: {'; '.join(_said)}")
        return self._held.context
