"""Readers of a plan's models: files it streams come from the run's session, conversions are worked out again."""

from __future__ import annotations

from collections.abc import Sequence

from hfmerge.checkpoint.delta import Delta, DeltaReader
from hfmerge.checkpoint.layout import match
from hfmerge.checkpoint.streaming.session import Streaming
from hfmerge.engine.model_match import Layouts
from hfmerge.engine.plan import Plan


def open_deltas(plan: Plan, deltas: Sequence[Delta], streaming: Streaming | None) -> list[DeltaReader]:
    """A reader for each of some of a plan's models.

    Where tensors are stored in another layout than the base's, transformers' own classes and converters are built
    again from the configurations and the headers in the plan, which holds none of them.

    Args:
        plan: whose models they are.
        deltas: of it.
        streaming: holds the files that the plan streams; None where it streams none.
    """
    layouts = Layouts(plan.recipe.trust_remote_code)
    readers = []
    for delta in deltas:
        converters = None
        if any(origin.converted for origin in (*delta.full.values(), *delta.beneath.values())):
            # of an adapter, only the model beneath it can need conversions
            stored = delta.source.beneath or delta.source
            converters = match(layouts.of(plan.base), layouts.of(stored)).converters
        # a plain sum takes its terms in float64; other methods compute in float32
        exact = plan.method.fold is not None and plan.method.fold.plain_sum is not None
        readers.append(DeltaReader(delta, streaming, converters, plan.base, exact=exact))
    return readers
