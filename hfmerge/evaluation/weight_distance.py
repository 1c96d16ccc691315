"""Distance of the weights of two merges: equality by digests, and the norm of the difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path


def same_weights(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Whether two merges have the same bytes of weights, by the digests of their files; heads do not count."""
    one, other = ({k: v for k, v in p.items() if k.endswith(".safetensors") and "/" not in k} for p in (first, second))
    return one == other


def distance(first: Path, second: Path) -> float:
    """Frobenius norm of the difference of two merges' weights; both have the same tensors in the same files."""
    from safetensors import safe_open

    squares = []
    for path in sorted(first.glob("*.safetensors")):
        with safe_open(path, "pt") as a, safe_open(second / path.name, "pt") as b:
            for key in a.keys():
                squares.append(float((a.get_tensor(key).double() - b.get_tensor(key).double()).square().sum()))
    return math.sqrt(math.fsum(squares))


def relative(distance: float, norm: float) -> float:
    """A distance of weights over the norm of the merged change of never merged, infinite where that is zero."""
    return distance / norm if norm else math.inf
