"""Lists the code of a model's repository that a trusting loader would run, for plans and errors.

Nothing here runs or reads any of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.side_files import is_code
from hfmerge.errors import UnsupportedError
from hfmerge.validation.values import show
from hfmerge.validation.wording import parameter


_SHOWN = 3
"""How many names a message shows."""


def own_code(source: Model, *, whole: bool) -> list[str]:
    """The classes and files of code that a source brings along, each once; an adapter has none of its own.

    Args:
        whole: the source is the base. Its files of code are copied beside the merge, so they count as well.
    """
    found = list(dict.fromkeys(_named(source.config))) if source.kind == "full" else []
    return found + ([name for name in sorted(source.snapshot.files) if is_code(name)] if whole else [])


def check_allowed(source: Model, *, whole: bool) -> None:
    """Refuse a source that has code of its own, in a merge that was made with this code.

    Args:
        whole: see `own_code`.

    Raises:
        UnsupportedError: names the repository, what would run, and how to allow it.
    """
    for one in (source, source.beneath):
        if one is None:
            continue
        if names := own_code(one, whole=whole):
            raise UnsupportedError(
                f"{one.snapshot.label}: brings code of its own ({listed_names(names)}), and the merge was made with "
                "such code. The ledger gives no permission to run it; pass "
                f"{parameter('trust_remote_code', True)} if you trust the author."
            )


def listed_names(names: Sequence[str]) -> str:
    """The first names, which a stranger has chosen, as a message shows them, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(show, names[:_SHOWN])) + more


def _named(config: Mapping[str, Any]) -> Iterator[str]:
    """What `auto_map` names: `module.Class`, or `org/name--module.Class` for code of another repository."""
    named = config.get("auto_map")
    for value in named.values() if isinstance(named, Mapping) else ():
        yield from (str(one) for one in (value if isinstance(value, list) else [value]) if one)
