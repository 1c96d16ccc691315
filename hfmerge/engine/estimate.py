"""Estimates the needs of a plan: bytes to download, read and write, memory, disk and time."""

from __future__ import annotations

import dataclasses

from hfmerge.checkpoint.archive import kept_files
from hfmerge.checkpoint.streaming.blocks import MEMORY
from hfmerge.engine.learning_time import learning_seconds
from hfmerge.engine.partition import ahead, chunks, held
from hfmerge.engine.plan import Estimate, Plan, needs_two_passes
from hfmerge.engine.threads import AHEAD, core_count
from hfmerge.hub.download import cached
from hfmerge.validation.wording import parameter, size


IMPORT_BYTES = 450_000_000
"""Resident memory of the libraries, measured after importing torch and transformers."""


def with_estimate(plan: Plan) -> Plan:
    done = plan.start
    wanted: dict[tuple[str, str | None, str], int] = {}
    for source in [plan.base, *(d.source for d in plan.read)]:
        for model in (source, source.beneath):
            for entry in model.tensors.values() if model is not None else ():
                assert model is not None
                if entry.file not in model.streams and cached(model.snapshot, entry.file) is None:
                    wanted[model.name, model.snapshot.commit, entry.file] = model.snapshot.files[entry.file].size
    for source in (delta.source for delta in plan.read):
        for file in source.beside:
            if cached(source.snapshot, file) is None:
                wanted[source.name, source.snapshot.commit, file] = source.snapshot.files[file].size
    output = sum(param.slot.nbytes for param in plan.params)
    state = sum(slot.nbytes for count in plan.keep for slot in plan.state_slots(count).values())
    read = sum(e.nbytes for e in plan.base.tensors.values())
    read += sum(d.stored_bytes(p.key) for d in plan.read for p in plan.params if p.mode == "merge")
    scratch = (
        0
        if plan.keep or not needs_two_passes(plan)
        else sum(slot.nbytes for slot in plan.state_slots(len(plan.deltas)).values())
    )
    spectral = 0.0
    if plan.method.needs == "matrix":
        for param in plan.params:
            steps = sum(rank is None for rank in param.ranks[done:]) if param.mode == "merge" else 0
            for block in param.blocks:
                shape = block.shape(param.slot.shape)
                if block.matrix and len(shape) == 2:
                    small, large = sorted(shape)
                    spectral += max(0, steps - (done == 0)) * (6.0 * large * small**2 + 20.0 * small**3)
    workers = core_count()
    stream = _streamed(plan)
    seconds = (
        3.0 + (sum(wanted.values()) + stream) / 50e6 + (read + output + state) / 500e6 + spectral / (10e9 * workers)
    )
    needs = sorted((held(plan, chunk) for chunk in chunks(plan, plan.params)), reverse=True)
    # learning is done, and its scratch space free, when the merge begins
    learning, spilled = plan.learning_bytes
    memory = IMPORT_BYTES + max(learning, sum(needs[: workers + ahead(plan)]) + stream_memory(plan))
    disk = max(spilled, output + state + scratch + sum(plan.base.snapshot.files[n].size for n in plan.side_files))
    sources = _copies(plan) if plan.recipe.keep_sources else 0
    learned = learning_seconds(plan)
    seconds += sources / 60e6 + learned
    estimate = Estimate(
        sum(wanted.values()), stream, read, output, state, disk + sources, memory, seconds, sources, learned
    )
    return dataclasses.replace(plan, estimate=estimate)


def more_states(plan: Plan) -> str | None:
    """What it costs to keep a state after each model, and what for; None if the plan does, or if it is of no use."""
    method, recipe, count = plan.method, plan.recipe, len(plan.deltas)
    whole = recipe.learn is not None or recipe.vocabulary == "union"
    if not method.is_fold or method.additive or whole or recipe.state in ("all", 1) or count < 2:
        return None
    cost = sum(slot.nbytes for kept in range(1, count + 1) for slot in plan.state_slots(kept).values())
    return (
        f"{parameter('state', 'all')} keeps a state after each of the {count} models, {size(cost)} in all: to take a "
        "model out then reads only the models after it."
    )


def _copies(plan: Plan) -> int:
    """What copies of all sources take at most: what cannot be compressed stays as long as it is."""
    total = 0
    for source in (plan.base, *(delta.source for delta in plan.deltas)):
        for model in (source, source.beneath):
            if model is not None:
                names = kept_files(model, remote_code=plan.recipe.trust_remote_code)
                # a directory of the archive and headers in it, and a byte here and there of deflate's own
                total += sum(model.snapshot.files[name].size * 1001 // 1000 + 1000 for name in names) + 1000
    return total


def stream_memory(plan: Plan) -> int:
    """Bytes that streamed blocks may hold: more where whole parameters of all models are read side by side."""
    if not plan.recipe.stream:
        return 0
    models = [plan.base, *(delta.source for delta in plan.deltas)]
    largest = max(entry.nbytes for source in models for entry in source.tensors.values())
    # half of it for what is read ahead, and half for what visits go over once more
    return min(8 * MEMORY, max(MEMORY, 2 * stream_readers(plan) * len(models) * largest * (not _sliced(plan))))


def stream_readers(plan: Plan) -> int:
    """Places of one streamed file that are read side by side: one where visits follow each other closely."""
    return 1 if _sliced(plan) else core_count() + AHEAD


def _sliced(plan: Plan) -> bool:
    return plan.method.needs == "elements"


def _streamed(plan: Plan) -> int:
    """Bytes that a run reads from the Hub without keeping them."""
    base, count = plan.base, plan.start
    measured = plan.method.measure(1) is not None
    total = sum(plan.deltas[model].source.streamed_bytes(head.tensors.values()) for model, head in plan.heads)
    ties = [(base, plan.base_layout.tied), *((delta.source, delta.tied) for delta in plan.read)]
    total += sum(source.streamed_bytes(pair) for source, tied in ties for pair in tied.items())
    for param in plan.params:
        dense = param.touched and any(rank is None for rank in param.ranks[count:])
        first = dense or not needs_two_passes(plan)
        times = first + needs_two_passes(plan) + (measured and dense) if param.touched else param.mode != "tied"
        total += times * base.streamed_bytes([param.key])
        if param.touched:
            again = measured + (plan.fits(param) and not plan.method.fits_from_state)
            total += (1 + again) * sum(delta.stored_bytes(param.key, streamed=True) for delta in plan.read)
    return total
