"""Unties a base whose models change one end of a tie alone: each end then gets a tensor of its own.

A tie gives one tensor to two places of a model. LoRA on one of the places changes that place alone, and so does the
head of a fine-tune that was saved untied. No tensor that both places share can say this. So the base is taken for an
untied model: `tie_word_embeddings` is false, and every end has a tensor, which at first has the values of the tie.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hfmerge.checkpoint.delta import Delta
from hfmerge.checkpoint.layout import Layout
from hfmerge.checkpoint.lora import Ends
from hfmerge.checkpoint.model import Model
from hfmerge.engine.model_match import Layouts, some
from hfmerge.errors import HfMergeError, UnsupportedError


TIE_FLAG = "tie_word_embeddings"
TEXT_SECTION = "text_config"


@dataclass(frozen=True)
class Untied:
    """A base as if it had been saved untied.

    Attributes:
        base: with a tensor for every end of a tie (see `Model.renamed`), and its configuration.
        layout: of `base`.
        ends: stored key -> all keys that were tied with it, the one that is stored first.
    """

    base: Model
    layout: Layout
    ends: Ends


def one_sided(deltas: Iterable[Delta], chosen: Callable[[str], bool]) -> tuple[int, ...]:
    """Indices of the models that change one end of a tie alone, at an end that is merged."""
    return tuple(i for i, delta in enumerate(deltas) if any(map(chosen, delta.apart)))


def untie(base: Model, layout: Layout, layouts: Layouts, names: Sequence[str]) -> Untied:
    """The base untied, from its headers.

    Args:
        layout: of the base as it is.
        names: parameters that have to get their own tensor, for the message.

    Raises:
        UnsupportedError: the class cannot be untied.
    """
    skeleton = layout.memory.skeleton
    assert skeleton is not None, "without a class no tie is known"
    why = _flag_does_more(skeleton.model)
    if why is None:
        config: dict[str, Any] = {**base.config, TIE_FLAG: False}
        if isinstance(config.get(TEXT_SECTION), dict):
            config[TEXT_SECTION] = {**config[TEXT_SECTION], TIE_FLAG: False}
        try:
            open_ends = layouts.of(replace(base, config=config)).missing
            held = {name: key for key, name in layout.canonical.items() if key not in layout.tied}
            doubled = {
                end: held[shared]
                for end in open_ends
                if (shared := _shared(layout, end.removeprefix(skeleton.prefix))) in held
            }
            entries = {end: base.tensors[key] for end, key in doubled.items()}
            untied = replace(
                base, config=config, tensors={**base.tensors, **entries}, renamed={**base.renamed, **doubled}
            )
            found = layouts.of(untied)
        except HfMergeError as error:
            why = str(error)
        else:
            if not found.missing and not found.tied and not found.memory.ties:
                return Untied(untied, found, _ends({**layout.tied, **doubled}))
            why = f"{layout.architecture} ties whatever `{TIE_FLAG}` says"
    raise UnsupportedError(
        f"{base.snapshot.label}: a model changes {some(names)} apart from the weight that it is tied to, and the base "
        f"cannot be untied: {why}. Leave this change out with `exclude: [{', '.join(names)}]`."
    )


def _shared(layout: Layout, name: str) -> str:
    """Canonical name of the parameter that a tied one shares, or its own."""
    return layout.memory.ties.get(name, name)


def _ends(copies: dict[str, str]) -> Ends:
    """From copy -> owner: every key with all that belong to its tie."""
    groups: dict[str, list[str]] = {}
    for copy, owner in copies.items():
        groups.setdefault(owner, [owner]).append(copy)
    return {key: tuple(group) for group in groups.values() for key in group}


def _flag_does_more(model: Any) -> str | None:
    """Why the flag cannot be set: the class computes something else with it, as the family of T5 scales its output."""
    if hasattr(model.config, "scale_decoder_outputs"):
        return f"{type(model).__name__} ties whatever `{TIE_FLAG}` says, and scales its output by it"
    for module in model.modules():
        if type(module).__module__.startswith("transformers.") and TIE_FLAG in inspect.getsource(type(module).forward):
            return f"{type(module).__name__} computes something else where `{TIE_FLAG}` is false"
    return None
