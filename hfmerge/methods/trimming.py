"""Helpers of trimming methods: magnitude thresholds by k-th value and by histogram, without sorting.

Magnitudes of float32 numbers order like their bit patterns, so a histogram over the leading bits is exact in its
counts, adds up over parameters in any order, and places a threshold within a relative 2^-12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor

BITS = 20
"""Leading bits kept of the 31 magnitude bits of a float32: 8 of the exponent and 12 of the fraction."""


def kept(count: int, density: float) -> int:
    """Number of elements that a density keeps: `round(density * count)`, at least one of a non-empty tensor."""
    return min(count, max(1, round(density * count)))


def kth_magnitude(values: Tensor, density: float) -> float:
    """Smallest magnitude among the `kept` largest of `values` (float32, any shape); 0 keeps everything."""
    count = values.numel()
    keep = kept(count, density)
    if keep == count:
        return 0.0
    return float(values.reshape(-1).abs().kthvalue(count - keep + 1).values)


def magnitude_histogram(values: Tensor) -> Tensor:
    """int64 counts of the magnitudes of `values` (float32) by their leading `BITS` bits, length 2^BITS."""
    import torch

    codes = values.abs().contiguous().view(torch.int32) >> (31 - BITS)
    return torch.bincount(codes.reshape(-1), minlength=1 << BITS)


def histogram_threshold(counts: Tensor, density: float) -> float:
    """Lower edge of the bin in which the `density` largest share of all counted magnitudes ends."""
    import torch

    keep = kept(int(counts.sum()), density)
    from_top = torch.cumsum(counts.flip(0), 0)
    code = counts.numel() - 1 - int(torch.searchsorted(from_top, torch.tensor([keep]))[0])
    return float(torch.tensor([code << (31 - BITS)], dtype=torch.int32).view(torch.float32)[0])
