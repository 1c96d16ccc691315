"""A merge's history as a tree in text: steps as a chain, what joined and left at each, merges among them as branches.

o  org/base@0f3c9a12
|
*  1 merge  5be1a09c77d2  opcm alpha=0.5  norm 1.07
|    + org/a@1b2c3d4e  0.53
| o  + org/inner@77aa01bc  0.61, itself a merge, ledger 90dd1c2e3f4a, of
|/     org/x@11112222
|      org/y@33334444
*  2 unmerge  8c1d2e3f4a5b  opcm alpha=0.5  norm 0.98
|    - org/a@1b2c3d4e
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hfmerge.comparing import compare
from hfmerge.ledger import Entry, Material, short
from hfmerge.recipe.weights import shown
from hfmerge.steps import Step


def tree(steps: Sequence[Step]) -> list[str]:
    """The lines of the tree, oldest step first."""
    lines = [f"o  {steps[0].entry.base.label}", *_parts(steps[0].entry.base)]
    before: Entry | None = None
    for step in steps:
        lines += ["|", f"*  {title(step)}"]
        if step.entry.restored is not None:
            lines.append(f"|    = step {step.entry.restored}")
        lines += _changes(before, step.entry)
        lines.append(f"|    ({step.entry.how})")
        before = step.entry
    return lines


def title(step: Step) -> str:
    """Number, action, digest, method, norm, and who and when where that is known, of one step."""
    words = [f"{step.entry.step} {step.entry.action}", step.digest[:12], method(step.entry)]
    words.append(f"norm {step.merged_norm:.4g}")
    if step.commit is not None:
        words += [", ".join(step.commit.authors), f"{step.commit.date:%Y-%m-%d %H:%M}"]
    return "  ".join(words)


def method(entry: Entry) -> str:
    """A method with its options, in one line."""
    options = " ".join(f"{name}={value}" for name, value in entry.method["options"].items())
    rescaled = "" if entry.method["norm"] == "none" else f"norm={entry.method['norm']}"
    return " ".join(part for part in (entry.method["name"], options, rescaled) if part)


def _changes(before: Entry | None, after: Entry) -> Iterator[str]:
    if before is None:
        for model in after.models:
            yield from _model("+", model)
        return
    change = compare(before, after)
    if change.base is not None:
        yield f"|    base {change.base[0].label} -> {change.base[1].label}"
        yield from _parts(change.base[1])
    for model in change.removed:
        yield from _model("-", model)
    for old, new in change.replaced:
        yield from _model("-", old)
        yield from _model("+", new)
    for model in change.added:
        yield from _model("+", model)
    for model in change.subtracted:
        yield f"|    ~ {model.label}  approximately subtracted, still in the state"
    for model, weight in change.weights:
        yield f"|    ~ {model.label}  weight {shown(weight)} -> {shown(model.weight)}"
    if change.order is not None:
        yield f"|    order {', '.join(model.label for model in after.models)}"
    for name, (old, new) in change.method.items():
        yield f"|    {name} {old} -> {new}"


def _model(sign: str, model: Material) -> Iterator[str]:
    weight = "" if model.weight == 1.0 else f", weight {shown(model.weight)}"
    text = f"{sign} {model.label}  {(model.squared_norm or 0.0) ** 0.5:.4g}{weight}"
    if model.ledger is None or sign == "-":
        yield f"|    {text}"
        return
    yield f"| o  {text}, itself a merge, ledger {model.ledger[:12]}, of"
    for at, identity in enumerate(model.contains):
        yield f"|{'/ ' if at == 0 else '  '}    {short(identity)}"


def _parts(base: Material) -> Iterator[str]:
    """What a base that is itself a merge was made of."""
    if base.ledger is not None:
        yield f"|\\   itself a merge, ledger {base.ledger[:12]}, of"
        yield from (f"| o  {short(identity)}" for identity in base.contains)
