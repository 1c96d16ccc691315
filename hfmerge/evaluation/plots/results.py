"""Pictures of `evaluate` and `continual`: score matrix, score over steps, sweep, norm drift, kept energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmerge.evaluation.plots.style import (
    COLOURS,
    MARKERS,
    canvas,
    heatmap,
    lines,
    save,
    short_names,
    shortened,
    title_of,
)


def draw_evaluation(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Models x tasks, as they were scored; lower-is-better metrics are left out, having no common scale."""
    shown = [j for j, task in enumerate(data["tasks"]) if task["metric"] != "perplexity"]
    if not shown:
        return []
    labels = [model["label"] for model in data["models"]]
    names = [data["tasks"][j]["name"] for j in shown]
    table = [[None if row[j] is None else row[j]["value"] for j in shown] for row in data["scores"]]
    return save(
        _scores(table, short_names(labels), names, "Score of every model on every task"), folder, "accuracy_matrix"
    )


def draw_continual(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Everything a continual experiment shows; returns the files."""
    models, variants = data["models"], data["variants"]
    tasks = [model["task"] for model in models]
    count = len(models)
    table = [[model[name]["value"] for model in models] for name in ("alone", "base")]
    table += [[_mean(_final(one, i)) for i in range(count)] for one in variants]
    rows = ["alone", "base", *(one["label"] for one in variants)]
    written = save(_scores(table, rows, tasks, "Score on every task after the last step"), folder, "accuracy_matrix")
    steps = range(1, count + 1)
    if count > 1:
        shown = _fewer(variants)
        for field, name, title, up in (
            ("accuracy", "accuracy_over_steps", "Score on the tasks seen so far", "ACC"),
            ("drift", "norm_drift", "Norm of the merged change", "of the models' mean norm"),
        ):
            series = {one["label"]: [_mean(_over(one, t, field)) for t in range(count)] for one in shown}
            spread = {one["label"]: [_range(_over(one, t, field)) for t in range(count)] for one in shown}
            across = "models merged" + ("; shade: all orders" if data["settings"]["orders"] > 1 else "")
            figure, axes = lines(steps, series, title=title, across=across, up=up, spread=spread)
            axes.set_xticks(list(steps))
            if field == "drift":
                axes.set_ylim(bottom=0.0)
            written += save(figure, folder, name)
    written += _sweep(variants, folder)
    if count > 2:
        written += _similarity(variants, folder)
    cleared = [one for one in variants if one["inspection"]["interference"]]
    if cleared and count > 1:
        order = cleared[0]["inspection"]["order"]
        kept = [
            [None if (x := one["inspection"]["interference"][i]) is None else 100 * (1 - x) for i in order]
            for one in cleared
        ]
        figure = heatmap(
            kept, [one["label"] for one in cleared], [tasks[i] for i in order],
            title="Energy that OPCM keeps, in order of arrival", form=".0f",
            span=(min(50.0, *map(_least, kept)), 100.0), legend="% of the squared norm",
        )  # fmt: skip
        written += save(figure, folder, "kept_energy")
    return written


def _sweep(variants: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Score, and interference with norm, against the one number that was varied, if that is what was done."""
    paths = {path for one in variants for path in one["varied"]}
    if len(paths) != 1 or len(variants) < 3:
        return []
    path = paths.pop()
    try:
        values = [float(one["varied"][path]) for one in variants]
    except (KeyError, ValueError):
        return []
    ranked = [one for _, one in sorted(zip(values, variants, strict=True), key=lambda pair: pair[0])]
    values = sorted(values)
    name = path.rpartition(".")[2]
    series, spread = {}, {}
    for field, title in (("accuracy", "ACC"), ("normalised_accuracy", "normalised ACC")):
        numbers = [one["summary"][field] for one in ranked]
        series[title] = [number["mean"] for number in numbers]
        if all(number["std"] is not None for number in numbers):
            spread[title] = [(n["mean"] - n["std"], n["mean"] + n["std"]) for n in numbers]
    across = f"{name}; shade: one standard deviation over orders" if spread else name
    figure, _ = lines(values, series, title=f"Final score against {name}", across=across, up="score", spread=spread)
    written = save(figure, folder, "sweep")
    shares = [[x for x in one["inspection"]["interference"] or () if x is not None] for one in ranked]
    if all(len(found) > 1 for found in shares):
        series = {
            "cleared of later models": [sum(found) / (len(found) - 1) for found in shares],
            "norm / mean norm": [one["summary"]["drift"]["mean"] for one in ranked],
            "forgetting": [one["summary"]["forgetting"]["mean"] for one in ranked],
        }
        title = f"Interference, norm and forgetting against {name}"
        figure, axes = lines(values, series, title=title, across=name, up="share")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        written += save(figure, folder, "sweep_interference")
    return written


def _similarity(variants: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Cosine of two models against what the arrival of one costs the other."""
    figure, axes = canvas(5.6, 3.6)
    for i, one in enumerate(_fewer(variants)):
        pairs = one["similarity"]["pairs"]
        found = one["similarity"]["spearman"]
        label = one["label"] if found is None else f"{one['label']} (rho {found:+.2f})"
        cosines, drops = [pair["cosine"] for pair in pairs], [pair["drop"] for pair in pairs]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.scatter(cosines, drops, s=22, color=colour, marker=marker, alpha=0.8, label=shortened(label))
    axes.axhline(0.0, color="#999999", linewidth=0.8)
    axes.set_xlabel("cosine of the two task vectors")
    axes.set_ylabel("drop of the earlier task's score")
    axes.grid(axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    title_of(figure, "Similarity of two models and damage by the later one")
    return save(figure, folder, "similarity_against_drop")


def _scores(table: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], title: str) -> Any:
    return heatmap(table, rows, columns, title=title, span=(0.0, 1.0), legend="score")


def _fewer(variants: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """As many variants as colours tell apart, evenly chosen."""
    most = 10
    step = -(-len(variants) // most)
    return variants[::step]


def _final(variant: Mapping[str, Any], model: int) -> list[float]:
    return [order["steps"][-1]["scores"][str(model)]["value"] for order in variant["orders"]]


def _over(variant: Mapping[str, Any], step: int, field: str) -> list[float]:
    found = [order["steps"][step][field] for order in variant["orders"]]
    return [value for value in found if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _range(values: Sequence[float]) -> tuple[float, float]:
    return (min(values), max(values)) if values else (float("nan"), float("nan"))


def _least(row: Sequence[float | None]) -> float:
    return min((value for value in row if value is not None), default=100.0)
