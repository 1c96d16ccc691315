"""The passes of one run over its chunks, on a pool of threads, and the sums between them.

Each thread computes on one core: the bytes do not depend on the number of cores. What the journal lists as finished
is compared with the files instead of being done again.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from hfmerge.engine.device import CPU, Device
from hfmerge.engine.environment import arithmetic_fingerprint, environment
from hfmerge.engine.estimate import stream_memory
from hfmerge.engine.journal import Finished, Key, Region
from hfmerge.engine.options import RunOptions
from hfmerge.engine.partition import Chunk, ahead, alike, chunks, cost, held, visit_bytes
from hfmerge.engine.plan import Plan, needs_two_passes
from hfmerge.engine.ranks import Ranks, assign_owners
from hfmerge.engine.run_files import RunFiles
from hfmerge.engine.storage import disk_of_files
from hfmerge.engine.tasks import Norms, Visit
from hfmerge.engine.threads import AHEAD, core_count, overlapped, resident_memory
from hfmerge.hub.progress_bar import progress_bar
from hfmerge.methods.base import Measure
from hfmerge.methods.fit import fit_scale
from hfmerge.recipe.values import FITS
from hfmerge.validation.wording import parameter


MEASURED: Key = ("measured", "", None)
"""The journal's key of what a joint method found out about all parameters."""
MOVED: Key = ("moved", "", None)
"""The journal's key of this: a matrix found no room on the device and was computed on the CPU."""
CHECKING = 0.1
"""Time of comparing a finished chunk with its checksum, as a share of merging it element by element."""

_Group = tuple[Chunk, ...]
Visited = tuple[Norms | None, bool]
"""What a visit found out, and whether an earlier attempt did."""


@dataclass(frozen=True)
class _Pass:
    """One pass over some chunks.

    Attributes:
        name: name of the pass in the journal; None: the pass is not noted.
        title: of its progress bar.
        chunks: what it visits.
    """

    name: str | None
    title: str
    chunks: tuple[Chunk, ...]

    def key(self, chunk: Chunk) -> Key:
        """What the journal calls the visit of a chunk."""
        return (self.name or "", chunk.param.key, chunk.rows)


def _in_one_walk(plan: Plan, merging: _Pass, writing: _Pass, copying: _Pass) -> tuple[_Pass, _Pass, _Pass]:
    """The passes, with copied parameters added to the last pass that reads the base, all in the base's order.

    So each of the base's files passes by once, from its beginning to its end, as its digest needs it.
    """
    places = {param.key: place for place, param in enumerate(plan.params)}

    def along(each: _Pass) -> _Pass:
        both = sorted((*each.chunks, *copying.chunks), key=lambda chunk: places[chunk.param.key])
        return replace(each, chunks=tuple(both))

    rest = replace(copying, chunks=())
    return (merging, along(writing), rest) if writing.chunks else (along(merging), writing, rest)


def _or_copy(work: Callable[[Visit], Norms | None]) -> Callable[[Visit], Norms | None]:
    """`work` for parameters that some model changes; the others are copied."""

    def either(visit: Visit) -> Norms | None:
        if visit.chunk.param.touched:
            return work(visit)
        visit.copy()
        return None

    return either


def _changes(plan: Plan, visited: Sequence[tuple[Chunk, Norms | None]], scale: float) -> dict[str, float]:
    """`executor.Outcome.changes`, from what the first pass found out about all chunks."""
    params = {param.key: param for param in plan.params if param.touched}
    squares: dict[str, list[list[float]]] = {key: [] for key in params}
    for chunk, norms in visited:
        if norms is not None:
            squares[chunk.param.key].append([math.fsum(norms.read_out), *map(math.fsum, norms.models)])
    changes: dict[str, float] = {}
    for key, parts in squares.items():
        merged, *models = (math.sqrt(math.fsum(column)) for column in zip(*parts, strict=True))
        weights = plan.weights_of(params[key])[plan.start :]
        sizes = [merged, *(abs(weight) * norm for weight, norm in zip(weights, models, strict=True))]
        own = scale if plan.norm not in FITS or plan.fits(params[key]) else 1.0
        if all(map(math.isfinite, sizes)):
            changes[key] = abs(own) * max(sizes) / math.sqrt(max(1, math.prod(params[key].slot.shape)))
    return changes


def _scale(
    plan: Plan, visited: Sequence[tuple[Chunk, Norms | None]], squared_norms: Sequence[float]
) -> tuple[float, float]:
    """The factor that `norm` asks for, and the norm of the merged change with it."""
    found = [(chunk.param, norms) for chunk, norms in visited if norms is not None]
    if plan.norm == "fit":
        scale = fit_scale(chain(*(norms.fits for _, norms in found)))
        scaled = math.fsum(chain(*(norms.read_out for param, norms in found if plan.fits(param))))
        others = math.fsum(chain(*(norms.read_out for param, norms in found if not plan.fits(param))))
        return scale, math.sqrt(scale**2 * scaled + others)
    read_out = math.sqrt(math.fsum(chain(*(norms.read_out for _, norms in found))))
    if not needs_two_passes(plan):
        return 1.0, read_out
    counted = [math.sqrt(s) for i, s in enumerate(squared_norms) if i not in plan.subtracted]
    target = math.fsum(counted) / len(counted) if plan.norm == "mean" else float(plan.norm)
    scale = target / read_out if read_out > 0.0 else 0.0
    return scale, read_out * scale


class Passes:
    """The passes of one run over its chunks, and the sums between them."""

    def __init__(self, plan: Plan, files: RunFiles, ranks: Ranks, options: RunOptions, device: Device):
        self.plan, self.files, self.ranks, self.notify = plan, files, ranks, options.notify
        self.max_memory = options.max_memory
        self.resident = resident_memory()  # measured before the first visit, because visits use freed memory again
        self.past = files.journal.past.finished if files.journal is not None else {}
        self.reused = 0
        self.moved = MOVED in self.past
        self.device = replace(device, moved=self._note_moved)

    def merge(self) -> dict[str, Any]:
        """Make all passes; squared norms, scale, kept states, by their names in `engine.executor.Outcome`."""
        plan = self.plan
        two = needs_two_passes(plan)
        touched = [param for param in plan.params if param.touched]
        untouched = [param for param in plan.params if param.mode != "tied" and not param.touched]
        # streamed files have to pass by in the order that their digests need
        if plan.method.needs == "matrix" and not plan.recipe.stream:
            touched.sort(key=lambda param: (-param.slot.nbytes, param.key))
        cut = tuple(chunks(plan, touched))
        merging, writing = _Pass("merged", "Merging", cut), _Pass("written", "Writing", cut if two else ())
        copying = _Pass("copied", "Copying", tuple(Chunk(param) for param in untouched))
        if plan.recipe.stream:
            merging, writing, copying = _in_one_walk(plan, merging, writing, copying)
        # before any process adds to the journal
        self.ranks.on_main(lambda: self._announce(merging, writing, copying))
        known = self._known()
        visited = self._over(merging, _or_copy(lambda visit: visit.merge(known, write=not two)))
        norms = [n for _, n in visited if n is not None]
        new = range(len(plan.deltas) - self.files.start)
        squares = tuple(math.fsum(chain(*(n.models[i] for n in norms))) for i in new)
        squared_norms = (*(plan.prior.squared_norms if plan.prior else ()), *squares)
        deviations = [n.deviation for n in norms if n.deviation is not None]
        scale, merged_norm = _scale(plan, visited, squared_norms)
        if two:
            self._over(writing, _or_copy(lambda visit: visit.rescale(scale)))
        self._over(copying, Visit.copy)
        self.files.complete()
        states = self.ranks.on_main(self.files.named_states)
        return {
            "squared_norms": squared_norms,
            "merged_norm": merged_norm,
            "scale": scale,
            "changes": _changes(plan, visited, scale),
            "states": states,
            "deviation": max(deviations, default=None),
            "dependent": tuple(sum(i in n.dependent for n in norms) for i in range(len(plan.deltas))),
            "reused": self.reused,
            "environment": self._environment(),
        }

    def _environment(self) -> dict[str, Any]:
        """Versions, device and arithmetic of all processes."""
        moved = any(self.ranks.gather(self.moved))
        mixed = len(set(self.ranks.gather(arithmetic_fingerprint(self.device.place)))) > 1
        return environment(self.device, moved=moved, mixed=mixed)

    def _note_moved(self) -> None:
        """Note it in the journal, so that the ledger says it even if this run is killed and another continues."""
        if not self.moved and self.files.journal is not None:
            self.files.journal.note(MOVED, Finished(None))
        self.moved = True

    def _announce(self, *passes: _Pass) -> None:
        """Say how many tensors earlier attempts finished, as far as the journal knows."""
        if not self.past or self.notify is None:
            return
        parts = []
        for each in passes:
            left = {chunk.param.key for chunk in each.chunks if each.key(chunk) not in self.past}
            keys = {chunk.param.key for chunk in each.chunks}
            if keys:
                parts.append(f"{len(keys) - len(left)} of {len(keys)} tensors {each.name}")
        self.notify(f"resuming: {', '.join(parts)}")

    def _known(self) -> list[float] | None:
        """The numbers that a joint method with a `measure` needs before the first pass."""
        method, journal = self.plan.method, self.files.journal
        measure = method.measure(len(self.files.models))
        if measure is None:
            return None
        if MEASURED in self.past:
            return list(self.past[MEASURED].result)
        known = self._measured(measure)
        if journal is not None and self.ranks.main:
            journal.note(MEASURED, Finished(known))
        return known

    def _measured(self, measure: Measure) -> list[float]:
        """Have all processes measure their share of the merged parameters, and put together what they find."""
        lock = threading.Lock()

        def look(visit: Visit) -> None:
            for found in visit.measure(measure):
                with lock:
                    measure.add(found)

        params = [param for param in self.plan.params if param.mode == "merge"]
        cut = chunks(self.plan, params) if measure.tiled else map(Chunk, params)
        self._over(_Pass(None, "Measuring", tuple(cut)), look)
        first, *others = self.ranks.gather(measure)
        for other in others:
            first.join(other)
        return first.settle()

    def _over(self, each: _Pass, work: Callable[[Visit], Norms | None]) -> list[tuple[Chunk, Norms | None]]:
        """Run `work` over a pass's chunks, this rank's share on its pool; all results, in the same order on all."""
        crews = [self.ranks.on_disk(disk) for disk in range(self.ranks.disk_count)]
        at = disk_of_files(self.plan, self.ranks)
        groups = self._groups(each, at)
        noted = [self._noted(each, group) is not None for group in groups]
        costs = [
            sum(CHECKING * chunk.nbytes if known else cost(self.plan, chunk) for chunk in group)
            for group, known in zip(groups, noted, strict=True)
        ]
        owners = assign_owners(costs, self.ranks.world, [crews[at[group[0].param.file]] for group in groups])
        mine = [i for i, owner in enumerate(owners) if owner == self.ranks.rank]
        self.files.expect([chunk.param.key for i in mine if not noted[i] for chunk in groups[i]])
        parts = self.ranks.together(
            lambda: self._on_pool([groups[i] for i in mine], lambda group: self._visits(each, work, group), each.title)
        )
        self.reused += sum(reused for part in parts for found in part for _, reused in found)
        cursors = [iter(part) for part in parts]
        results = [zip(group, next(cursors[owner]), strict=True) for group, owner in zip(groups, owners, strict=True)]
        return [(chunk, norms) for result in results for chunk, (norms, _) in result]

    def _groups(self, each: _Pass, at: Mapping[str, int]) -> list[_Group]:
        """Groups of chunks: one chunk each; on an accelerator, matrices of equal shape together."""
        # streamed files pass by in their own order
        if self.device.place == CPU or each.name is None or self.plan.recipe.stream:
            return [(chunk,) for chunk in each.chunks]
        return alike(self.plan.method, each.chunks, self.device.room, lambda chunk: at[chunk.param.file])

    def _noted(self, each: _Pass, group: _Group) -> list[tuple[Chunk, Finished]] | None:
        """What earlier attempts noted of a group that they finished."""
        found = [(chunk, self.past[key]) for chunk in group if (key := each.key(chunk)) in self.past]
        return found if len(found) == len(group) else None

    def _visits(self, each: _Pass, work: Callable[[Visit], Norms | None], group: _Group) -> list[Visited]:
        """Do the work on a group, unless an earlier attempt did all of it: bytes may tell what goes into one call."""
        done = self._noted(each, group)
        if done is not None and self.files.intact(done):
            return [(None if noted.result is None else Norms.of(noted.result), True) for _, noted in done]
        visits = [partial(self._visit, each, work, chunk) for chunk in group]
        return self.device.together(visits) if len(visits) > 1 else [visits[0](self.device)]

    def _visit(self, each: _Pass, work: Callable[[Visit], Norms | None], chunk: Chunk, device: Device) -> Visited:
        journal, visit = self.files.journal, Visit(self.files, chunk, device)
        norms = work(visit)
        if journal is not None and each.name is not None:
            wrote = tuple(Region(file, tensor, value) for (file, tensor), value in visit.wrote.items())
            journal.note(each.key(chunk), Finished(None if norms is None else astuple(norms), wrote))
        return norms, False

    def _on_pool(
        self, visited: Sequence[_Group], work: Callable[[_Group], list[Visited]], title: str
    ) -> list[list[Visited]]:
        if not visited:
            return []
        needs = [self._held(group) for group in visited]
        total = sum(chunk.nbytes for group in visited for chunk in group)
        bar = progress_bar(total, title, "B", scaled=True, shown=self.ranks.main)
        # an accelerator waits for what is read
        threads = core_count() + (ahead(self.plan) if self.device.place == CPU else AHEAD)
        visits = overlapped(work, visited, needs, threads=threads, memory=self._budget(max(needs)))
        left = Counter(chunk.param.key for group in visited for chunk in group)
        done, results = 0, []
        with contextlib.closing(bar), contextlib.closing(visits):
            for group, result in zip(visited, visits, strict=True):
                results.append(result)
                for chunk in group:
                    left[chunk.param.key] -= 1
                    done += not left[chunk.param.key]
                bar.set_postfix_str(f"{done}/{len(left)} parameters", refresh=False)
                bar.update(sum(chunk.nbytes for chunk in group))
                self.ranks.check()
        return results

    def _held(self, group: _Group) -> int:
        """About the bytes that a group's visits hold in the CPU's memory at their peak."""
        if len(group) == 1:
            return held(self.plan, group[0])
        # the float64 values are on the accelerator
        return sum(visit_bytes(chunk.param, chunk.shape, None) for chunk in group)

    def _budget(self, largest: int) -> int | None:
        """Bytes that visits may hold together, of what the process may use and does not use yet."""
        if self.max_memory is None:
            return None
        left = max(0, self.max_memory - self.resident - stream_memory(self.plan))
        if left < largest and self.notify is not None:
            need = self.max_memory - left + largest
            bound = parameter("max_memory")
            self.notify(f"{bound} cannot be kept: the largest parameter needs about {need / 1e9:.2f} GB in all.")
        return left
