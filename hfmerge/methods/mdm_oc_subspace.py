"""MDM-OC-style merging with OPCM's orthogonality: each change is projected off the singular directions of the sum of
those before it, and the models' weights multiply what is left. So they can be learned, which OPCM's own cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hfmerge.methods.base import Carry, Form
from hfmerge.methods.declare import method
from hfmerge.methods.opcm import OPCM
from hfmerge.task_vector import Core, Dense, TaskVector, summed_rank


@method(
    "mdm_oc_subspace",
    source=("mdmoc2025", "tang2025opcm"),
    needs="matrix",
    laws=("identity_for_one", "scale_equivariant", "linear_in_weights"),
)
@dataclass(frozen=True)
class MdmOcSubspace(OPCM):
    """MDM-OC-style: `sum_t a_t d_t` with `d_t = P_{t-1}(tau_t)`, where OPCM's P is made of `d_1 + ... + d_{t-1}`.

    `mdm_oc` makes changes orthogonal as vectors, by one number a matrix; here a matrix is made orthogonal to the
    leading singular directions of what is there already (see `OPCM` for `alpha`, `variant`, `spectral`). The weights
    `a_t`, given or learned, do not change what is projected off what, so the merged change is linear in them; all
    equal to 1 it is OPCM's with `norm: none`.

    Source: the projection of arXiv 2501.09522 in the place of the Gram-Schmidt of arXiv 2507.20997; putting them
    together is ours.

    The sum for the projections and the weighted sum are both carried, in float64, the latter always dense.
    """

    learnable: ClassVar[bool] = True
    in_parts: ClassVar[bool] = True
    element_bytes: ClassVar[int] = 76

    def step(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """The sums with `P(tau)`; the first model and non-matrices as they are."""
        import torch

        tau = tau.to(torch.float64)
        if carry is None:
            weighed = Dense(tau.to_dense() * weight)
            return {"S": tau, "W": weighed} if matrix else {"W": weighed}
        if tau.is_zero:
            return carry
        if not matrix:
            return {"W": carry["W"].plus(tau, weight)}
        if carry["S"].is_zero:
            return {"S": tau, "W": carry["W"].plus(tau, weight)}
        core = Core.of(carry["S"], tau)
        projected = self._projected(core, self.spectral)
        return {"S": core.lift(core.first + projected), "W": carry["W"].plus(core.lift(projected), weight)}

    def unstep(self, carry: Carry, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """`W - weight * tau`; what later models were projected off stays as it was, hence approximate."""
        return {**carry, "W": carry["W"].plus(tau, -weight)}

    def emit(self, carry: Carry, weights: Sequence[float], *, matrix: bool) -> TaskVector:
        """The weighted sum."""
        return carry["W"]

    def carry_form(self, shape: tuple[int, ...], ranks: Sequence[int | None], *, matrix: bool) -> dict[str, Form]:
        weighed = {"W": Form(shape, None, "F64")}
        return {"S": Form(shape, summed_rank(shape, ranks), "F64"), **weighed} if matrix else weighed

    def parts(self, taus: Sequence[TaskVector], *, matrix: bool) -> list[TaskVector]:
        """See `MergeMethod.parts`; float32."""
        import torch

        if not matrix:
            return list(taus)
        total: TaskVector | None = None
        found: list[TaskVector] = []
        for tau in taus:
            part = tau
            if total is None or total.is_zero:
                total = tau.to(torch.float64)
            elif not tau.is_zero:
                core = Core.of(total, tau)
                projected = self._projected(core, self.spectral)
                part, total = core.lift(projected), core.lift(core.first + projected)
            found.append(part.to(torch.float32))
        return found

    def part_ranks(self, shape: tuple[int, ...], ranks: Sequence[int | None]) -> list[int | None]:
        return [0 if rank == 0 else summed_rank(shape, ranks[: t + 1]) for t, rank in enumerate(ranks)]
