"""How far a merged bfloat16 checkpoint is from the exact linear combination, computed in float64 and rounded once.

`python -m benchmarks.reference_linear BASE SCALE MERGED MODEL [MODEL ...]` compares MERGED with
`base + SCALE * sum of (model - base)`, so `SCALE = 1/T` is the average, and prints one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path


def compare(base: Path, scale: float, merged: Path, models: Sequence[Path]) -> dict[str, float]:
    """Compare one checkpoint with the exact combination.

    Returns:
        not_nearest: share of elements that are not the bfloat16 number nearest to the exact value.
        relative: norm of the error over the norm of the exact merged task vector.
        rounding: the same for the correctly rounded result, the least that can be reached.
    """
    import torch
    from safetensors import safe_open

    origin = safe_open(str(base / "model.safetensors"), "pt")
    sources = [safe_open(str(model / "model.safetensors"), "pt") for model in models]
    where = {}
    for path in sorted(merged.glob("*.safetensors")):
        file = safe_open(str(path), "pt")
        where.update({name: file for name in file.keys()})
    wrong, elements, error, least, norm = 0, 0, 0.0, 0.0, 0.0
    for name in origin.keys():
        start = origin.get_tensor(name).double()
        delta = torch.zeros_like(start)
        for source in sources:
            delta += source.get_tensor(name).double() - start
        exact = start + scale * delta
        nearest, found = exact.to(torch.bfloat16), where[name].get_tensor(name)
        wrong += int((nearest != found).sum())
        elements += exact.numel()
        error += float((found.double() - exact).square().sum())
        least += float((nearest.double() - exact).square().sum())
        norm += float((scale * delta).square().sum())
    return {
        "not_nearest": wrong / elements,
        "relative": math.sqrt(error / norm),
        "rounding": math.sqrt(least / norm),
    }


if __name__ == "__main__":
    base_folder, factor, merged_folder, *model_folders = sys.argv[1:]
    result = compare(Path(base_folder), float(factor), Path(merged_folder), [Path(name) for name in model_folders])
    print(json.dumps(result))
