"""The merges that learning chooses from: base plus weighted changes, one weight for each model and group of layers.

`theta_p = theta_0,p + sum_t c_t d_t,p` with `c = M_p a`, where `a` are the weights that hold for parameter p, and M_p
and the parts d follow from the method: the changes themselves and the identity for task arithmetic, or `L^-T` of
Gram-Schmidt for MDM-OC; of other methods (`MergeMethod.parts`) what each change adds, and the identity. So the
gradient of a loss in the weights is `M_p^T <grad_p, d_t,p>`, summed over the parameters of a group: it needs the
gradient in the merged model alone, and each part once more. What does not fit the memory that is given is read again
for every step: changes from their files, parts that had to be computed from a scratch file. Factors stay factors, and
no model but the merged one is ever held.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hfmerge.checkpoint.reader import Reader
from hfmerge.checkpoint.streaming.session import leave_session, take_session
from hfmerge.checkpoint.writer import disk_errors
from hfmerge.engine.plan import Param, Plan
from hfmerge.engine.plan_readers import open_deltas
from hfmerge.errors import UnsupportedError
from hfmerge.methods import MergeMethod
from hfmerge.recipe.learning import Groups
from hfmerge.recipe.weights import PatternWeights, Weight, weight_at
from hfmerge.task_vector import Dense, LowRank, Segment, TaskVector, cut, from_tensors, zero


if TYPE_CHECKING:
    from torch import Tensor


_T = TypeVar("_T")

_TILE = 1 << 16
"""Elements that are multiplied and summed up at a time, in a core's cache."""


class Space:
    """All merges of a plan's models, by their weights; leaving the `with` block closes the files.

    Args:
        plan: of a method that is linear in the weights.
        groups: what has a weight of its own for each model (see `Learning`).
        budget: bytes of parts that may be held between steps.
        scratch: folder for parts that were computed and do not fit; None: that of temporary files.

    Attributes:
        groups: names of the groups of parameters, prefixes of their names; "" stands for all.
        params: the parameters that some model changes.

    Raises:
        UnsupportedError: the method is not linear in the weights, or vocabularies are being united.
    """

    def __init__(self, plan: Plan, *, groups: Groups, budget: int = 0, scratch: Path | None = None):
        if plan.vocabulary is not None and plan.vocabulary.added:
            raise UnsupportedError(
                "learn: does not work where `vocabulary: union` adds tokens; set `vocabulary: base`."
            )
        self.plan = plan
        self.params = tuple(param for param in plan.params if param.touched)
        names = [group_of(param.key, groups) for param in self.params]
        self.groups = tuple(dict.fromkeys(names))
        self._group = {p.key: self.groups.index(name) for p, name in zip(self.params, names, strict=True)}
        self._streaming = take_session(plan.sources) if plan.recipe.stream else None
        self._base = Reader(plan.base, self._streaming)
        self._models = open_deltas(plan, plan.deltas, self._streaming)
        self._held: dict[str, list[TaskVector | None]] = {}
        for param in self.params:
            need = sum(_bytes(param, rank) for rank in plan.method.part_ranks(param.slot.shape, param.ranks))
            if need <= budget:
                budget -= need
                self._held[param.key] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="hfmerge-learning-", dir=scratch)
        self._mixing: dict[tuple[str, Segment], Tensor] = self._mixings()

    def __enter__(self) -> Space:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._scratch.cleanup()
        self._base.close()
        for reader in self._models:
            reader.close()
        if self._streaming is not None and kind is None:
            # the run that merges with the weights found goes on with it
            leave_session(self._streaming)
        elif self._streaming is not None:
            self._streaming.close()

    def base(self, param: Param) -> Tensor:
        """The base's float32 value, in memory of its own."""
        return self._base.value(param.key)

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        """The merged float32 values of all changed parameters.

        Args:
            weights: float64 (models, groups).
        """
        return {param.key: self._merged(param, weights[:, self._group[param.key]]) for param in self.params}

    def pulled_back(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradient in the weights, float64 (models, groups), from that in the merged values."""
        import torch

        found = torch.zeros(len(self._models), len(self.groups), dtype=torch.float64)
        for param in self.params:
            gradient = gradients.get(param.key)
            if gradient is None:
                continue
            parts = self._parts(param)
            for block in param.blocks:
                part = Dense(block.take(gradient).contiguous())
                inner = [0.0 if one is None else _inner(cut(one, block), part) for one in parts]
                mixing = self._mixing[param.key, block]
                found[:, self._group[param.key]] += mixing.T @ torch.tensor(inner, dtype=torch.float64)
        return found

    def start(self, weights: Sequence[Weight]) -> Tensor:
        """Weights as they are written, as float64 (models, groups); of a group what holds for its first parameter."""
        import torch

        first = [next(p.key for p in self.params if self._group[p.key] == g) for g in range(len(self.groups))]
        return torch.tensor([[weight_at(weight, key) for key in first] for weight in weights], dtype=torch.float64)

    def weights_of(self, values: Tensor, model: int, digits: int) -> Weight:
        """One model's weights as a recipe writes them, rounded to so many decimal digits."""
        found = [round(float(value), digits) + 0.0 for value in values[model]]
        if len(set(found)) == 1:
            return found[0]
        names = {param.key for param in self.params}
        patterns = [group if group in names else f"{group}.*" for group in self.groups]
        pairs = list(zip(patterns, found, strict=True))
        return PatternWeights((*pairs, ("*", found[-1])))

    def _merged(self, param: Param, weights: Tensor) -> Tensor:
        value = self.base(param)
        parts = self._parts(param)
        for block in param.blocks:
            shares = (self._mixing[param.key, block] @ weights).tolist()
            whole = value if block.is_whole else block.take(value).contiguous()
            for part, share in zip(parts, shares, strict=True):
                if part is not None and share != 0.0:
                    change = cut(part, block)
                    if isinstance(change, LowRank):
                        whole.addmm_(change.up, change.down, alpha=share)
                    else:
                        whole.add_(change.to_dense(), alpha=share)
            if not block.is_whole:
                block.put(value, whole)
        return value

    def _parts(self, param: Param) -> Sequence[TaskVector | None]:
        """What the models' weights multiply, as wholes of the parameter; None for nothing."""
        held = self._held.get(param.key)
        if held:
            return held
        if not self.plan.method.in_parts:
            parts = self._taus(param)
        elif held is None and (place := self._place(param)).exists():
            return _loaded(place, len(self._models))
        else:
            parts = self._solved(param, self.plan.method)
            if held is None:
                _save(parts, place)
        if held is not None:
            held.extend(parts)
        return parts

    def _place(self, param: Param) -> Path:
        return Path(self._scratch.name) / f"{self.params.index(param)}.safetensors"

    def _solved(self, param: Param, method: MergeMethod) -> list[TaskVector | None]:
        """What each model adds by a method that has to compute it."""
        import torch

        taus = self._taus(param)
        wholes: list[TaskVector | None] = [None] * len(taus)
        for block in param.blocks:
            shape = block.shape(param.slot.shape)
            found = method.parts(
                [zero(shape) if tau is None else cut(tau, block) for tau in taus], matrix=block.matrix
            )
            if block.is_whole:
                return [None if tau is None else part for tau, part in zip(taus, found, strict=True)]
            for i, part in enumerate(found):
                if taus[i] is not None:
                    whole = wholes[i] = wholes[i] or Dense(torch.zeros(param.slot.shape))
                    block.put(whole.to_dense(), part.to_dense())
        return wholes

    def _taus(self, param: Param) -> list[TaskVector | None]:
        base: list[Tensor] = []

        def value() -> Tensor:
            if not base:
                base.append(self.base(param))
            return base[0]

        return [reader.task_vector(param.key, value) for reader in self._models]

    def _mixings(self) -> dict[tuple[str, Segment], Tensor]:
        """M of every block."""
        import torch

        method, count = self.plan.method, len(self._models)
        if not method.learnable:
            raise UnsupportedError(f"learn: {method.name} is not linear in the models' weights; take mdm_oc or gram.")

        def mixing(numbers: Sequence[float] | None) -> Tensor | None:
            rows = method.mixing(count, numbers)
            return None if rows is None else torch.tensor(rows, dtype=torch.float64)

        places = [(param, block) for param in self.params for block in param.blocks]
        same = mixing(None)
        examined: dict[tuple[str, Segment], list[float]] = {}
        if same is None:
            examined = {(param.key, block): self._examined(param, block) for param, block in places}
            if method.measure(count) is None:
                return {place: _some(mixing(values)) for place, values in examined.items()}
            same = _some(mixing(torch.tensor(list(examined.values()), dtype=torch.float64).sum(0).tolist()))
        return {(param.key, block): same for param, block in places}

    def _examined(self, param: Param, block: Segment) -> list[float]:
        shape = block.shape(param.slot.shape)
        return _some(
            self.plan.method.examine([zero(shape) if tau is None else cut(tau, block) for tau in self._parts(param)])
        )


def group_of(name: str, groups: Groups) -> str:
    """The group that a parameter belongs to; its layer is its name up to the first number, else its first word."""
    if groups != "layer":
        return name if groups == "parameter" else ""
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return numbered[0] if numbered else name.partition(".")[0]


def _some(value: _T | None) -> _T:
    assert value is not None
    return value


def _inner(part: TaskVector, gradient: Dense) -> float:
    """As `TaskVector.inner`, with sums of dense tiles in float32: gradients of a few rows are no more exact."""
    import torch

    if isinstance(part, LowRank):
        return part.inner(gradient)
    pieces = zip(part.to_dense().view(-1).split(_TILE), gradient.value.view(-1).split(_TILE), strict=True)
    return math.fsum(float(torch.dot(one, other)) for one, other in pieces)


def _save(parts: Sequence[TaskVector | None], place: Path) -> None:
    from safetensors.torch import save_file

    pairs = [(i, part.tensors()) for i, part in enumerate(parts) if part is not None]
    with disk_errors(place):
        save_file({f"{i}{name}": value.contiguous() for i, some in pairs for name, value in some.items()}, place)


def _loaded(place: Path, count: int) -> list[TaskVector | None]:
    """What `_save` saved of so many models."""
    from safetensors.torch import load_file

    tensors: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, value in load_file(place).items():
        number, dot, rest = name.partition(".")
        tensors[int(number)][dot + rest] = value
    return [from_tensors(some) if some else None for some in tensors]


def _bytes(param: Param, rank: int | None) -> int:
    """Float32 bytes of one model's change."""
    size = math.prod(param.slot.shape)
    return 4 * (size if rank is None else rank * sum(param.slot.shape))
