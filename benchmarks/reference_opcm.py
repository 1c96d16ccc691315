"""An independent float64 transcription of OPCM, and the comparison of merged checkpoints with it.

Model: "Merging Models on the Fly Without Retraining", arXiv 2501.09522, section 4. Deliberately plain and slow: a
singular value decomposition of the accumulator for every matrix and model, all in float64, and no code shared with
hfmerge. Three rules the paper leaves open are those hfmerge documents: every *parameter* is merged (a walk over leaf
modules misses the class embedding), the norm of the rescaling is over all parameters, and the diagonal is cleared only
where singular vectors are determined: `s_i > s_1 * eps * max(m, n)` with the epsilon of float32, in which hfmerge
carries the accumulator.

    python -m benchmarks.reference_opcm compute BASE VARIANT ALPHA TARGET MODEL [MODEL ...]
    python -m benchmarks.reference_opcm compare BASE WANTED FOUND

The second prints one JSON object; WANTED and FOUND are merged checkpoints or a TARGET of the first.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor

FLOAT32_EPS = 2.0**-23
MATRIX = re.compile(r"\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight$")
"""The linear maps of a CLIP tower. Its convolution, embeddings, norms and biases are simply summed."""
LEFT_OUT_BY_FUSION_BENCH = ("vision_model.embeddings.class_embedding",)
"""Parameters that belong to a module with children: FusionBench visits leaf modules only."""


def kept_part(total: Tensor, tau: Tensor, alpha: float, variant: str) -> Tensor:
    """The part of `tau` that is added to the accumulator `total`; both (m, n), float64.

    In coordinates `C = U^T tau V` of the accumulator's singular bases, with `r` the first index (from 0) at which the
    cumulative sum of singular values exceeds `alpha` times their sum:

        code: the r x r block and the diagonal are zeroed
        code-whole-diagonal: the same, also where singular values are numerically zero (FusionBench's rule)
        code-no-diagonal: the block is zeroed
        paper: the first r rows and columns and the diagonal are zeroed

    Thin bases suffice: what is zeroed is subtracted, and none of it touches the orthogonal complements.
    """
    import torch

    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    v = vh.T
    rank = int((s > s[0] * FLOAT32_EPS * max(total.shape)).sum())
    if rank == 0:
        return tau
    exceeds = (torch.cumsum(s, 0) > alpha * torch.sum(s)).nonzero()
    r = int(exceeds[0]) if alpha < 1 and len(exceeds) else rank
    ur, vr = u[:, :r], v[:, :r]
    rest: Tensor = tau - ur @ (ur.T @ tau @ vr) @ vr.T
    if variant == "code-no-diagonal":
        return rest
    if variant == "paper":
        rest = tau - ur @ (ur.T @ tau)
        rest = rest - (rest @ vr) @ vr.T
    elif variant not in ("code", "code-whole-diagonal"):
        raise ValueError(f"no such variant of OPCM: {variant}")
    diagonal = torch.sum(u * (tau @ v), dim=0)
    diagonal[:r] = 0  # already gone with the block
    if variant != "code-whole-diagonal":
        diagonal[rank:] = 0
    rest = rest - (u * diagonal) @ vh
    return rest


def accumulate(name: str, taus: Iterable[Tensor], alpha: float, variant: str) -> Tensor:
    """`S_T` of one parameter: `S_1 = tau_1`, `S_t = S_{t-1} + P(tau_t)` for matrices, a plain sum for the rest."""
    total: Tensor | None = None
    for tau in taus:
        if total is None:
            total = tau.clone()
        elif MATRIX.search(name):
            total = total + kept_part(total, tau, alpha, variant)
        else:
            total = total + tau
    if total is None:
        raise ValueError("OPCM needs at least one model")
    return total


def compute(base: Path, variant: str, alpha: float, target: Path, models: Sequence[Path]) -> None:
    """Write the merged task vector of the transcription as float64 tensors to the file `target`."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    origin, *sources = [safe_open(str(folder / "model.safetensors"), "pt") for folder in (base, *models)]
    squares = [0.0] * len(sources)
    merged: dict[str, Tensor] = {}
    for name in origin.keys():
        start = origin.get_tensor(name).double()
        taus = [source.get_tensor(name).double() - start for source in sources]
        squares = [square + float(tau.square().sum()) for square, tau in zip(squares, taus, strict=True)]
        merged[name] = accumulate(name, taus, alpha, variant)
    mean_norm = math.fsum(math.sqrt(square) for square in squares) / len(squares)
    norm = math.sqrt(math.fsum(float(total.square().sum()) for total in merged.values()))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".tmp")
    save_file({name: (total * (mean_norm / norm)).contiguous() for name, total in merged.items()}, str(partial))
    os.replace(partial, target)


def compare(base: Path, wanted: Path, found: Path) -> dict[str, float]:
    """Relative Frobenius differences between two merged task vectors.

    Returns:
        relative: over all parameters, scale included.
        rounding: what rounding `base + wanted` to float32 weights costs by itself, the least that can be expected.
        direction: over the parameters FusionBench merges, both scaled to unit norm there, because the parameter it
            leaves out also changes its global scale.
    """
    import torch
    from safetensors import safe_open

    origin = safe_open(str(base / "model.safetensors"), "pt")
    names = list(origin.keys())
    left, right = TaskVectors(base, wanted), TaskVectors(base, found)
    shared = [name for name in names if name not in LEFT_OUT_BY_FUSION_BENCH]
    norm = math.sqrt(math.fsum(float(left(name).square().sum()) for name in names))
    left_norm = math.sqrt(math.fsum(float(left(name).square().sum()) for name in shared))
    right_norm = math.sqrt(math.fsum(float(right(name).square().sum()) for name in shared))
    difference, rounding, direction = 0.0, 0.0, 0.0
    for name in names:
        start, one, other = origin.get_tensor(name).double(), left(name), right(name)
        rounded = (start + one).to(torch.float32).double() - start
        difference += float((other - one).square().sum())
        rounding += float((rounded - one).square().sum())
        if name in shared:
            direction += float((other / right_norm - one / left_norm).square().sum())
    return {
        "relative": math.sqrt(difference) / norm,
        "rounding": math.sqrt(rounding) / norm,
        "direction": math.sqrt(direction),
    }


class TaskVectors:
    """Task vectors by parameter name, from a merged checkpoint's folder or from a file that `compute` wrote."""

    def __init__(self, base: Path, source: Path):
        from safetensors import safe_open

        is_checkpoint = source.is_dir()
        self._file = safe_open(str(source / "model.safetensors" if is_checkpoint else source), "pt")
        self._base = safe_open(str(base / "model.safetensors"), "pt") if is_checkpoint else None

    def __call__(self, name: str) -> Tensor:
        stored: Tensor = self._file.get_tensor(name).double()
        return stored if self._base is None else stored - self._base.get_tensor(name).double()


if __name__ == "__main__":
    verb, first, *rest = sys.argv[1:]
    if verb == "compute":
        compute(Path(first), rest[0], float(rest[1]), Path(rest[2]), [Path(model) for model in rest[3:]])
    elif verb == "compare":
        print(json.dumps(compare(Path(first), Path(rest[0]), Path(rest[1]))))
    else:
        sys.exit(f"unknown verb {verb!r}: compute or compare")
