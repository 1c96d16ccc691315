"""What a model is made of and what was made of it, as far as cards say and the viewer may know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfmerge.hubserver.cards import base_models
from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.info import listed, tip_facts
from hfmerge.hubserver.wire import Call


_MOST = 50


@dataclass(frozen=True)
class Relative:
    """A model by the name a card gives it, with its repository if that is here and may be seen."""

    name: str
    relation: str
    row: RepoRow | None


@dataclass(frozen=True)
class ModelTree:
    """The neighbours of a model."""

    parents: Sequence[Relative]
    children: Sequence[Relative]


def model_tree(hub: Hub, row: RepoRow, call: Call) -> ModelTree:
    """The tree of a model; of anything else an empty one."""
    if row.kind != "model":
        return ModelTree([], [])
    relation, names = _bases(tip_facts(hub, row).fields)
    parents = [Relative(name, relation, _seen(hub, name, call)) for name in names[:_MOST]]
    others = [other for other in hub.database.repos("model") if hub.may_see(other, call.user)]
    found = listed(hub, "model", others)
    children = []
    for other in others:
        how, of = _bases(found[other.rid][1]) if other.rid in found else ("", [])
        if other.rid != row.rid and row.id.lower() in [name.lower() for name in of]:
            children.append(Relative(other.id, how, other))
    return ModelTree(parents, children[:_MOST])


def _bases(fields: Mapping[str, Any]) -> tuple[str, list[str]]:
    """How a model comes from others, and from which, as its card says."""
    return str(fields.get("baseModels", {}).get("relation") or "base"), base_models(fields.get("cardData") or {})


def _seen(hub: Hub, name: str, call: Call) -> RepoRow | None:
    found = hub.database.repo("model", name) if "/" in name else None
    return found if found is not None and hub.may_see(found, call.user) else None
