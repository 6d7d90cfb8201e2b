"""What can be wrong with a run, as far as it can be told without reading a weight.

Each part of the project judges its own settings (`Method.problems`, `Sampler.problems`, `task_problems`,
`calib_problems`, `inspect`); this module asks them, and adds the checks that need two groups at once.
`dqx.study.experiment` tells all of it together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from dqx.common.devices import DTYPES
from dqx.common.names import did_you_mean
from dqx.config.schema import Config, WandbConfig
from dqx.data.calibration import calib_problems
from dqx.data.masking import masking_problems
from dqx.diffusion.rollout import schedule
from dqx.diffusion.samplers import Sampler
from dqx.evaluate.problems import task_problems
from dqx.formats.bits import UNQUANTIZED
from dqx.models.architecture import Architecture
from dqx.models.checkpoint import PACKAGED, Checkpoint
from dqx.models.family import families, family_of
from dqx.models.tokenizer import chat_template_problem, tokenizer_problem
from dqx.quant.backends.choice import AUTO, BACKENDS, SIMULATED, backend_problems
from dqx.quant.method import Method
from dqx.study.cache.owned import cache_problem
from dqx.study.engine import LLAMA_CPP

WANDB_MODES = ("auto", "online", "offline", "disabled")
WANDB_RESERVED = "/\\#?%:"  # characters that W&B lets no project's name have
WANDB_LENGTHS = {"project": 128, "tags": 64}  # characters at the most
ABOVE_ZERO = ("model.outliers.gain", "outliers.channel_ratio", "outliers.massive_absolute", "outliers.massive_relative")


def setting_problems(config: Config) -> list[str]:
    """Numbers and names that no run can have."""
    empty = ["model.sampler is empty; choose a model, or set its _target_"] if not config.model.sampler else []
    return [*_number_problems(config), *_name_problems(config), *_wandb_problems(config.wandb), *empty]


def data_problems(config: Config, method: Method | None, sampler: Sampler | None) -> list[str]:
    """What is wrong with the tasks and the calibration text; method and sampler are None where they are wrong too."""
    told = task_problems(
        config.task.suite,
        data_root=config.data_root,
        steps=config.steps.count if (config.steps.count or 0) > 0 else None,  # else told by `setting_problems`
        sampler=sampler,
        limit=config.task.limit,
        chat=config.model.chat,
        likelihood=config.likelihood,
    )
    fidelity = config.fidelity
    if sampler is not None and sampler.stores_final and fidelity.samples > 0 and fidelity.gen_length > 0:
        length = fidelity.gen_length
        steps = sampler.steps_for(length, schedule(length, config.steps.count))
        wrong = sampler.problems(length, sampler.block_length(None), steps)
        told += [p if p.startswith("sampler.") else f"fidelity.gen_length={length}: {p}" for p in wrong]
    told = [f"model.{p}" if p.startswith("sampler.") else p for p in told]
    if method is None or method.needs_data or config.outliers.samples > 0:
        told += calib_problems(config.calib, config.data_root) + masking_problems(config.calib, sampler)
    if method is not None and sampler is not None and "mean" in method.streams():
        told += _mean_problems(config, method, sampler)
    if method is not None and method.weighs_by("committed") and config.calib.masking != "trajectory":
        told.append(
            f"calib={config.calib.masking} has no steps of a sampler, but method.token_weight weighs calibration "
            "tokens by the step at which they are written; write calib=trajectory, or "
            "method.token_weight=mask_state or confidence"
        )
    elif method is not None and method.token_weight is not None and config.calib.masking == "clean":
        told.append(
            "calib=clean masks no token, so method.token_weight, which tells masked tokens from visible ones, does "
            "nothing; calibrate on masked text (calib=mcs, random_t or trajectory), or write method.token_weight=null"
        )
    return told


def _mean_problems(config: Config, method: Method, sampler: Sampler) -> list[str]:
    """A mean over calibration windows that are passes of unequal numbers."""
    if config.calib.masking != "trajectory" or not sampler.stores_final:
        return []
    unequal = {
        "calib.rollout": config.calib.rollout,
        "model.sampler.block_cache": getattr(sampler, "block_cache", False),
    }
    return [
        f"{setting}=true: windows of calib=trajectory differ in the passes that they show, and have no mean by "
        f"position, which method {method.name} looks at; write {setting}=false, or stream=quantized in the part that "
        "has stream=mean (method.transforms.rotate.stream=quantized)"
        for setting, on in unequal.items()
        if on
    ]


def reuse_problems(config: Config, method: Method | None, sampler: Sampler | None) -> list[str]:
    """A rounding of what a sampler's cache stores, where nothing is stored; one that a way of storing cannot have."""
    kv = None if method is None else method.kv
    if sampler is None or kv is None or min(config.bits.kv_widths()) == UNQUANTIZED:
        return []
    if sampler.stores_final and (problems := kv.final_problems("method.kv")):
        return problems
    if not kv.stored_only:
        return []
    rounds = "method.kv.when=commit rounds keys and values where a sampler's cache stores them"
    if not sampler.has_cache:
        cache = "cache=prefix" if hasattr(sampler, "cache") else "cache=prefix model.sampler=llada"
        return [f"{rounds}, but this sampler has none; write model.sampler.{cache}, or method.kv.when=always"]
    if all(spec.kind != "generation" for spec in config.task.suite.values()):
        return [
            f"{rounds}, but none of the tasks ({', '.join(config.task.suite)}) has answers written by it; add one that "
            "has (task=gsm8k), or write method.kv.when=always"
        ]
    return []


def reuse_notes(config: Config, method: Method) -> list[str]:
    """What a reader of results should know where only what a sampler's cache stores is rounded."""
    if method.kv is None or not method.kv.stored_only or min(config.bits.kv_widths()) == UNQUANTIZED:
        return []
    return [
        "method.kv.when=commit: keys and values are rounded where the sampler's cache stores them; calibration, "
        "likelihoods, outlier statistics and divergences are of forwards without a cache, which round none"
    ]


def backend_notes(config: Config, arch: Architecture, kernels: Mapping[str, str]) -> list[str]:
    """What `backend=auto` leaves simulated; `kernels` has the linears that a kernel computes."""
    if config.backend != AUTO:
        return []
    left = [f"blocks.{i}.{role}" for i in range(arch.n_blocks) for role in arch.roles]
    left = [name for name in left if name not in kernels]
    what = f"{len(left)} of {arch.n_blocks * len(arch.roles)} linears are {SIMULATED}, which no kernel takes here"
    return [f"backend=auto: {what}: {', '.join(left)}"] if left else []


def sampler_notes(config: Config, arch: Architecture, sampler: Sampler) -> list[str]:
    """What a reader of results should know of the sampler beside the model, and what cannot be measured with it."""
    notes = sampler.model_notes(arch)
    if sampler.stores_final and config.fidelity.samples:
        notes.append(
            f"answers are written by {sampler.name}, and no forward has all of their tokens: outliers are not looked "
            "at by denoising step, nor is it judged what a step would commit (commit_flips, commit_delays)"
        )
    return notes


def model_problems(config: Config, arch: Architecture, method: Method | None, sampler: Sampler | None) -> list[str]:
    """Numbers that a model is too small for, and a sampler and widths that do not go with it."""
    of_bits = method.problems(config.bits, arch) if method else []
    return [
        *(f"model.sampler: {problem}" for problem in (sampler.model_problems(arch) if sampler else ())),
        *_architecture_problems(config, arch),
        *of_bits,
        *(backend_problems(config.backend, method, config.bits, arch) if method and not of_bits else ()),
    ]


def is_local(path: str) -> bool:
    """Whether a checkpoint's path names no repository on the hub."""
    return not path or path.startswith(PACKAGED) or Path(path).expanduser().exists() or path.count("/") != 1


def _number_problems(config: Config) -> Iterator[str]:
    at_least = (
        ("seed", 0),
        ("calib.samples", 1),
        ("calib.length", 1),
        ("steps.count", 1),
        ("model.mask_token_id", 0),
        ("model.outliers.channels", 0),
        ("outliers.samples", 0),
        ("outliers.steps", 0),
        ("fidelity.samples", 0),
        ("fidelity.length", 16),
        ("fidelity.gen_length", 1),
        ("fidelity.steps", 0),
        ("wandb.documents", 0),
        ("verbose", 0),
    )
    if config.verbose > 2:
        yield f"verbose={config.verbose} must be 0 (one line per run), 1 or 2 (everything)"
    if config.seed >= 2**63:
        yield f"seed={config.seed} must be below 2^63"
    for key, low in at_least:
        value = attrgetter(key)(config)
        if value is not None and value < low:
            yield f"{key}={value} must be {low} or more"
    if config.cache_max_gb is not None and not config.cache_max_gb >= 0:
        yield f"cache_max_gb={config.cache_max_gb} must be 0 or more, or null for no limit"
    if config.hang_minutes is not None and not config.hang_minutes > 0:
        yield f"hang_minutes={config.hang_minutes:g} must be above 0, or null for no limit"
    for key in ABOVE_ZERO:
        number = attrgetter(key)(config)
        if not (number > 0 and math.isfinite(number)):
            yield f"{key}={number} must be a number above 0"
    for key in ("memory.ram_gb", "memory.gpu_gb"):
        limit = attrgetter(key)(config)
        if limit is not None and not (limit > 0 and math.isfinite(limit)):
            yield f"{key}={limit} must be a number above 0, or null for what the machine has"


def _name_problems(config: Config) -> Iterator[str]:
    if problem := cache_problem(Path(config.cache_dir)):
        yield f"cache_dir={config.cache_dir} cannot be a cache: {problem}"
    for key in ("model.path", "data_root", "calib.text"):
        text = attrgetter(key)(config)
        if text is not None and not text.strip():
            yield f"{key} is empty" + ("; write null for the hub" if key == "data_root" else "")
    one_of: dict[str, Sequence[str]] = {"model.family": tuple(families()), "model.dtype": DTYPES}
    one_of |= {"wandb.mode": WANDB_MODES, "backend": (*BACKENDS, LLAMA_CPP)}
    for key, known in one_of.items():
        value = attrgetter(key)(config)
        if value not in known:
            yield f"{key}={value} is unknown; {did_you_mean(value, known)}"
    if Path(config.cache_dir).exists() and not Path(config.cache_dir).is_dir():
        yield f"cache_dir={config.cache_dir} is a file; give a folder, it is made where it does not exist"


def _wandb_problems(wandb: WandbConfig) -> Iterator[str]:
    """Names that W&B would refuse when the run is finished."""
    project = wandb.project
    for key, name in (("project", project), ("entity", wandb.entity or "")):
        team, slash, rest = name.partition("/")
        if slash and team and rest and not set(rest) & set(WANDB_RESERVED):
            yield f"wandb.{key}={name} names a team and a project; write wandb.entity={team} wandb.project={rest}"
            return
    reserved = [character for character in WANDB_RESERVED if character in project]
    if reserved:
        plain = re.sub(f"[{re.escape(WANDB_RESERVED)}]", "-", project)
        yield f"wandb.project={project} has a {reserved[0]}, which W&B allows in no project; write for example {plain}"
    if not 0 < len(project) <= WANDB_LENGTHS["project"]:
        yield f"wandb.project has {len(project)} characters; W&B takes 1 to {WANDB_LENGTHS['project']}"
    for tag in wandb.tags:
        if not 0 < len(tag) <= WANDB_LENGTHS["tags"]:
            yield f"wandb.tags: {tag!r} has {len(tag)} characters; W&B takes 1 to {WANDB_LENGTHS['tags']}"


def checkpoint_problems(config: Config, checkpoint: Checkpoint) -> Iterator[str]:
    """What the folder is not or does not have: another family, no tokenizer, no chat template."""
    model, arch = config.model, checkpoint.arch
    if model.family in families() and arch.family != model.family:
        yield (
            f"model.family={model.family}, but {checkpoint.folder / 'config.json'} is of family {arch.family}; "
            f"choose a model of that family, for example model={family_of(arch.family).example or 'NAME'} "
            f"model.path={model.path}"
        )
    missing = tokenizer_problem(checkpoint.folder)
    if missing:
        yield missing
    elif model.chat and (problem := chat_template_problem(checkpoint.folder)):
        yield f"model.chat=true, but {problem}; set model.chat=false for a base model"


def _architecture_problems(config: Config, arch: Architecture) -> Iterator[str]:
    """Numbers that the model is too small for."""
    model = config.model
    if model.mask_token_id is not None and model.mask_token_id >= arch.vocab_size:
        yield f"model.mask_token_id={model.mask_token_id} lies outside the vocabulary of {arch.vocab_size}"
    if config.calib.length > arch.max_length:
        yield (
            f"calib.length={config.calib.length} is longer than the model's {arch.max_length} positions; "
            f"choose {arch.max_length} or less"
        )
    fidelity = config.fidelity
    positions = max(fidelity.length, fidelity.length // 2 + fidelity.gen_length)
    if fidelity.samples > 0 and positions > arch.max_length:
        yield (
            f"fidelity.length={fidelity.length} and fidelity.gen_length={fidelity.gen_length} take {positions} "
            f"positions, more than the model's {arch.max_length}; choose less, or fidelity.samples=0"
        )
    for name, spec in config.task.suite.items():
        if spec.kind == "text" and spec.length is not None and spec.length >= arch.max_length:
            yield (
                f"task.suite.{name}.length={spec.length} and a start token are more than the model's "
                f"{arch.max_length} positions; choose {arch.max_length - 1} or less"
            )
        if spec.kind == "generation" and (spec.gen_length or 0) >= arch.max_length:
            yield (
                f"task.suite.{name}.gen_length={spec.gen_length} leaves no room for a prompt in the model's "
                f"{arch.max_length} positions; choose {arch.max_length - 1} or less"
            )
    channels = min(arch.hidden_size, arch.mlp_size)
    if model.outliers.channels > channels:
        yield f"model.outliers.channels={model.outliers.channels} is more than the model's {channels} channels"
    absent = [block for block in config.outliers.surfaces or () if not 0 <= block < arch.n_blocks]
    if absent:
        yield (
            f"outliers.surfaces={config.outliers.surfaces} names blocks that the model has not: "
            f"{', '.join(map(str, absent))}; it has 0 to {arch.n_blocks - 1}"
        )
