"""What a model is made of and what was made of it, as far as cards say and the viewer may know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hfmerge.hubserver.cards import base_models
from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.info import main_facts
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
    relation, names = _bases(hub, row)
    parents = [Relative(name, relation, _seen(hub, name, call)) for name in names[:_MOST]]
    children = []
    for other in hub.database.repos("model"):
        if other.rid != row.rid and hub.may_see(other, call.user):
            how, of = _bases(hub, other)
            if row.id.lower() in [name.lower() for name in of]:
                children.append(Relative(other.id, how, other))
                if len(children) == _MOST:
                    break
    return ModelTree(parents, children)


def _bases(hub: Hub, row: RepoRow) -> tuple[str, list[str]]:
    facts = main_facts(hub, row)
    return str(facts.get("baseModels", {}).get("relation") or "base"), base_models(facts.get("cardData") or {})


def _seen(hub: Hub, name: str, call: Call) -> RepoRow | None:
    found = hub.database.repo("model", name) if "/" in name else None
    return found if found is not None and hub.may_see(found, call.user) else None
