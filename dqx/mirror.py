"""The record of a run in Weights & Biases. results.json is the record; this is a copy of it, and it may fail.

One W&B run per dqx run, made from the finished `Record`: config under `cfg` and `choices` (a sweep parameter named
like a key of ours would overwrite it at the top level), summary, delta table, outlier table, histograms of |x| per
site. Whatever goes wrong (no package, no network, a full disk) becomes a warning and a line in results.json.
"""

from __future__ import annotations

import logging
import math
import netrc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import numpy as np

from dqx.deltas import headline
from dqx.outliers import SITES, OutlierStats
from dqx.store import Record, jsonable

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
MODES = ("auto", *get_args(Mode))
DEFAULTS: dict[str, Any] = {"mode": "auto", "project": "dqx", "group": None, "entity": None, "tags": []}
INIT_TIMEOUT = 20.0  # seconds for the server to answer
FINISH_TIMEOUT = 60.0  # seconds for the upload; what is missing then stays on disk for `wandb sync`
FILE_HEADER = 7  # bytes of a W&B file that holds nothing yet
OUTLIER_COLUMNS = (
    "model", "block", "site", "abs_max", "median", "p99", "p999", "p9999", "kurtosis", "max_over_median",
    "outlier_channels", "massive_values", "massive_tokens", "massive_token_share", "relative_values",
    "relative_token_share", "top_channel", "top_sequence", "top_position", "top_token_id",
)  # fmt: skip
DELTA_COLUMNS = (
    "name", "kind", "category", "metric", "n", "full_precision", "quantized", "delta", "low", "high",
    "relative_drop", "level", "lost", "gained", "bootstrap_low", "bootstrap_high", "p_value", "p_adjusted",
    "resolvable", "verdict",
)  # fmt: skip


def log(record: Record, folder: str | Path, settings: Any = None, group: str | None = None) -> dict[str, Any]:
    """Copy `record` to W&B and say what became of it: the `mirror` entry of results.json. Never raises.

    `folder` is the run folder (W&B's files go below it), `settings` the `wandb` section of a config (None: of the
    record's), `group` the sweep's name where they have none. Online, a server that does not answer makes the copy
    offline.
    """
    config = {"cfg": jsonable(record.config), "choices": record.choices}
    config |= {"checkpoint": {"fingerprint": record.model.get("fingerprint")}}
    config |= {"environment": jsonable(record.environment)}
    settings = record.config.get("wandb") if settings is None else settings
    return _copied(Path(folder), settings, group, config, lambda run: _fill(run, record))


def skip(config: Mapping[str, Any], folder: str | Path, settings: Any, reason: str) -> dict[str, Any]:
    """Say in W&B that a run of one of its sweeps cannot be: `reason` as `skipped` in the summary. Never raises."""
    return _copied(Path(folder), settings, None, {"cfg": config}, lambda run: run.summary.update({"skipped": reason}))


def _copied(
    folder: Path, settings: Any, group: str | None, config: dict[str, Any], fill: Callable[[Any], None]
) -> dict[str, Any]:
    """Start a W&B run, let `fill` put in what it holds, and say what became of it."""
    try:
        wanted = DEFAULTS | (jsonable(settings) or {})
        wanted["group"] = wanted["group"] or group
        mode = pick_mode(wanted["mode"])
        if mode == "disabled":
            return {"state": "disabled", "mode": mode}
        try:
            return _write(folder, wanted, mode, config, fill)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("W&B could not be reached (%s); the copy is written offline", _short(error))
            written = _write(folder, wanted, "offline", config, fill)
            return written | {"message": f"wanted online, but {_short(error)}"}
    except Exception as error:
        message = "the package wandb cannot be imported" if isinstance(error, ImportError) else _short(error)
        logger.warning("no copy of the run in W&B: %s; results.json has everything", message)
        return {"state": "failed", "message": message}


def pick_mode(wanted: str) -> Mode:
    """`auto` is W&B's own WANDB_MODE where set, else online where a login exists, else offline.

    Raises ValueError for an unknown mode.
    """
    if wanted not in MODES:
        raise ValueError(f"wandb.mode={wanted} is unknown; it is one of {', '.join(MODES)}")
    chosen = os.environ.get("WANDB_MODE", "") if wanted == "auto" else wanted
    for mode in get_args(Mode):
        if mode == chosen:
            return mode
    return "online" if has_login() else "offline"


def has_login() -> bool:
    """Whether W&B would find an API key: in the environment, or in netrc for its server. The key is not read out."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = {urlsplit(url).netloc for url in servers()}
    chosen = os.environ.get("NETRC")
    for path in [Path(chosen)] if chosen else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if hosts & set(netrc.netrc(path).hosts):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def servers() -> list[str]:
    """Addresses under which W&B would look for a login: the one that is set, else its own (wandb 0.31 changed it)."""
    chosen = os.environ.get("WANDB_BASE_URL")
    if chosen:
        return [chosen]
    import wandb

    return [wandb.Settings().base_url, "https://api.wandb.ai"]


def summary(record: Record) -> dict[str, Any]:
    """Flat numbers for W&B's table of runs: `delta/average`, `accuracy/nano_sums`, `average_bits` ..."""
    found: dict[str, Any] = {"average_bits": record.average_bits, "seconds": sum(record.timings.values())}
    found |= {f"seconds/{stage}": seconds for stage, seconds in record.timings.items()}
    for row in record.deltas:
        values: dict[str, Any] = {
            "accuracy": row.quantized,
            "accuracy_full_precision": row.full_precision,
            "delta": row.delta,
        }
        values |= {"delta_low": row.low, "delta_high": row.high, "relative_drop": row.relative_drop, "level": row.level}
        values |= {"p_adjusted": row.p_adjusted, "resolvable": row.resolvable, "verdict": row.verdict}
        if row.lower_is_better:  # nats per token
            values["nll"], values["nll_full_precision"] = values.pop("accuracy"), values.pop("accuracy_full_precision")
        found |= {f"{key}/{row.name}": value for key, value in values.items()}
    first = headline(record.deltas)
    if not first.lower_is_better:
        found.setdefault("delta/average", first.delta)  # of one task it is that task's: sweeps optimize it
    for measured in record.fidelity.get("by_mask_ratio", ()):
        found |= {f"fidelity/{key}/{measured['mask_ratio']:g}": measured[key] for key in ("divergence", "agreement")}
    if record.fidelity:
        found["fidelity/answers"] = record.fidelity["answers"]["agreement"]
    for side, stats in record.outliers.items():
        for site in SITES:
            worst = stats.worst(site)
            found[f"outliers/{side}/{site}/abs_max"] = worst.abs_max
            found[f"outliers/{side}/{site}/massive_values"] = sum(
                r.massive_values for r in stats.rows if r.site == site
            )
    return jsonable({key: value for key, value in found.items() if value is not None})


def outlier_rows(record: Record) -> list[list[Any]]:
    """The outlier table: one row per model, block and site, by OUTLIER_COLUMNS."""
    rows = []
    for side, stats in record.outliers.items():
        for row in stats.rows:
            token = row.top_tokens[0]
            extra = {
                "model": side,
                "max_over_median": row.max_over_median,
                "top_channel": row.top_channels[0].channel,
                "top_sequence": token.sequence,
                "top_position": token.position,
                "top_token_id": token.token_id,
            }
            values = asdict(row) | extra
            rows.append([_number(values[column]) for column in OUTLIER_COLUMNS])
    return rows


def histogram(stats: OutlierStats, site: str) -> tuple[list[float], list[float]]:
    """Counts and edges of log2 |x| at a site, all blocks together, a bin per power of two; zeros left out."""
    counts: dict[int, float] = {}
    for row in stats.rows:
        if row.site == site:
            for edge, count in zip(row.histogram["edges"], row.histogram["counts"], strict=False):
                exponent = round(math.log2(edge))
                counts[exponent] = counts.get(exponent, 0.0) + count
    if not counts:
        return [0.0], [0.0, 1.0]
    exponents = range(min(counts), max(counts) + 1)
    return [counts.get(e, 0.0) for e in exponents], [float(e) for e in (*exponents, exponents[-1] + 1)]


def _write(
    folder: Path, settings: Mapping[str, Any], mode: Mode, config: dict[str, Any], fill: Callable[[Any], None]
) -> dict[str, Any]:
    import wandb

    where = folder / "wandb"
    where.mkdir(parents=True, exist_ok=True)  # else wandb silently writes to a temporary folder
    quiet = wandb.Settings(
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        host="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
    )
    with (
        _terminated_politely(),
        wandb.init(
            mode=mode,
            dir=str(folder),
            project=settings["project"],
            entity=settings["entity"],
            group=settings["group"],
            tags=list(settings["tags"]),
            name=folder.name,
            config=config,
            reinit="create_new",
            settings=quiet,
        ) as run,
    ):
        run.summary.update({"folder": str(folder)})
        fill(run)
        url = run.url if mode == "online" else None
        file = Path(run.settings.sync_file)
    _wait_until_written(file)
    return {"state": "written", "mode": mode, "folder": str(file.parent), "url": url}


def _fill(run: Any, record: Record) -> None:
    """Summary, tables and histograms."""
    import wandb

    run.summary.update(summary(record))
    logged: dict[str, Any] = {"deltas": wandb.Table(columns=list(DELTA_COLUMNS), data=_delta_rows(record))}
    if record.outliers:
        logged["outliers"] = wandb.Table(columns=list(OUTLIER_COLUMNS), data=outlier_rows(record))
    for side, stats in record.outliers.items():
        for site in SITES:
            counts, edges = histogram(stats, site)
            bars = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
            logged[f"log2_abs/{side}/{site}"] = bars
    run.log(logged)


def _wait_until_written(file: Path, at_most: float = 5.0) -> None:
    """W&B's writer, a process of its own, is still closing its file when `finish` returns: wait until it rests."""
    deadline, size, last = time.monotonic() + at_most, -1, 0
    while (size != last or size <= FILE_HEADER) and time.monotonic() < deadline:
        time.sleep(0.1)
        last, size = size, file.stat().st_size


def _delta_rows(record: Record) -> list[list[Any]]:
    return [[_number(getattr(row, column)) for column in DELTA_COLUMNS] for row in record.deltas]


def _number(value: Any) -> Any:
    """Table cells of one column need one type: what is no finite number is left empty."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _terminated_politely() -> Iterator[None]:
    """SIGTERM as SystemExit inside the block: W&B keeps its last rows only if the run is finished in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
