"""Adapters that were trained on top of another adapter: alone, they would lose the change of the one beneath."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.schema import ADAPTER
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
    """Look for adapters whose `base_model_name_or_path` is the folder of another adapter that the merge lacks."""
    there = {one.snapshot.folder.resolve() for one in sources if one is not None and one.snapshot.folder is not None}
    found = Below()
    for i, source in enumerate(sources):
        if source is None or source.adapter is None or source.beneath is not None:
            continue
        folder = Path(str(source.adapter.get("base_model_name_or_path") or "")).expanduser()
        try:
            if not (folder / CONFIG).is_file() or folder.resolve() in there:
                continue
            said = read_json_file(folder / CONFIG, JSON_BYTES, finite=False)
            ADAPTER(said)
        except (OSError, ValueError):  # no path on this machine, or no adapter
            continue
        beneath = f"{source.snapshot.label} was trained on top of the adapter {show(folder.name)}"
        if _is(str(said.get("base_model_name_or_path") or ""), base):
            text = f"{beneath}, whose change the base does not hold; name {show(folder.name)} before it, as a model"
            found.problems.append((i, f"{text} of its own, or merge it into the base first."))
        else:
            found.warnings.append(f"{beneath}; its change is taken to be in the base {base.snapshot.label}.")
    return found


def _is(named: str, base: Model) -> bool:
    if base.snapshot.folder is None:
        return named.lower() == base.name.lower()
    return bool(named) and Path(named).expanduser().resolve() == base.snapshot.folder.resolve()
