"""Pictures of `inspect`: cosine of task vectors, norm and kept energy per layer, energy of leading directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmerge.evaluation.plots.style import heatmap, lines, save, short_names


def draw_inspection(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw everything an inspection shows; returns the files."""
    names = short_names(data["names"])
    written = []
    if len(names) > 1:
        written += save(_cosine(data["whole"]["cosine"], names), folder, "task_vector_cosine")
    layers = data["layers"]
    series = {name: [layer["norms"][i] for layer in layers] for i, name in enumerate(names)}
    figure, axes = _per_layer(layers, series, "Norm of the change per layer", "Frobenius norm")
    axes.set_ylim(bottom=0.0)
    written += save(figure, folder, "norm_per_layer")
    with_matrices = [layer for layer in layers if any(share is not None for share in layer["interference"])]
    if with_matrices and len(names) > 1:
        series = {name: [_kept(layer["interference"][i]) for layer in with_matrices] for i, name in enumerate(names)}
        title = f"Energy that OPCM keeps of each model (alpha {data['alpha']:g}, {data['variant']})"
        figure, _ = _per_layer(with_matrices, series, title, "% of the squared norm of matrices")
        written += save(figure, folder, "kept_energy_per_layer")
    if data["spectra"]:
        written += save(_spectra(data["spectra"], names), folder, "spectra")
    return written


def _kept(interference: float | None) -> float | None:
    return None if interference is None else 100.0 * (1.0 - interference)


def _cosine(cosine: Sequence[Sequence[float | None]], names: Sequence[str]) -> Any:
    """Without the diagonal, which is one, so that the colours serve what differs."""
    table = [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(cosine)]
    greatest = max((abs(value) for row in table for value in row if value is not None), default=0.0)
    span = max(0.1, greatest)
    title = "Cosine of task vectors"
    return heatmap(table, names, names, title=title, span=(-span, span), diverging=True, legend="cosine")


def _per_layer(
    layers: Sequence[Mapping[str, Any]], series: Mapping[str, Sequence[float | None]], title: str, unit: str
) -> tuple[Any, Any]:
    names = [layer["name"] for layer in layers]
    stems = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2].isdigit()}
    stem = stems.pop() if len(stems) == 1 else ""
    ticks = [name.removeprefix(f"{stem}.") if stem else name for name in names]
    width = min(12.0, max(5.6, 2.6 + 0.34 * len(layers)))
    across = stem or "layer"
    return lines(range(len(layers)), series, title=title, across=across, up=unit, ticks=ticks, width=width)


def _spectra(spectra: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """Share of the energy in the first r directions against r: mean over matrices, and the middle half of them."""
    import numpy as np

    tops = [int(top) for top in spectra[0]["energy"]]
    series: dict[str, list[float | None]] = {}
    spread = {}
    for i, name in enumerate(names):
        own = [one for one in spectra if one["model"] == i]
        if own:
            shares = 100.0 * np.array([[one["energy"][str(top)] for top in tops] for one in own])
            series[name] = [float(share) for share in shares.mean(0)]
            low, high = np.percentile(shares, [25, 75], axis=0)
            spread[name] = list(zip(low.tolist(), high.tolist(), strict=True))
    figure, axes = lines(
        tops,
        series,
        title="Energy of a change in its leading directions",
        across="singular directions; mean over matrices, shade: middle half",
        up="% of the squared norm",
        spread=spread,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(tops, [str(top) for top in tops])
    axes.set_ylim(0.0, 100.0)
    return figure
