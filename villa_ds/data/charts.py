"""`villa-ds shards stat --plots`: the statistics of a shard set as pictures."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.statistics import Distribution, Statistics
from villa_ds.data.store import LocalStore
from villa_ds.data.stored import pieces_of
from villa_ds.pictures import MUTED, PALETTE, mark, picture, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BARS = 80  # at most, in a histogram
_NAMED_PIECES = 6  # of the commonest, in the picture of the vocabulary


def draw(statistics: Statistics, folder: str | Path) -> list[Path]:
    """Write PNG pictures into a folder; returns their paths. ConfigError without matplotlib."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        _lengths(statistics, folder / "text_lengths.png", "word pieces a text", "Text lengths", "texts"),
        _lengths(statistics, folder / "regions.png", "regions a group", "Regions per image group", "image groups"),
        _lengths(statistics, folder / "texts.png", "texts a group", "Texts per image group", "image groups"),
        _token_budget(statistics, folder / "token_budget.png"),
        _vocabulary(statistics, folder / "vocabulary.png"),
    ]
    return [*drawn, _labels(statistics, folder / "labels.png")] if statistics.labels is not None else drawn


def _lengths(statistics: Statistics, path: Path, quantity: str, title: str, counted: str) -> Path:
    found = statistics.lengths[quantity]
    subtitle = f"all {found.total:,} {counted} of {_name(statistics)}"
    with picture(path, title, subtitle) as (axes,):
        _bars(axes, found, PALETTE[0])
        axes.set_xlabel(f"{quantity} (special tokens not counted)" if quantity.endswith("text") else quantity)
        axes.set_ylabel(counted)
    return path


def _bars(axes: "Axes", found: Distribution, colour: str) -> None:
    """A histogram with median, 95th percentile and maximum."""
    values = np.flatnonzero(found.counts)
    low, high = int(values[0]), int(values[-1])
    width = -(-(high - low + 1) // _BARS)  # whole numbers in a bar
    edges = np.arange(low, high + width + 1, width)
    heights = np.add.reduceat(np.append(found.counts, np.zeros(width, np.int64)), np.minimum(edges[:-1], high))
    axes.bar(edges[:-1] + (width - 1) / 2, heights, width=width * 0.92, color=colour)
    axes.set_xlim(low - 0.5 - width, edges[-1] - 0.5 + width)
    axes.set_ylim(0, heights.max() * 1.3)  # room for the labels
    axes.grid(visible=False, axis="x")
    for level, (percent, name) in enumerate(((50, "median"), (95, "95th percentile"), (100, "largest"))):
        value = found.percentile(percent)
        mark(axes, value, f"{name} {value:,}", level)
    thousands(axes.xaxis)
    thousands(axes.yaxis)


def _token_budget(statistics: Statistics, path: Path) -> Path:
    found = statistics.lengths["joint length a pair"]
    subtitle = (
        f"all {found.total:,} pairs of {_name(statistics)}\n"
        f"micro-batches: {statistics.packed:,} of them, sorted and packed by length as a read window is in training"
    )
    with picture(path, "Joint lengths and the token budget", subtitle, panels=3) as (lengths, rows, padding):
        _bars(lengths, found, PALETTE[0])
        lengths.set_xlabel("joint length a pair: [CLS], word pieces, [SEP], regions")
        lengths.set_ylabel("pairs")
        budgets = [budget.tokens for budget in statistics.budgets]
        rows.plot(budgets, [budget.rows for budget in statistics.budgets], "o-", color=PALETTE[1])
        padding.plot(budgets, [100 * budget.padding for budget in statistics.budgets], "o-", color=PALETTE[2])
        padding.set_ylim(bottom=0)
        rows.set_yscale("log", base=2)
        thousands(rows.yaxis)
        for axes, what in ((rows, "rows a micro-batch, mean"), (padding, "padding, % of a micro-batch's positions")):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("token budget of a micro-batch (data.tokens)")
            axes.set_ylabel(what)
            axes.set_xticks(budgets)
            axes.minorticks_off()
            thousands(axes.xaxis)
    return path


def _vocabulary(statistics: Statistics, path: Path) -> Path:
    counts = statistics.pieces
    order = np.argsort(-counts, kind="stable")[: statistics.used_pieces]
    ranked = counts[order]
    subtitle = (
        f"{statistics.used_pieces:,} of {len(counts):,} pieces used, [UNK] {statistics.unknown:.2%}\n"
        f"{int(counts.sum()):,} pieces in {_sampled(statistics)}"
    )
    with picture(path, "Word pieces by rank", subtitle) as (axes,):
        ranks = np.arange(1, len(ranked) + 1)
        axes.loglog(ranks, ranked, "o-", markersize=3, linewidth=1.2, color=PALETTE[0])
        axes.set_xlabel("rank of the word piece (log scale)")
        axes.set_ylabel("occurrences (log scale)")
        axes.set_xlim(0.8, max(10, len(ranked) * 1.3))
        axes.set_ylim(0.7 if ranked[-1] < 10 else ranked[-1] / 3, ranked[0] * 2.5)
        pieces = pieces_of(statistics.manifest)
        named = [rank for rank in range(min(_NAMED_PIECES, len(ranked))) if pieces[order[rank]].isascii()]
        text = ", ".join(pieces[order[rank]] for rank in named)
        axes.text(0.03, 0.05, f"commonest: {text}", transform=axes.transAxes, fontsize=9, color=MUTED)
        thousands(axes.xaxis)
        thousands(axes.yaxis)
    return path


def _labels(statistics: Statistics, path: Path) -> Path:
    labels = statistics.labels
    if labels is None:
        raise ValueError("a set without labels has no picture of them")
    limit = math.log(statistics.manifest.detector_classes)
    regions = int(labels.entropy_counts.sum())
    subtitle = (
        f"{regions:,} regions in {_sampled(statistics)}\n"
        f"{statistics.manifest.detector_classes:,} classes, background included"
    )
    with picture(path, "Detector labels", subtitle, panels=2) as (entropy, background):
        _shares(entropy, labels.entropy_counts, limit, PALETTE[0])
        entropy.set_xlim(0, limit * 1.05)
        mark(entropy, labels.entropy, f"mean {labels.entropy:.2f}", 0)
        mark(entropy, limit, f"uniform {limit:.2f}", 1, MUTED)
        entropy.set_xlabel("entropy of a region's class distribution, nats")
        _shares(background, labels.background_counts, 1.0, PALETTE[1])
        background.set_xlim(0, 1)
        mark(background, labels.background, f"mean {labels.background:.2f}", 0)
        background.set_xlabel("probability of the background")
    return path


def _shares(axes: "Axes", counts: NDArray[np.int64], limit: float, colour: str) -> None:
    """A histogram of equal bins from 0 to `limit`, as per cent of the regions."""
    width = limit / len(counts)
    shares = 100 * counts / counts.sum()
    axes.bar((np.arange(len(counts)) + 0.5) * width, shares, width=width * 0.92, color=colour)
    axes.set_ylim(0, shares.max() * 1.2)
    axes.set_ylabel("regions, %")
    axes.grid(visible=False, axis="x")


def _sampled(statistics: Statistics) -> str:
    total = statistics.manifest.num_groups
    if statistics.sampled == total:
        return f"all {total:,} groups of {_name(statistics)}"
    return f"{statistics.sampled:,} of {total:,} groups of {_name(statistics)}, evenly spaced"


def _name(statistics: Statistics) -> str:
    store = statistics.manifest.store
    place = str(store.folder.resolve()) if isinstance(store, LocalStore) else str(store)
    return "/".join(place.split("/")[-2:])
