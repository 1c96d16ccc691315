"""The merged model under each source's own head: one shared encoder, the heads, and the rows of each source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.delta import Delta
from hfmerge.checkpoint.model import Model
from hfmerge.engine.device import CPU
from hfmerge.engine.plan import Plan
from hfmerge.errors import HeadError, UnsupportedError
from hfmerge.evaluation.models import Subject, kind_of, open_subject
from hfmerge.hub.reference import Snapshot
from hfmerge.learning.replay.dataset import Replay
from hfmerge.learning.replay.targets import divergence


if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Student:
    """The merged model in the place of one source.

    Attributes:
        name: of the source.
        model: an instance of its class, in evaluation mode; what is merged is put into it for the time of `holding`.
        places: stored key of the base -> the modules that have it, and the name of the parameter there; none where the
            source's class has no such part.
        rows: to learn from, each kind with its own outputs, and what each counts.
    """

    name: str
    model: PreTrainedModel = field(repr=False)
    places: Mapping[str, tuple[tuple[Module, str], ...]] = field(repr=False)
    rows: tuple[tuple[Replay, float], ...] = field(repr=False)

    @contextlib.contextmanager
    def holding(self, merged: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with these parameters, for passes forwards and backwards.

        As `torch.func.functional_call` does it, but for longer than one call: activations that are computed again on
        the way back need the same parameters.

        Args:
            merged: by stored key of the base; what is not given stays the base's.
        """
        before = []
        try:
            for key, value in merged.items():
                for module, name in self.places[key]:
                    before.append((module, name, module._parameters[name]))
                    module._parameters[name] = value  # type: ignore[assignment]  # a plain tensor, for a while
            yield
        finally:
            for module, name, parameter in before:
                module._parameters[name] = parameter

    def logits(self, inputs: Mapping[str, Tensor], precision: str) -> Tensor:
        """What the model says of rows: (rows, classes) or (rows, length, vocabulary).

        Args:
            precision: "float32" or "bfloat16".
        """
        with autocast(self.model.device.type, precision):
            found: Tensor = self.model(**inputs).logits
        return found

    def loss(self, replay: Replay, numbers: Sequence[int], precision: str) -> Tensor:
        """The mean divergence of the model from what is known of some rows, in nats."""
        inputs, targets = replay.batch(numbers, str(self.model.device))
        return divergence(replay.scores, targets, self.logits(inputs, precision)).mean()


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[None]:
    """Matrix products in bfloat16, if that is the precision; nothing is kept of weights for a next pass."""
    import torch

    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def references(plan: Plan) -> tuple[str, ...]:
    """How each model of a plan is opened as a model of its own: an adapter on what it lies on, here at least."""

    def opened(source: Model) -> str:
        if source.kind != "adapter":
            return source_reference(source.snapshot)
        under = source.beneath.snapshot if source.beneath is not None else plan.base.snapshot
        return f"{source_reference(under)}+{source_reference(source.snapshot)}"

    return tuple(opened(delta.source) for delta in plan.deltas)


def source_reference(snapshot: Snapshot) -> str:
    """The reference by which a source is opened."""
    return f"{snapshot.name}@{snapshot.commit}" if snapshot.commit else str(snapshot.folder)


def students(
    plan: Plan,
    keys: Iterable[str],
    rows: Sequence[Sequence[tuple[Replay, float]]],
    *,
    checkpointing: bool,
    place: str = CPU,
) -> list[Student]:
    """One for each model of a plan; together they hold the base once, and their heads.

    Args:
        keys: stored keys of the base that are merged.
        rows: of each model.
        checkpointing: compute activations again for gradients.
        place: where, as torch names it.

    Raises:
        UnsupportedError: transformers holds a merged tensor otherwise than the base's file does.
        HeadError, SourceError: a head is missing, or does not fit.
    """
    wanted = tuple(keys)
    base = open_subject(source_reference(plan.base.snapshot), device=place, dtype="float32", copies=plan.copies)
    made = []
    whole: PreTrainedModel | None = None
    for delta, ref, some in zip(plan.deltas, references(plan), rows, strict=True):
        subject = open_subject(ref, device=place, dtype="float32", copies=plan.copies)
        kind = kind_of(subject)
        if kind in ("causal", "masked"):
            model = whole = base.whole(kind) if whole is None else whole
        else:
            head = subject.own_head()
            if head is None:
                raise HeadError(f"{subject.info.label}: has no head of its own, so nothing can be learned from it.")
            model = base.with_head(head, kind, spare=subject)
        subject.forget()
        pads = [replay.pad for replay, _ in some if replay.pad is not None]
        if pads and getattr(model.config, "pad_token_id", None) is None:
            # without a padding token a decoder cannot tell where a row ends
            model.config.pad_token_id = pads[0]
        if checkpointing:
            _checkpointed(model)
        made.append(Student(subject.info.label, model, _places(model, delta, base, wanted), tuple(some)))
    return made


def check_tokens(plan: Plan) -> None:
    """Rows are token numbers of the model that made them, and the merge reads them as the base's.

    Raises:
        UnsupportedError: a model has other tokens than the base.
    """
    if plan.vocabulary is None:
        return
    for delta, rows in zip(plan.deltas, plan.vocabulary.rows, strict=True):
        if rows is not None:
            raise UnsupportedError(
                f"learn: {delta.source.name} has other tokens than the base, so the merge would misread its "
                "rows; leave it out, or merge without `learn`."
            )


def _places(
    model: PreTrainedModel, delta: Delta, base: Subject, keys: Sequence[str]
) -> dict[str, tuple[tuple[Module, str], ...]]:
    """Where the base's tensors are in a model that was made over them: in the same memory, or copied under the same
    name (as transformers does with some that are tied). What the source's class has not is nowhere.
    """
    import torch

    known: dict[int, list[tuple[Module, str, tuple[int, ...]]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                known.setdefault(parameter.data_ptr(), []).append((module, name, tuple(parameter.shape)))
    named = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    found: dict[str, tuple[tuple[Module, str], ...]] = {}
    for key in keys:
        value = base.weights[key]
        places = known.get(value.data_ptr(), [])
        if not places:
            names = (key, f"{prefix}{key}", key.removeprefix(prefix))
            copies = [named[name] for name in names if name in named and torch.equal(named[name], value)]
            places = known[copies[0].data_ptr()] if copies else []
        if not places and delta.rank(key) == 0:
            found[key] = ()
            continue
        if not places or any(shape != tuple(value.shape) for _, _, shape in places):
            raise UnsupportedError(
                f"learn: {type(model).__name__} stores {key} in another form than the base's file, which "
                "learning cannot follow; merge without `learn`, or leave it to the base with `exclude`."
            )
        found[key] = tuple((module, name) for module, name, _ in places)
    return found


def _checkpointed(model: PreTrainedModel) -> None:
    """Recompute activations, which transformers does while training only, but without dropout."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            # rates of dropout modules, and of attention, which applies its own
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)


def parameters(merged: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Merged values as leaves on a device, whose gradient is kept."""
    return {key: value.detach().to(device).requires_grad_() for key, value in merged.items()}
