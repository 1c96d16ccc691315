"""Methods by declaration: the decorator `method` makes a merging method from a function over a `Block` or a class.

    @method("my_dare", source="Language Models are Super Mario, arXiv:2311.03099", needs="elements")
    def my_dare(block: Block, *, density: float = option(0.5, 0.0, 1.0), seed: int = 0) -> Tensor:
        return sum(m.weight * m.tau * block.bernoulli(density, seed, m) / density for m in block.models)

The keyword parameters of the function are the method's options. It returns the merged task vector of the block, before
`norm` is applied: a tensor, or factors `(up, down)`. The result must depend on the arguments alone, because
blocks are visited on several threads and processes, in any order, and because a replay makes the merge again. A fold,
which carries a state, is a class with the same decorator.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_type_hints, overload

from hfmerge.errors import HfMergeError
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.methods.base import NOWHERE, Citation, JointMethod, Law, Measure, MergeMethod, Needs, Site, Survey
from hfmerge.task_vector import Dense, LowRank, TaskVector


if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

M = TypeVar("M", bound=MergeMethod)
Laws = Sequence[Law] | Callable[[Any], Sequence[Law]]

FURTHER = ("arity", "normalises_weights", "default_norm", "of_weights", "absolute", "version")
"""Class attributes of methods that a declaration may name."""
DRAW = 1 << 18
"""Elements that random numbers are drawn for at a time."""


@dataclass(frozen=True, eq=False)
class Member:
    """One model in a block.

    Attributes:
        index: its place among the models.
        weight: of the model in this parameter.
    """

    index: int
    weight: float
    _block: Block = field(repr=False)

    @property
    def tau(self) -> Tensor:
        """The model's change, float32 of the block's shape, on its device. Each access reads it again, so store it."""
        return self._change.to_dense()

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """`up` (m, k) and `down` (k, n) whose product is the change, if it comes from an adapter; None if it is dense.

        A model that does not change the matrix has factors of rank 0.
        """
        change = self._change
        return (change.up, change.down) if isinstance(change, LowRank) else None

    @property
    def pin(self) -> str:
        """The model's pin: the commit of a repository, or the digest of a folder."""
        return self._block.site.pin(self.index)

    def tensor(self, file: str) -> Tensor:
        """The tensor for this block in a file of the model (see `tensors`): float32 of its shape, on its device."""
        return self._block.site.tensor(file, self.index)

    @property
    def _change(self) -> TaskVector:
        return self._block.taus[self.index]


@dataclass(frozen=True, eq=False)
class Block:
    """The input of a method: all models' changes of one matrix or tensor, or of some rows of it.

    Attributes:
        taus: the changes in their stored form; use `models` to read them.
        weights: of the models.
        found: result of `measure` or `survey`, else None; see `method`.
        site: where the block lies.
    """

    taus: Sequence[TaskVector] = field(repr=False)
    weights: Sequence[float]
    base: Callable[[], Tensor] = field(repr=False)
    """Gives the base's values of the block when called: float32, on its device."""
    found: Sequence[float] | None
    site: Site

    @cached_property
    def models(self) -> tuple[Member, ...]:
        """All models, in order of arrival."""
        return tuple(Member(i, weight, self) for i, weight in enumerate(self.weights))

    @property
    def key(self) -> str:
        """Name of the parameter; of a matrix inside a fused one "name#part"."""
        return self.site.key

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the block; (out, in) of a matrix."""
        return tuple(self.base().shape) if self.site.shape is None else self.site.shape

    @property
    def matrix(self) -> bool:
        """The block is a real matrix, a linear map, and not an embedding, vector or convolution."""
        return self.site.matrix

    @property
    def first(self) -> int:
        """Elements of the parameter that come before the block's first: not 0 where some of its rows are visited."""
        return self.site.first

    @property
    def device(self) -> str:
        """Where the block is computed, as torch names it."""
        return self.site.device

    def uniform(self, seed: int, model: Member) -> Tensor:
        """Numbers of [0, 1) in steps of 2^-24, float32 of the block's shape.

        A number depends only on `seed`, the model's pin, the parameter, and the element's place in it. So it is the
        same for every cut of the tensor, every process, and every replay. Generator: Philox 4x64-10.
        """
        import numpy as np

        return self._drawn(seed, model, lambda raw: (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))

    def bernoulli(self, probability: float, seed: int, model: Member) -> Tensor:
        """Random 0 and 1, 1 with the given probability, float32 of the block's shape; as reproducible as `uniform`."""
        import numpy as np

        edge = int(min(max(probability, 0.0), 1.0) * 2.0**64)
        if edge == 1 << 64:
            return self._drawn(seed, model, lambda raw: np.ones(raw.shape, np.float32))
        return self._drawn(seed, model, lambda raw: (raw < np.uint64(edge)).astype(np.float32))

    def _drawn(self, seed: int, model: Member, made: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        import numpy as np
        import torch

        count = math.prod(self.shape)
        values = np.empty(count, np.float32)
        key = int(sha256_bytes(canonical_json([seed, model.pin, self.key]))[:32], 16)
        for at in range(0, count, DRAW):
            # a step of the counter gives four numbers
            steps, over = divmod(self.first + at, 4)
            size = min(DRAW, count - at)
            raw = np.random.Philox(key=key, counter=steps).random_raw(over + size)[over:]
            values[at : at + size] = made(raw)
        return torch.from_numpy(values).view(self.shape).to(self.device)


class _Declared(JointMethod):
    """A method made of a function over blocks; its fields are the function's keyword parameters."""

    function: ClassVar[Callable[..., Any]]

    def combine(
        self,
        taus: Sequence[TaskVector],
        weights: Sequence[float],
        base: Callable[[], Tensor],
        found: Sequence[float] | None,
        site: Site = NOWHERE,
    ) -> TaskVector:
        """What the function says; see `JointMethod.combine`.

        Raises:
            HfMergeError: it returned a change of another shape.
        """
        block = Block(taus, weights, base, found, site)
        options = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        result = self.function(block, **options)
        change = Dense(result) if not isinstance(result, tuple) else LowRank(*result)
        if change.shape != block.shape:
            raise HfMergeError(
                f"the method {self.name} returned a change of shape {change.shape} for {site.key or 'a block'} of "
                f"shape {block.shape}; it has to return the merged task vector of the block it is given."
            )
        return change


def summed(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors that are made one at a time, in the memory of the first; at least one."""
    total = None
    for part in parts:
        total = part if total is None else total.add_(part)
        # not held while the next one is made
        del part
    assert total is not None
    return total


def option(default: Any, low: float | None = None, high: float | None = None, help: str = "") -> Any:
    """Declare the default of an option, its bounds and its help.

    Args:
        default: value if a recipe does not name the option; None needs a type that allows None.
        low, high: the least and the greatest value, inclusive; None: no bound.
        help: one line for users; default: the option's name.
    """
    limits = {"minimum": low, "maximum": high}
    return field(default=default, metadata={"help": help, **{k: v for k, v in limits.items() if v is not None}})


def tensors(default: str, help: str = "") -> Any:
    """Declare an option that names a safetensors file of every model, with tensors beside its weights.

    The file lies in each model's folder or repository, next to its weights, and holds a tensor for every parameter of
    the base that some model changes, of its name and shape. It counts among the model's files: it is fetched, pinned
    and recorded by digest like them. The function gets the file's name, and `Member.tensor` reads it.
    """
    return field(default=default, metadata={"help": help, "tensors": True})


class method:  # noqa: N801
    """Decorator: a merging method by its name.

    Of a function over a `Block` it makes a class of methods, whose instances hold values of the options, the keyword
    parameters of the function (of type float, int, bool, str, Literal, or one of these or None). Of a class, a fold
    for instance, it sets the class attributes (see `MergeMethod`).

    Args:
        name: as written in a recipe, and as the entry point in the group `hfmerge.methods`.
        source: publications: keys of `citations.bib`, "title, arXiv:NUMBER" or "title, https://..."; None: the method
            was not published, and the card cites nothing.
        needs: the piece of the input that the method needs at once, see `Needs`.
        laws: laws of the method, see `Law`; or a function from the method to its laws, if they depend on options.
        survey, measure: for a method made of a function, see `MergeMethod`; their first argument is the method.
            `Block.found` is their result. For a block that is given whole, `survey` is not called and `found` is None.
        more: `arity`, `normalises_weights`, `default_norm`, `of_weights`, `absolute`, `version`, as in `MergeMethod`.

    Raises:
        TypeError: a fault of the declaration. ValueError: an unknown source.
    """

    def __init__(
        self,
        name: str,
        *,
        source: str | Sequence[str] | None,
        needs: Needs = "tensor",
        laws: Laws = (),
        survey: Callable[[Any, int, int], Survey | None] | None = None,
        measure: Callable[[Any, int], Measure | None] | None = None,
        **more: Any,
    ):
        citations = tuple(map(cited, [source] if isinstance(source, str) else source or ()))
        if unknown := {*more} - {*FURTHER}:
            raise TypeError(f"{name}: no attribute {', '.join(sorted(unknown))}; one of {', '.join(FURTHER)}")
        self._attributes = {"name": name, "needs": needs, "citations": citations, **more}
        if callable(laws):
            self._attributes["holds"] = lambda self, law: law in laws(self)
        else:
            self._attributes["laws"] = tuple(laws)
        self._attributes |= {} if survey is None else {"survey": survey}
        self._attributes |= {} if measure is None else {"measure": measure}
        if needs == "model" and measure is None:
            raise TypeError(f"{name}: a method that needs the model has a `measure` that looks at it")

    @overload
    def __call__(self, target: type[M]) -> type[M]: ...

    # a class can be called as well, and is one of methods then
    @overload
    def __call__(self, target: Callable[..., Any]) -> type[_Declared]: ...  # type: ignore[overload-cannot-match,unused-ignore]

    def __call__(self, target: Any) -> Any:
        if not isinstance(target, type):
            return self._made(target)
        # attributes that neither names are reset, so that none is inherited from an extended method
        unset = {key: getattr(MergeMethod, key) for key in FURTHER if key not in vars(target)}
        for attribute, value in {**unset, **self._attributes}.items():
            setattr(target, attribute, value)
        return target

    def _made(self, function: Callable[..., Any]) -> type[_Declared]:
        first, *others = inspect.signature(function).parameters.values()
        if any(other.kind is not other.KEYWORD_ONLY or other.default is other.empty for other in others):
            raise TypeError(f"{self._attributes['name']}: options are keyword parameters with defaults, after a `*`")
        # the annotations of the block and of the result may be there for type checkers only
        notes = type("Notes", (), {"__annotations__": {other.name: other.annotation for other in others}})
        hints = get_type_hints(notes, function.__globals__)
        fields = []
        for other in others:
            given = other.default if isinstance(other.default, dataclasses.Field) else field(default=other.default)
            help = given.metadata.get("help") or other.name.replace("_", " ")
            made = field(default=given.default, metadata={**given.metadata, "help": help})
            fields.append((other.name, hints[other.name], made))
        sources = "; ".join(f"{one.title}, {one.url}" for one in self._attributes["citations"]) or "not published"
        text = f"{inspect.cleandoc(function.__doc__ or function.__name__)}\n\nSource: {sources}."
        space = {**self._attributes, "function": staticmethod(function), "__doc__": text}
        found = dataclasses.make_dataclass(function.__name__, fields, bases=(_Declared,), namespace=space, frozen=True)
        found.__module__ = function.__module__
        return found


def cited(source: str) -> Citation:
    """A publication by its key in `citations.bib`, by "title, arXiv:NUMBER", or by "title, https://..."."""
    known = _library()
    if source in known:
        return known[source]
    page = re.fullmatch(r"(.+),\s*(https://\S+)", source, re.DOTALL)
    if page is not None:
        return Citation(page[1], page[2], f"@misc{{page,\n  title = {{{page[1]}}},\n  url   = {{{page[2]}}}\n}}")
    found = re.fullmatch(r"(?:(.+),\s*)?arXiv[: ](\d{4}\.\d{4,5})", source, re.DOTALL)
    if found is None:
        raise ValueError(
            f'{source!r} is no key of citations.bib; write "title, arXiv:NUMBER" or "title, https://...", or None'
        )
    title, number = found[1] or f"arXiv:{found[2]}", found[2]
    bibtex = (
        f"@misc{{arxiv{number},\n  title  = {{{title}}},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}"
    )
    return Citation(title, f"https://arxiv.org/abs/{number}", bibtex)


@cache
def _library() -> dict[str, Citation]:
    """`citations.bib`: before each entry stands the address at which the publication is found."""
    text = Path(__file__).with_name("citations.bib").read_text(encoding="utf-8")
    found = {}
    for url, entry, key in re.findall(r"^(https://\S+)\n(@\w+\{(\w+),\n.*?^\})$", text, re.DOTALL | re.MULTILINE):
        title = re.search(r"^  title\s+= \{(.*)\},$", entry, re.MULTILINE)
        assert title is not None, key
        found[key] = Citation(title[1], url, entry)
    return found
