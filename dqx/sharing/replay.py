"""A bundle as the configuration of a run: `python launch.py --from BUNDLE [SETTING=VALUE ...]`.

The bundle's values stand in place of the config files, resolved, so that other files, or none of a team's, change
nothing. Single settings can be changed on top, also swept with `-m`; choices of a group cannot: they would be mixed
with the values of another choice, or go unnoticed, so they are refused. The name of the widths alone is computed
again, because it names what may be changed.

A replay is computed, not looked up: its `cache_dir` is a folder of its own below `runs/replays`, so that nothing that
the author's machine still has is taken for a result of this one, and a replay that was killed goes on. Whoever wants
to reuse what is there sets `cache_dir=runs/cache`; the comparison then says what was reused.

The configuration goes into Hydra's config store, which launchers hand to the processes that they start.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dqx.config.compose import literal
from dqx.config.schema import CONF_DIR, GROUPS, PLACES, ConfigProblems
from dqx.formats.bits import BitsConfig, label
from dqx.sharing import bundle

FLAG = "--from"
REPLAYS = "runs/replays"
NAME = "shared_run"  # of the configuration in Hydra's store
GROUP = re.compile(rf"[+~]*({'|'.join(GROUPS)})(/[\w/]+)?(@[\w.]+)?(=.*)?")
PARTS = "parts"  # the setting that names trusted modules; a bundle cannot set it
MEANINGS = {"data_root": "FOLDER_WITH_THE_DATASET_COPIES", "model.path": "FOLDER_OR_HUB_ID"}


def replayed(argv: Sequence[str]) -> list[str]:
    """The command line without `--from BUNDLE`, for Hydra with the bundle's configuration; as it is without it.

    Expects what `dqx.config.command_line.normalize` returns. Raises ConfigProblems for a bundle that cannot be used,
    for choices of groups, and for settings that must be given anew and are not.
    """
    at = next((i for i, a in enumerate(argv) if a == FLAG or a.startswith(f"{FLAG}=")), None)
    if at is None:
        return list(argv)
    path, rest = _take(argv, at)
    try:
        shared = bundle.read(Path(path).expanduser())
        config = configuration(shared)
    except bundle.BundleError as error:
        raise ConfigProblems([f"{FLAG} {path}: {error}"]) from error
    problems = [
        f"{a}: a shared run's choices are fixed; change single settings (bits.weight.bits=4, seed=1), "
        f"or start from the config files with {shared_command(shared)}"
        for a in rest
        if GROUP.fullmatch(a)
    ]
    missing = [key for key in shared.manifest["give_anew"] if not any(_sets(a, key) for a in rest)]
    if missing:
        anew = shlex.join(f"{key}={MEANINGS.get(key, 'FILE_OR_FOLDER')}" for key in missing)
        problems.append(
            f"this run has read local files that are not in the bundle: {', '.join(missing)}; "
            f"add them to the command: {anew}"
        )
    if (modules := config[PARTS]) and not any(_sets(a, PARTS) for a in rest):
        problems.append(
            f"this run has used parts of {', '.join(modules)}, which are not in the bundle; "
            f"if you have that code and trust it, add {shlex.quote(f'{PARTS}=[{chr(44).join(modules)}]')}"
        )
    if problems:
        raise ConfigProblems(problems)
    own = {"bundle": str(path), "cache_dir": own_cache(Path(path).expanduser())}
    ConfigStore.instance().store(name=NAME, node=settings(config) | own)
    return [f"--config-name={NAME}", *rest]


def configuration(shared: bundle.Bundle) -> dict[str, Any]:
    """The bundle's configuration. Raises BundleError where it is none, or sets what is no setting of a run."""
    config = bundle.plain_yaml("config.yaml", shared.members["config.yaml"])
    if not isinstance(config, dict) or not isinstance(config.get("bits"), dict):
        raise bundle.BundleError("config.yaml is no configuration of a run")
    foreign = [key for key in config if key in ("defaults", "hydra") or not isinstance(key, str)]
    if foreign:
        raise bundle.BundleError(f"config.yaml sets {foreign[0]}, which is no setting of a run")
    modules = config.setdefault(PARTS, [])
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise bundle.BundleError(f"config.yaml: {PARTS} is no list of modules")
    return config


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A bundle's configuration as a primary config of Hydra's.

    What it says of places and limits (`dqx.config.schema.PLACES`) and of trusted modules is left out.
    """
    main = yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"))
    ours = [entry for entry in main["defaults"] if isinstance(entry, dict) and str(*entry).startswith("override ")]
    taken = literal({key: value for key, value in config.items() if key not in (*PLACES, PARTS)})
    with suppress(OmegaConfBaseException):  # of another version of dqx: Hydra will name the key
        widths = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BitsConfig), taken["bits"]))
        if isinstance(widths, BitsConfig) and label(widths) == widths.name:
            taken["bits"]["name"] = "${bits_name:}"
    return {"defaults": ["schema", *ours, "_self_"], **taken, "hydra": main["hydra"]}


def own_cache(path: Path) -> str:
    """The folder of what replays of a bundle have computed, by the file's name and content."""
    digest = hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", path.name.removesuffix(bundle.SUFFIX))
    return f"{REPLAYS}/{name}-{digest}"


def shared_command(shared: bundle.Bundle) -> str:
    """The command of the run that was shared."""
    return str(shared.json("results.json").get("command") or "python launch.py ...")


def _take(argv: Sequence[str], at: int) -> tuple[str, list[str]]:
    """The bundle's path and the other arguments."""
    if argv[at].startswith(f"{FLAG}="):
        path, rest = argv[at].removeprefix(f"{FLAG}="), [*argv[:at], *argv[at + 1 :]]
    else:
        path, rest = "".join(argv[at + 1 : at + 2]), [*argv[:at], *argv[at + 2 :]]
    if not path:
        raise ConfigProblems([f"{FLAG} needs the file that `dqx share RUN` has written: {FLAG} RUN{bundle.SUFFIX}"])
    if any(a == FLAG or a.startswith(f"{FLAG}=") for a in rest):
        raise ConfigProblems([f"{FLAG} is given twice; a command runs one shared run again"])
    return path, rest


def _sets(argument: str, key: str) -> bool:
    return argument.lstrip("+").startswith(f"{key}=")
