"""Does one verb after another for `reversal.py`, a line of JSON each, and answers each with what it cost.

Libraries are loaded before the clock starts. Bytes are what the process asked the kernel for, from whatever file:
weights (once to merge, once to hash), states, headers, configurations.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import transformers  # noqa: F401  # loaded before the clock starts

from benchmarks.fold_adapters import bytes_read
from hfmerge import add, merge, unmerge
from hfmerge.engine.planner import make_plan
from hfmerge.ledger.repository import open_merged
from hfmerge.lifecycle.changes import plan_add, plan_subtract, plan_unmerge
from hfmerge.recipe.recipe import ModelEntry, parse_recipe


def model_bytes(asked: dict[str, Any]) -> int:
    """Bytes of the models' tensors that the plan of the step reads."""
    if asked["verb"] == "merge":
        plan = make_plan(parse_recipe(asked["recipe"], "benchmark"))
    else:
        opened = open_merged(asked["merged"])
        if asked["verb"] == "add":
            change = plan_add(opened, [ModelEntry(model) for model in asked["models"]])
        elif asked.get("mode") == "subtract":
            change = plan_subtract(opened, [asked["remove"]])
        else:
            change = plan_unmerge(opened, [asked["remove"]])
        plan = change.plan
    return sum(delta.stored_bytes(param.key) for delta in plan.read for param in plan.params if param.mode == "merge")


def step(asked: dict[str, Any]) -> dict[str, Any]:
    """Do one step; seconds, bytes read, bytes of the kept states, digest of the weights, how it was done."""
    output, models = Path(asked["output"]), model_bytes(asked)
    own = -bytes_read() + bytes_read()
    before, start = bytes_read(), time.perf_counter()
    if asked["verb"] == "merge":
        result = merge(parse_recipe(asked["recipe"], "benchmark"), output=output)
    elif asked["verb"] == "add":
        result = add(asked["merged"], asked["models"], output=output)
    else:
        result = unmerge(asked["merged"], asked["remove"], mode=asked.get("mode", "exact"), output=output)
    seconds, read = time.perf_counter() - start, bytes_read() - before - own
    states = sum(path.stat().st_size for path in (output / "merge_state").glob("*.safetensors"))
    weights = {name: digest for name, digest in result.entry.products.items() if name.endswith(".safetensors")}
    return {
        "seconds": seconds,
        "read": read,
        "models": models,
        "states": states,
        "weights": weights,
        "how": result.entry.how,
        "gap": result.entry.scalars.gap_bound,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(step(json.loads(line))), flush=True)
