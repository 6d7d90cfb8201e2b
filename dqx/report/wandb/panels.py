"""The panels that a team looks at: defined once, so that everybody sees the same view of a project's runs.

`dqx mirror RUNS --workspace` saves them as a view of the project, by the package wandb-workspaces (`dqx[workspace]`).
Whoever has not got it makes them by hand from the table in README.md. A panel over a key that a run has not logged
stays empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dqx.models.architecture import Architecture
from dqx.record.folder import SIDES

VIEW = "dqx"
COLUMNS = ("average_bits", "accuracy/average", "delta/average", "delta_low/average", "delta_high/average", "seconds")


@dataclass(frozen=True)
class Panel:
    """One panel: its kind, the keys it shows, and for plots the key of its horizontal axis."""

    kind: Literal["scatter", "bars", "lines", "table", "images"]
    keys: tuple[str, ...]
    x: str | None = None


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "What quantization cost": (
        Panel("scatter", ("accuracy/average",), x="average_bits"),
        Panel("scatter", ("delta/average",), x="average_bits"),
        Panel("bars", ("seconds",)),
        Panel("bars", ("memory/ram_gb",)),
        Panel("table", ("deltas",)),
    ),
    "Denoising": (
        *(Panel("lines", (f"by_step/{key}",), x="denoising_step") for key in ("divergence", "commit_flips", "sqnr_db")),
        Panel("lines", ("by_mask_ratio/divergence",), x="mask_ratio"),
        Panel("images", ("figures/divergence_by_step", "figures/sqnr")),
    ),
    "Depth": (
        Panel("lines", ("by_block/sqnr_db",), x="block"),
        *(
            Panel("lines", tuple(f"by_block/abs_max/{side}/{site}" for side in SIDES), x="block")
            for site in Architecture.sites
        ),
    ),
    "Outliers": (
        Panel("images", ("figures/channel_maxima", "figures/outliers_by_class", "figures/outliers_by_step")),
        Panel("table", ("outliers",)),
    ),
    "Documents": (Panel("table", ("documents",)),),
}


def workspace(entity: str, project: str) -> Any:
    """The view as wandb-workspaces has it; `save()` writes it to W&B. Raises ImportError without the package."""
    from wandb_workspaces import workspaces

    drawn = {name: [_drawn(panel) for panel in panels] for name, panels in SECTIONS.items()}
    sections = [workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in drawn.items()]
    runs = workspaces.RunsetSettings(pinned_columns=[f"summary:{key}" for key in COLUMNS])
    return workspaces.Workspace(entity=entity, project=project, name=VIEW, sections=sections, runset_settings=runs)


def save(entity: str | None, project: str) -> str:
    """Save the view to a project of W&B, as a new one. Returns its address; raises what W&B raises."""
    import wandb

    return str(workspace(entity or str(wandb.Api().default_entity), project).save().url)


def _drawn(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2

    keys: list[Any] = list(panel.keys)
    match panel.kind:
        case "scatter":
            return v2.ScatterPlot(x=panel.x, y=keys[0], title=keys[0])
        case "bars":
            return v2.BarPlot(metrics=keys, title=keys[0])
        case "lines":
            return v2.LinePlot(x=panel.x, y=keys, title=keys[0])
        case "table":
            return v2.WeavePanelSummaryTable(table_name=keys[0])
        case "images":
            return v2.MediaBrowser(media_keys=keys)
