"""The configuration as types: what every key means, its default, and how `conf/` becomes a `Config`.

`conf/` says which choices exist, this module says what a choice may contain: Hydra checks every file and every
override against these classes. Parts (`method.rounding`, `model.sampler`, ...) stay plain mappings with a
`_target_`, so that a new part needs no change here; their options are checked when they are built (`dqx/checks.py`).

    from dqx.config import compose, resolve, validate
    config = resolve(compose(["method=gptq", "bits=4"]))
    problems = validate(config)

Nothing here imports torch, so that `--help` and tab completion answer at once.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec
from dqx.names import approximations, did_you_mean, method_label, natural
from dqx.parts import build_part, part_problems
from dqx.quant.bits import BitsConfig, label

CONF_DIR = Path(__file__).parent.parent / "conf"
GROUPS = ("model", "method", "bits", "calib", "task", "steps", "experiment")


class ConfigProblems(ValueError):
    """A configuration that cannot run: every problem found, each in plain words with its remedy."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(f"{i}. {p}" for i, p in enumerate(self.problems, 1)))


@dataclass
class OutlierPlanting:
    """Outlier channels planted in the finished network by a rescaling that leaves its function unchanged."""

    gain: float = 1.0  # factor on those channels; 1 plants nothing
    channels: int = 4  # how many channels per place


@dataclass
class ModelConfig:
    """Which checkpoint, in which precision, and how it samples."""

    name: str = MISSING
    family: str = MISSING  # llada or dream
    path: str = MISSING  # a folder, or a hub id; pkg://dqx/... lies inside this package
    revision: str | None = None  # of the hub repository
    dtype: str = "bfloat16"  # float32, bfloat16, float16, or auto: as stored
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
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
    quantizes: str = "weights"  # or weights_and_activations: what `bits=4` means with this method
    symmetric_weights: bool = False  # what bits choices take unless they say otherwise
    symmetric_activations: bool = False
    calib_text: str = "wikitext2"  # the calibration its authors or the study used: text, windows, tokens per window
    calib_samples: int = 128
    calib_length: int = 2048


@dataclass
class CalibConfig:
    """The text a method sees while it quantizes, and how much of it is masked (`dqx/masking.py`)."""

    masking: str = MISSING  # clean, mcs, random_t or trajectory: none, two random shares, the sampler's states
    text: str = MISSING  # a name (wikitext2, pile, nano), a local .txt/.jsonl/.parquet file, or a dataset id
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


@dataclass
class StepsConfig:
    count: int | None = None  # denoising steps per answer; null: the task's own


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
    """How predictions are compared with full precision (`dqx/fidelity.py`); nothing else depends on it."""

    samples: int = 4  # windows of the bundled text; 0: not measured
    length: int = 128  # tokens per window
    gen_length: int = 16  # tokens of the answers written after half a window
    steps: int = 16  # denoising steps of those answers looked at, spread evenly over all of them; 0: none


@dataclass
class MemoryConfig:
    """How much a run may take (`dqx/planning/memory.py`). What it took is in the record; results do not depend on it.

    A model that does not fit together with what quantizing it needs is quantized from disk, block by block.
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
    figures: bool = True  # false saves the seconds that drawing takes
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
    dispatch: str = "auto"  # auto, shared, separate or a number: how runs use the GPUs of a machine (dqx/dispatch.py)
    hang_minutes: float | None = 60.0  # a run in which nothing has moved for so long is ended; null: never
    bundle: str | None = None  # the shared run that this one repeats and is compared with; `--from` sets it
    sweep: dict[str, str] = field(default_factory=dict)  # what a preset varies: {method: "rtn,gptq", bits: "w4,w3"}
    plan: bool = False  # true: list the runs and estimate their cost, load and run nothing (dqx/planning)
    plan_tflops: float | None = None  # plan for a machine of so many 10^12 operations per second; null: measured here
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    calib: CalibConfig = field(default_factory=CalibConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    likelihood: LikelihoodSettings = field(default_factory=LikelihoodSettings)
    outliers: OutlierConfig = field(default_factory=OutlierConfig)
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


# ---- what the YAML files may compute -------------------------------------------------------------------------


def by_method(quantizes: str, weights: int, weights_and_activations: int) -> int:
    """One of two values, by what a method quantizes: `${by_method:${method.quantizes},128,-1}`."""
    values = {"weights": weights, "weights_and_activations": weights_and_activations}
    if quantizes not in values:
        raise ValueError(f"method.quantizes={quantizes} is unknown; it is one of {', '.join(values)}")
    return values[quantizes]


def by_family(family: str, llada: Any, dream: Any) -> Any:
    """One of two values, by the model's family: `${by_family:${model.family},block,sublayer}`."""
    values = {"llada": llada, "dream": dream}
    if family not in values:
        raise ValueError(f"model.family={family} is unknown; it is one of {', '.join(values)}")
    return values[family]


def first_set(*values: Any) -> Any:
    """The first value that is not null."""
    return next((v for v in values if v is not None), None)


def half(number: int) -> int:
    """Half of a number, rounded down."""
    return number // 2


def bits_name(*, _parent_: Any) -> str:
    """The name of the widths, formats and overrides it stands beside: `w4a16-down8`."""
    return label(_parent_)


def run_name(*, _root_: DictConfig) -> str:
    """A run's folder name, `nano_llada-gptq-w4a16`.

    With what makes its sampler approximate, the masking and the number of steps where they are set.
    """
    model, name, variant, bits = (
        OmegaConf.select(_root_, key) for key in ("model.name", "method.name", "method.variant", "bits.name")
    )
    parts: list[str | None] = [model, method_label(name, variant), bits]
    parts += approximations(*(OmegaConf.select(_root_, f"model.sampler.{key}") for key in ("threshold", "cache")))
    masking, count = OmegaConf.select(_root_, "calib.masking"), OmegaConf.select(_root_, "steps.count")
    parts += [None if masking == "clean" else masking, f"{count}steps" if count else None]
    return "-".join(str(p) for p in parts if p is not None)


def group_choices(*, _root_: DictConfig) -> str:
    """The config groups with their choices, from every folder on the search path (for `--help`)."""
    folders = [s.path for s in _root_.hydra.runtime.config_sources if s.schema == "file"]
    wrapper = textwrap.TextWrapper(width=110, subsequent_indent=" " * 14, break_on_hyphens=False)
    return "\n".join(wrapper.fill(f"  {g:<11} {', '.join(choices(g, folders))}") for g in GROUPS) + "\n"


def choices(group: str, folders: Sequence[str | Path] = (CONF_DIR,)) -> list[str]:
    """The choices of a group: the files of that folder. Numbers in names sort as numbers."""
    names = {p.stem for folder in folders for p in Path(folder, group).glob("*.yaml")}
    return sorted(names, key=natural)


RESOLVERS = (by_method, by_family, first_set, half, bits_name, run_name, group_choices)
for _resolver in RESOLVERS:
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)


ConfigStore.instance().store(name="schema", node=Config)


# ---- from files to a Config ----------------------------------------------------------------------------------


def compose(overrides: Sequence[str] = (), folder: str | Path = CONF_DIR) -> DictConfig:
    """What `python launch.py OVERRIDES --cfg job` would show, for notebooks and tests.

    Raises ConfigProblems for names and values that the configuration does not have.
    """
    from dqx.command_line import explain, normalize

    outer = GlobalHydra.instance().hydra  # may be called from inside somebody's Hydra application
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(Path(folder).resolve()), version_base="1.3"):
            return hydra_compose("config", overrides=normalize(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigProblems(explain(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def resolve(cfg: DictConfig) -> Config:
    """The typed configuration with every interpolation resolved.

    Raises ConfigProblems for keys without a place in the schema (`+model.nam=x` gets past Hydra), for values that
    are missing and for interpolations that fail.
    """
    problems = strangers(cfg)
    try:
        problems += [f"{key} is not set" for key in sorted(OmegaConf.missing_keys(cfg)) if not key.startswith("hydra")]
        if problems:
            raise ConfigProblems(problems)
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        from dqx.command_line import explain

        raise ConfigProblems([*problems, *explain(error)]) from error
    assert isinstance(config, Config)
    return config


def restored(values: Mapping[str, Any]) -> Config:
    """The configuration of which `asdict` made plain values."""
    cfg = OmegaConf.merge(OmegaConf.structured(Config), literal(values))
    assert isinstance(cfg, DictConfig)
    return resolve(cfg)


def literal(value: Any) -> Any:
    """`value` with what OmegaConf would take for an interpolation escaped."""
    if isinstance(value, Mapping):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def select(*, method: str, bits: str | int, model: ModelConfig | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a method at a width, by their names in `conf/`, for a model that is already there.

    fp16 has one width, so `bits` is not looked at.
    """
    cfg = compose([f"method={method}", *([] if method == "fp16" else [f"bits={bits}"]), *overrides])
    if model is not None:
        cfg.model = model
    return resolve(cfg)


def suite(tasks: Sequence[str]) -> dict[str, TaskSpec]:
    """The tasks of one or several choices of the task group."""
    return resolve(compose([f"task=[{','.join(tasks)}]"])).task.suite


def build(part: MethodConfig | Mapping[str, Any]) -> Any:
    """The `Method` of a method's configuration, or the object of any part. Raises ConfigProblems."""
    where = "method" if isinstance(part, MethodConfig) else "part"
    node = as_part(part) if isinstance(part, MethodConfig) else part
    problems = part_problems(node, where)
    if problems:
        raise ConfigProblems(problems)
    return build_part(node)


def as_part(method: MethodConfig) -> dict[str, Any]:
    """A method without the keys that only other groups read."""
    return {key: value for key, value in vars(method).items() if key not in ("calib_samples", "calib_length")}


def strangers(cfg: DictConfig, path: str = "") -> list[str]:
    """Keys that the schema does not have. `+key=value` adds such keys, and nothing would ever read them."""
    if cfg._is_none() or cfg._is_missing():
        return []
    schema = OmegaConf.get_type(cfg)
    known = [f.name for f in fields(schema)] if schema is not None and is_dataclass(schema) else None
    problems = []
    for key in map(str, cfg):
        node = cfg._get_node(key)
        if known is not None and key not in known:
            problems.append(f"{path}{key} is no setting, so nothing would read it; {did_you_mean(key, known)}")
        elif isinstance(node, DictConfig):
            problems += strangers(node, f"{path}{key}.")
    return problems


def validate(config: Config | DictConfig) -> list[str]:
    """Everything that is wrong with a run, as far as can be told without reading a weight; see `dqx.checks`."""
    from dqx.checks import problems

    return problems(config if isinstance(config, Config) else resolve(config))
