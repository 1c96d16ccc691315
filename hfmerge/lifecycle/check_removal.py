"""Measures the effect of a removal on scores: before, after, of the base, and of a merge without the model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfmerge.engine.executor import run
from hfmerge.engine.options import DEFAULT, RunOptions
from hfmerge.engine.plan import Plan
from hfmerge.engine.ranks import Ranks
from hfmerge.errors import HfMergeError
from hfmerge.evaluation.evaluator import Evaluator, Settings
from hfmerge.evaluation.models import Subject
from hfmerge.evaluation.results import Matrix
from hfmerge.evaluation.suite import Suite, Task, load_suite
from hfmerge.evaluation.weight_distance import distance, relative, same_weights
from hfmerge.hub.download import fetch
from hfmerge.hub.reference import Snapshot
from hfmerge.ledger.entry import Material, material_reference
from hfmerge.ledger.repository import Merged, open_merged
from hfmerge.lifecycle.changes import plan_replay
from hfmerge.lifecycle.session import MergeResult


ROWS = ("base", "before", "after", "never merged")


@dataclass(frozen=True)
class Behaviour:
    """Scores and weights around a removal, and how near it comes to never having merged the models.

    Never merged, `theta_never`, is the merge of the others from their sources, with the same settings and in the same
    order. If the recipe learns weights, they are learned again for this merge. So a removal that keeps the old weights
    (`relearn: false`, or a subtraction) is compared with weights that were learned without the removed models.
    `a_i(theta)` is the score on task `i` with the head of its model. `identical`, `distance` and `residual` mean the
    same as in a continual experiment (`experiments.continual.metrics.Fidelity`).

    Attributes:
        matrix: rows `ROWS`, the tasks of the suite as columns.
        removed: tasks of the models that left: those whose head is theirs.
        identical: weights after the removal have the bytes of never merged.
        distance: `||theta_after - theta_never|| / ||theta_never - theta_0||`, Frobenius norms over all weights as they
            are stored, `theta_0` the base; 0 where the bytes are the same.
    """

    matrix: Matrix
    removed: tuple[str, ...]
    identical: bool
    distance: float

    @property
    def retained_gap(self) -> float:
        """The mean of `|a_i(theta_after) - a_i(theta_never)|` over the tasks `i` of models that stay."""
        others = [task.name for task in self.matrix.tasks if task.name not in self.removed]
        gaps = [abs(self._value("after", task) - self._value("never merged", task)) for task in others]
        return math.fsum(gaps) / len(gaps) if gaps else 0.0

    @property
    def residual(self) -> dict[str, float]:
        """Task `k` of a removed model -> `a_k(theta_after) - a_k(theta_never)`: 0 if nothing of the model is left."""
        return {task: self._value("after", task) - self._value("never merged", task) for task in self.removed}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "removed": list(self.removed),
            "identical": self.identical,
            "distance": self.distance,
            "retained_gap": self.retained_gap,
            "residual": self.residual,
            "matrix": self.matrix.to_dict(),
        }

    def _value(self, row: str, task: str) -> float:
        score = self.matrix.score(row, task)
        return math.nan if score is None else score.value


def check_removal(
    opened: Merged,
    names: Sequence[str],
    suite: Suite | str | Path,
    remove: Callable[[], MergeResult],
    settings: Settings | None = None,
    options: RunOptions = DEFAULT,
) -> tuple[MergeResult, Behaviour]:
    """Score a merge, take models out, score what is left, and merge the others from their sources beside it.

    Args:
        opened: the merge before the removal.
        names: names of the models that are removed.
        suite: its tasks name their heads (`head`), since the merge loses the heads of the removed models.
        remove: function that removes the models.
        settings: settings of the evaluation.
        options: options for the merge without the models, the same as those of `remove`.

    Raises:
        HfMergeError: no task of the suite is a removed model's; or what evaluating and merging raise.
    """
    suite = load_suite(suite) if not isinstance(suite, Suite) else suite
    last = opened.last
    removed_models = [last.models[last.find(name)] for name in names]
    owners = {task.name: _owner(task, last.models) for task in suite.tasks}
    removed = tuple(task for task, owner in owners.items() if owner in removed_models)
    if not removed:
        raise HfMergeError(
            f"suite {suite.name}: no task says `head: {removed_models[0].name}`, so it cannot tell what leaves with "
            "that model."
        )
    heads = {task: material_reference(owner, opened.refs) for task, owner in owners.items() if owner is not None}
    evaluator = Evaluator(suite, settings, heads=heads, progress=True)
    rows = {"base": material_reference(last.base, opened.refs), "before": _where(opened)}
    subjects = [_called(evaluator.open(ref), label) for label, ref in rows.items()]
    # scored now: a folder is about to be replaced
    first = evaluator.matrix(subjects)
    result = remove()
    after = result.folder or (f"{result.pushed.repo_id}@{result.pushed.commit}" if result.pushed else None)
    if after is None:
        raise HfMergeError("a pull request cannot be scored; name an output folder as well.")
    with tempfile.TemporaryDirectory(prefix="hfmerge-never-") as folder:
        left = open_merged(str(after), _folders(opened, result), opened.consent)
        outcome = run(_never(left, options.device), Path(folder), options=replace(options, resume=None, notify=None))
        second = evaluator.matrix(
            [_called(evaluator.open(after), "after"), _called(evaluator.open(folder), "never merged")]
        )
        identical = same_weights(outcome.products, result.entry.products)
        apart = 0.0 if identical else relative(_apart(left.snapshot, Path(folder)), outcome.merged_norm)
    matrix = replace(
        first,
        models=(*first.models, *second.models),
        scores=(*first.scores, *second.scores),
        notes=(*first.notes, *second.notes),
    )
    return result, Behaviour(matrix, removed, identical, apart)


def _never(left: Merged, device: str | None) -> Plan:
    """The merge of the models that stay, as if the others had never been there."""
    plan = plan_replay(left, never=True)
    if plan.recipe.learn is None:
        return plan
    from hfmerge.learning.learn import learn

    # each model has replay rows of its own; keep those of the models that stay
    return learn(plan, Ranks(), opened=left, device=device)[0]


def _apart(after: Snapshot, never: Path) -> float:
    """Frobenius norm of the difference of the weights."""
    places = {fetch(after, path.name).parent for path in sorted(never.glob("*.safetensors"))}
    return distance(never, places.pop())


def _owner(task: Task, models: Sequence[Material]) -> Material | None:
    """The model of the merge whose head a task uses, pinned as it was merged."""
    head = (task.head or "").partition("@")[0]
    return next((m for m in models if head in (m.name, m.alias) or (m.digest and m.name == Path(head).name)), None)


def _called(subject: Subject, label: str) -> Subject:
    subject.info = replace(subject.info, label=label)
    return subject


def _where(opened: Merged) -> str:
    snapshot = opened.snapshot
    return str(snapshot.folder) if snapshot.folder is not None else f"{snapshot.name}@{snapshot.commit}"


def _folders(opened: Merged, result: MergeResult) -> dict[str, str]:
    """Name of every folder that is still merged -> where it lies, which a result on the Hub does not say."""
    present = {identity for m in (result.entry.base, *result.entry.models) for identity in (m.identity, m.beneath)}
    return {i.rpartition("@sha256:")[0]: path for i, path in opened.refs.items() if i in present}
