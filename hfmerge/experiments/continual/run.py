"""Continual merging, measured: models arrive one after another in several orders, and leave again one by one.

Every merge is made by the public verbs: `merge` for the first model, `add` with the carried state for each further
model, `unmerge` for each model that leaves. Each measurement (cell) is kept in one file, under a digest of everything
it depends on. So a killed run can be continued, and a larger experiment uses the cells of a smaller one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hfmerge import api
from hfmerge.engine.environment import environment
from hfmerge.engine.options import RunOptions
from hfmerge.engine.plan import Plan
from hfmerge.engine.planner import build_method
from hfmerge.errors import HeadError
from hfmerge.evaluation.data import pin_data
from hfmerge.evaluation.evaluator import Evaluator, Settings
from hfmerge.evaluation.inspection.inspection import public_name
from hfmerge.evaluation.results import Score
from hfmerge.evaluation.suite import Suite, load_suite
from hfmerge.evaluation.weight_distance import distance, relative, same_weights
from hfmerge.experiments.continual import metrics
from hfmerge.experiments.continual.config import Variant, arranged, check_variants, pair
from hfmerge.experiments.continual.config import orders as drawn_orders
from hfmerge.experiments.continual.measures import PeakMemory, model_identity, summed_up, values
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.ledger.repository import open_merged
from hfmerge.methods import registry
from hfmerge.recipe.recipe import Recipe
from hfmerge.recipe.weights import stored
from hfmerge.version import __version__


_SCHEMA = 1
"""Version of the JSON form, and of what a cell holds."""


@dataclass(frozen=True)
class Experiment:
    """The definition of an experiment.

    Attributes:
        variants: settings that are compared; all of the same base and models.
        suite: with a task for each model.
        orders: how many orders of arrival.
        seed: of the orders.
        settings: how tasks are run.
        removals: for which orders every model is also taken out again: "first", "all" or "none".
        mode: how it is taken out, "exact" or "subtract".
        tasks: task -> model, where the suite and the names do not tell.
    """

    variants: tuple[Variant, ...]
    suite: Suite
    orders: int = 10
    seed: int = 42
    settings: Settings = field(default_factory=Settings)
    removals: str = "first"
    mode: Literal["exact", "subtract"] = "exact"
    tasks: Mapping[str, str] | None = None


def run_continual(
    experiment: Experiment, folder: Path, *, notify: Callable[[str], object] | None = None
) -> dict[str, Any]:
    """Measure everything that is not measured yet; the result is JSON-able. `report` makes tables of it.

    Args:
        folder: for the cells, and for merges while they are needed.
        notify: told in one line what was just measured.

    Raises:
        HfMergeError: an error of merging or evaluating. Earlier measurements stay.
    """
    check_variants(experiment.variants)
    plan = api.plan(experiment.variants[0].recipe)
    sources = [delta.source for delta in plan.deltas]
    refs = [entry.model for entry in experiment.variants[0].recipe.models]
    names = [source.name for source in sources]
    tasks = pair(experiment.suite, [source.slug for source in sources], refs, dict(experiment.tasks or {}))
    suite = experiment.suite.select(tasks)
    owners = dict(zip(tasks, refs, strict=True))
    heads = {task.name: owners[task.name] for task in suite.tasks if task.classifies}
    evaluator = Evaluator(suite, experiment.settings, heads=heads)
    run = _Run(experiment, folder, plan, tasks, evaluator, notify or (lambda line: None))
    base = run.scores("the base", run.base, experiment.variants[0].recipe.base, range(len(refs)))
    alone: dict[int, Score] = {}
    for i, name in enumerate(names):
        alone |= run.scores(f"{name} alone", run.identities[i], refs[i], [i])
    arrivals = drawn_orders(len(refs), experiment.orders, experiment.seed)
    return {
        "kind": "continual",
        "schema": _SCHEMA,
        "suite": {"name": experiment.suite.name, "digest": experiment.suite.digest},
        "settings": {
            "orders": len(arrivals), "seed": experiment.seed, "limit": experiment.settings.limit,
            "sample_seed": experiment.settings.seed, "removals": experiment.removals, "mode": experiment.mode,
        },
        "base": public_name(plan.base),
        "models": [
            {
                "name": names[i], "pinned": public_name(source), "kind": source.kind, "task": tasks[i],
                "alone": alone[i].to_dict(), "base": base[i].to_dict(),
            }
            for i, source in enumerate(sources)
        ],
        "variants": [run.variant(variant, arrivals, base, alone) for variant in experiment.variants],
        "environment": environment(),
    }  # fmt: skip


class _Run:
    """One experiment under way: its cells, and the merge that stands in the work folder."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        plan: Plan,
        tasks: Sequence[str],
        evaluator: Evaluator,
        notify: Callable[[str], object],
    ):
        self.experiment, self.tasks, self.evaluator, self.notify = experiment, tasks, evaluator, notify
        self.cells, self.place = folder / "cells", folder / "merge"
        self.cells.mkdir(parents=True, exist_ok=True)
        # the same rows for all orders: they depend on the model alone
        self.options = RunOptions(rows=folder / "rows")
        self.identities = [model_identity(delta.source) for delta in plan.deltas]
        self.base = model_identity(plan.base)
        self.rows: dict[str, list[Any]] = {}
        self.standing: list[Any] | None = None
        self.left()

    def left(self) -> None:
        """Nothing of merges that were needed is left."""
        self.standing = None
        shutil.rmtree(self.place, ignore_errors=True)

    def _options(self, recipe: Recipe) -> RunOptions:
        """How the verbs run; they are allowed what the recipe of the user allows."""
        return replace(self.options, trust_remote_code=recipe.trust_remote_code, allow_pickle=recipe.allow_pickle)

    def variant(
        self,
        variant: Variant,
        arrivals: Sequence[tuple[int, ...]],
        base: Mapping[int, Score],
        alone: Mapping[int, Score],
    ) -> dict[str, Any]:
        """Everything about one setting."""
        found = []
        for k, order in enumerate(arrivals):
            steps = [self.step(variant, order, t) for t in range(len(order))]
            wanted = self.experiment.removals == "all" or (self.experiment.removals == "first" and k == 0)
            removals = [self.removal(variant, order, i) for i in order] if wanted and len(order) > 1 else []
            self.left()
            found.append(
                {"order": list(order), **summed_up(order, steps, values(base), values(alone)), "removals": removals}
            )
            acc = found[-1]["metrics"]["accuracy"]
            self.notify(f"{variant.label}: order {k + 1} of {len(arrivals)} done, ACC {acc:.3f}")
        numbers = found[0]["metrics"]
        inspection = self.inspection(variant, arrivals[0])
        rows = [[{int(i): s["value"] for i, s in step["scores"].items()} for step in one["steps"]] for one in found]
        pairs = metrics.drops(inspection["cosine"], arrivals, rows)
        points = [(pair.cosine, pair.drop) for pair in pairs]
        return {
            "label": variant.label,
            "varied": dict(variant.varied),
            "method": variant.recipe.method.to_dict(),
            "summary": {name: metrics.mean_and_deviation([one["metrics"][name] for one in found]) for name in numbers},
            "orders": found,
            "inspection": inspection,
            "similarity": {
                "pairs": [asdict(pair) for pair in pairs],
                "pearson": metrics.correlation(points),
                "spearman": metrics.correlation(metrics.ranked(points)),
            },
        }

    def scores(self, title: str, who: str, ref: str, tasks: Sequence[int]) -> dict[int, Score]:
        """Scores of a model that is no merge, one cell."""

        def work() -> dict[str, Any]:
            return {str(i): score.to_dict() for i, score in self._evaluate(ref, tasks).items()}

        key = ["scores", who, [[self.tasks[i], self.identities[i]] for i in tasks]]
        return {int(i): Score.from_dict(score) for i, score in self._cell(title, key, work).items()}

    def step(self, variant: Variant, order: Sequence[int], step: int) -> dict[str, Any]:
        """The arrival of one model: merge or add, then the tasks seen so far and the next one."""
        seen, upcoming = order[: step + 1], order[step + 1 : step + 2]

        def work() -> dict[str, Any]:
            options = self._options(variant.recipe)
            if step == 0:
                self.left()
                peak = PeakMemory()
                result = api.merge(arranged(variant.recipe, seen), output=self.place, options=options)
            else:
                self._stand_at(variant.recipe, order[:step])
                self.standing, peak = None, PeakMemory()
                result = api.add(self.place, [variant.recipe.models[order[step]]], options=options)
            most = peak.read()
            self.standing = self._merge_of(variant.recipe, seen)
            norms = [math.sqrt(model.squared_norm or 0.0) for model in result.entry.models]
            scores = self._evaluate(str(self.place), [*seen, *upcoming])
            return {
                "scores": {str(i): score.to_dict() for i, score in scores.items()},
                "norm": float(result.entry.scalars.merged_norm),
                "mean_norm": math.fsum(norms) / len(norms),
                "how": result.entry.how,
                "seconds": result.seconds["total"],
                "peak_bytes": most,
            }

        key = ["step", self._merge_of(variant.recipe, seen), [[self.tasks[i], i] for i in (*seen, *upcoming)]]
        return self._cell(f"{variant.label}: {len(seen)} models", key, work)

    def removal(self, variant: Variant, order: Sequence[int], removed: int) -> dict[str, Any]:
        """Take one model out of the whole merge, and compare with the merge that never saw it."""

        def work() -> dict[str, Any]:
            self._stand_at(variant.recipe, order)
            options = self._options(variant.recipe)
            name = open_merged(str(self.place)).last.models[order.index(removed)].name
            with tempfile.TemporaryDirectory(dir=self.place.parent) as folder:
                out, never = Path(folder) / "unmerged", Path(folder) / "never"
                result = api.unmerge(self.place, name, output=out, mode=self.experiment.mode, options=options)
                rest = arranged(variant.recipe, [i for i in order if i != removed])
                other = api.merge(rest, output=never, options=options)
                identical = same_weights(result.entry.products, other.entry.products)
                first = self._evaluate(str(out), order)
                second = first if identical else self._evaluate(str(never), order)
                norm = float(other.entry.scalars.merged_norm)
                apart = 0.0 if identical else relative(distance(out, never), norm)
            fidelity = metrics.fidelity(
                name, removed, values(first), values(second),
                identical=identical, distance=apart, seconds=result.seconds["total"],
            )  # fmt: skip
            return {**asdict(fidelity), "how": result.entry.how}

        key = ["removal", self._merge_of(variant.recipe, order), list(self.tasks), removed]
        key += [self.experiment.mode] if self.experiment.mode != "exact" else []
        return self._cell(f"{variant.label}: without {self.tasks[removed]}", key, work)

    def inspection(self, variant: Variant, order: Sequence[int]) -> dict[str, Any]:
        """Cosine of task vectors, and what OPCM clears of each model in this order; listed as in the recipe."""
        projects = build_method(variant.recipe).projection is not None

        def work() -> dict[str, Any]:
            whole = api.inspect(arranged(variant.recipe, order), spectral=projects).to_dict()["whole"]
            places = [list(order).index(i) for i in range(len(order))]
            return {
                "order": list(order),
                "cosine": [[whole["cosine"][i][j] for j in places] for i in places],
                "norms": [whole["norms"][i] for i in places],
                "interference": [whole["interference"][i] for i in places] if projects else None,
            }

        return self._cell(
            f"{variant.label}: inspection", ["inspection", self._merge_of(variant.recipe, order), list(order)], work
        )

    def _evaluate(self, ref: str, models: Iterable[int]) -> dict[int, Score]:
        """Scores on the tasks of some models, by the models' places in the recipe."""
        wanted = {self.tasks[i]: i for i in models}
        found = self.evaluator.score(ref, tasks=list(wanted))
        scores = {}
        for name, i in wanted.items():
            score = found[name]
            if score is None:
                raise HeadError(f"{ref}: has no head for {name}.")
            scores[i] = score
        return scores

    def _cell(self, title: str, key: Sequence[Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A cell from its file, or measured and put there in one rename."""
        settings = self.experiment.settings
        rows = [self.evaluator.pin(task).digest for task in self.evaluator.suite.tasks]
        about = [_SCHEMA, __version__, self.experiment.suite.digest, rows, settings.limit, settings.seed, *key]
        path = self.cells / f"{key[0]}-{sha256_bytes(canonical_json(about))[:24]}.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_bytes())
            return found
        start = time.monotonic()
        data = work()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
        self.notify(f"{title}, {time.monotonic() - start:.1f} s")
        return data

    def _merge_of(self, recipe: Recipe, order: Sequence[int]) -> list[Any]:
        """Everything that the merge of some models in an order depends on."""
        settings = recipe.to_dict()
        chosen = {key: settings[key] for key in ("method", "dtype", "include", "exclude", "vocabulary", "learn")}
        if recipe.learn is not None and recipe.learn.suite is not None:
            chosen["labelled"] = self._labelled(recipe.learn.suite)
        models = [[self.identities[i], stored(recipe.models[i].weight)] for i in order]
        return [chosen, registry()[recipe.method.name].version, self.base, models]

    def _stand_at(self, recipe: Recipe, order: Sequence[int]) -> None:
        """Have the merge of these models in the work folder; made anew where the steps to it were measured before."""
        wanted = self._merge_of(recipe, order)
        if self.standing != wanted:
            self.left()
            # learned weights depend on the way to them, all else on the models alone
            first = 1 if recipe.learn is not None else len(order)
            api.merge(arranged(recipe, order[:first]), output=self.place, options=self._options(recipe))
            for i in order[first:]:
                api.add(self.place, [recipe.models[i]], options=self._options(recipe))
            self.standing = wanted

    def _labelled(self, suite: str) -> list[Any]:
        """What a suite's rows are, for weights that are learned from them."""
        if suite not in self.rows:
            found = load_suite(suite)
            pins = [pin_data(task, found.folder).digest for task in found.tasks if task.classifies]
            self.rows[suite] = [found.digest, pins]
        return self.rows[suite]
