"""Helpers of trimming methods: magnitude thresholds by k-th value and by histogram, without sorting a tensor.

A k-th value is found by bracketing: a sample says between which two magnitudes it must lie, one pass counts what is
above them and collects the few values between. It is exact, needs a few percent of a tensor beside it, and takes a
tensor piece by piece, so that a file can be read instead of held.

Magnitudes of float32 numbers order like their bit patterns, so a histogram over the leading bits is exact in its
counts, adds up over parameters in any order, and places a threshold within a relative 2^-12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hfmerge.methods.base import SAMPLED, Measure, Survey
from hfmerge.task_vector import TaskVector


if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BITS = 20
"""Leading bits kept of the 31 magnitude bits of a float32: 8 of the exponent and 12 of the fraction."""

PART = 1 << 18
"""Elements looked at at a time: what is computed of them stays in a cache, and threads seldom wait to make a call."""

SAMPLE = 1 << 16
"""Elements of a sample; with so many, its bracket holds 2 % of a tensor."""
SPREAD = 4.5
"""Standard deviations of a sample that a bracket reaches to either side; missing it costs a second time only."""


def kept(count: int, density: float) -> int:
    """Number of elements that a density keeps: `round(density * count)`, at least one of a non-empty tensor."""
    return min(count, max(1, round(density * count)))


def flat_pieces(values: Tensor) -> Iterator[Tensor]:
    """A tensor as flat pieces of `PART` elements, one at least, without copying what is contiguous."""
    flat = values.reshape(-1)
    return (flat[at : at + PART] for at in range(0, max(1, flat.numel()), PART))


def thinned(values: Tensor, count: int) -> Tensor:
    """Evenly spread elements of `values`, such that about `SAMPLE` come from `count` in all."""
    # an odd step meets all columns of a matrix
    return values.reshape(-1)[:: max(1, count // SAMPLE) | 1]


def kth_magnitude(values: Tensor, density: float) -> float:
    """Smallest magnitude among the `kept` largest of `values` (float32, any shape); 0 keeps everything."""
    flat = values.reshape(-1)
    search = KthMagnitude([thinned(flat, flat.numel())], flat.numel(), density)
    while search.value is None:
        for part in flat_pieces(flat):
            search.add(part)
        search.settle()
    return search.value


class KthMagnitude:
    """The search for `kth_magnitude` in a tensor that is given in pieces, in any cut and order.

    Call sequence: until `value` is set, `add` every piece, then `settle`. Once is enough unless the sample was so far
    from the tensor that it has placed the bracket wrongly, which costs a second time and never changes the value.

    Attributes:
        value: the magnitude; infinite where so many values are NaN, which counts as the greatest magnitude.
    """

    def __init__(self, sample: Iterable[Tensor], count: int, density: float):
        """Place the bracket.

        Args:
            sample: some of the elements, float32, as evenly spread as is cheap; at least one.
            count: how many elements all pieces have together.
            density: share of them that is kept.
        """
        import numpy as np

        self.value: float | None = None
        self._keep = kept(count, density)
        self._above = self._on_high = self._on_low = self._count = 0
        self._buffer = self._inside = np.empty(0, np.float32)
        if self._keep == count:
            self.value = 0.0
        else:
            self._low, self._high = _bracket(sample, self._keep / count)

    def add(self, piece: Tensor) -> None:
        """Count the magnitudes of one piece above and on the ends of the bracket, and keep those inside it."""
        import numpy as np

        flat = piece.reshape(-1)
        # NumPy compares and selects in half torch's time, into memory that stays in the core's cache
        self._buffer = _grown(self._buffer, 0, flat.numel())
        array = np.abs(flat.numpy(), out=self._buffer[: flat.numel()])
        reached = array <= self._high
        self._above += flat.numel() - int(np.count_nonzero(reached))
        reached &= array >= self._low
        # a third of the time of indexing with the mask
        inside = array.compress(reached)
        on_high, on_low = (int(np.count_nonzero(inside == end)) for end in (self._high, self._low))
        if on_high or on_low:
            inside = inside[(inside > self._low) & (inside < self._high)]
        self._on_high += on_high
        self._on_low += on_low
        # into one array: many small ones, each living beside large temporary ones, would keep the heap from reuse
        count = self._count + inside.size
        self._inside = _grown(self._inside, self._count, count)
        self._inside[self._count : count] = inside
        self._count = count

    def settle(self) -> None:
        """Set `value`, or move the bracket to where it must be for all pieces to be added once more."""
        inside = self._inside[: self._count]
        wanted = self._keep - self._above
        deeper = wanted - self._on_high
        if wanted <= 0:
            if self._high == math.inf:
                self.value = math.inf
            self._low, self._high = self._high, math.inf
        elif deeper <= 0:
            self.value = self._high
        elif deeper <= inside.size:
            inside.partition(inside.size - deeper)
            self.value = float(inside[inside.size - deeper])
        elif self._low < self._high and deeper <= inside.size + self._on_low:
            self.value = self._low
        else:
            self._low, self._high = -math.inf, self._low
        self._above = self._on_high = self._on_low = self._count = 0


class KthMagnitudes(Survey):
    """The k-th magnitudes of each of several models' task vectors, for one density or several; model by model."""

    samples = True

    def __init__(self, models: int, count: int, *densities: float):
        self._count, self._densities = count, densities
        self._spread: list[list[Tensor]] = [[] for _ in range(models)]
        self._searches: list[list[KthMagnitude]] = []

    def sample(self, taus: Iterable[Tensor]) -> None:
        for spread, tau in zip(self._spread, taus, strict=True):
            spread.append(thinned(tau, self._count // SAMPLED).clone())

    def add(self, taus: Iterable[Tensor], base: Callable[[], Tensor]) -> None:
        if not self._searches:
            self._searches = [
                [KthMagnitude(spread, self._count, density) for density in self._densities] for spread in self._spread
            ]
        for searches, tau in zip(self._searches, taus, strict=True):
            for search in searches:
                if search.value is None:
                    search.add(tau)

    def settle(self) -> list[float] | None:
        searches = [search for own in self._searches for search in own]
        for search in searches:
            if search.value is None:
                search.settle()
        values = [search.value for search in searches if search.value is not None]
        return values if len(values) == len(searches) else None


class Histograms(Measure):
    """Magnitudes of each of several models' task vectors over all parameters, counted; settles on thresholds."""

    def __init__(self, models: int, density: float):
        import torch

        self._density = density
        self._totals = [torch.zeros(1 << BITS, dtype=torch.int64) for _ in range(models)]

    def find(self, taus: Sequence[TaskVector]) -> Iterator[tuple[int, Tensor]]:
        return ((model, magnitude_histogram(tau.to_dense())) for model, tau in enumerate(taus))

    def add(self, measured: tuple[int, Tensor]) -> None:
        model, histogram = measured
        self._totals[model].add_(histogram)

    def join(self, other: Histograms) -> None:
        for total, more in zip(self._totals, other._totals, strict=True):
            total.add_(more)

    def settle(self) -> list[float]:
        return [histogram_threshold(total, self._density) for total in self._totals]


def _grown(array: np.ndarray, used: int, size: int) -> np.ndarray:
    """An array with room for `size` elements that begins with the first `used` ones of `array`."""
    import numpy as np

    if array.size >= size:
        return array
    larger = np.empty(max(size, 2 * array.size), np.float32)
    larger[:used] = array[:used]
    return larger


def _bracket(sample: Iterable[Tensor], share: float) -> tuple[float, float]:
    """Two magnitudes between which, as far as the sample knows, the `share` largest of all end."""
    import numpy as np

    magnitudes = np.abs(np.concatenate([part.reshape(-1).numpy() for part in sample]))
    np.nan_to_num(magnitudes, copy=False, nan=math.inf, posinf=math.inf)
    size = magnitudes.size
    margin = SPREAD * math.sqrt(size * share * (1.0 - share)) + 2.0
    # places from the smallest on
    low, high = size - 1 - math.ceil(size * share + margin), size - 1 - math.floor(size * share - margin)
    places = [place for place in (low, high) if 0 <= place < size]
    if places:
        magnitudes.partition(places)
    return (
        float(magnitudes[low]) if low >= 0 else -math.inf,
        float(magnitudes[high]) if high < size else math.inf,
    )


def trim(values: Tensor, limit: float) -> Tensor:
    """`values` (float32) where the magnitude reaches `limit`, 0 elsewhere and for NaN; a new tensor."""
    import torch

    # shrinking keeps what exceeds its bound, so the bound is the next number below the limit
    bound = torch.nextafter(torch.tensor(limit, dtype=torch.float32), torch.tensor(0.0))
    kept_values = torch.nn.functional.hardshrink(values, float(bound)) if limit > 0.0 else values.clone()
    return kept_values.nan_to_num_(0.0, math.inf, -math.inf)


def magnitude_histogram(values: Tensor) -> Tensor:
    """int64 counts of the magnitudes of `values` (float32) by their leading `BITS` bits, length 2^BITS."""
    import torch

    codes = values.reshape(-1).abs().view(torch.int32).bitwise_right_shift_(31 - BITS)
    return torch.bincount(codes, minlength=1 << BITS)


def histogram_threshold(counts: Tensor, density: float) -> float:
    """Lower edge of the bin in which the `density` largest share of all counted magnitudes ends."""
    import torch

    keep = kept(int(counts.sum()), density)
    from_top = torch.cumsum(counts.flip(0), 0)
    code = counts.numel() - 1 - int(torch.searchsorted(from_top, torch.tensor([keep]))[0])
    return float(torch.tensor([code << (31 - BITS)], dtype=torch.int32).view(torch.float32)[0])
