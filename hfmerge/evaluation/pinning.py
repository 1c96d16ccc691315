"""Suites with every data set and head fixed to the commit it has now, so that a later run asks the same."""

from __future__ import annotations

import dataclasses
from typing import Any

from hfmerge.evaluation.data import pin_data
from hfmerge.evaluation.suite import Suite, Task
from hfmerge.hub.download import pin
from hfmerge.hub.reference import parse_ref
from hfmerge.validation.strict_yaml import dump_yaml


def pinned_suite(suite: Suite) -> Suite:
    """The suite with commits; data sets that are files get their full path.

    Raises:
        HfMergeError: a data set or head that cannot be reached.
    """
    heads: dict[str, str] = {}
    return dataclasses.replace(suite, tasks=tuple(_pinned(suite, task, heads) for task in suite.tasks))


def suite_text(suite: Suite) -> str:
    """The suite as the YAML that `suite.load_suite` reads."""
    told: dict[str, Any] = {"description": suite.description} if suite.description else {}
    return dump_yaml({"name": suite.name, **told, "tasks": [task.to_dict() for task in suite.tasks]})


def _pinned(suite: Suite, task: Task, heads: dict[str, str]) -> Task:
    dataset, head = task.dataset, task.head
    if dataset:
        found = pin_data(task, suite.folder)
        dataset = f"{found.name}@{found.commit}" if found.path is None else str(found.path)
    if head is not None:
        if head not in heads:
            places = [pin(place) for place in parse_ref(head)]
            heads[head] = "+".join(f"{p.name}@{p.commit}" if p.commit else p.place.text for p in places)
        head = heads[head]
    return dataclasses.replace(task, dataset=dataset, head=head)
