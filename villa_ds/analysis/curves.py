"""Training curves of several runs from their metrics.jsonl: faint steps, a weighted mean over them, phases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.errors import ConfigError
from villa_ds.pictures import MUTED, PALETTE, fewer_colours, mark, picture, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPAN = 40  # the mean's span is one part in so many of a run's steps
_STEADY = ("learning rate", "text perturbation", "region perturbation")  # drawn as they are
_WIDEST = 2.7
_STYLES = ("-", "--", ":", "-.")

Rows = Sequence[Mapping[str, Any]]  # of a metrics.jsonl, in order


@dataclass(frozen=True, slots=True)
class Series:
    """One quantity of one run."""

    run: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    span: float  # optimizer steps

    @property
    def smoothed(self) -> NDArray[np.float64]:
        """The line that is drawn."""
        return smooth(self.steps, self.values, self.span)


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity of all runs that report it."""

    name: str  # such as "mlm loss"
    unit: str
    series: tuple[Series, ...]
    phases: tuple[tuple[int, str], ...]  # (first step, name) of phases after the first


def smooth(steps: NDArray[np.int64], values: NDArray[np.float64], span: float) -> NDArray[np.float64]:
    """Mean of the values around each, weighted by exp(-distance in steps / span); `steps` ascend, with gaps or not."""
    before, weight_before = _decayed(steps, values, span)
    after, weight_after = _decayed(-steps[::-1], values[::-1], span)
    smoothed: NDArray[np.float64] = (before + after[::-1] - values) / (weight_before + weight_after[::-1] - 1)
    return smoothed


def _decayed(
    steps: NDArray[np.int64], values: NDArray[np.float64], span: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At each value the weighted sum of it and those before, and the sum of their weights."""
    sums, weights = np.array(values), np.ones(len(values))
    kept = np.exp(-np.diff(steps) / span)
    for place in range(1, len(values)):
        sums[place] += kept[place - 1] * sums[place - 1]
        weights[place] += kept[place - 1] * weights[place - 1]
    return sums, weights


def panels_of(runs: Mapping[str, Rows]) -> list[Panel]:
    """Loss by objective, learning rate, gradient norm; of an adversary its divergence and perturbation norms.

    What no run reports has no panel; values that are not finite were stored as null and are left out.
    """
    objectives = dict.fromkeys(str(row["objective"]) for rows in runs.values() for row in rows)
    wanted: list[tuple[str, str, Callable[[Mapping[str, Any]], Any]]] = [
        (f"{name} loss", "mean of the micro-batches", _loss_of(name)) for name in objectives
    ]
    wanted += [
        ("learning rate", "", lambda row: row["lr"]),
        ("gradient norm", "before clipping", lambda row: row["grad_norm"]),
        ("divergence", "symmetric KL of clean and perturbed answers", lambda row: row["losses"].get("kl")),
        ("text perturbation", "mean L2 norm of a row", lambda row: row["losses"].get("text_perturbation_norm")),
        ("region perturbation", "mean L2 norm of a row", lambda row: row["losses"].get("regions_perturbation_norm")),
    ]
    panels = []
    for name, unit, value_of in wanted:
        series = [_series(run, rows, value_of) for run, rows in runs.items()]
        shown = tuple(each for each in series if len(each.steps))
        if shown:
            panels.append(Panel(name, unit, shown, _phases([runs[each.run] for each in shown])))
    return panels


def _loss_of(objective: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: row["losses"].get("loss") if row["objective"] == objective else None


def _series(run: str, rows: Rows, value_of: Callable[[Mapping[str, Any]], Any]) -> Series:
    found = [(row["step"], value) for row in rows if (value := value_of(row)) is not None]
    last = rows[-1]["step"] if rows else 1
    steps, values = np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64)
    return Series(run, steps, values, max(1.0, last / SPAN))


def _phases(runs: Sequence[Rows]) -> tuple[tuple[int, str], ...]:
    """Where a phase after the first begins, in any of the runs."""
    found: dict[tuple[int, str], None] = {}
    for rows in runs:
        for row, before in zip(rows[1:], rows, strict=False):
            if row["phase"] != before["phase"]:
                found[row["step"], str(row["phase"])] = None
    return tuple(sorted(found))


def draw_panel(axes: "Axes", panel: Panel, order: Sequence[str]) -> None:
    """One panel; a run's colour is its place in `order`."""
    for number, series in enumerate(panel.series):
        place = order.index(series.run)
        width = max(_WIDEST - 0.9 * number, _WIDEST / 3)  # narrower than the one below, which shows where they agree
        colour, style = PALETTE[place % len(PALETTE)], _STYLES[place // len(PALETTE) % len(_STYLES)]
        noisy = panel.name not in _STEADY
        if noisy:
            axes.plot(series.steps, series.values, color=colour, linewidth=0.7, alpha=0.22)
        line = series.smoothed if noisy else series.values
        axes.plot(series.steps, line, style, color=colour, linewidth=width, label=series.run)
    _limit(axes, panel)
    axes.set_title(panel.name, loc="left", fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    thousands(axes.xaxis)
    for level, (step, name) in enumerate(panel.phases):
        mark(axes, step, name, level, MUTED)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2, borderaxespad=0)  # below: lines may be anywhere


def _limit(axes: "Axes", panel: Panel) -> None:
    """All of the smooth lines, and all but the rarest of the raw ones."""
    values = np.concatenate([series.values for series in panel.series])
    low, high = np.quantile(values, [0.002, 0.995])
    is_loss = panel.name.endswith("loss")
    bottom = low if is_loss else min(0.0, low)
    margin = 0.08 * (high - bottom) or 0.08 * abs(high) or 1.0
    axes.set_ylim(bottom - margin if is_loss else bottom, high + 2 * margin)  # room for labels


def draw(runs: Mapping[str, Rows], path: Path, title: str = "Training curves") -> Path:
    """All panels of some runs in one PNG. ConfigError if no run has a step."""
    panels = panels_of(runs)
    if not panels:
        raise ConfigError(f"{', '.join(runs)}: no optimizer step in metrics.jsonl, nothing to draw")
    subtitle = f"faint: every optimizer step; line: mean, weighted over 1/{SPAN} of the run to either side"
    with picture(path, title, subtitle, panels=len(panels), columns=3) as all_axes:
        for axes, panel in zip(all_axes, panels, strict=True):
            draw_panel(axes, panel, list(runs))
    fewer_colours(path)
    return path


def draw_one(panel: Panel, order: Sequence[str], path: Path) -> Path:
    """One panel as a PNG."""
    with picture(path, "") as (axes,):
        draw_panel(axes, panel, order)
    fewer_colours(path)
    return path
