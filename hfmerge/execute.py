"""The one executor: visits each output parameter once, folds all models into it, and writes it.

Call sequence of `run`: fetch the files; count magnitudes if the method asks (`settle`); first pass: per parameter,
read base and models, fold or combine, keep the carried state; then, if the recipe's `norm` needs a number over all
parameters, a second pass that scales what was kept and writes it; heads, side files, digests. Parameters are
independent, so they run on a pool of
threads, each computing on one core: the bytes do not depend on the number of cores.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.deltas import DeltaReader
from hfmerge.checkpoint.heads import write_head
from hfmerge.checkpoint.reader import Reader, Rows
from hfmerge.checkpoint.sidefiles import copy_side_files
from hfmerge.checkpoint.vocabulary import extended_base, write_tokenizer
from hfmerge.checkpoint.writer import TORCH_NAMES, SafetensorsWriter, Slot, write_index
from hfmerge.digest import sha256_file
from hfmerge.errors import NonFiniteError, UnsupportedError
from hfmerge.ledger import KeptState
from hfmerge.methods import Carry, FoldMethod, JointMethod
from hfmerge.planning import DTYPE_NAMES, Param, Plan, carry_slots, needs_two_passes, state_name, worker_count
from hfmerge.runtime import Ranks, shares
from hfmerge.source import Digester, Pinned, Place, Source, fetch, safetensors_entries, weight_files
from hfmerge.taskvector import Block, Dense, LowRank, TaskVector, cut, from_tensors, squared_norm, zero


if TYPE_CHECKING:
    from torch import Tensor

STATE_FOLDER = "merge_state"


@dataclass(frozen=True)
class Outcome:
    """What a run found out, for the ledger.

    Attributes:
        squared_norms: per model, squared Frobenius norm of its task vector over all merged parameters.
        merged_norm: norm of the merged task vector as written, before the output's rounding.
        scale: factor that `norm` put on the method's read-out.
        source_digests: for the base and then each model (and None where a prior state stood for it), file -> SHA-256.
        states: kept states.
        products: every file written, path -> SHA-256, states left out.
    """

    squared_norms: tuple[float, ...]
    merged_norm: float
    scale: float
    source_digests: tuple[dict[str, str] | None, ...]
    states: tuple[KeptState, ...]
    products: dict[str, str]


SLICE_BYTES = 2 << 20
"""Float32 bytes of a slice: small enough that one visit's tensors stay in a core's cache, and memory small."""


@dataclass(frozen=True)
class Piece:
    """One visit: a parameter, or some rows of a large one whose method works element by element."""

    param: Param
    rows: Rows | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what the visit computes."""
        shape = self.param.slot.shape
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of it in the output."""
        shape = self.param.slot.shape
        return self.param.slot.nbytes if self.rows is None else self.param.slot.nbytes // shape[0] * self.shape[0]


def pieces(plan: Plan, params: Iterable[Param]) -> list[Piece]:
    """Cut parameters into visits; the cuts depend on the plan alone, so sums over them are the same everywhere."""
    result: list[Piece] = []
    for param in params:
        shape = param.slot.shape
        size = math.prod(shape)
        aligned = param.vocab_axis is not None and plan.vocabulary is not None
        # a norm is summed up as the visits are cut, and must not depend on which models take part
        if (
            plan.method.elementwise
            and plan.norm == "none"
            and not aligned
            and len(shape) > 1
            and 4 * size > SLICE_BYTES
        ):
            if all(delta.sliceable(param.key) for delta in plan.deltas):
                step = max(1, SLICE_BYTES // (4 * size // shape[0]))
                result.extend(Piece(param, (at, min(at + step, shape[0]))) for at in range(0, shape[0], step))
                continue
        result.append(Piece(param))
    return result


def run(plan: Plan, folder: Path, ranks: Ranks | None = None, digester: Digester | None = None) -> Outcome:
    """Execute a plan into an empty folder.

    With several processes, all call `run` with the same plan and the same folder on storage they share. Call sequence:
    every rank fetches what is not in its cache; rank 0 lays out the files; every rank visits its own parameters and
    writes them into the shared files, exchanging only sums; digests are divided; rank 0 adds heads and side files. A
    rank that fails makes all fail with its error.

    Raises:
        SourceError, NonFiniteError, OutputError: with file, tensor and model; the folder is then to be thrown away.
    """
    ranks = ranks or Ranks()
    start = plan.prior.count if plan.prior else 0
    ranks.on_main(lambda: _fetch_all(plan, start))
    ranks.each(lambda: _fetch_all(plan, start))
    ranks.on_main(lambda: _check_ties(plan, start))
    with _one_thread_each(), contextlib.ExitStack() as stack:
        hashing = digester or stack.enter_context(Digester())
        # results are asked for at the end; a source that differs from its digest then fails the whole run
        wanted = [plan.base, *(delta.source for delta in plan.deltas[start:])]
        mine = {i: hashing.result(source) for i, source in enumerate(wanted) if i % ranks.world == ranks.rank}
        job = stack.enter_context(_Job(plan, folder, start, ranks))
        outcome = job.merge()
        parts = ranks.together(lambda: {i: future.result() for i, future in mine.items()})
        found = {i: value for part in parts for i, value in part.items()}
    known = tuple(
        found[0] if i == 0 else found.get(i - start) if i > start else None for i in range(len(plan.deltas) + 1)
    )
    products = ranks.on_main(lambda: _finish_folder(plan, folder))
    return Outcome(**outcome, source_digests=known, products=products)


def _fetch_all(plan: Plan, start: int) -> None:
    """Download every file the run reads; the Hub client shows its own progress."""
    for source in [plan.base, *(delta.source for delta in plan.deltas[start:])]:
        for place in (source, source.beneath):
            if place is not None:
                for name in weight_files(place):
                    fetch(place.pinned, name)
    for name in plan.side_files:
        fetch(plan.base.pinned, name)


def _check_ties(plan: Plan, start: int) -> None:
    """A stored copy of a tied tensor must be a copy: transformers unties those that differ; a merge would lose one.

    Raises:
        UnsupportedError: names the model and both tensors.
    """
    checked = [(plan.base, plan.base_layout.tied), *((d.source, d.tied) for d in plan.deltas[start:])]
    for source, tied in checked:
        with Reader(source) as reader:
            for copy, owner in tied.items():
                if not reader.equal(copy, owner):
                    raise UnsupportedError(
                        f"{source.pinned.label}: {copy} differs from {owner}, to which its configuration ties it; set "
                        "`tie_word_embeddings` in its config.json as the weights are, or remove the tensor."
                    )


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Each matrix is computed on one core, so that its bytes are the same on every number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Job:
    """The open files and totals of one run."""

    def __init__(self, plan: Plan, folder: Path, start: int, ranks: Ranks):
        self.plan, self.folder, self.start, self.ranks = plan, folder, start, ranks
        self.base = Reader(plan.base)
        self.models = [DeltaReader(delta) for delta in plan.deltas]
        self.tied: dict[str, list[Param]] = {}
        for param in plan.params:
            if param.owner is not None:
                self.tied.setdefault(param.owner, []).append(param)
        self.prior = _StateReader(plan.prior.path) if plan.prior else None
        self.outputs: dict[str, SafetensorsWriter] = {}
        self.states: dict[int, SafetensorsWriter] = {}
        self.scratch: SafetensorsWriter | None = None

    def __enter__(self) -> _Job:
        # rank 0 lays out the files that the others then open
        if self.ranks.main:
            self.ranks.each(self._open_files)
            self.ranks.each(lambda: None)
        else:
            self.ranks.each(lambda: None)
            self.ranks.each(self._open_files)
        return self

    def _open_files(self) -> None:
        plan, create = self.plan, self.ranks.main
        if plan.keep and create:
            (self.folder / STATE_FOLDER).mkdir()
        for file, slots in sorted(plan.slots().items()):
            self.outputs[file] = SafetensorsWriter(self.folder / file, slots, create=create)
        for count in plan.keep:
            path = self.folder / STATE_FOLDER / f"after-{count}.safetensors"
            self.states[count] = SafetensorsWriter(path, plan.state_slots(count), create=create)
        if needs_two_passes(plan) and len(plan.deltas) not in self.states:
            if isinstance(plan.method, FoldMethod):
                slots = plan.state_slots(len(plan.deltas))
            else:
                slots = {p.key: Slot("F32", p.slot.shape) for p in plan.params if p.touched}
            self.scratch = SafetensorsWriter(self.folder / ".scratch", slots, create=create)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.base.close()
        for reader in self.models:
            reader.close()
        if self.prior is not None:
            self.prior.close()
        for writer in (*self.outputs.values(), *self.states.values()):
            writer.close(complete=False)
        if self.scratch is not None:
            self.scratch.close(complete=False)
            if self.ranks.main:
                self.scratch.path.unlink(missing_ok=True)

    def merge(self) -> dict[str, Any]:
        plan = self.plan
        thresholds = self._measure() if isinstance(plan.method, JointMethod) and plan.method.measured else None
        two = needs_two_passes(plan)
        touched = [param for param in plan.params if param.touched]
        untouched = [param for param in plan.params if param.mode != "tied" and not param.touched]
        if plan.method.matrixwise:
            touched.sort(key=lambda param: (-param.slot.nbytes, param.key))
        visits = pieces(plan, touched)
        results = self._over(visits, lambda piece: self._first_pass(piece, thresholds, write=not two), "Merging")
        squares = tuple(math.fsum(r[0][i] for r in results) for i in range(len(plan.deltas) - self.start))
        squared_norms = (*(plan.prior.squared_norms if plan.prior else ()), *squares)
        read_out = math.sqrt(math.fsum(r[1] for r in results))
        scale = 1.0
        if two:
            mean = math.fsum(math.sqrt(s) for s in squared_norms) / len(squared_norms)
            target = mean if plan.norm == "mean" else float(plan.norm)
            scale = target / read_out if read_out > 0.0 else 0.0
            self._over(visits, lambda piece: self._second_pass(piece, scale), "Writing")
        self._over([Piece(param) for param in untouched], self._copy, "Copying")
        self._check_complete()
        states = self.ranks.on_main(lambda: tuple(self._name_state(c, w) for c, w in self.states.items()))
        return {"squared_norms": squared_norms, "merged_norm": read_out * scale, "scale": scale, "states": states}

    def _check_complete(self) -> None:
        """Every tensor of every file has been written, once, by some rank; all of it is on the disk."""
        writers = [*self.outputs.values(), *self.states.values()]
        everyone = self.ranks.together(lambda: [writer.missing() for writer in writers])
        others = [missing for rank, missing in enumerate(everyone) if rank != self.ranks.rank]
        for i, writer in enumerate(writers):
            writer.count_others([missing[i] for missing in others])
        self.ranks.each(lambda: _close_all(writers))

    def _name_state(self, count: int, writer: SafetensorsWriter) -> KeptState:
        sha256, nbytes = sha256_file(writer.path), writer.path.stat().st_size
        state = KeptState(count, sha256, nbytes)
        writer.path.rename(self.folder / state.file)
        return state

    def _over(self, visits: Sequence[Piece], work: Callable[[Piece], Any], title: str) -> list[Any]:
        """Run `work` over the visits, this rank's share on its pool; all results in the visits' order."""
        owners = shares([self._cost(piece) for piece in visits], self.ranks.world)
        mine = [i for i, owner in enumerate(owners) if owner == self.ranks.rank]
        parts = self.ranks.together(lambda: self._on_pool([visits[i] for i in mine], work, title))
        cursors = [iter(part) for part in parts]
        return [next(cursors[owner]) for owner in owners]

    def _cost(self, piece: Piece) -> float:
        """Relative time of a visit: m n min(m, n) of its matrices for spectral methods, bytes otherwise."""
        if not self.plan.method.matrixwise:
            return float(piece.nbytes)
        shapes = [block.shape(piece.shape) for block in piece.param.blocks if block.matrix]
        return piece.nbytes + float(sum(math.prod(shape) * min(shape) for shape in shapes))

    def _on_pool(self, visits: Sequence[Piece], work: Callable[[Piece], Any], title: str) -> list[Any]:
        import torch
        from huggingface_hub.utils import tqdm

        if not visits:
            return []
        total = sum(piece.nbytes for piece in visits)
        # the number of threads is a property of each thread: what the main thread set does not reach those of the pool
        pool = ThreadPoolExecutor(worker_count(), "hfmerge", torch.set_num_threads, (1,))
        bar = tqdm(
            total=total, desc=title, unit="B", unit_scale=True, name="hfmerge", disable=not self.ranks.main or None
        )
        try:
            results = []
            for piece, result in zip(visits, _windowed(pool, work, visits), strict=True):
                results.append(result)
                bar.update(piece.nbytes)
            return results
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()

    def base_value(self, piece: Piece) -> Tensor:
        """The base's float32 value in the output's rows, in memory of its own."""
        param = piece.param
        value = self.base.value(param.key, piece.rows)
        vocabulary = self.plan.vocabulary
        if vocabulary is not None and vocabulary.added and param.vocab_axis is not None:
            rows = [model.new_value(param.key) for model in self.models]
            value = extended_base(vocabulary, value, rows, param.vocab_axis)
        return value

    def task_vector(self, model: int, piece: Piece, base: Callable[[], Tensor]) -> TaskVector | None:
        """One model's change, or None where it has none."""
        aligned = None
        if self.plan.vocabulary is not None and piece.param.vocab_axis is not None:
            aligned = (self.plan.vocabulary, model, piece.param.vocab_axis)
        return self.models[model].task_vector(piece.param.key, base, aligned, piece.rows)

    def _measure(self) -> list[float]:
        """One threshold per model from its histogram over all merged parameters; exact integer sums."""
        import torch

        from hfmerge.methods.trimming import BITS, magnitude_histogram

        method = self.plan.method
        assert isinstance(method, JointMethod)
        totals = [torch.zeros(1 << BITS, dtype=torch.int64) for _ in self.models]

        lock = threading.Lock()

        def count(piece: Piece) -> None:
            base = _once(lambda: self.base_value(piece))
            for i, total in enumerate(totals):
                tau = self.task_vector(i, piece, base)
                part = magnitude_histogram(torch.zeros(piece.shape) if tau is None else tau.to_dense())
                with lock:
                    total.add_(part)

        self._over([Piece(param) for param in self.plan.params if param.mode == "merge"], count, "Measuring")
        if self.ranks.world > 1:
            parts = self.ranks.gather(totals)
            totals = [torch.stack([part[i] for part in parts]).sum(0) for i in range(len(self.models))]
        return [method.settle(total) for total in totals]

    def _first_pass(self, piece: Piece, thresholds: list[float] | None, *, write: bool) -> tuple[list[float], float]:
        """Fold or combine one visit; its squared norms per new model, and that of its read-out."""
        base = _once(lambda: self.base_value(piece))
        if isinstance(self.plan.method, FoldMethod):
            squares, carries = self._fold(piece, self.plan.method, base)
            changes = [self.plan.method.emit(carry, self.plan.weights) for carry in carries]
        else:
            squares, changes = self._combine(piece, base, thresholds)
        total = math.fsum(_finite_square(change) for change in changes)
        if write:
            self._write(piece, base(), changes, 1.0)
        elif self.scratch is not None and isinstance(self.plan.method, JointMethod):
            import torch

            whole = torch.empty(piece.shape)
            for block, change in zip(piece.param.blocks, changes, strict=True):
                block.put(whole, change.to_dense())
            self._put(self.scratch, piece.param.key, whole, piece)
        return squares, total

    def _fold(self, piece: Piece, method: FoldMethod, base: Callable[[], Tensor]) -> tuple[list[float], list[Carry]]:
        param, count = piece.param, len(self.models)
        carries: list[Carry | None] = [self._prior_carry(method, piece, block) for block in param.blocks]
        squares = []
        for i in range(self.start, count):
            tau = self.task_vector(i, piece, base)
            squares.append(self._squared_norm(i, piece, tau))
            for b, block in enumerate(param.blocks):
                part = zero(block.shape(piece.shape)) if tau is None else cut(tau, block)
                carry = method.step(carries[b], part, self.plan.weights[i], matrix=block.matrix)
                carries[b] = _settled(method, param, block, i + 1, carry)
            if i + 1 in self.states:
                self._store(self.states[i + 1], piece, carries, i + 1)
        if self.start == count and count in self.states:
            self._store(self.states[count], piece, carries, count)
        if self.scratch is not None:
            self._store(self.scratch, piece, carries, count)
        return squares, [carry for carry in carries if carry is not None]

    def _combine(
        self, piece: Piece, base: Callable[[], Tensor], thresholds: list[float] | None
    ) -> tuple[list[float], list[TaskVector]]:
        method = self.plan.method
        assert isinstance(method, JointMethod)
        squares = []
        for i in range(len(self.models)):
            tau = self.task_vector(i, piece, base)
            squares.append(self._squared_norm(i, piece, tau))
        changes = []
        for block in piece.param.blocks:
            taus = _LazyTaus(self, piece, block, base)
            changes.append(method.combine(taus, self.plan.weights, partial(_taken, block, base), thresholds))
        return squares, changes

    def _squared_norm(self, model: int, piece: Piece, tau: TaskVector | None) -> float:
        """Of one model's change; not a number means that the model or the base is not, which is refused by name.

        Where the recipe allows such values they count as zero in norms, but no matrix with them can be taken apart.
        """
        if tau is None:
            return 0.0
        square = tau.squared_norm()
        if math.isfinite(square):
            return square
        key, method = piece.param.key, self.plan.method
        if not self.plan.recipe.allow_nonfinite:
            self.models[model].check_finite(key)
            self.base.check_finite(key)
        elif method.matrixwise and any(block.matrix for block in piece.param.blocks):
            raise NonFiniteError(
                f"{self.models[model].delta.source.pinned.label}: {key} holds NaN or Inf, and {method.name} cannot "
                "take "
                "such a matrix apart; repair the source, or leave the tensor out with `exclude`."
            )
        return _finite_square(tau)

    def _prior_carry(self, method: FoldMethod, piece: Piece, block: Block) -> Carry | None:
        if self.prior is None or self.start == 0:
            return None
        param = piece.param
        names = method.carry_ranks(block.shape(param.slot.shape), list(param.ranks[: self.start]))
        if all(rank == 0 for rank in param.ranks[: self.start]):
            return {name: zero(block.shape(piece.shape)) for name in names}
        return {name: self.prior.read(state_name(param, block, name), piece.rows) for name in names}

    def _store(self, writer: SafetensorsWriter, piece: Piece, carries: Sequence[Carry | None], count: int) -> None:
        param = piece.param
        if all(rank == 0 for rank in param.ranks[:count]):
            return
        for block, carry in zip(param.blocks, carries, strict=True):
            assert carry is not None
            for name, value in carry.items():
                for suffix, tensor in value.tensors().items():
                    self._put(writer, f"{state_name(param, block, name)}{suffix}", tensor, piece)

    def _put(self, writer: SafetensorsWriter, name: str, tensor: Tensor, piece: Piece) -> None:
        writer.write(name, tensor, None if piece.rows is None else piece.rows[0])

    def _second_pass(self, piece: Piece, scale: float) -> None:
        method, count, param = self.plan.method, len(self.models), piece.param
        if isinstance(method, FoldMethod):
            kept = self.scratch or self.states[count]
            changes = []
            for block in param.blocks:
                carry: Carry = {}
                slots = carry_slots(method, param, block, count)
                for name in method.carry_ranks(block.shape(param.slot.shape), list(param.ranks)):
                    stem = state_name(param, block, name)
                    suffixes = [s for s in ("", ".up", ".down") if f"{stem}{s}" in slots]
                    carry[name] = from_tensors({s: kept.read(f"{stem}{s}", piece.rows) for s in suffixes})
                changes.append(method.emit(carry, self.plan.weights))
        else:
            assert self.scratch is not None
            whole = self.scratch.read(param.key, piece.rows)
            changes = [Dense(block.take(whole)) for block in param.blocks]
        self._write(piece, self.base_value(piece), changes, scale)

    def _write(self, piece: Piece, base: Tensor, changes: Sequence[TaskVector], scale: float) -> None:
        """`base + scale * change` into the output; `base` is used up."""
        for block, change in zip(piece.param.blocks, changes, strict=True):
            if change.is_zero:
                continue
            if block.is_whole:
                base.add_(change.to_dense(), alpha=scale)
            else:
                block.put(base, block.take(base).add(change.to_dense(), alpha=scale))
        self._emit(piece, base)

    def _emit(self, piece: Piece, value: Tensor) -> None:
        import torch

        param = piece.param
        cast = value.to(getattr(torch, TORCH_NAMES[param.slot.dtype]))
        if not self.plan.recipe.allow_nonfinite:
            checked = cast.float() if param.slot.dtype == "F16" else value
            if not math.isfinite(squared_norm(checked)) and not bool(checked.isfinite().all()):
                raise NonFiniteError(
                    f"{param.key}: the merged values do not fit {DTYPE_NAMES[param.slot.dtype]}; choose a wider dtype "
                    "or "
                    "a smaller norm."
                )
        for target in (param, *self.tied.get(param.key, ())):
            self._put(self.outputs[target.file], target.key, cast, piece)

    def _copy(self, piece: Piece) -> None:
        param = piece.param
        entry = self.plan.base.tensors[param.key]
        grown = entry.shape != param.slot.shape
        if entry.floating and (grown or entry.dtype != param.slot.dtype):
            self._emit(piece, self.base_value(piece))
            return
        stored = self.base.stored(param.key)
        for target in (param, *self.tied.get(param.key, ())):
            self.outputs[target.file].write(target.key, stored)


class _LazyTaus(Sequence[TaskVector]):
    """The task vectors of one block, each read anew when indexed, so that memory does not grow with the models."""

    def __init__(self, job: _Job, piece: Piece, block: Block, base: Callable[[], Tensor]):
        self.job, self.piece, self.block, self.base = job, piece, block, base

    def __len__(self) -> int:
        return len(self.job.models)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tau = self.job.task_vector(index, self.piece, self.base)
        return zero(self.block.shape(self.piece.shape)) if tau is None else cut(tau, self.block)


class _StateReader:
    """Reads carried task vectors from a state file into fresh, aligned memory."""

    def __init__(self, path: Path):
        pinned = Pinned(Place(str(path), None, None, path.parent), path.name, None, path.parent, {})
        self._reader = Reader(Source(str(path), pinned, "full", {}, None, safetensors_entries(path)))

    def read(self, stem: str, rows: Rows | None) -> TaskVector:
        """One carried task vector, or some rows of a dense one."""
        names = self._reader.source.tensors
        suffixes = [suffix for suffix in ("", ".up", ".down") if f"{stem}{suffix}" in names]
        return from_tensors({suffix: self._reader.stored(f"{stem}{suffix}", rows) for suffix in suffixes})

    def close(self) -> None:
        self._reader.close()


def _settled(method: FoldMethod, param: Param, block: Block, count: int, carry: Carry) -> Carry:
    """A carry in exactly the form its state file would give back: dtype, contiguous, factored or dense as planned."""
    import torch

    shape = block.shape(param.slot.shape)
    result: Carry = {}
    for name, rank in method.carry_ranks(shape, list(param.ranks[:count])).items():
        value = carry[name].to(getattr(torch, TORCH_NAMES[method.carry_dtype]))
        if rank is None or not isinstance(value, LowRank):
            result[name] = Dense(value.to_dense().contiguous())
        else:
            result[name] = LowRank(value.up.contiguous(), value.down.contiguous())
    return result


def _finite_square(change: TaskVector) -> float:
    """Squared norm of the finite elements, whose squares may exceed float32."""
    square = change.squared_norm()
    if math.isfinite(square):
        return square
    return float(change.to_dense().double().nan_to_num(0.0, 0.0, 0.0).square().sum())


def _close_all(writers: Sequence[SafetensorsWriter]) -> None:
    for writer in writers:
        writer.close()


def _once(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Call `make` at the first use only; the value is then shared within one parameter's visit."""
    held: list[Tensor] = []

    def get() -> Tensor:
        if not held:
            held.append(make())
        return held[0]

    return get


def _taken(block: Block, base: Callable[[], Tensor]) -> Tensor:
    """The base's values in one block."""
    return block.take(base())


def _windowed(pool: ThreadPoolExecutor, work: Callable[[Piece], Any], visits: Sequence[Piece]) -> Iterable[Any]:
    """Results in order, with at most a few visits beyond the running ones submitted."""
    ahead: list[Future[Any]] = []
    width = worker_count() + 1
    try:
        for piece in visits:
            ahead.append(pool.submit(work, piece))
            if len(ahead) >= width:
                yield ahead.pop(0).result()
        while ahead:
            yield ahead.pop(0).result()
    finally:
        for future in ahead:
            future.cancel()


def _finish_folder(plan: Plan, folder: Path) -> dict[str, str]:
    """Heads, side files and the index; then every file's digest."""
    for model, head in plan.heads:
        write_head(head, plan.deltas[model].source, folder)
    floats = {p.slot.dtype for p in plan.params if plan.base.tensors[p.key].floating}
    changes: dict[str, Any] = {}
    if len(floats) == 1:
        changes = {"torch_dtype": None, "dtype": DTYPE_NAMES[floats.pop()]}
    if plan.vocabulary is not None and plan.vocabulary.added:
        text = plan.base.config.get("text_config")
        if "vocab_size" not in plan.base.config and isinstance(text, dict):
            changes["text_config"] = {**text, "vocab_size": plan.vocabulary.size}
        else:
            changes["vocab_size"] = plan.vocabulary.size
    copy_side_files(plan.base.pinned, list(plan.side_files), folder, changes)
    if plan.vocabulary is not None and plan.vocabulary.added:
        write_tokenizer(plan.vocabulary, plan.base.pinned, folder)
    if len(plan.slots()) > 1:
        total = sum(param.slot.nbytes for param in plan.params)
        write_index(folder, {param.key: param.file for param in plan.params}, total)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: sha256_file(folder / name) for name in files if not name.startswith(f"{STATE_FOLDER}/")}
