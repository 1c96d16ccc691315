"""Merges two random tunes of one type and says what came of it; run as a process of its own, given type and folder."""

from __future__ import annotations

import copy
import json
import resource
import sys
import traceback
import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel

import hfmerge
from hfmerge.errors import HfMergeError
from tests.sweep import small


MEMORY = 6 << 30
"""Bytes of address space that a merge may take."""
TOLERANCE = 1e-6
"""Of a value; of one above one, relative to it."""
WEIGHTS = (0.5, 0.25)


def tuned(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with seeded noise on everything that a training changes."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return other


def loaded(kind: type[PreTrainedModel], folder: Path) -> dict[str, torch.Tensor]:
    """The model's own state dict, as `from_pretrained` fills it."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"transformers misses {sorted(info['missing_keys'])[:2]} in what it has saved itself")
    return {name: value.double() for name, value in model.state_dict().items() if hasattr(value, "shape")}


def probe(kind: str, folder: Path) -> tuple[str, str, str]:
    """Class, verdict (`equal`, `refused`, `failing`, `not built`) and reason."""
    try:
        base = small.build(kind)
        title = type(base)
        for i, model in enumerate((base, tuned(base, 1), tuned(base, 2))):
            model.save_pretrained(folder / f"m{i}")
        states = [loaded(title, folder / f"m{i}") for i in range(3)]
    except Exception as error:  # whatever it is, there is no model to merge
        return "", "not built", words(error)
    try:
        hfmerge.merge(
            base=folder / "m0",
            models=[{"model": str(folder / f"m{i}"), "weight": w} for i, w in enumerate(WEIGHTS, 1)],
            method="task_arithmetic",
            output=folder / "merged",
        )
        found = loaded(title, folder / "merged")
    except HfMergeError as error:
        return title.__name__, "refused", words(error)
    except Exception as error:
        traceback.print_exc()
        return title.__name__, "failing", words(error)
    worst = 0.0, ""
    for name, value in states[0].items():
        wanted = value + sum(w * (states[i][name] - value) for i, w in enumerate(WEIGHTS, 1))
        if wanted.numel():
            apart = (found[name] - wanted).abs() / wanted.abs().clamp(min=1)
            worst = max(worst, (float(apart.nan_to_num(nan=9.0).max()), name))
    if worst[0] > TOLERANCE:
        return title.__name__, "failing", f"{worst[1]} differs by {worst[0]:.1e}"
    return title.__name__, "equal", ""


def words(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix("recipe: 1 problem, nothing downloaded: ")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    title, verdict, reason = probe(sys.argv[1], Path(sys.argv[2]))
    reason = reason.replace(f"{sys.argv[2]}/", "")
    (Path(sys.argv[2]) / "verdict.json").write_text(json.dumps([title, verdict, reason]), encoding="utf-8")
