"""How `conf/` and the command line become a `Config`.

from dqx.config.compose import compose, resolve
config = resolve(compose(["method=gptq", "bits=4"]))
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dqx.common.names import approximating, approximations, method_label
from dqx.common.parts import build_part, part_problems, trust
from dqx.config.command_line import normalize
from dqx.config.mistakes import did_you_mean_setting, explain
from dqx.config.schema import (
    CONF_DIR,
    GROUPS,
    READ_BY_OTHER_GROUPS,
    Config,
    ConfigProblems,
    MethodConfig,
    ModelConfig,
    choices,
    setting_names,
)
from dqx.evaluate.spec import TaskSpec
from dqx.formats.bits import label
from dqx.models.family import families, family_of

# ---- what the YAML files may compute -------------------------------------------------------------------------


def by_method(quantizes: str, weights: int, weights_and_activations: int) -> int:
    """One of two values, by what a method quantizes: `${by_method:${method.quantizes},128,-1}`."""
    values = {"weights": weights, "weights_and_activations": weights_and_activations}
    if quantizes not in values:
        raise ValueError(f"method.quantizes={quantizes} is unknown; it is one of {', '.join(values)}")
    return values[quantizes]


def by_trait(family: str, trait: str, yes: Any, no: Any) -> Any:
    """One of two values, by whether a family has the trait: `${by_trait:${model.family},awq_judges_block,yes,no}`.

    Raises ValueError for a family that is not known and a trait that none has.
    """
    traits = family_of(family).traits
    if all(trait not in other.traits for other in families().values()):
        raise ValueError(f"no family has the trait {trait}")
    return yes if trait in traits else no


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

    With what makes its sampler approximate, the masking, the number of steps and the backend where they are set.
    """
    model, name, variant, bits = (
        OmegaConf.select(_root_, key) for key in ("model.name", "method.name", "method.variant", "bits.name")
    )
    parts: list[str | None] = [model, method_label(name, variant), bits]
    parts += approximations(*approximating(OmegaConf.select(_root_, "model.sampler") or {}))
    masking, count = OmegaConf.select(_root_, "calib.masking"), OmegaConf.select(_root_, "steps.count")
    backend = OmegaConf.select(_root_, "backend")
    parts += [None if masking == "clean" else masking, f"{count}steps" if count else None]
    parts += [None if backend == "simulated" else backend]
    return "-".join(str(p) for p in parts if p is not None)


def group_choices(*, _root_: DictConfig) -> str:
    """The config groups with their choices, from every folder on the search path (for `--help`)."""
    folders = [s.path for s in _root_.hydra.runtime.config_sources if s.schema == "file"]
    wrapper = textwrap.TextWrapper(width=110, subsequent_indent=" " * 14, break_on_hyphens=False)
    return "\n".join(wrapper.fill(f"  {g:<11} {', '.join(choices(g, folders))}") for g in GROUPS) + "\n"


def console_level(*, _root_: DictConfig) -> str:
    """Which messages of a run reach the terminal, by `verbose`; run.log has all."""
    verbose = OmegaConf.select(_root_, "verbose")
    sweep = OmegaConf.select(_root_, "hydra.mode") == RunMode.MULTIRUN
    return "DEBUG" if verbose > 1 else "INFO" if verbose == 1 and not sweep else "WARNING"


RESOLVERS = (by_method, by_trait, first_set, half, bits_name, run_name, group_choices, console_level)
for _resolver in RESOLVERS:
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)


ConfigStore.instance().store(name="schema", node=Config)


# ---- from files to a Config ----------------------------------------------------------------------------------


def compose(overrides: Sequence[str] = (), folder: str | Path = CONF_DIR, *, with_hydra: bool = False) -> DictConfig:
    """What `dqx run OVERRIDES --cfg job` would show, for notebooks and tests; with Hydra's own part where asked for.

    Raises ConfigProblems for names and values that the configuration does not have.
    """
    outer = GlobalHydra.instance().hydra  # may be called from inside somebody's Hydra application
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(Path(folder).resolve()), version_base="1.3"):
            return hydra_compose("config", overrides=normalize(overrides), return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigProblems(explain(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def resolve(cfg: DictConfig) -> Config:
    """The typed configuration with every interpolation resolved; the modules it names as `parts` are trusted.

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
        raise ConfigProblems([*problems, *explain(error)]) from error
    assert isinstance(config, Config)
    trust(config.parts)
    return config


def restored(values: Mapping[str, Any]) -> Config:
    """The configuration of which `asdict` made plain values."""
    cfg = OmegaConf.merge(OmegaConf.structured(Config), literal(values))
    assert isinstance(cfg, DictConfig)
    return resolve(cfg)


def literal(value: Any) -> Any:
    """`value` with what OmegaConf would take for an interpolation escaped, and every backslash before it doubled."""
    if isinstance(value, Mapping):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


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
    node = as_part(part)
    problems = part_problems(node, where)
    if problems:
        raise ConfigProblems(problems)
    return build_part(node)


def as_part(part: MethodConfig | Mapping[str, Any]) -> dict[str, Any]:
    """A part as it is built: of a method, without the keys that only other groups read."""
    options = vars(part) if isinstance(part, MethodConfig) else part
    return {key: value for key, value in options.items() if key not in READ_BY_OTHER_GROUPS}


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
            near = did_you_mean_setting(path + key, known, setting_names())
            problems.append(f"{path}{key} is no setting, so nothing would read it; {near}")
        elif isinstance(node, DictConfig):
            problems += strangers(node, f"{path}{key}.")
    return problems
