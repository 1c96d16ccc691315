"""The numbers of a continual experiment as Markdown and CSV, from its JSON alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmerge.evaluation.results import markdown_table
from hfmerge.validation.quoting import Markdown, markdown


COLUMNS: Mapping[str, str] = {
    "accuracy": "ACC",
    "normalised_accuracy": "normalised",
    "backward_transfer": "BWT, /(T-1)",
    "backward_transfer_over_all": "BWT, /T",
    "forgetting": "forgetting",
    "forward_transfer": "FWT (GEM)",
    "learning_gap": "learning gap",
    "drift": "norm / mean norm",
}
"""Numbers of a whole order -> heading; the formulas are in `metrics`."""


def save_continual(data: Mapping[str, Any], folder: Path, stem: str = "continual") -> list[Path]:
    """Write `stem`.json, .md and .csv into a folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "md": to_markdown(data),
        "csv": to_csv(data),
    }
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"{stem}.{suffix}")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def to_markdown(data: Mapping[str, Any]) -> str:
    """All tables of an experiment."""
    settings, models, variants = data["settings"], data["models"], data["variants"]
    orders = f"{settings['orders']} order{'s' if settings['orders'] != 1 else ''} of arrival (seed {settings['seed']})"
    rows = {model["alone"]["n"] for model in models}
    shown = f"{min(rows)} to {max(rows)}" if len(rows) > 1 else f"{min(rows)}"
    base, suite = markdown(data["base"].partition("@")[0]), markdown(data["suite"]["name"])
    parts = [
        f"{len(models)} models on {base}, {orders}, suite {suite}, {shown} rows a task. "
        "Mean ± sample standard deviation over orders.",
        markdown_table("", list(COLUMNS.values()), _labels(variants), [_summary(one["summary"]) for one in variants]),
        "Score on every task after the last step, mean over orders:",
        _by_task(models, variants),
        "ACC on the tasks seen so far, mean over orders:",
        _by_step(variants, len(models)),
        "Cost of a step after the first, mean over steps and orders:",
        _costs(variants),
    ]
    if any(order["removals"] for one in variants for order in one["orders"]):
        how = "subtracted, which is approximate" if settings.get("mode") == "subtract" else "taken out again"
        parts += [f"Every model {how}, against the merge that never saw it:", _removals(models, variants)]
    if any(one["inspection"]["interference"] for one in variants):
        parts += [
            "Interference: share of each model's matrices that OPCM clears, in the first order of arrival:",
            _interference(models, variants),
        ]
    if len(models) > 2:
        title = (
            "Similarity and damage: cosine of two task vectors against what the arrival of the second costs the task "
            "of the first, mean over orders:"
        )
        parts += [title, _similarity(variants)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def to_csv(data: Mapping[str, Any]) -> str:
    """One line a number, for other programs: variant, order (from 1), step (from 1), model, task, quantity, value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("variant", "order", "step", "model", "task", "quantity", "value"))
    for line in _lines(data):
        writer.writerow(["" if value is None else value for value in line])
    return out.getvalue()


def _lines(data: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    models = data["models"]
    for model in models:
        for name in ("alone", "base"):
            yield name, None, None, model["name"], model["task"], model[name]["metric"], model[name]["value"]
    for variant in data["variants"]:
        label = variant["label"]
        for k, order in enumerate(variant["orders"], 1):
            for t, step in enumerate(order["steps"], 1):
                arrived = models[step["model"]]["name"]
                for i, score in step["scores"].items():
                    yield label, k, t, arrived, models[int(i)]["task"], score["metric"], score["value"]
                for name in ("accuracy", "norm", "drift", "seconds", "peak_bytes"):
                    yield label, k, t, arrived, None, name, step[name]
            for name, value in order["metrics"].items():
                yield label, k, None, None, None, name, value
            for removal in order["removals"]:
                for name in (
                    "identical",
                    "distance",
                    "retained_gap",
                    "residual",
                    "retained",
                    "removed_score",
                    "seconds",
                ):
                    yield label, k, None, removal["removed"], None, f"removal {name}", removal[name]


def _labels(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    return [one["label"] for one in variants]


def _summary(summary: Mapping[str, Any]) -> list[str]:
    return [spread(summary[name]) for name in COLUMNS]


def spread(number: Mapping[str, Any]) -> str:
    """Mean and deviation as tables show them."""
    if number["mean"] is None:
        return "-"
    return f"{number['mean']:.3f}" + ("" if number["std"] is None else f" ± {number['std']:.3f}")


def final_scores(variant: Mapping[str, Any], model: int) -> float:
    """Mean over orders of a model's score after the last step."""
    found = [order["steps"][-1]["scores"][str(model)]["value"] for order in variant["orders"]]
    return float(sum(found) / len(found))


def mean_over_orders(variant: Mapping[str, Any], step: int, name: str) -> float:
    """Mean over orders of a number of one step."""
    found = [order["steps"][step][name] for order in variant["orders"]]
    return float(sum(found) / len(found))


def _by_task(models: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [model["alone"]["value"], model["base"]["value"], *(final_scores(one, i) for one in variants)]
        for i, model in enumerate(models)
    ]
    rows.append([sum(column) / len(column) for column in zip(*rows, strict=True)])
    names = [*(model["task"] for model in models), Markdown("**mean**")]
    cells = [[f"{value:.3f}" for value in row] for row in rows]
    return markdown_table("task", ["alone", "base", *_labels(variants)], names, cells)


def _by_step(variants: Sequence[Mapping[str, Any]], count: int) -> str:
    cells = [[f"{mean_over_orders(one, t, 'accuracy'):.3f}" for t in range(count)] for one in variants]
    return markdown_table("models", [str(t + 1) for t in range(count)], _labels(variants), cells)


def _costs(variants: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for one in variants:
        steps = [step for order in one["orders"] for step in order["steps"][1:]]
        peaks = [step["peak_bytes"] for step in steps if step["peak_bytes"] is not None]
        seconds = f"{sum(step['seconds'] for step in steps) / len(steps):.1f}" if steps else "-"
        cells.append([seconds, f"{max(peaks) / 1e6:.0f}" if peaks else "-"])
    return markdown_table("", ["seconds", "peak memory of the process, MB"], _labels(variants), cells)


def _removals(models: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]]) -> str:
    names, cells = [], []
    base = {model["name"]: model["base"]["value"] for model in models}
    for one in variants:
        several = sum(bool(order["removals"]) for order in one["orders"]) > 1
        for k, order in enumerate(one["orders"], 1):
            for removal in order["removals"]:
                names.append(f"{one['label']}: {removal['removed']}" + (f", order {k}" if several else ""))
                cells.append(
                    [
                        "yes" if removal["identical"] else "no",
                        *(f"{removal[name]:.3g}" for name in ("distance", "retained_gap", "residual")),
                        *(f"{removal[name]:.3f}" for name in ("retained", "removed_score")),
                        f"{base.get(removal['removed'], float('nan')):.3f}",
                        f"{removal['seconds']:.1f}",
                    ]
                )
    columns = [
        "same bytes",
        "weight distance",
        "retained gap",
        "residual",
        "others",
        "removed task",
        "base there",
        "s",
    ]
    return markdown_table("removed", columns, names, cells)


def _interference(models: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]]) -> str:
    with_it = [one for one in variants if one["inspection"]["interference"]]
    order = with_it[0]["inspection"]["order"]
    cells = []
    for one in with_it:
        shares = [one["inspection"]["interference"][i] for i in order]
        cells.append(["-" if share is None else f"{share:.1%}" for share in shares])
    return markdown_table("", [models[i]["task"] for i in order], _labels(with_it), cells)


def _similarity(variants: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for one in variants:
        found, pairs = one["similarity"], one["similarity"]["pairs"]
        shown = [found["pearson"], found["spearman"]]
        drops = [pair["drop"] for pair in pairs]
        cells.append(
            [
                str(len(pairs)),
                *("-" if value is None else f"{value:+.2f}" for value in shown),
                f"{sum(drops) / len(drops):.3f}" if drops else "-",
                f"{max(drops):.3f}" if drops else "-",
            ]
        )
    columns = ["ordered pairs", "Pearson r", "Spearman rho", "mean drop", "largest drop"]
    return markdown_table("", columns, _labels(variants), cells)
