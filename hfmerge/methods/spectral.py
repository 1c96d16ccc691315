"""What OPCM clears from a task vector, by three ways of taking the accumulator apart: Gram matrix, full SVD, sketch.

All take a tall or square accumulator `total` (m, n), m >= n, and `tau` of the same shape, both float64, and give
`tau` without what the variant clears. With `total = U diag(s) V^T`, `r` directions lead and `rank` count: see `split`.

**Gram.** Eigenvectors of `total^T total` are `V`, and `u_i = total v_i / s_i`: half the work of a singular value
decomposition or less. Its price is that squared singular values are known to `eps s_1^2` instead of singular values
to `eps s_1`. Two neighbours i, j are mixed by an angle of about `eps s_1^2 / |s_i^2 - s_j^2|`. That changes what is
cleared of a `tau` of no special direction by the angle over `sqrt(m n)` for an element of the diagonal, and by
`2 sqrt(r)` times as much across the edge of the leading block, whose rows are wrong by `eps s_1^2 / s_i^2` besides.
`gram_uncertainty` sums this up from the spectrum. Up to `TRUSTED`, which is below what rounding a task vector to
float32 does to it, the Gram matrix is used; beyond, and where its eigenvalues do not converge, the full
decomposition. Ranges of more than 1e4 and clusters at the low end of a spectrum go beyond; large matrices of trained
models lie a hundredfold below, since their numerical rank ends at `s_1 eps32 max(m, n)`.

**SVD.** LAPACK's divide and conquer, and once more on the triangular factor where that fails to converge.

**Sketch.** Only singular values and the leading block are computed, the former and what leads to the latter in
float32: random vectors are filtered by Chebyshev polynomials of the Gram matrix (subspace iteration), and a
Rayleigh-Ritz step in float64 finds the leading directions in their span. The diagonal beyond the block is left as it
is, for it needs every singular vector.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from hfmerge.errors import HfMergeError
from hfmerge.methods.batched_linalg import apart, lapack_error


if TYPE_CHECKING:
    from torch import Tensor

OpcmVariant = Literal["code", "code-no-diagonal", "paper"]

EPS = 2.0**-23
"""Machine epsilon of float32, the greatest precision a direction of a checkpoint can be trusted to."""
TRUSTED = 2.0**-30
"""Relative change of a projected task vector up to which the round-off of the Gram matrix is accepted."""

SKETCHED = 256
"""Columns from which on a sketch is worth its overhead; smaller matrices are taken apart exactly."""
SURPLUS = 0.25
"""Directions beyond the leading ones that a sketch carries along, as a share of them: what separates the two."""
DEGREE = 12
"""Degree of the filter, over all its stages."""
GROWTH = 1e6
"""Greatest amplification of a stage, so that float32 keeps the weakest direction of the block beside the strongest."""
NOISE = 16.0 * EPS
"""Squared singular values, as shares of the greatest, that float32 no longer tells from zero."""


def split(singular: Tensor, shape: tuple[int, int], alpha: float) -> tuple[int, int]:
    """Number of leading directions and numerical rank.

    `rank` counts the `s_i > s_1 * eps * max(shape)`, eps of float32; `r` is the first index, from 0, at which the
    cumulative share of their sum exceeds `alpha`, and `rank` where none does or alpha is 1.

    Args:
        singular: values, descending.
        shape: of the full matrix.
        alpha: share of the sum.
    """
    import torch

    rank = int((singular > singular[:1] * EPS * max(shape)).sum())
    s = singular[:rank]
    share = torch.cumsum(s, 0) > alpha * s.sum()
    if alpha < 1.0 and rank and bool(share.any()):
        return int(torch.argmax(share.int())), rank
    return rank, rank


def cleared(total: Tensor, tau: Tensor, shape: tuple[int, int], alpha: float, variant: OpcmVariant) -> Tensor:
    """`tau` without what `variant` clears, exactly: by the Gram matrix where it can be trusted, else by an SVD."""
    by_gram = cleared_by_gram(total, tau, shape, alpha, variant)
    return cleared_by_svd(total, tau, shape, alpha, variant) if by_gram is None else by_gram


def cleared_by_gram(
    total: Tensor, tau: Tensor, shape: tuple[int, int], alpha: float, variant: OpcmVariant
) -> Tensor | None:
    """See the module; None where the spectrum's range or clusters forbid this way, or eigenvalues do not converge."""
    import torch

    try:
        squares, vectors = apart(torch.linalg.eigh, total.T @ total)
    except lapack_error():
        return None
    squares = squares.flip(0).clamp_min(0.0)
    singular = squares.sqrt()
    r, rank = split(singular, shape, alpha)
    if rank == 0:
        return tau.clone()
    if not gram_uncertainty(squares, r, rank, total.numel()) <= TRUSTED:
        return None
    s, v = singular[:rank], vectors.flip(1)[:, :rank].contiguous()
    del vectors
    lead_v, tail = v[:, :r], v[:, r:]
    cross = total.T @ tau
    # what goes is `total @ away`: with u_i = S v_i / s_i, the coefficient of u_i v_j^T in tau is v_i^T cross v_j / s_i
    rows = (lead_v.T @ cross) / s[:r, None] ** 2
    block = (rows @ lead_v) @ lead_v.T
    away = lead_v @ (rows - block if variant == "paper" else block)
    if variant != "code-no-diagonal" and r < rank:
        diagonal = ((cross @ tail) * tail).sum(0) / s[r:] ** 2
        away += (tail * diagonal) @ tail.T
    del cross
    projected = torch.addmm(tau, total, away, alpha=-1.0)
    return projected - (tau @ lead_v) @ lead_v.T if variant == "paper" else projected


def gram_uncertainty(squares: Tensor, r: int, rank: int, elements: int) -> float:
    """Expected relative change of a projected task vector by round-off in the Gram matrix; see the module.

    Args:
        squares: eigenvalues, descending, not negative.
        r, rank: of `split`.
        elements: m n.
    """
    import torch

    unit = torch.finfo(squares.dtype).eps * squares[0]
    counted = squares[:rank]
    # angles between each direction that counts and the next; below the last one of a full rank there is none
    angles = unit / (counted - torch.cat([squares[1:], squares.new_full((1,), -math.inf)])[:rank])
    mixed = torch.maximum(angles, torch.cat([angles.new_zeros(1), angles])[:-1])
    total = float(mixed[r:].square().sum())
    if r:
        total += r * (4.0 * float(angles[r - 1]) ** 2 + float((unit / counted[:r]).square().sum()))
    return math.sqrt(total / elements)


def cleared_by_svd(total: Tensor, tau: Tensor, shape: tuple[int, int], alpha: float, variant: OpcmVariant) -> Tensor:
    """See the module.

    Raises:
        HfMergeError: LAPACK does not converge, which finite numbers have not been seen to do.
    """
    u, s, vt = thin_svd(total)
    r, rank = split(s, shape, alpha)
    if rank == 0:
        return tau.clone()
    projected = _without_block(tau, u[:, :r], vt[:r].T, variant)
    if variant != "code-no-diagonal" and r < rank:
        tail_u, tail_v = u[:, r:rank], vt[r:rank].T
        projected -= (tail_u * (tail_u * (tau @ tail_v)).sum(0)) @ tail_v.T
    return projected


def cleared_by_sketch(
    total: Tensor, tau: Tensor, shape: tuple[int, int], alpha: float, variant: OpcmVariant
) -> Tensor | None:
    """See the module; the diagonal beyond the block stays. None where the exact ways are no slower.

    The random vectors depend on the shape alone, so equal inputs give equal bytes everywhere.
    """
    import torch

    n = total.shape[1]
    if n < SKETCHED:
        return None
    rounded = total.float()
    gram = rounded.T @ rounded
    squares = apart(torch.linalg.eigvalsh, gram).flip(0).clamp_min(0.0).double()
    r, rank = split(squares.sqrt(), shape, alpha)
    if rank == 0 or r == 0:
        return None
    width = r + max(16, math.ceil(SURPLUS * r))
    # beyond half of the directions nothing is gained, and beyond the round-off of float32 nothing can be told apart
    if width > n // 2 or float(squares[width - 1]) < NOISE * float(squares[0]):
        return None
    seed = torch.Generator().manual_seed(n * 1_000_003 + width)
    start = torch.randn(n, width, generator=seed).to(total.device)
    block = apart(torch.linalg.qr, _filtered(gram, start, float(squares[width - 1]), float(squares[0])).double())[0]
    images = total @ block
    found, turn = apart(torch.linalg.eigh, images.T @ images)
    lead = turn.flip(1)[:, :r]
    # the turn has made the images orthogonal
    return _without_block(tau, (images @ lead) / found.flip(0)[:r].sqrt(), block @ lead, variant)


def _filtered(gram: Tensor, block: Tensor, edge: float, top: float) -> Tensor:
    """Columns whose components above `edge` have grown beside those below: Chebyshev polynomials on [0, edge].

    Args:
        gram: (n, n), float32.
        block: where to start, (n, width), float32.
        edge, top: the eigenvalue above which components grow, and the greatest.
    """
    import torch

    scale = 2.0 / edge
    steps = max(1, min(DEGREE, int(math.log(2.0 * GROWTH) / math.log(2.0 * max(scale * top - 1.0, 1.0)))))
    for _ in range(math.ceil(DEGREE / steps)):
        before, block = block, torch.addmm(block, gram, block, beta=-1.0, alpha=scale)
        for _ in range(steps - 1):
            before, block = block, torch.addmm(block, gram, block, beta=-2.0, alpha=2.0 * scale).sub_(before)
        block = apart(torch.linalg.qr, block)[0]
    return block


def _without_block(tau: Tensor, lead_u: Tensor, lead_v: Tensor, variant: OpcmVariant) -> Tensor:
    """`tau` without its components in the leading directions: of both sides at once, or of either (`paper`)."""
    import torch

    rows = lead_u.T @ tau
    block = (rows @ lead_v) @ lead_v.T
    if variant != "paper":
        return torch.addmm(tau, lead_u, block, alpha=-1.0)
    projected = torch.addmm(tau, lead_u, rows - block, alpha=-1.0)
    return projected - (tau @ lead_v) @ lead_v.T


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`U V^T` of a matrix's directions up to its numerical rank, and their singular values, descending; float64.

    By the smaller Gram matrix, whose round-off turns a direction that still counts by
    `eps64 / (eps32 max(m, n))^2` at most: 2e-8 for 768 columns, less for more.

    Args:
        matrix: (m, n), float64.
    """
    if matrix.shape[0] < matrix.shape[1]:
        turned, singular = polar(matrix.T)
        return turned.T, singular
    v, s = _right(matrix)
    return ((matrix @ v) / s) @ v.T, s


def directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors (n, rank) of a matrix up to its numerical rank, and singular values, descending; float64.

    As exact as `polar`.

    Args:
        matrix: (m, n), float64.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        return _right(matrix)
    u, s = _right(matrix.T)
    return (matrix.T @ u) / s, s


def _right(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """See `directions`; of a matrix with m >= n."""
    import torch

    try:
        squares, vectors = apart(torch.linalg.eigh, matrix.T @ matrix)
        singular, v = squares.flip(0).clamp_min(0.0).sqrt(), vectors.flip(1)
    except lapack_error():
        _, singular, vt = thin_svd(matrix)
        v = vt.T
    rank = split(singular, (matrix.shape[0], matrix.shape[1]), 1.0)[1]
    return v[:, :rank].contiguous(), singular[:rank]


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin `U, s, V^T`; a second try has the matrix's triangular factor, so another sequence of roundings."""
    import torch

    not_converging = lapack_error()
    try:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    except not_converging:
        q, triangle = torch.linalg.qr(matrix)
        try:
            u, s, vt = torch.linalg.svd(triangle, full_matrices=False)
        except not_converging as error:
            raise HfMergeError(
                f"the singular values of a {tuple(matrix.shape)} accumulator do not converge ({error}); look for "
                "values of extreme size in its sources, or leave the tensor out with `exclude`."
            ) from error
        u = q @ u
    return u, s, vt
