"""One look for every picture that the project draws: sizes, colours, axes, and a file that is the same every time.

Pictures are drawn by matplotlib's Agg, without a display and without the global state of pyplot.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from villa_ds.errors import ConfigError
from villa_ds.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart with any kind of colour vision, and in print; black is left to text.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, GRID = "#222222", "#666666", "#DDDDDD"
DPI = 150
PANEL = (6.4, 4.2)  # inches of one panel: 960 x 630 pixels
_COLOURS = 128  # of a drawing with some lines in some colours
_TITLE = 0.6  # inches for the title, and for each line below it
_LINE = 0.2

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a picture is the same on every machine
    "font.size": 10.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 10.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def picture(
    path: Path, title: str, subtitle: str = "", panels: int = 1, columns: int | None = None
) -> "Iterator[Sequence[Axes]]":
    """Axes side by side to draw on, so many of them in a row as `columns` says (default: all).

    Written as a PNG to `path` when the block ends without an error. Without a title there is no room for one.

    ConfigError if matplotlib is missing.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415  # takes a second, and is an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
        from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415
        from matplotlib.rcsetup import cycler  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(f"pictures need the package {error.name}: pip install 'villa_ds[plots]'") from None
    with mpl.rc_context():
        mpl.rcdefaults()  # not what a matplotlibrc of this machine says
        for name, value in _STYLE.items():
            mpl.rcParams[name] = value  # type: ignore[index]  # newer stubs list all names
        mpl.rcParams["axes.prop_cycle"] = cycler(color=PALETTE)
        above = _TITLE + _LINE * len(subtitle.splitlines()) if title else 0.0
        across = min(columns or panels, panels)
        down = -(-panels // across)
        width, height = PANEL[0] * across, PANEL[1] * down + above
        layout = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.98 - above / height), wspace=0.04, hspace=0.06)
        figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
        left = 0.2 / width
        figure.text(left, 1 - 0.2 / height, title, fontsize=14, fontweight="bold", va="top")
        figure.text(left, 1 - 0.52 / height, subtitle, fontsize=9.5, color=MUTED, va="top", linespacing=1.4)
        found = figure.subplots(down, across, squeeze=False).ravel()
        for empty in found[panels:]:
            empty.set_visible(False)
        yield tuple(found[:panels])
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})  # no version in the file
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data.getvalue())


def fewer_colours(path: Path) -> None:
    """Write a PNG once more, in a palette: of a drawing hardly a difference to see, and a third of the size."""
    with Image.open(path) as drawn:
        small = drawn.convert("RGB").quantize(
            _COLOURS,
            method=Image.Quantize.MAXCOVERAGE,
            dither=Image.Dither.NONE,  # keeps the hue of rare colours
        )
    small.save(path, "PNG", optimize=True)


def thousands(axis: Any) -> None:
    """Whole numbers with separators on an axis, `axes.xaxis` or `axes.yaxis`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: PLC0415

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def mark(axes: "Axes", value: float, text: str, level: int, colour: str = INK) -> None:
    """A vertical line at `value` with a label at the top; `level` 0, 1, ... keeps near labels apart. Set xlim first."""
    low, high = axes.get_xlim()
    right = value > low + 0.75 * (high - low)  # the label goes to the line's other side, where there is room
    axes.axvline(value, color=colour, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        text,
        (value, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if right else 4, -4 - 14 * level),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        fontsize=9,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
    )
