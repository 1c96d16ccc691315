"""Model Stock: the average of the changes, shortened by how much they agree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, method, option
from hfmerge.methods.mdm_oc import Products, gram


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "model_stock",
    source="jang2024stock",
    needs="tensor",
    laws=("order_free", "scale_equivariant"),
    arity=(2, None),
    normalises_weights=True,
    survey=lambda self, models, count: None if self.filter_wise else Products(models),
)
def model_stock(
    block: Block,
    *,
    filter_wise: bool = option(False, help="one ratio for each row of a matrix in the place of one for each tensor"),
) -> Tensor:
    """The average of the changes, shortened by how much they agree: `t * sum w_t tau_t / sum w_t`.

    `t = T cos / (1 + (T - 1) cos)`, with `cos` the mean cosine between two changes of a tensor.

    Source: arXiv 2403.19522, equation 4 and its extension to T models, one `t` for each tensor. Departures: the paper
    has no weights of models, which is all weights 1; a cosine with a change of zero is 0; a mean cosine below 0, for
    which the geometry of the paper has no answer, gives `t = 0`, so the base's values stay. One model has no angle,
    so two are needed.
    """
    import torch

    total = math.fsum(block.weights)
    average = torch.zeros(block.shape)
    for model in block.models:
        average.add_(model.tau, alpha=model.weight / total)
    if filter_wise and average.dim() > 1:
        ratios = _ratio(_cosines_of_rows(block), len(block.models))
        return average * ratios.view(-1, *[1] * (average.dim() - 1))
    products = torch.tensor(gram(block.taus) if block.found is None else block.found, dtype=torch.float64)
    return average.mul_(float(_ratio(_mean_cosine(products.view(len(block.models), -1)), len(block.models))))


def _ratio(cosine: Tensor, models: int) -> Tensor:
    """`t` of each mean cosine."""
    cosine = cosine.clamp(0.0, 1.0)
    return models * cosine / (1.0 + (models - 1) * cosine)


def _mean_cosine(products: Tensor) -> Tensor:
    """Mean cosine of all pairs, from a Gram matrix (models, models), float64."""
    import torch

    lengths = products.diagonal().clamp_min(0.0).sqrt()
    inverse = torch.where(lengths > 0.0, 1.0 / lengths, 0.0)
    cosines = products * inverse[:, None] * inverse
    pairs = torch.triu_indices(len(lengths), len(lengths), 1)
    return cosines[pairs[0], pairs[1]].mean()


def _cosines_of_rows(block: Block) -> Tensor:
    """Mean cosine of all pairs of models for each row (rows,), float64.

    The cosines of all pairs follow from the sum of the changes scaled to length 1: its squared length is the number of
    those that are not zero and twice the sum of all cosines. So one change is held at a time.
    """
    import torch

    units = torch.zeros(block.shape[0], math.prod(block.shape[1:]), dtype=torch.float64)
    present = torch.zeros(block.shape[0], dtype=torch.float64)
    for model in block.models:
        rows = model.tau.reshape(units.shape).double()
        lengths = torch.linalg.vector_norm(rows, dim=1)
        units += torch.where(lengths > 0.0, 1.0 / lengths, 0.0)[:, None] * rows
        present += lengths > 0.0
    count = len(block.models)
    return (units.square().sum(1) - present) / (count * (count - 1))
