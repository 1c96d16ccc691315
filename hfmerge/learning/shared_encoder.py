"""Losses of several models from one pass through the encoder they share: larger calls, and one gradient of it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfmerge.learning.replay.dataset import Replay
from hfmerge.learning.replay.targets import divergence
from hfmerge.learning.student import Student, autocast


if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Part:
    """Rows that one model is asked about."""

    student: Student
    replay: Replay
    rows: Sequence[int]


def losses(parts: Sequence[Part], precision: str) -> list[Tensor]:
    """The mean divergence of each part, as `Student.loss` gives it, in nats; all models hold the same merge.

    Texts are padded to the longest of all, which attention masks hide. Models whose encoder is not a module of its own
    are asked one by one.

    Args:
        precision: "float32" or "bfloat16".
    """
    groups: dict[object, list[int]] = {}
    for i, part in enumerate(parts):
        model = part.student.model
        apart = model.base_model is model
        groups.setdefault(i if apart else (type(model.base_model), *sorted(part.replay.inputs)), []).append(i)
    found: dict[int, Tensor] = {}
    for group in groups.values():
        some = [parts[i] for i in group]
        few = len(group) == 1
        values = [some[0].student.loss(some[0].replay, some[0].rows, precision)] if few else _together(some, precision)
        found.update(zip(group, values, strict=True))
    return [found[i] for i in range(len(parts))]


def _together(parts: Sequence[Part], precision: str) -> list[Tensor]:
    model = parts[0].student.model
    batches = [part.replay.batch(part.rows, str(model.device)) for part in parts]
    inputs = _joined([own for own, _ in batches], [part.replay.pad or 0 for part in parts])
    cached = "use_cache" in inspect.signature(model.base_model.forward).parameters
    with autocast(model.device.type, precision):
        seen = model.base_model(**inputs, **({"use_cache": False} if cached else {}))
    total, at = sum(len(part.rows) for part in parts), 0
    found = []
    for part, (_, targets) in zip(parts, batches, strict=True):
        end = at + len(part.rows)
        with _standing_in(part.student.model.base_model, _cut(seen, at, end, total)):
            logits = part.student.logits({name: value[at:end] for name, value in inputs.items()}, precision)
        found.append(divergence(part.replay.scores, targets, logits).mean())
        at = end
    return found


def _joined(batches: Sequence[Mapping[str, Tensor]], pads: Sequence[int]) -> dict[str, Tensor]:
    """All rows below one another; texts padded to one length, `input_ids` by each batch's own token."""
    import torch

    found = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if "attention_mask" in batches[0]:
            longest = max(value.shape[1] for value in values)
            values = [
                torch.nn.functional.pad(value, (0, longest - value.shape[1]), value=pad if name == "input_ids" else 0)
                for value, pad in zip(values, pads, strict=True)
            ]
        found[name] = torch.cat(values)
    return found


def _cut(output: ModelOutput, start: int, end: int, total: int) -> ModelOutput:
    """Some rows of all rows' outputs."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(cut(one) for one in value)
        return value[start:end] if getattr(value, "shape", (0,))[:1] == (total,) else value

    return type(output)(**{name: cut(value) for name, value in output.items()})


@contextlib.contextmanager
def _standing_in(encoder: Module, output: ModelOutput) -> Iterator[None]:
    """The encoder gives this output whatever it is asked; a model that does not ask it computes its own."""

    def forward(*args: object, return_dict: bool | None = None, **more: object) -> Any:
        return output.to_tuple() if return_dict is False else output

    encoder.forward = forward
    try:
        yield
    finally:
        del encoder.forward
