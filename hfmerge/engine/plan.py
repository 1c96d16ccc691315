"""The plan as data: every tensor of the output, every model's change of it, and what carried states hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hfmerge.checkpoint.delta import Delta
from hfmerge.checkpoint.heads import Head
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.vocabulary import MergedVocabulary
from hfmerge.checkpoint.writer import Slot
from hfmerge.errors import LedgerError
from hfmerge.hashing import is_digest
from hfmerge.methods import FoldMethod, MergeMethod
from hfmerge.recipe.learning import HELD_BYTES
from hfmerge.recipe.recipe import Recipe
from hfmerge.recipe.values import FITS
from hfmerge.recipe.weights import Weight, weight_at
from hfmerge.task_vector import Segment


SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

DTYPE_NAMES = {short: long for long, short in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class BaseLayout:
    """The part of the base's layout that a run needs.

    Attributes:
        architecture: class that was built, "BertForSequenceClassification"; what config.json says if none could be.
        tied, missing, unexpected: as of `checkpoint.layout.layout.Layout`.
    """

    architecture: str
    tied: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True)
class Param:
    """One tensor of the output.

    Attributes:
        key: stored key, the base's.
        file: output file.
        slot: dtype and shape in the output.
        mode: "merge", "copy" (the base's value, cast to the output's dtype if floating), or "tied" (the value of
            `owner`).
        owner: the parameter a tied copy follows.
        blocks: the pieces of the tensor that methods get: real matrices, or the whole tensor.
        ranks: per model, rank of its change: 0 none, None dense.
        vocab_axis: axis with one row per token, if any.
        leaving: per model that is subtracted from the prior state, rank of its change, as in `ranks`.
    """

    key: str
    file: str
    slot: Slot
    mode: str
    owner: str | None = None
    blocks: tuple[Segment, ...] = ()
    ranks: tuple[int | None, ...] = ()
    vocab_axis: int | None = None
    leaving: tuple[int | None, ...] = ()

    @property
    def touched(self) -> bool:
        """True when some model changes it."""
        return self.mode == "merge" and any(rank != 0 for rank in self.ranks)


@dataclass(frozen=True)
class Prior:
    """A carried state to continue from, in the safetensors file `path`.

    Attributes:
        count: the state replaces the first `count` models of the plan.
        path: the file.
        squared_norms: squared norms of the task vectors of these models.
        held: the models in the state, as indices into the plan's models, or `-1 - j` for `Plan.leaving[j]`. It is set
            for the state of an additive fold that also holds models which leave, or that has another order. Empty:
            the first `count` models, in order.
    """

    count: int
    path: Path
    squared_norms: tuple[float, ...]
    held: tuple[int, ...] = ()

    def ranks(self, param: Param) -> list[int | None]:
        """Ranks of a parameter's changes by the models in the state, in its order."""
        if not self.held:
            return list(param.ranks[: self.count])
        return [param.ranks[i] if i >= 0 else param.leaving[-1 - i] for i in self.held]


@dataclass(frozen=True)
class Estimate:
    """Estimated needs of the work, in bytes and seconds.

    `download` goes to the Hugging Face cache. `stream` is read from the Hub and not kept. `sources` is an upper bound
    for the copies of sources, and a part of `disk`. `learning` is the part of `seconds` that learned weights take on
    the CPU at most.
    """

    download: int
    stream: int
    read: int
    output: int
    state: int
    disk: int
    memory: int
    seconds: float
    sources: int = 0
    learning: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will do. `executor.run` runs a plan; `plan_json` writes and reads it.

    A plan is plain data. It holds no open file and no built model.
    `leaving` are models that the prior state holds and that are subtracted from it, with their weights.
    `untied` are the models for which the base is untied (see `engine.untying`); `base` then has all ends of its ties.
    `chosen` says of which model the files of a choice are (see `checkpoint.behaviour`), -1 for the base. `differing`
    says for each model in what it is used otherwise than the base.
    """

    recipe: Recipe
    method: MergeMethod
    base: Model
    base_layout: BaseLayout = field(repr=False)
    deltas: tuple[Delta, ...] = field(repr=False)
    params: tuple[Param, ...] = field(repr=False)
    heads: tuple[tuple[int, Head], ...]
    vocabulary: MergedVocabulary | None = field(repr=False)
    side_files: tuple[str, ...]
    keep: tuple[int, ...]
    prior: Prior | None
    estimate: Estimate
    warnings: tuple[str, ...]
    leaving: tuple[Delta, ...] = field(default=(), repr=False)
    leaving_weights: tuple[Weight, ...] = ()
    untied: tuple[int, ...] = ()
    chosen: Mapping[str, int] = field(default_factory=dict)
    differing: tuple[tuple[str, ...], ...] = ()

    def weights_of(self, param: Param) -> tuple[float, ...]:
        """The models' weights in one merged parameter, in order."""
        return tuple(weight_at(entry.weight, param.key) for entry in self.recipe.models)

    @property
    def subtracted(self) -> tuple[int, ...]:
        """Models that stay in the carried state and are approximately subtracted when the merge is read out."""
        return tuple(i for i, entry in enumerate(self.recipe.models) if entry.subtracted)

    @property
    def start(self) -> int:
        """Number of models that the prior state replaces."""
        return self.prior.count if self.prior else 0

    @property
    def read(self) -> tuple[Delta, ...]:
        """Models whose weights are read, in order; models that leave come last. A leaving adapter is not read."""
        some = [delta for i, delta in enumerate(self.deltas) if i >= self.start or i in self.subtracted]
        dense = [
            delta
            for j, delta in enumerate(self.leaving)
            if any(p.leaving and p.leaving[j] is None for p in self.params)
        ]
        return (*some, *dense)

    @property
    def sources(self) -> tuple[Model, ...]:
        """The base, all models and those that leave, each followed by the model beneath it, if any."""
        named = [self.base, *(delta.source for delta in (*self.deltas, *self.leaving))]
        return tuple(one for source in named for one in (source, source.beneath) if one is not None)

    @property
    def copies(self) -> dict[str, Path]:
        """`org/name@COMMIT` -> folder that is read in its place when models are opened again (see
        `hub.download.pin`)."""
        snapshots = [source.snapshot for source in self.sources]
        return {f"{p.name}@{p.commit}": p.folder for p in snapshots if p.commit is not None and p.folder is not None}

    @property
    def norm(self) -> str | float:
        """The norm to which the merged task vector is rescaled; see `MethodChoice.norm`."""
        return self.recipe.method.norm

    def fits(self, param: Param) -> bool:
        """Whether `norm` fits the scale of a parameter: of one that is made of matrices."""
        return self.norm in FITS and all(block.matrix for block in param.blocks)

    @property
    def choices(self) -> list[str]:
        """One line of text for each option of the method that the sources decided."""
        found = [
            all(rank is not None for rank in param.ranks)
            for param in self.params
            if param.touched
            for block in param.blocks
            if block.matrix
        ]
        return [*self.method.choices(found.count(True), found.count(False)), *self._learning()]

    @property
    def learning_bytes(self) -> tuple[int, int]:
        """Memory beside the activations, and scratch space on the disk, that learning needs; zero without it."""
        learn = self.recipe.learn
        if learn is None:
            return 0, 0
        size = 4 * sum(math.prod(param.slot.shape) for param in self.params if param.touched)
        parts = size * len(self.deltas)
        # the base under all heads, the merged values, their gradient; with consolidation also values and information
        memory = min(HELD_BYTES, parts) + size * (5 if learn.ewc else 3)
        return memory, max(0, parts - HELD_BYTES) if self.method.in_parts else 0

    def _learning(self) -> list[str]:
        """What learning the weights needs, if they are learned."""
        learn = self.recipe.learn
        if learn is None:
            return []
        rows = f"{learn.replay.rows} replay rows of each model" if learn.replays else "no replay rows"
        return [
            f"learn: {learn.loss}, one weight a model" + ("" if learn.groups == "model" else f" and {learn.groups}")
            + f", at most {learn.steps} steps of {learn.batch} rows a model; {rows}; about "
            f"{self.learning_bytes[0] / 1e9:.2f} GB of memory beside the activations"
        ]  # fmt: skip

    def slots(self) -> dict[str, dict[str, Slot]]:
        """Output file -> tensor -> slot."""
        files: dict[str, dict[str, Slot]] = {}
        for param in self.params:
            files.setdefault(param.file, {})[param.key] = param.slot
        return files

    def state_slots(self, count: int) -> dict[str, Slot]:
        """Tensors of the carried state after the first `count` models."""
        slots: dict[str, Slot] = {}
        fold = self.method.fold
        if fold is None:
            return slots
        for param in self.params:
            if param.mode != "merge" or all(rank == 0 for rank in param.ranks[:count]):
                continue
            for block in param.blocks:
                slots |= carry_slots(fold, param, block, count)
        return slots


def carry_slots(method: FoldMethod, param: Param, block: Segment, count: int) -> dict[str, Slot]:
    """State tensors of one block after `count` models, by their name in the state file."""
    slots = {}
    forms = method.carry_form(block.shape(param.slot.shape), param.ranks[:count], matrix=block.matrix)
    for name, form in forms.items():
        stem = state_name(param, block, name)
        if form.rank is None:
            slots[stem] = Slot(form.dtype, form.shape)
        elif form.rank:
            slots[f"{stem}.up"] = Slot(form.dtype, (form.shape[0], form.rank))
            slots[f"{stem}.down"] = Slot(form.dtype, (form.rank, form.shape[1]))
    return slots


def state_name(param: Param, block: Segment, name: str) -> str:
    """Name of one carried task vector in a state file."""
    return f"{param.key}#{block.label}:{name}" if block.label else f"{param.key}:{name}"


def folder_of(file: str) -> str:
    """The folder of a module's weight file, with a slash, with which the keys of its tensors begin; "" in the root."""
    return file[: file.rfind("/") + 1]


def needs_two_passes(plan: Plan) -> bool:
    """True when a number over all parameters is needed before anything can be written."""
    return plan.norm not in ("none", "fit-matrix")


@dataclass(frozen=True)
class KeptState:
    """A carried state that lies beside the weights: after how many models, its digest and bytes."""

    count: int
    sha256: str
    nbytes: int

    @property
    def file(self) -> str:
        """Its path in the repository."""
        return state_file(self.sha256)


def checked_digest(digest: object) -> str:
    """A SHA-256 that names a file beside a merge. Raises LedgerError."""
    if not is_digest(digest):
        raise LedgerError(
            f"{digest!r} is not a SHA-256, which names a file beside a merge; the ledger is damaged or forged."
        )
    return str(digest)


def state_file(digest: str) -> str:
    """Path in the repository of what is carried from step to step."""
    return f"merge_state/{checked_digest(digest)}.safetensors"
