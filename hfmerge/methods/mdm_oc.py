"""MDM-OC-style merging: task vectors made orthogonal by Gram-Schmidt in their order of arrival, then a weighted sum.

With `tau_t` the task vectors, `d_t = tau_t - sum_{j<t} <tau_t, d_j> / ||d_j||^2 d_j` and `a_t` the models' weights the
merged change is `sum_t a_t d_t`. The vectors `d_t` are never formed: with the Gram matrix `<tau_s, tau_t> = L D L^T`
they are `L^-1 tau`, so the sum is `sum_t c_t tau_t` with `L^T c = a`. Only T x T numbers are needed, which are sums
over elements: of a tensor read tile by tile, of factors without multiplying them out, of a whole model.

Source: the abstract of arXiv 2507.20997 and what others say of it. Its text was not available, so this is a method in
its style, and no reproduction is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from hfmerge.methods.base import NOWHERE, JointMethod, Measure, Site, Survey
from hfmerge.methods.declare import method
from hfmerge.task_vector import Dense, LowRank, TaskVector, zero


if TYPE_CHECKING:
    from torch import Tensor

DEPENDENT = 2.0**-40
"""||d||^2 / ||tau||^2 up to which a task vector counts as a combination of those before it: 2^-20 of its norm, eight
times the last place of float32, to which task vectors are rounded; the float64 Gram matrix is rounded far below it."""
_PIECE = 1 << 14
"""Elements computed with at a time, such that those of all models stay in a core's cache in float64."""
_HELD = 1 << 22
"""Elements of all models' task vectors of one block that are kept while it is examined; more are read again."""


@method(
    "mdm_oc",
    source="mdmoc2025",
    needs="tensor",
    laws=("identity_for_one", "scale_equivariant", "linear_in_weights"),
)
@dataclass(frozen=True)
class MdmOc(JointMethod):
    """MDM-OC-style: orthogonal parts of the changes in order of arrival, times the weights, summed.

    `scope: layer` orthogonalises every real matrix (and every other tensor) by itself, `scope: model` the whole
    changes, flattened. The first model keeps its change, each later one what is orthogonal to all before it. A change
    that is a combination of earlier ones (see `DEPENDENT`) adds nothing and gets coefficient 0 in its scope, which the
    run reports; so it is in all tensors of fewer elements than models.

    The coefficients `a_t` are the models' weights, as given or as learned. To subtract a model (`unmerge --mode
    subtract`) is to set its own to 0: what later models were made orthogonal to stays, so this is not the merge that
    never saw it, except for the last model.
    """

    subtractable: ClassVar[bool] = True
    learnable: ClassVar[bool] = True

    scope: Literal["layer", "model"] = field(
        default="layer", metadata={"help": "make changes orthogonal matrix by matrix, or over the whole model"}
    )

    def survey(self, models: int, count: int) -> Survey:
        return Products(models)

    def measure(self, models: int) -> Measure | None:
        return ModelProducts(models) if self.scope == "model" else None

    def examine(self, taus: Sequence[TaskVector]) -> list[float]:
        """The Gram matrix of a block's task vectors, row by row."""
        return gram(taus)

    def mixing(self, models: int, found: Sequence[float] | None) -> list[list[float]] | None:
        """M with `c = M a`, whose columns are the shares of unit weights; from the Gram matrix."""
        if found is None:
            return None
        columns = [coefficients(found, [float(i == t) for i in range(models)]) for t in range(models)]
        return [list(row) for row in zip(*columns, strict=True)]

    def dependent(self, found: Sequence[float]) -> tuple[int, ...]:
        return tuple(t for t, one in enumerate(_orthogonal(found)[1]) if not one)

    def combine(
        self,
        taus: Sequence[TaskVector],
        weights: Sequence[float],
        base: Callable[[], Tensor],
        found: Sequence[float] | None,
        site: Site = NOWHERE,
    ) -> TaskVector:
        """`sum_t c_t tau_t`, summed in float64, since large coefficients of nearly dependent changes cancel."""
        import torch

        total: TaskVector | None = None
        for i, share in enumerate(coefficients(self.examine(taus) if found is None else found, weights)):
            if share == 0.0:
                continue
            tau = taus[i]
            if isinstance(tau, LowRank) and (total is None or isinstance(total, LowRank)):
                term = tau.to(torch.float64).scaled(share)
                total = term if total is None else total + term
            else:
                total = Dense(_added(total, tau, share))
        if total is None:
            return zero(tuple(base().shape))
        return total if isinstance(total, LowRank) else Dense(_narrowed(total.to_dense()))

    def gap_bound(self, norms: Sequence[float], subtracted: Sequence[int]) -> float:
        """The norms of the models that stay and came after the first subtracted one, together.

        Each of these models was made orthogonal to more changes than in the merge that never saw the subtracted one.
        Two orthogonal projections of one vector differ by at most its norm. Earlier models do not change, and the term
        of the subtracted model is zero.
        """
        return math.fsum(norm for t, norm in enumerate(norms) if t > min(subtracted) and t not in subtracted)


class Products(Survey):
    """Inner products of all task vectors of one block; settles on its Gram matrix, row by row."""

    def __init__(self, models: int):
        self._models = models
        self._sums: list[list[float]] = []

    def add(self, taus: Iterable[Tensor], base: Callable[[], Tensor]) -> None:
        found = []
        for pieces in zip(*map(_pieces, taus), strict=True):
            values = [piece.double() for piece in pieces]
            found.append([_dot(first, second) for i, first in enumerate(values) for second in values[: i + 1]])
        self._sums.append([math.fsum(column) for column in zip(*found, strict=True)])

    def settle(self) -> list[float]:
        return _square([math.fsum(column) for column in zip(*self._sums, strict=True)], self._models)


class ModelProducts(Measure):
    """The Gram matrix of all task vectors over all merged parameters."""

    tiled = True

    def __init__(self, models: int):
        self._sums: list[list[float]] = [[] for _ in range(models * models)]

    def find(self, taus: Sequence[TaskVector]) -> Iterator[list[float]]:
        yield gram(taus)

    def add(self, measured: list[float]) -> None:
        for sums, value in zip(self._sums, measured, strict=True):
            sums.append(value)

    def join(self, other: ModelProducts) -> None:
        for sums, more in zip(self._sums, other._sums, strict=True):
            sums.extend(more)

    def settle(self) -> list[float]:
        return [math.fsum(sums) for sums in self._sums]


def gram(taus: Sequence[TaskVector]) -> list[float]:
    """`<tau_s, tau_t>` of a block's task vectors, T x T row by row, in float64; each is that of its pair alone."""
    if len(taus) * math.prod(taus[0].shape) <= _HELD:
        taus = list(taus)
    triangle = []
    for i in range(len(taus)):
        first = taus[i]
        triangle += [_product(first, first if i == j else taus[j]) for j in range(i + 1)]
    return _square(triangle, len(taus))


def coefficients(products: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The coefficients `c` of the task vectors from their Gram matrix and the coefficients `a` of the `d_t`."""
    lower, independent = _orthogonal(products)
    result = [weight if one else 0.0 for weight, one in zip(weights, independent, strict=True)]
    for t in reversed(range(len(result))):
        for j in range(t):
            result[j] -= lower[t][j] * result[t]
    return result


def _orthogonal(products: Sequence[float]) -> tuple[list[list[float]], list[bool]]:
    """Rows of L below the diagonal, and which task vectors are independent of those before them."""
    count = math.isqrt(len(products))
    lower: list[list[float]] = []
    squares: list[float] = []
    independent: list[bool] = []
    for t in range(count):
        inner: list[float] = []  # <tau_t, d_j>
        row: list[float] = []
        for j in range(t):
            known = math.fsum([products[t * count + j], *(-inner[i] * lower[j][i] for i in range(j))])
            inner.append(known if independent[j] else 0.0)
            row.append(known / squares[j] if independent[j] else 0.0)
        square = math.fsum([products[t * count + t], *(-inner[j] * row[j] for j in range(t))])
        independent.append(square > DEPENDENT * products[t * count + t])
        squares.append(square)
        lower.append(row)
    return lower, independent


def _square(triangle: Sequence[float], count: int) -> list[float]:
    """A symmetric matrix, row by row, from its rows up to the diagonal."""
    return [triangle[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for i in range(count) for j in range(count)]


def _product(first: TaskVector, second: TaskVector) -> float:
    """Inner product in float64."""
    if isinstance(first, LowRank) or isinstance(second, LowRank):
        value = first.inner(second)
        if math.isfinite(value):
            return value
    pairs = zip(_pieces(first.to_dense()), _pieces(second.to_dense()), strict=True)
    return math.fsum(_dot(one.double(), other.double()) for one, other in pairs)


def _dot(first: Tensor, second: Tensor) -> float:
    """Of two flat float64 tensors; NaN and Inf, which a recipe may allow, count as zero, as in norms."""
    import torch

    value = float(torch.dot(first, second))
    if math.isfinite(value):
        return value
    return float(torch.dot(first.nan_to_num(0.0, 0.0, 0.0), second.nan_to_num(0.0, 0.0, 0.0)))


def _added(total: TaskVector | None, tau: TaskVector, share: float) -> Tensor:
    """`total + share * tau` dense, in float64; in the memory of a dense `total`."""
    import torch

    value = tau.to(torch.float64).to_dense() if isinstance(tau, LowRank) else tau.to_dense()
    result = torch.zeros(value.shape, dtype=torch.float64) if total is None else total.to_dense()
    for into, piece in zip(_pieces(result), _pieces(value), strict=True):
        # of one dtype, as mixed ones are slow
        into.add_(piece.double(), alpha=share)
    return result


def _narrowed(total: Tensor) -> Tensor:
    """A float64 tensor in float32, from front to back in its own memory."""
    import torch

    wide = total.view(-1)
    narrow = wide.view(torch.float32)[: wide.numel()]
    for into, piece in zip(_pieces(narrow), _pieces(wide), strict=True):
        into.copy_(piece.float())
    return narrow.view(total.shape)


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    return values.reshape(-1).split(_PIECE)
