"""mergekit's YAML as a recipe of ours, wherever the meaning can be kept; anything else is an error that names it.

What the keys mean is mergekit 0.1.5's behaviour: a parameter of a model wins over one of its slice, and that over the
file's; a base that is not among `models` is added to them; `linear` and `karcher` count the base like any other model,
the other methods do not; `linear`, `ties` and `della` normalise by default, the other methods do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hfmerge.errors import RecipeError
from hfmerge.recipe.mergekit.syntax import (
    Input,
    ModelInputs,
    constant,
    model_text,
    read_dtype,
    read_model_inputs,
    read_tokenizer_source,
)
from hfmerge.recipe.mergekit.weights import model_weight, weight_sums
from hfmerge.recipe.weights import PatternWeights, Weight, values_of, written
from hfmerge.validation.values import Section, flag, number, show, suggestion, text


PRUNING = {
    **dict.fromkeys(("dare_linear", "dare_ties"), None),
    **dict.fromkeys(("della", "della_linear"), "epsilon"),
    **dict.fromkeys(("breadcrumbs", "breadcrumbs_ties"), "gamma"),
}
"""Methods that prune every model's change, and the parameter they have for it beside `density`."""

DEFAULTS = {"epsilon": 0.15, "gamma": 0.01}
"""mergekit's values of them."""

SHARED: dict[str, tuple[str, ...]] = {
    "linear": ("normalize",),
    "task_arithmetic": ("normalize", "lambda"),
    "ties": ("normalize", "lambda", "rescale", "int8_mask"),
    "slerp": ("t",),
    **dict.fromkeys(PRUNING, ("normalize", "lambda", "rescale", "int8_mask")),
    "sce": ("select_topk", "int8_mask"),
    "model_stock": ("filter_wise",),
    "nuslerp": ("nuslerp_flatten", "nuslerp_row_wise"),
    "multislerp": ("normalize_weights", "eps"),
    "karcher": ("max_iter", "tol"),
    "nearswap": ("t",),
    "arcee_fusion": (),
}
"""Parameters of a whole merge that mergekit heeds, by method."""

PER_MODEL: dict[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "slerp": (),
    **{name: ("weight", "density", *(() if own is None else (own,))) for name, own in PRUNING.items()},
    **dict.fromkeys(("nuslerp", "multislerp"), ("weight",)),
    **dict.fromkeys(("sce", "model_stock", "karcher", "nearswap", "arcee_fusion"), ()),
}
"""Parameters of each model that mergekit heeds; given for the file they stand for all models."""

PARAMETERS = tuple(dict.fromkeys(name for table in (PER_MODEL, SHARED) for names in table.values() for name in names))

BY_TENSOR = (
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "model_stock",
    "nuslerp",
    "multislerp",
    "karcher",
    "arcee_fusion",
)
"""Methods that look at each tensor as a whole, where hfmerge looks at each matrix inside it."""

WITHOUT_BASE = ("linear", "nuslerp", "karcher")
"""Methods that need no base; the first model then gives the configuration."""

OTHER_METHODS = ("passthrough", "ram", "ramplus_tl")

KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "name"),
)


def convert(data: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], list[str]]:
    """Turn a mergekit configuration into the data of a recipe.

    Args:
        data: the configuration, with `merge_method`.
        origin: what error messages call it.

    Returns:
        Data for `parse_recipe`, and notes for the user: choices made, and where results may differ in detail.

    Raises:
        RecipeError: everything that cannot be expressed or is wrong, by mergekit's own key paths.
    """
    top, notes = Section(data, "", []), list[str]()
    top.refuse_unknown(KEYS, "mergekit key")
    if "name" in data:
        notes.append("name: only a label in mergekit; dropped")
    if data.get("modules") is not None:
        top.report("modules", "merging modules differently cannot be expressed; list the models under `models`")
    if data.get("chat_template") is not None:
        top.report("chat_template", "cannot be expressed; the merge keeps the base's, remove the key")
    method = _method(top)
    base = top.read("base_model", model_text, None, nullable=True)
    layout = read_model_inputs(top, notes)
    settings = {"dtype": read_dtype(top, notes), "vocabulary": read_tokenizer_source(top, base)}
    merge: dict[str, Any] = {}
    if method and base is None and method not in WITHOUT_BASE and data.get("base_model") is None:
        top.report("base_model", f"is missing; {method} needs one")
    elif method and layout.inputs:
        merge = _Conversion(top, notes, method, base, layout).run()
    if top.problems:
        # one faulty setting for all models is met once for each of them
        raise RecipeError(list(dict.fromkeys(top.problems)), origin)
    return merge | {key: value for key, value in settings.items() if value is not None}, notes


def _method(top: Section) -> str | None:
    """The method's name if it can be converted."""
    name = top.read("merge_method", text, "", required=True)
    if name in SHARED or not name:
        return name or None
    known = f"convertible: {', '.join(SHARED)}"
    if name in OTHER_METHODS:
        top.report("merge_method", f"{show(name)} is not in hfmerge (yet); {known}")
    else:
        remedy = suggestion(name, (*SHARED, *OTHER_METHODS)) or f"; {known}"
        top.report("merge_method", f"{show(name)} is not a mergekit method{remedy}")
    return None


class _Conversion:
    """The method's part of one conversion; what is wrong or noteworthy is added to `top.problems` and `notes`."""

    def __init__(self, top: Section, notes: list[str], method: str, base: str | None, layout: ModelInputs):
        self.top, self.notes, self.method, self.base, self.layout = top, notes, method, base, layout
        self.others = tuple(entry for entry in layout.inputs if entry.model != base)

    def run(self) -> dict[str, Any]:
        """`base`, `models` and `method` of the recipe; of use only if no problem was added."""
        for scope in self.layout.shared:
            self._check_names(scope, (*PER_MODEL[self.method], *SHARED[self.method]))
        for entry in self.layout.inputs:
            self._check_names(entry.parameters, PER_MODEL[self.method])
        counted = self.method in ("linear", "karcher")
        if not counted and not self.others:
            self.top.report("models", "holds nothing but the base")
            return {}
        if self.method != "slerp" and not counted and len(self.others) < len(self.layout.inputs):
            self.notes.append("base_model: listed among the models, where it changes nothing; taken as the base only")
        if self.method in BY_TENSOR:
            self.notes.append(f"{self.method}: the parts of fused tensors are merged one by one")
        recipe = {
            "linear": self._linear,
            "task_arithmetic": self._task_arithmetic,
            "ties": self._ties,
            "slerp": self._slerp,
            **dict.fromkeys(PRUNING, self._pruning),
            "sce": self._sce,
            "model_stock": self._model_stock,
            "nuslerp": self._nuslerp,
            "multislerp": self._multislerp,
            "karcher": self._karcher,
            **dict.fromkeys(("nearswap", "arcee_fusion"), self._of_one),
        }[self.method]()
        return {"base": self.base or self.layout.inputs[0].model, **recipe}

    def _linear(self) -> dict[str, Any]:
        """sum w theta / sum w, in which the base is a model like the others, if it takes part at all."""
        inputs = self.layout.inputs
        if self.base is None:
            self._note_base("a weighted average does not depend on it")
        elif not self.layout.sliced and len(self.others) == len(inputs):
            if not any("weight" in scope.data for scope in self.layout.shared):
                self.top.report("base_model", "needs a weight in linear; add it to models (weight 0 leaves it out)")
                return {}
            inputs = (*inputs, Input(self.base, Section({}, "base_model", self.top.problems)))
            self.notes.append(f"base_model: mergekit's linear merges the base too; {self.base} is added to the models")
        weights, normalize = self._weights(inputs), self._shared("normalize", flag, True)
        # 1e-9 is far below float32's rounding: such weights were meant to sum to 1
        sums = weight_sums(weights or (1.0,))
        if normalize is False and (sums is None or any(abs(total - 1.0) > 1e-9 for total in sums)):
            self._blame("normalize", "false with weights that do not sum to 1 rescales the models, not expressible")
        return {"models": _entries(inputs, weights), "method": {"name": "linear", "norm": "none"}}

    def _task_arithmetic(self) -> dict[str, Any]:
        """theta_0 + lambda sum w tau, divided by sum w if `normalize`."""
        weights = self._weights(self.others)
        method = {"name": "task_arithmetic", "scale": self._sum_scale(weights), "norm": "none"}
        return {"models": _entries(self.others, weights), "method": method}

    def _sum_scale(self, weights: Sequence[Weight] | None) -> float | None:
        """The factor of a weighted sum: lambda, divided by the sum of the weights if `normalize`."""
        normalize, scale = self._shared("normalize", flag, False), self._shared("lambda", number, 1.0)
        sums = weight_sums(weights or ())
        if normalize and (sums is None or any(total != sums[0] for total in sums)):
            self._blame("normalize", "true divides by sums of weights, which differ by filter; not expressible")
        # mergekit does not divide by sums smaller than this
        elif normalize and sums is not None and scale is not None and abs(sums[0]) >= 1e-8:
            scale /= sums[0]
            self.notes.append(f"normalize: expressed as scale, lambda / sum of weights = {scale!r}")
        return None if scale is None else float(scale)

    def _ties(self) -> dict[str, Any]:
        """theta_0 + lambda (sum of agreeing w tau) / (sum of agreeing w), each tau trimmed tensor by tensor."""
        weights, density = self._weights(self.others), self._density()
        normalize, scale = self._shared("normalize", flag, True), self._shared("lambda", number, 1.0)
        if normalize is False:
            self._blame("normalize", "false cannot be expressed with ties, which divides by the agreeing weights")
        self._refuse_negative(weights)
        if density is not None and density < 1.0:
            if self._shared("rescale", flag, False):
                self._blame("rescale", "true cannot be expressed; trimmed changes keep their size, remove it")
            self.notes.append(
                "ties: the number of kept elements is rounded where mergekit truncates, so one element a tensor may "
                "differ; the parts of fused tensors are trimmed one by one"
            )
        self.notes.append("ties: where weighted changes cancel exactly the base's value stays; mergekit adds a change")
        options = {"density": None if density is None else min(density, 1.0), "scale": scale, "scope": "tensor"}
        return {"models": _entries(self.others, weights), "method": {"name": "ties", **options, "norm": "none"}}

    def _refuse_negative(self, weights: Sequence[Weight] | None) -> None:
        """Report weights by which two tools divide in different ways."""
        for entry, weight in zip(self.others, weights or (), strict=False):
            if (least := min(values_of(weight))) < 0.0:
                text = f"{least!r} for {entry.model} is negative: mergekit divides by it, hfmerge by its magnitude"
                self._blame("weight", text, entry)

    def _pruning(self) -> dict[str, Any]:
        """theta_0 + lambda times the sum of pruned w tau, or of those that agree with the elected sign."""
        name, weights, density = self.method, self._weights(self.others), self._density()
        options: dict[str, Any] = {"density": None if density is None else min(density, 1.0)}
        own = PRUNING[name]
        if own is not None:
            options[own] = self._common(own, DEFAULTS[own])
        whole = density is not None and density >= 1.0
        if own == "epsilon" and whole:
            options[own] = 0.0
        if name in ("dare_linear", "della_linear", "breadcrumbs"):
            options["scale"] = self._sum_scale(weights)
        else:
            options["scale"] = self._shared("lambda", number, 1.0)
            options["average"] = self._shared("normalize", flag, name == "della")
            if options["average"]:
                self._refuse_negative(weights)
            self.notes.append(f"{name}: where weighted changes cancel exactly the base's value stays")
        rescale = self._shared("rescale", flag, own != "gamma")
        if own != "gamma":
            options["rescale"] = rescale
            if not whole:
                self.notes.append(
                    f"{name}: hfmerge draws its own random numbers, and divides what is kept by its probability, as "
                    "the paper does, where mergekit restores the sum of magnitudes of each tensor"
                )
        elif rescale and not whole:
            self._blame("rescale", "true cannot be expressed; pruned changes keep their size, remove it")
        return {"models": _entries(self.others, weights), "method": {"name": name, **options, "norm": "none"}}

    def _sce(self) -> dict[str, Any]:
        """Select, calculate, erase; every model has the weight 1."""
        topk = self._shared("select_topk", number, 1.0)
        if topk is not None and topk <= 0.0:
            self._blame("select_topk", f"{topk!r} drops every change in mergekit; give a value above 0")
        self.notes.append("sce: where the changes sum to exactly zero the base's value stays")
        return self._equal(self.others, {"name": "sce", "density": None if topk is None else min(topk, 1.0)})

    def _model_stock(self) -> dict[str, Any]:
        """The average of the changes times the ratio that their mean angle gives."""
        self.notes.append("model_stock: where the mean cosine of the changes is negative the base's values stay")
        return self._equal(
            self.others, {"name": "model_stock", "filter_wise": self._shared("filter_wise", flag, False)}
        )

    def _nuslerp(self) -> dict[str, Any]:
        """slerp between the changes of two models; without a base between the models themselves."""
        weights = self._weights(self.others)
        flat, turned = self._shared("nuslerp_flatten", flag, True), self._shared("nuslerp_row_wise", flag, False)
        models = _entries(self.others, weights)
        if self.base is not None:
            # mergekit's "row-wise" angles are those of vectors along the first axis
            by = "tensor" if flat else "column" if turned else "row"
            return {"models": models, "method": {"name": "nuslerp", "by": by, "norm": "none"}}
        if not flat:
            self._blame("nuslerp_flatten", "false without a base_model cannot be expressed; add a base_model")
        self._note_base("interpolation between two models does not depend on it")
        return {"models": models, "method": {"name": "slerp", "norm": "none"}}

    def _multislerp(self) -> dict[str, Any]:
        """The mean direction of the changes at their mean length."""
        weights = self._weights(self.others)
        sums = weight_sums(weights or (1.0,))
        if self._shared("normalize_weights", flag, True) is False and (
            sums is None or any(abs(total - 1.0) > 1e-9 for total in sums)
        ):
            self._blame("normalize_weights", "false with weights that do not sum to 1 cannot be expressed")
        if any("eps" in scope.data for scope in self.layout.shared):
            self.notes.append("eps: hfmerge needs none; dropped")
        return {"models": _entries(self.others, weights), "method": {"name": "multislerp", "norm": "none"}}

    def _karcher(self) -> dict[str, Any]:
        """The Riemannian mean of all models, the base being one of them if there is one."""
        inputs = self.layout.inputs
        if self.base is None:
            self._note_base("the mean does not depend on it")
        elif not self.layout.sliced and len(self.others) == len(inputs):
            inputs = (*inputs, Input(self.base, Section({}, "base_model", self.top.problems)))
            self.notes.append(
                f"base_model: mergekit's karcher counts the base too; {self.base} is added to the models"
            )
        steps, tolerance = self._shared("max_iter", number, 10), self._shared("tol", number, 1e-5)
        whole = None if steps is None else int(steps)
        return self._equal(inputs, {"name": "karcher", "steps": whole, "tolerance": tolerance})

    def _of_one(self) -> dict[str, Any]:
        """nearswap and arcee_fusion: what one model changes, in part."""
        name = self.method
        if len(self.others) != 1:
            self.top.report("models", f"{name} takes the base and one other model, {len(self.others)} others given")
        if name == "arcee_fusion":
            self.notes.append("arcee_fusion: divergences are computed in float64, and quartiles of all elements")
            return self._equal(self.others, {"name": name})
        if not any("t" in scope.data for scope in self.layout.shared):
            self.top.report("parameters.t", "is missing; nearswap needs it")
        return self._equal(self.others, {"name": name, "t": self._shared("t", number, None)})

    def _equal(self, inputs: Sequence[Input], method: dict[str, Any]) -> dict[str, Any]:
        return {"models": [{"model": entry.model} for entry in inputs], "method": {**method, "norm": "none"}}

    def _note_base(self, why: str) -> None:
        self.notes.append(
            f"no base_model: the first model, {self.layout.inputs[0].model}, becomes the base, which gives the "
            f"configuration and the tokenizer; {why}"
        )

    def _slerp(self) -> dict[str, Any]:
        """From the base at t = 0 to the other model at t = 1, whatever their order in the file."""
        if not any("t" in scope.data for scope in self.layout.shared):
            self.top.report("parameters.t", "is missing; slerp needs it")
        if len(self.others) != 1:
            self.top.report("models", f"slerp takes the base and one other model, {len(self.others)} others given")
        t = self._shared("t", number, None)
        self.notes.append("slerp: fused tensors are interpolated part by part, and straight where a part is all zero")
        return {
            "models": [{"model": self.base}, {"model": self.others[0].model}],
            "method": {"name": "slerp", "t": t, "norm": "none"},
        }

    def _check_names(self, scope: Section, heeded: Sequence[str]) -> None:
        """Unknown parameters are problems; those that mergekit ignores in this place are noted and dropped."""
        scope.refuse_unknown(PARAMETERS, "parameter")
        for name in scope.data:
            if name in PARAMETERS and name not in heeded:
                self.notes.append(f"{scope.at(name)}: without effect on {self.method} in mergekit; dropped")

    def _blame(self, name: str, text: str, entry: Input | None = None) -> None:
        """Report a parameter where it is written, for the file if it is nowhere."""
        scopes = (*((entry.parameters,) if entry else ()), *self.layout.shared)
        next((scope for scope in scopes if name in scope.data), scopes[-1]).report(name, text)

    def _shared(self, name: str, kind: Callable[[Any], Any], default: Any) -> Any:
        return _lookup(name, kind, default, self.layout.shared)

    def _weights(self, inputs: Sequence[Input]) -> list[Weight] | None:
        """One weight a model, None if one is faulty; a missing one is an error in mergekit too."""
        weights: list[Weight] = []
        for entry in inputs:
            scopes = (entry.parameters, *self.layout.shared)
            if not any("weight" in scope.data for scope in scopes):
                entry.parameters.report("weight", "is missing; mergekit requires one for every model it merges")
            weight = model_weight(scopes)
            weights += [] if weight is None else [weight]
        if any(isinstance(weight, PatternWeights) for weight in weights):
            self.notes.append("weight: a filter counts where it is part of the name of a tensor in the base's files")
        return weights if len(weights) == len(inputs) else None

    def _density(self) -> float | None:
        """The one density of all models, None if there is none; of 0 mergekit makes the base."""
        density = self._common("density", 1.0)
        if density is not None and density <= 0.0:
            self._blame(
                "density", f"{density!r} drops every change in mergekit; give a density above 0", self.others[0]
            )
        return density

    def _common(self, name: str, default: float) -> float | None:
        """The one value of a parameter of models, None if there is none."""
        given = [_lookup(name, number, default, (entry.parameters, *self.layout.shared)) for entry in self.others]
        if None not in given and any(value != given[0] for value in given):
            many = "densities" if name == "density" else f"values of {name}"
            self.top.report("models", f"{many} {given} cannot be expressed; hfmerge has one {name} for all models")
        return None if None in given else given[0]


def _lookup(name: str, kind: Callable[[Any], Any], default: Any, scopes: Sequence[Section]) -> Any:
    """The value in the first scope that has the parameter, one constant; None if it is faulty."""
    for scope in scopes:
        if name in scope.data:
            return scope.read(name, lambda value: kind(constant(value)), None)
    return default


def _entries(inputs: Sequence[Input], weights: Sequence[Weight] | None) -> list[dict[str, Any]]:
    pairs = zip(inputs, weights or (), strict=False)
    return [{"model": entry.model, "weight": written(weight)} for entry, weight in pairs]
