"""Identifies the work of a plan: everything that its bytes depend on. Only the same work may continue a killed run.

The number of processes and threads does not belong to the work: the bytes do not depend on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfmerge.checkpoint.model import Model, weight_files
from hfmerge.checkpoint.vocabulary import VOCABULARY_FILES
from hfmerge.engine.device import Device
from hfmerge.engine.environment import environment
from hfmerge.engine.plan import Plan
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.recipe.keys import jsonable, keys_of
from hfmerge.recipe.recipe import Recipe
from hfmerge.recipe.weights import stored


def work_of(plan: Plan, device: Device | None = None) -> dict[str, str]:
    """Part of the work, as a user would name it -> a digest of it.

    The files of a folder are known by size and by the times of their last changes: hashing them before every run would
    cost more than most interrupted runs.

    Args:
        device: what computes; None: the CPU.
    """
    method, recipe, prior = plan.method, plan.recipe, plan.prior
    entries = zip(plan.deltas, recipe.models, strict=True)
    models = [[_identity(delta.source), stored(entry.weight)] for delta, entry in entries]
    leaving = [[_identity(d.source) for d in plan.leaving], [stored(weight) for weight in plan.leaving_weights]]
    facts: dict[str, Any] = {
        "environment": environment(device),
        "base": _identity(plan.base),
        "models": models,
        "method": [method.name, method.version, repr(method), plan.norm],
        # learned weights follow from all these values and from the `learn` section
        "learning": None if recipe.learn is None else recipe.learn.to_dict(),
        "settings": [jsonable(getattr(recipe, key.name)) for key in keys_of(Recipe) if key.declared.get("result")],
        "side files": plan.side_files,
        # streamed bytes are checked at the end of the run that reads them
        "streaming": recipe.stream,
        "kept states": plan.keep,
        # the name of a state's file is its digest
        "state it continues from": prior and [prior.count, prior.path.name, prior.squared_norms, prior.held],
        "models that leave": [*leaving, plan.subtracted],
        "tensors": repr((plan.params, plan.vocabulary)),
    }  # fmt: skip
    return {name: sha256_bytes(canonical_json(value)) for name, value in facts.items()}


def _identity(source: Model) -> list[Any]:
    snapshot = source.snapshot
    under = _identity(source.beneath) if source.beneath is not None else None
    if snapshot.folder is None or snapshot.commit is not None:
        return [snapshot.name, snapshot.commit, under]
    names = dict.fromkeys([*weight_files(source), *(name for name in VOCABULARY_FILES if name in snapshot.files)])
    return [str(snapshot.folder), [[name, *_last_change(snapshot.folder / name)] for name in names], under]


def _last_change(path: Path) -> tuple[int, int, int]:
    """Size, and times of the last change of content and of status; a copy that keeps the former has its own latter."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
