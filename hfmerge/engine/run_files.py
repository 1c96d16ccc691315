"""The files of one run: base, models and prior state to read, output, carried states and scratch to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfmerge.checkpoint.headers import read_header
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.reader import Reader, Rows
from hfmerge.checkpoint.streaming.session import Streaming
from hfmerge.checkpoint.writer import SafetensorsWriter, Slot, bytes_of
from hfmerge.engine.batched_sum import ThreadBuffers
from hfmerge.engine.journal import Finished, Journal, Key, checksum
from hfmerge.engine.partition import Chunk
from hfmerge.engine.plan import KeptState, Param, Plan, folder_of, needs_two_passes
from hfmerge.engine.plan_readers import open_deltas
from hfmerge.engine.ranks import Ranks
from hfmerge.engine.storage import own_params
from hfmerge.hashing import sha256_file
from hfmerge.hub.reference import ModelRef, Snapshot
from hfmerge.task_vector import TaskVector, from_tensors


if TYPE_CHECKING:
    from torch import Tensor

STATE_FOLDER = "merge_state"


class RunFiles:
    """All open files of a run; leaving the `with` block closes them.

    Attributes:
        base: reads the base.
        models: read one model's task vectors each.
        leaving: the same of models that are subtracted from the prior state.
        prior: reads the state the run continues from, if any.
        outputs: weight file -> its writer.
        states: number of models -> writer of the state kept after them.
        scratch: what the first pass leaves for the second where no kept state does.
        start: number of models that the prior state replaces.
        memory: buffers of the threads that visit.
        journal: the journal for finished chunks, or None.
        pin: model -> its commit, or the digest of its folder. The call may wait for the digest.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        ranks: Ranks,
        journal: Journal | None = None,
        streaming: Streaming | None = None,
        pin: Callable[[int], str] | None = None,
    ):
        self.plan, self.folder, self.ranks, self.journal, self.pin = plan, folder, ranks, journal, pin
        self.start = plan.start
        self.memory = ThreadBuffers()
        self.base = Reader(plan.base, streaming)
        readers = open_deltas(plan, (*plan.deltas, *plan.leaving), streaming)
        self.models, self.leaving = readers[: len(plan.deltas)], readers[len(plan.deltas) :]
        sources = [delta.source for delta in plan.deltas]
        self._beside = [
            {
                file: Reader(dataclasses.replace(s, tensors=held, pickled=False, streams=()))
                for file, held in s.beside.items()
            }
            for s in sources
        ]
        self.prior = StateReader(plan.prior.path) if plan.prior else None
        self.outputs: dict[str, SafetensorsWriter] = {}
        self.states: dict[int, SafetensorsWriter] = {}
        self.scratch: SafetensorsWriter | None = None
        self._tied: dict[str, list[Param]] = {}
        for param in plan.params:
            if param.owner is not None:
                self._tied.setdefault(param.owner, []).append(param)

    def __enter__(self) -> RunFiles:
        # the leading rank of each disk, mostly rank 0 alone, lays out the files that the others then open
        if self.ranks.leads:
            self.ranks.each(self._open)
            self.ranks.each(lambda: None)
        else:
            self.ranks.each(lambda: None)
            self.ranks.each(self._open)
        return self

    def expect(self, keys: Sequence[str]) -> None:
        """Announce the parameters that are visited next, in order, so that streamed tensors are fetched in time."""
        self.base.expect(keys)
        subtracted = [self.models[i] for i in self.plan.subtracted if i < self.start]
        for model in (*self.models[self.start :], *subtracted, *self.leaving):
            model.expect(keys)

    def _open(self) -> None:
        plan, create = dataclasses.replace(self.plan, params=own_params(self.plan, self.ranks)), self.ranks.leads
        if create and self.journal is not None:
            self._tidy(self.journal)
        if create and plan.keep:
            (self.folder / STATE_FOLDER).mkdir(exist_ok=True)
        for file, slots in sorted(plan.slots().items()):
            if create:
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            self.outputs[file] = SafetensorsWriter(self.folder / file, slots, create=create, prefix=folder_of(file))
        for count in plan.keep:
            self.states[count] = SafetensorsWriter(self._state(count), plan.state_slots(count), create=create)
        if needs_two_passes(plan) and len(plan.deltas) not in self.states:
            if plan.method.is_fold:
                slots = plan.state_slots(len(plan.deltas))
            else:
                slots = {p.key: Slot("F32", p.slot.shape) for p in plan.params if p.touched}
            # with a journal it stays for a run that goes on from here, and goes with the journal
            place = self.folder / ".scratch" if self.journal is None else self.journal.folder / "scratch"
            self.scratch = SafetensorsWriter(place, slots, create=create)

    def _state(self, count: int) -> Path:
        return self.folder / STATE_FOLDER / f"after-{count}.safetensors"

    def _tidy(self, journal: Journal) -> None:
        """Leave of earlier attempts only the files that this one fills, under the names they had while filled."""
        wanted = [self.folder / file for file in self.plan.slots()]
        for count in self.plan.keep:
            wanted.append(self._state(count))
            named = journal.past.finished.get(_naming(count))
            if named is not None and (self.folder / named.result).exists():
                (self.folder / named.result).rename(self._state(count))
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path in file.parents for file in wanted):
                    path.rmdir()
            elif path not in wanted:
                path.unlink()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.base.close()
        for reader in (*self.models, *self.leaving):
            reader.close()
        for reader in (*([self.prior] if self.prior else ()), *(one for own in self._beside for one in own.values())):
            reader.close()
        for writer in (*self.outputs.values(), *self.states.values()):
            writer.close(complete=False)
        if self.scratch is not None:
            self.scratch.close(complete=False)
            if self.ranks.leads and self.journal is None:
                self.scratch.path.unlink(missing_ok=True)

    def beside(self, model: int, file: str, key: str, rows: Rows | None) -> Tensor:
        """A float32 tensor, or some rows of it, from a file that a model has beside its weights."""
        return self._beside[model][file].value(key, rows)

    def places(self, param: Param) -> list[Param]:
        """Where a parameter's value goes: its own tensor, then those tied to it."""
        return [param, *self._tied.get(param.key, ())]

    def intact(self, done: Sequence[tuple[Chunk, Finished]]) -> bool:
        """Whether all chunks' bytes are on the disk as the journal says; they then count as written."""
        # files of two folders may have one name, but no tensor in common
        everything = [w for w in (*self.outputs.values(), *self.states.values(), self.scratch) if w]
        writers = {(w.path.name, tensor): w for w in everything for tensor in w.slots}
        sizes = []
        for chunk, finished in done:
            for region in finished.wrote:
                writer = writers.get((region.file, region.tensor))
                if writer is None:
                    return False
                found, size = 0, 0
                for tile in chunk.tiles():
                    data = bytes_of(writer.read(region.tensor, tile.rows))
                    found, size = checksum(data, found), size + len(data)
                if found != region.checksum:
                    return False
                sizes.append((writer, region.tensor, size))
        for writer, tensor, size in sizes:
            writer.claim(tensor, size)
        return True

    def complete(self) -> None:
        """Every tensor of every kept file has been written, once, by some rank; all of it is on the disk."""
        writers = [*self.outputs.values(), *self.states.values()]
        everyone = self.ranks.together(lambda: [writer.missing() for writer in writers])
        others = [everyone[rank] for rank in self.ranks.on_disk(self.ranks.disk) if rank != self.ranks.rank]
        for i, writer in enumerate(writers):
            writer.count_others([missing[i] for missing in others])
        self.ranks.each(lambda: _close_all(writers))

    def named_states(self) -> tuple[KeptState, ...]:
        """Give every kept state, complete by now, the name it has in the ledger."""
        return tuple(self._name_state(count, writer.path) for count, writer in self.states.items())

    def _name_state(self, count: int, path: Path) -> KeptState:
        state = KeptState(count, sha256_file(path), path.stat().st_size)
        if self.journal is not None:
            self.journal.note(_naming(count), Finished(state.file))
        path.rename(self.folder / state.file)
        return state


def carried(
    names: Collection[str], read: Callable[[str, Rows | None], Tensor], stem: str, rows: Rows | None
) -> TaskVector:
    """One carried task vector, dense or as factors, from a file that holds tensors of `names`."""
    suffixes = [suffix for suffix in ("", ".up", ".down") if f"{stem}{suffix}" in names]
    return from_tensors({suffix: read(f"{stem}{suffix}", rows) for suffix in suffixes})


class StateReader:
    """Reads carried task vectors from a state file into fresh, aligned memory."""

    def __init__(self, path: Path):
        snapshot = Snapshot(ModelRef(str(path), None, None, path.parent), path.name, None, path.parent, {})
        self._reader = Reader(Model(str(path), snapshot, "full", {}, None, read_header(path, path.name).entries))

    def read(self, stem: str, rows: Rows | None) -> TaskVector:
        """One carried task vector, or some rows of a dense one."""
        return carried(self._reader.source.tensors, self._reader.stored, stem, rows)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


def _naming(count: int) -> Key:
    """The journal's key of the step that renames a finished state."""
    return ("name", str(count), None)


def _close_all(writers: Sequence[SafetensorsWriter]) -> None:
    for writer in writers:
        writer.close()
