"""One style for every picture, and saving without a trace of when and where: the same numbers give the same file.

Figures are made without pyplot, so no window system is asked for and nothing global is kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.errors import HfMergeError
from hfmerge.validation.quoting import plain


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D31",
    "#5A5A5A",
    "#B22222",
    "#6A3D9A",
)
"""Colours that people with any kind of colour vision can tell apart: Okabe and Ito's without yellow, and some more."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a dollar sign in a model's name is a dollar sign
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "hfmerge",
    "svg.fonttype": "path",
}
MOST_NUMBERS = 14
"""Cells of a side up to which a heatmap's numbers are written into it."""
MOST_TICKS = 24
"""Places of an axis of lines that get a text."""
MOST_NAMES = 60
"""Rows, and columns, of a heatmap up to which each gets a text; and characters of a name."""
MOST_INCHES = 24.0
"""Of a side of a figure: one of four times as many takes gigabytes."""
MOST_PLACES = 2_000
"""Places of a line that are drawn, evenly chosen: there are not so many pixels."""


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """matplotlib's settings while figures are made and saved, and nothing of the user's own.

    Raises:
        HfMergeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise HfMergeError("pictures need matplotlib: pip install hfmerge[plots].") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one plot; inches, of which there are at most `MOST_INCHES` on a side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, MOST_INCHES), min(height, MOST_INCHES)), layout="constrained")
    return figure, figure.add_subplot()


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `name.png` and `name.svg`.

    Raises:
        HfMergeError: the folder cannot be written to.
    """
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    try:
        os.makedirs(folder, exist_ok=True)
        figure.savefig(paths[0], dpi=144, metadata={"Software": None})
        # places were found for the first file and serve the second
        figure.set_layout_engine("none")
        figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    except OSError as error:
        raise HfMergeError(f"{folder}: pictures cannot be written there ({error.strerror}).") from error
    return paths


def heatmap(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    span: tuple[float, float],
    diverging: bool = False,
    form: str = ".2f",
    legend: str = "",
) -> Figure:
    """Rows x columns of numbers as colours, and as numbers where there is room; None is left blank.

    Args:
        span: values of the first and last colour.
        diverging: white in the middle of `span`, else white at its beginning.
    """
    import numpy as np

    table = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    height, width = table.shape
    rows, columns = list(map(shortened, rows)), list(map(shortened, columns))
    longest = max(len(name) for name in rows)
    figure, axes = canvas(1.9 + 0.62 * width + 0.07 * longest, 1.5 + 0.36 * height + 0.05 * max(map(len, columns)))
    shown = axes.imshow(
        np.ma.masked_invalid(table),
        cmap="RdBu_r" if diverging else "YlGnBu",
        vmin=span[0],
        vmax=span[1],
        aspect="auto",
    )
    across, down = -(-width // MOST_NAMES), -(-height // MOST_NAMES)
    axes.set_xticks(range(0, width, across), columns[::across], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(0, height, down), rows[::down])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if max(height, width) <= MOST_NUMBERS:
        for i in range(height):
            for j in range(width):
                if not np.isnan(table[i, j]):
                    axes.text(
                        j, i, format(table[i, j], form), ha="center", va="center", color=_ink(shown, table[i, j])
                    )
    figure.colorbar(shown, ax=axes, label=legend, pad=0.02).outline.set_visible(False)
    title_of(figure, title)
    return figure


def lines(
    places: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    across: str,
    up: str,
    ticks: Sequence[str] | None = None,
    spread: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    width: float = 5.6,
) -> tuple[Figure, Axes]:
    """One line a series over common places; None leaves a gap.

    Args:
        across, up: what the axes show.
        ticks: text at the places; None: their numbers.
        spread: name of a series -> low and high at every place, shaded.
    """
    import numpy as np

    figure, axes = canvas(width, 3.4)
    every = -(-len(places) // MOST_PLACES)
    places = places[::every]
    for i, (name, values) in enumerate(list(series.items())[:MOST_NAMES]):
        colour = COLOURS[i % len(COLOURS)]
        shown = np.array([np.nan if value is None else value for value in values[::every]], dtype=float)
        axes.plot(places, shown, label=shortened(name), color=colour, marker=MARKERS[i % len(MARKERS)])
        if spread is not None and name in spread:
            low, high = np.array(spread[name][::every], dtype=float).T
            axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    step = max(1, len(places) // MOST_TICKS)
    names = [f"{place:g}" for place in places] if ticks is None else list(map(shortened, ticks[::every]))
    turned = any(len(name) > 5 for name in names)
    turn: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axes.set_xticks(list(places)[::step], names[::step], **turn)
    axes.set_xlabel(shortened(across))
    axes.set_ylabel(up)
    axes.grid(axis="y")
    if len(series) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    title_of(figure, title)
    return figure, axes


def title_of(figure: Figure, title: str) -> None:
    """A title at the figure's left edge, where long ones have room."""
    figure.suptitle(shortened(title, 2 * MOST_NAMES), x=0.01, ha="left", fontsize=10.0, fontweight="bold")


def shortened(name: str, most: int = MOST_NAMES) -> str:
    """A name of which there may be any number of characters, on one line."""
    text = plain(name)
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _ink(shown: Any, value: float) -> str:
    """Black or white, whichever can be read on a value's colour."""
    red, green, blue, _ = shown.cmap(shown.norm(value))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def short_names(names: Sequence[str]) -> list[str]:
    """Names without owner, and without the words that all of them begin with."""
    words = [name.replace("/", "--").rpartition("--")[2].replace("_", "-").split("-") for name in names]
    originals = [name.replace("/", "--").rpartition("--")[2] for name in names]
    shared = 0
    while len(names) > 1 and all(len(parts) > shared + 1 for parts in words):
        if len({tuple(parts[: shared + 1]) for parts in words}) > 1:
            break
        shared += 1
    start = sum(len(word) + 1 for word in words[0][:shared])
    found = [original[start:] for original in originals]
    return found if len({*found}) == len(found) else list(names)
