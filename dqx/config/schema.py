"""The configuration as types: what every key means and its default.

`conf/` says which choices exist, this module says what a choice may contain: Hydra checks every file and every
override against these classes. Parts (`method.rounding`, `model.sampler`, ...) stay plain mappings with a
`_target_`, so that a new part needs no change here; their options are checked when they are built
(`dqx/study/checks.py`).

Nothing here imports torch, so that `--help` and tab completion answer at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING

from dqx.common.files import PACKAGE
from dqx.common.names import natural
from dqx.common.problems import ConfigProblems as ConfigProblems  # told by everything that reads a configuration
from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec
from dqx.formats.bits import BitsConfig

#: The config groups: inside an installed package, beside it in a clone.
CONF_DIR = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
GROUPS = ("model", "method", "bits", "calib", "task", "steps", "export", "experiment")


@dataclass
class OutlierPlanting:
    """Outlier channels planted in the finished network by a rescaling that leaves its function unchanged."""

    gain: float = 1.0  # factor on those channels; 1 plants nothing
    channels: int = 4  # how many channels per place


@dataclass
class ModelConfig:
    """Which checkpoint, in which precision, and how it samples."""

    name: str = MISSING
    family: str = MISSING  # one that is registered (`dqx.models.family`)
    path: str = MISSING  # a folder, or a hub id; pkg://dqx/... lies inside this package
    revision: str | None = None  # of the hub repository
    dtype: str = "bfloat16"  # float32, bfloat16, float16, or auto: as stored
    device: str = "auto"  # auto, cpu, cuda, cuda:1, xpu, ...
    fused: bool | None = None  # activations rounded by one compiled kernel; null: on GPUs where it can be compiled
    chat: bool = False  # put prompts through the checkpoint's chat template
    mask_token_id: int | None = None  # null: the checkpoint's own
    outliers: OutlierPlanting = field(default_factory=OutlierPlanting)
    sampler: dict[str, Any] = MISSING  # a part: how answers are generated
    calib_text: str | None = None  # what calibration uses with this model; null: what the method says
    calib_samples: int | None = None
    calib_length: int | None = None


@dataclass
class MethodConfig:
    """A quantization method as a composition of parts; see `dqx.quant.method.Method`. Slots are empty by default."""

    _target_: str = "dqx.quant.method.Method"
    _convert_: str = "all"
    name: str = MISSING
    variant: str = ""  # tells settings of one method apart: as_published
    transforms: dict[str, Any] = field(default_factory=dict)  # named parts, applied in this order
    clip: Any = None  # a part; null: the whole range of a weight is represented
    rounding: Any = None  # a part; null: weights stay as they are
    rounding_by_role: dict[str, Any] = field(default_factory=dict)  # other parts for single roles; null: role untouched
    activation: Any = None  # a part; null: a weight-only method
    kv: Any = None  # a part; null: keys and values stay as they are
    corrections: dict[str, Any] = field(default_factory=dict)  # named parts
    token_weight: Any = None  # a part; null: all calibration tokens count alike
    order: list[Any] = field(default_factory=list)  # roles by steps, [[o], [q, k, v], ...]; []: as in the data flow
    quantizes: str = "weights"  # or weights_and_activations: what `bits=4` means with this method
    symmetric_weights: bool = False  # what bits choices take unless they say otherwise
    symmetric_activations: bool = False
    calib_text: str = "wikitext2"  # the calibration its authors or the study used: text, windows, tokens per window
    calib_samples: int = 128
    calib_length: int = 2048


#: Keys of a method that the groups bits and calib read, and no part of it.
READ_BY_OTHER_GROUPS = ("symmetric_weights", "symmetric_activations", "calib_text", "calib_samples", "calib_length")


@dataclass
class CalibConfig:
    """The text a method sees while it quantizes, and how much of it is masked (`dqx/data/masking.py`)."""

    masking: str = MISSING  # clean, mcs, random_t or trajectory: none, two random shares, the sampler's states
    text: str = MISSING  # a name (wikitext2, pile, c4, nano), a local .txt/.jsonl/.parquet file, or a dataset id
    config: str | None = None  # of a dataset id: its configuration, split and text field
    split: str | None = None
    field: str = "text"
    samples: int = MISSING  # windows
    length: int = MISSING  # tokens per window
    visible: float | None = None  # mcs, random_t: share of each window, from its start, that is never masked
    gen_length: int | None = None  # trajectory: tokens of the answer; what comes before them is the prompt
    block_length: int | None = None  # trajectory: tokens per block; Dream's sampler has none; null: one block
    steps: int | None = None  # trajectory: denoising steps over the whole answer; null: one per token
    rollout: bool = False  # trajectory: the model writes the answer, half a generation per window
    buckets: list[float] | None = None  # trajectory: shares of the windows, from masked answers to written ones


@dataclass
class StepsConfig:
    count: int | None = None  # denoising steps per answer; null: the task's own


@dataclass
class ExportConfig:
    format: str | None = None  # gguf, compressed-tensors, dequantized: a file in the run's folder; null: none
    dtype: str | None = None  # of what stays in 16 bit, where the format has a choice


@dataclass
class TaskConfig:
    limit: int | None = None  # documents per task; null: all
    suite: dict[str, TaskSpec] = field(default_factory=dict)


@dataclass
class OutlierConfig:
    """How activation outliers are measured; nothing else depends on it."""

    samples: int = 8  # calibration windows looked at; 0: not measured
    channel_ratio: float = 6.0  # a channel stands out at a token where |x| exceeds this many medians of the token
    massive_absolute: float = 100.0  # a value is massive where it exceeds this ...
    massive_relative: float = 1000.0  # ... and this many medians of the place where it is read
    steps: int = 16  # denoising steps looked at, spread evenly over all of them; 0: none
    surfaces: list[int] | None = None  # blocks of which |x| of one window is kept; null: first, middle and last


@dataclass
class FidelityConfig:
    """How predictions are compared with full precision (`dqx/diagnostics/fidelity.py`); nothing else depends on it."""

    samples: int = 4  # windows of the bundled text; 0: not measured
    length: int = 128  # tokens per window
    gen_length: int = 16  # tokens of the answers written after half a window
    steps: int = 16  # denoising steps of those answers looked at, spread evenly over all of them; 0: none


@dataclass
class MemoryConfig:
    """How much a run may take (`dqx/study/estimate/memory.py`). What it took is in the record.

    Results do not depend on it. A model that does not fit together with what quantizing it needs is quantized from
    disk, block by block.
    """

    ram_gb: float | None = None  # 10^9 bytes resident in each process; null: what the machine has
    gpu_gb: float | None = None  # 10^9 bytes on each GPU, where there is one; null: what it has


@dataclass
class WandbConfig:
    mode: str = "auto"  # online where a login exists, else offline; or online, offline, disabled
    project: str = "dqx"
    group: str | None = None  # null: one group per sweep
    entity: str | None = None
    tags: list[str] = field(default_factory=list)  # besides those of the run: model, method, bits, task
    documents: int = 50  # of each task, in the table of documents; those whose score changed come first
    figures: bool | None = None  # null: where the copy goes online, else later by `dqx mirror`
    checkpoint: bool = False  # true: the quantized model too, as an artifact


@dataclass
class Config:
    """One run."""

    seed: int = 0  # of calibration windows, sampling and Monte-Carlo masks
    data_root: str | None = None  # a folder with local copies of hub datasets: data_root/openai/gsm8k ...
    cache_dir: str = "runs/cache"  # what runs share: results, quantized models, ...; what a killed run had finished
    cache_max_gb: float | None = 100.0  # 10^9 bytes; what was not used for longest makes room; null: no limit
    keep_quantized: bool = True  # false: no quantized weights in the cache, only what was measured on them
    reuse: bool = True  # false: compute everything afresh, and keep it
    dispatch: str = (
        "auto"  # auto, shared, separate or a number: how runs use the GPUs of a machine (dqx/launch/dispatch.py)
    )
    verbose: int = 1  # 0: one line per run; 1: one line per run of a sweep, else its tables; 2: everything
    hang_minutes: float | None = 60.0  # a run in which nothing has moved for so long is ended; null: never
    backend: str = "simulated"  # or int8, fp8, auto (dqx/quant/backends), llama_cpp: what computes the quantized model
    parts: list[str] = field(default_factory=list)  # your own modules whose classes a `_target_` may name
    bundle: str | None = None  # the shared run that this one repeats and is compared with; `--from` sets it
    sweep: dict[str, str] = field(default_factory=dict)  # what a preset varies: {method: "rtn,gptq", bits: "w4,w3"}
    plan: bool = False  # true: list the runs and estimate their cost, load and run nothing (dqx/study/plan)
    plan_tflops: float | None = None  # plan for a machine of so many 10^12 operations per second; null: measured here
    plan_gpu: str | None = None  # plan for h100, a100, 4090, ... beside this machine (dqx/study/estimate/gpus.py)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    calib: CalibConfig = field(default_factory=CalibConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    likelihood: LikelihoodSettings = field(default_factory=LikelihoodSettings)
    outliers: OutlierConfig = field(default_factory=OutlierConfig)
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


#: Settings that say where things are and what they may take, not what is computed.
PLACES = (
    *("cache_dir", "cache_max_gb", "keep_quantized", "memory", "reuse", "wandb", "export"),
    *("plan", "plan_tflops", "plan_gpu", "bundle", "sweep", "dispatch", "hang_minutes", "verbose"),
)


@cache
def setting_names() -> tuple[str, ...]:
    """The settings by their whole names (`task.limit`), without those of parts, whose classes have them."""
    return tuple(_names_below(Config))


def _names_below(schema: type, path: str = "") -> Iterator[str]:
    for name, kind in get_type_hints(schema).items():
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _names_below(kind, f"{path}{name}.")
        elif not name.startswith("_"):
            yield f"{path}{name}"


def choices(group: str, folders: Sequence[str | Path] = (CONF_DIR,)) -> list[str]:
    """The choices of a group: the files of that folder. Numbers in names sort as numbers."""
    names = {p.stem for folder in folders for p in Path(folder, group).glob("*.yaml")}
    return sorted(names, key=natural)
