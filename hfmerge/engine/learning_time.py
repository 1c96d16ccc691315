"""Estimates how long the weights of a plan are learned: replay rows that models make, and the steps on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hfmerge.engine.plan import Plan
from hfmerge.engine.threads import core_count
from hfmerge.recipe.replay import GENERATORS


SPEED = 50e9
"""Operations in a second that one core does in passes through a model, measured with a MiniLM of 22 million
parameters: two adapters, 32 rows and 10 steps took 35 s of processor time."""
MERGING = 1e9
"""Bytes in a second that one core goes through where the merge of a step is put together."""
FILLED = 0.75
"""Share of the tokens of a batch's longest row that its rows have on average, padding included."""


def learning_seconds(plan: Plan) -> float:
    """Seconds on the CPU, if no weight stops changing early; 0 where no weights are learned."""
    learn = plan.recipe.learn
    if learn is None:
        return 0.0
    count, replay = len(plan.deltas), learn.replay
    matrices = [math.prod(p.slot.shape) for p in plan.params if p.vocab_axis is None and len(p.slot.shape) > 1]
    patches = _patches(plan.base.config)
    tokens = patches or replay.length * FILLED
    forwards = 2.0 * sum(matrices) * tokens  # operations on one row
    made = 0.0
    held_out = 0
    if learn.replays:
        # a pass of a search goes forwards and backwards; the outputs are taken before and after
        passes = _passes(plan.base.config) if replay.steps is None else replay.steps
        made = count * replay.rows * forwards * (2 + 3 * passes)
        held_out = replay.kept_back
    looks = learn.steps // learn.every + 1
    # with checkpointing activations are computed twice
    each = (4 if learn.checkpointing else 3) * learn.batch
    learned = count * forwards * (learn.steps * each + looks * held_out)
    size = 4.0 * sum(math.prod(param.slot.shape) for param in plan.params if param.touched)
    # the changes are added up with their weights, and each is multiplied with the gradient
    moved = size * (2 * count + 4) * learn.steps
    return ((made + learned) / SPEED + moved / MERGING) / core_count()


def _patches(config: Mapping[str, Any]) -> float:
    """Tokens of an image; 0 for a model of text."""
    seen = config if "image_size" in config else config.get("vision_config") or {}
    if not isinstance(seen.get("image_size"), int):
        return 0.0
    patch = seen.get("patch_size")
    return float((seen["image_size"] // (patch if isinstance(patch, int) and patch > 0 else 16)) ** 2 + 1)


def _passes(config: Mapping[str, Any]) -> int:
    """Passes over the replay rows by default, for a model of this kind."""
    title = str(next(iter(config.get("architectures") or ()), ""))
    if title.endswith(("ForCausalLM", "LMHeadModel")):
        kind = "causal"
    else:
        kind = "image-classification" if _patches(config) else "text-classification"
    return next(iter(GENERATORS[kind].values()))
