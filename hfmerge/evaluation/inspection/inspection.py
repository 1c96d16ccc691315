"""Compares models before they are merged: similarity, norms, signs, spectra and predicted interference.

No merge is made and no file is written. The plan is that of an OPCM merge, and its headers are checked as for a merge.
Parameters are read one after another and divided among the processes of a run. Only sums over elements are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.streaming.session import Streaming, take_session
from hfmerge.engine.estimate import stream_memory, stream_readers
from hfmerge.engine.options import RunOptions
from hfmerge.engine.partition import visit_bytes
from hfmerge.engine.plan import Param, Plan
from hfmerge.engine.planner import build_method, make_plan
from hfmerge.engine.ranks import Ranks, assign_owners
from hfmerge.engine.threads import AHEAD, core_count, overlapped, resident_memory
from hfmerge.errors import Problem, RecipeError
from hfmerge.evaluation.inspection.spectra import Detail, Spectrum
from hfmerge.evaluation.inspection.statistics import HELD, Changes, Measured, measure
from hfmerge.hub.progress_bar import progress_bar
from hfmerge.methods.opcm import OPCM
from hfmerge.recipe.recipe import MethodChoice, Recipe
from hfmerge.validation.wording import parameter


_SCHEMA = 1
"""Version of the JSON form."""
TOPS = (1, 4, 16, 64)
"""Numbers of leading directions whose share of a change's energy is reported."""

Square = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class LayerStatistics:
    """The whole model, or one layer of it; per model in order, or T x T.

    Attributes:
        name: "model", or what the names of its tensors have in common.
        elements: that at least one model changes.
        norms: Frobenius norm of every task vector.
        cosine: `<tau_i, tau_j> / (||tau_i|| ||tau_j||)`; None where one is zero. Source: "Editing Models with Task
            Arithmetic", arXiv 2212.04089 (task vectors of different tasks are almost orthogonal).
        sign_conflict: of the elements that models i and j both change, the share they change in opposite directions:
            0.5 for unrelated changes. Source: TIES, arXiv 2306.01708, section 3; nothing is trimmed here.
        cancelled: share of the models' summed magnitude that is lost in their (weighted) sum:
            `1 - sum_p |sum_t w_t tau_t,p| / sum_p sum_t |w_t tau_t,p|`.
        interference: share of the energy of every model's matrices that OPCM would clear because it lies in what the
            models before it occupy: `1 - ||P(tau_t)||^2 / ||tau_t||^2` over all real matrices, P of arXiv 2501.09522,
            section 4, against the accumulator of the models before, in the recipe's order and with its weights. 0 for
            the first. None where a model changes no matrix, or matrices were not asked for.
    """

    name: str
    elements: int
    norms: tuple[float, ...]
    cosine: Square
    sign_conflict: Square
    cancelled: float | None
    interference: tuple[float | None, ...]


@dataclass(frozen=True)
class Inspection:
    """The result of a comparison.

    Attributes:
        base, models: see `public_name`, the models in order; `names` are unique.
        alpha, variant: of OPCM, for `Part.interference`.
        whole, layers: sums over all parameters, and over each layer's, in stored order.
        spectra: of every matrix that was asked for, and every model that changes it.
        seconds: wall time.
        warnings: of the plan.
    """

    base: str
    models: tuple[str, ...]
    names: tuple[str, ...]
    alpha: float
    variant: str
    whole: LayerStatistics
    layers: tuple[LayerStatistics, ...]
    spectra: tuple[Spectrum, ...]
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, numbers to six digits; what `evaluation.plots` draws."""
        data = dataclasses.asdict(self)
        rounded: dict[str, Any] = {"kind": "inspection", "schema": _SCHEMA, **_rounded(data)}
        return rounded


def inspect_models(
    recipe: Recipe,
    *,
    origin: str = "recipe",
    matrices: Sequence[str] | None = None,
    spectral: bool = True,
    options: RunOptions,
    ranks: Ranks | None = None,
    code_was_run: bool = False,
) -> Inspection:
    """Compare a recipe's models; see `Inspection`, which is the same on every process, whatever their number.

    Args:
        recipe: models to compare. If its method projects as OPCM does, its alpha and variant are used, else 0.5 and
            `code`.
        origin: names the recipe in errors.
        matrices: fnmatch patterns of tensors whose matrices are decomposed, for spectra and interference; None: all.
        spectral: decompose matrices. False: only sums over elements are computed.
        options: only `max_memory` and `notify` are used.
        ranks: the processes that share the parameters.
        code_was_run: see `make_plan`.

    Raises:
        RecipeError: as for a merge, or a pattern that matches no matrix. NonFiniteError: names model and tensor.
    """
    start = time.monotonic()
    ranks = ranks or Ranks()
    alpha, variant = build_method(recipe).projection or OPCM().projection
    choice = MethodChoice(OPCM.name, {"alpha": alpha, "variant": variant}, "none")
    wanted = dataclasses.replace(recipe, method=choice, state="none", dtype=None, keep_sources=False)
    plan = ranks.each(lambda: make_plan(wanted, origin=origin, code_was_run=code_was_run))
    touched = [param for param in plan.params if param.touched]
    chosen = {p.key for p in touched if matrices is None or any(fnmatch.fnmatchcase(p.key, m) for m in matrices)}
    if not any(block.matrix for param in touched if param.key in chosen for block in param.blocks) and matrices:
        raise RecipeError(
            [Problem(parameter("matrices"), f"{', '.join(matrices)} match no matrix that a model changes")], origin
        )
    detail = Detail(True, TOPS, alpha, variant)
    plain = dataclasses.replace(detail, spectral=False)
    apart = chosen if spectral else set[str]()
    owners = assign_owners([_cost(param, param.key in apart) for param in touched], ranks.world)

    def mine() -> dict[str, Measured]:
        own = [param for param, owner in zip(touched, owners, strict=True) if owner == ranks.rank]
        if not own:
            return {}
        with _streamed(plan) as streaming, Changes(plan, streaming) as changes:

            def work(param: Param) -> Measured:
                ranks.check()
                return measure(changes, param, detail if param.key in apart else plain)

            changes.expect(own)
            return {one.key: one for one in _over(plan, own, work, options, bar=ranks.main)}

    everyone = {key: one for part in ranks.together(mine) for key, one in part.items()}
    measured = [everyone[param.key] for param in touched]
    return Inspection(
        base=public_name(plan.base),
        models=tuple(public_name(delta.source) for delta in plan.deltas),
        names=tuple(delta.source.slug for delta in plan.deltas),
        alpha=alpha,
        variant=variant,
        whole=_part("model", measured),
        layers=tuple(_part(name, parts) for name, parts in by_layer(measured).items()),
        spectra=tuple(spectrum for one in measured for spectrum in one.spectra),
        seconds=time.monotonic() - start,
        warnings=plan.warnings,
    )


def public_name(source: Model) -> str:
    """A model as results name it: pinned to its commit, or a folder by its last part, since paths are nobody's."""
    commit = source.snapshot.commit
    return f"{source.name}@{commit}" if commit else source.name


def _cost(param: Param, apart: bool) -> float:
    """Of measuring a parameter, against that of others: reading it, or taking its matrices apart."""
    elements = float(math.prod(param.slot.shape))
    return elements * min(param.slot.shape) if apart and len(param.slot.shape) > 1 else elements


def _over(
    plan: Plan, params: Sequence[Param], work: Callable[[Param], Measured], options: RunOptions, *, bar: bool
) -> Iterator[Measured]:
    """`work` over parameters on a pool of threads, in their order, below the bound on memory; `bar`: show progress."""
    needs = [
        visit_bytes(param, param.slot.shape, OPCM()) + 4 * min(HELD, len(plan.deltas) * math.prod(param.slot.shape))
        for param in params
    ]
    budget = None
    if options.max_memory is not None:
        budget = max(0, options.max_memory - resident_memory() - stream_memory(plan))
        if budget < max(needs) and options.notify is not None:
            bound = parameter("max_memory")
            options.notify(f"{bound} cannot be kept: one parameter needs about {max(needs) / 1e9:.2f} GB.")
    shown = progress_bar(len(params), "Inspecting", " tensors", shown=bar)
    visits = overlapped(work, params, needs, threads=core_count() + AHEAD, memory=budget)
    with contextlib.closing(shown), contextlib.closing(visits):
        for result in visits:
            shown.update(1)
            yield result


@contextlib.contextmanager
def _streamed(plan: Plan) -> Iterator[Streaming | None]:
    if not plan.recipe.stream:
        yield None
        return
    with contextlib.closing(take_session(plan.sources)) as streaming:
        # files are not read whole: heads, and what no model changes, stay where they are
        streaming.begin(
            stream_memory(plan), stream_readers(plan), plan.estimate.stream, unchecked="it is read in part"
        )
        yield streaming


def by_layer(measured: Sequence[Measured]) -> Mapping[str, list[Measured]]:
    """Parameters by layer, in stored order.

    A layer's name ends with the first number in a tensor's name ("encoder.layer.3"); other tensors go by their first
    word ("embeddings"), or two where the first stands before layers as well ("model.norm").
    """
    numbered = {one.key: _numbered(one.key) for one in measured}
    stems = {name.partition(".")[0] for name in numbered.values() if name is not None}
    layers: dict[str, list[Measured]] = {}
    for one in measured:
        name = numbered[one.key]
        if name is None:
            words = one.key.split(".")
            name = ".".join(words[: 2 if words[0] in stems and len(words) > 1 else 1])
        layers.setdefault(name, []).append(one)
    return layers


def _numbered(key: str) -> str | None:
    words = key.split(".")
    places = [i for i, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: places[0] + 1]) if places else None


def _part(name: str, measured: Sequence[Measured]) -> LayerStatistics:
    models = range(len(measured[0].gram))

    def total(field: str, i: int, j: int) -> float:
        return math.fsum(getattr(one, field)[i][j] for one in measured)

    norms = tuple(math.sqrt(total("gram", i, i)) for i in models)

    def cosine(i: int, j: int) -> float | None:
        scale = norms[i] * norms[j]
        return None if scale == 0.0 else 1.0 if i == j else max(-1.0, min(1.0, total("gram", i, j) / scale))

    def conflict(i: int, j: int) -> float | None:
        both = total("both", i, j)
        return total("opposed", i, j) / both if both else None

    def cleared(i: int) -> float | None:
        whole = total("matrices", i, 0)
        return total("matrices", i, 1) / whole if whole else None

    magnitude = math.fsum(one.magnitude[0] for one in measured)
    return LayerStatistics(
        name,
        sum(one.elements for one in measured),
        norms,
        tuple(tuple(cosine(i, j) for j in models) for i in models),
        tuple(tuple(conflict(i, j) for j in models) for i in models),
        1.0 - math.fsum(one.magnitude[1] for one in measured) / magnitude if magnitude else None,
        tuple(cleared(i) for i in models),
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
