"""TSV-M: the leading singular vectors of all changes of a matrix, made orthogonal to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from hfmerge.methods import Block, method, option
from hfmerge.methods.spectral import polar


@method(
    "trial_tsv",
    source="Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv:2412.00081",
    needs="matrix",
    laws=("order_free", "identity_for_one", "scale_equivariant", "linear_in_weights"),
)
def trial_tsv(block: Block, *, scale: float = option(1.0, help="factor of the merged task vector")) -> Tensor:
    """TSV-M: `U_o diag(s) V_o^T` of the first 1/T singular triples of each change; other tensors are averaged."""
    if not block.matrix:
        return scale / len(block.models) * sum(m.weight * m.tau for m in block.models)
    count = max(1, min(block.shape) // len(block.models))
    parts = [torch.linalg.svd(m.weight * m.tau.double(), full_matrices=False) for m in block.models]
    u, s = torch.cat([p[0][:, :count] for p in parts], 1), torch.cat([p[1][:count] for p in parts])
    v = torch.cat([p[2][:count] for p in parts])
    # a direction of no strength is nobody's
    real = s > 1e-7 * s.max()
    return scale * (polar(u[:, real])[0] * s[real]) @ polar(v[real])[0]
