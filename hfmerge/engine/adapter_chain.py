"""Adapters that were trained on top of another adapter: alone, they would lose the change of the one beneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.schema import ADAPTER
from hfmerge.engine.named_base import folder_of_base, name_of_base
from hfmerge.validation.limits import JSON_BYTES
from hfmerge.validation.strict_json import read_json_file
from hfmerge.validation.values import show


CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Below:
    """What is to be said of the adapters beneath others.

    Attributes:
        problems: index of a model without which the adapter beneath it would be lost, and why.
        warnings: adapters beneath that the base may hold.
    """

    problems: list[tuple[int, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def below_adapters(base: Model, sources: Sequence[Model | None]) -> Below:
    """Look for adapters whose `base_model_name_or_path` is the folder of another adapter that the merge lacks.

    Only what an adapter in a folder of this machine names is looked at: a path in a repository is that of a stranger.
    """
    there = {one.snapshot.folder.resolve() for one in sources if one is not None and one.snapshot.folder is not None}
    found = Below()
    for i, source in enumerate(sources):
        if (
            source is None
            or source.adapter is None
            or source.beneath is not None
            or source.snapshot.commit is not None
        ):
            continue
        folder = folder_of_base(source.adapter)
        try:
            if folder is None or folder in there or not (folder / CONFIG).is_file():
                continue
            said = read_json_file(folder / CONFIG, JSON_BYTES, finite=False)
            ADAPTER(said)
        except (OSError, ValueError):  # no path on this machine, or no adapter
            continue
        beneath = f"{source.snapshot.label} was trained on top of the adapter {show(folder.name)}"
        if _is_of(said, base):
            text = f"{beneath}, whose change the base does not hold; name {show(folder.name)} before it, as a model"
            found.problems.append((i, f"{text} of its own, or merge it into the base first."))
        else:
            found.warnings.append(f"{beneath}; its change is taken to be in the base {base.snapshot.label}.")
    return found


def _is_of(adapter: Mapping[str, Any], base: Model) -> bool:
    """Whether an adapter's configuration names the base of the merge."""
    if base.snapshot.folder is None:
        return (name_of_base(adapter) or "").lower() == base.name.lower()
    return folder_of_base(adapter) == base.snapshot.folder.resolve()
