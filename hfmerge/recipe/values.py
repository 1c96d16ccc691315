"""What single values of a recipe may be: dtypes, norms, states, repository ids, and the options a method declares."""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hfmerge.errors import HfMergeError
from hfmerge.hub.reference import in_subfolder, parse_ref
from hfmerge.recipe.keys import keys_of, read_keys
from hfmerge.recipe.weights import PatternWeights, Weight, values_of
from hfmerge.validation.limits import PATTERN, PATTERNS
from hfmerge.validation.values import Section, factor, items, line, one_of, show, suggestion, text


if TYPE_CHECKING:
    from hfmerge.methods import MergeMethod

Option = float | int | bool | str

DTYPES = ("float32", "float16", "bfloat16", "float64")
DTYPE_ALIASES = {
    **dict.fromkeys(("bf16", "torch.bfloat16", "brain_float"), "bfloat16"),
    **dict.fromkeys(("f16", "fp16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("f32", "fp32", "float", "single", "full", "torch.float32"), "float32"),
    **dict.fromkeys(("f64", "fp64", "double", "torch.float64"), "float64"),
}
_EIGHT_BITS = re.compile(r"(torch\.)?(float8|fp8|f8|u?int[48]|[nf]f?p?4|nf4|mxfp)")
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT]B)", re.ASCII)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
"""Bytes of the units that `save_pretrained` knows."""
_ALIAS = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
VOCABULARIES = ("base", "union")
STATES = ("none", "last", "all")
FITS = ("fit", "fit-matrix")
"""Norms that `methods.fit` finds: one scale for all matrices, or one for each."""
NORMS = ("none", "mean", *FITS)


def dtype(value: object) -> str:
    """A dtype that a merge can be written in. Raises ValueError."""
    if isinstance(value, str) and _EIGHT_BITS.match(value.strip().lower()):
        raise ValueError(
            f"{show(value)} has too few bits for a merge without scales of its own: most changes would be "
            'rounded away. Write "bfloat16", and quantise the result with the program that will run it'
        )
    return str(one_of(DTYPES, DTYPE_ALIASES)(value))


def norm(value: object) -> str | float:
    """`none`, `mean`, `fit`, `fit-matrix` or a positive number. Raises ValueError."""
    if isinstance(value, str) and value in NORMS:
        return value
    near = suggestion(value, NORMS) if isinstance(value, str) else ""
    if near:
        raise ValueError(f"must be none, mean, fit, fit-matrix or a positive number, not {show(value)}{near}")
    result = factor(value)
    if result <= 0.0:
        raise ValueError(f"must be none, mean, fit, fit-matrix or a positive number, not {show(value)}")
    return result


def state(value: object) -> str | int:
    """`none`, `last`, `all` or a positive whole number. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and value in STATES:
        return value
    near = suggestion(value, STATES) if isinstance(value, str) else ""
    raise ValueError(f"must be none, last, all or a positive whole number, not {show(value)}{near}")


def shard_size(value: object) -> int:
    """Bytes, from a positive whole number or a text such as `5GB`. Raises ValueError."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip().upper())):
        value = int(decimal.Decimal(match[1]) * _UNITS[match[2]])
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise ValueError(f'must be a size such as "5GB" or "200MB", or a positive number of bytes, not {show(value)}')
    return value


def pattern(value: object) -> str:
    """A pattern on the names of parameters, as a ledger holds it. Raises ValueError."""
    PATTERN.check(len(line(value)))
    return line(value)


def patterns(value: object) -> tuple[str, ...]:
    """A list of patterns, as a ledger holds it. Raises ValueError."""
    return tuple(items(pattern, PATTERNS)(value))


def repo_id(value: object) -> str:
    """An id the Hub would accept for a repository. Raises ValueError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = text(value)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{show(name)} is not a repository id, write org/name: {error}") from error
    return name


def model_alias(value: object) -> str:
    """A name of the user's own for a model, which can be a folder's too. Raises ValueError."""
    name = text(value)
    if _ALIAS.fullmatch(name) is None or name == "base":
        raise ValueError(
            f"must be of letters, digits, dots, hyphens and underscores, begin with a letter or digit, and not be "
            f"base, not {show(name)}"
        )
    return name


def model_place(value: object) -> str:
    """A model's reference, or a mapping of `model` and `subfolder`. Raises ValueError."""
    if not isinstance(value, Mapping):
        return text(value)
    if strange := sorted(str(key) for key in value if key not in ("model", "subfolder")):
        raise ValueError(f"has the key {show(strange[0])}; only model and subfolder can stand here")
    if "model" not in value:
        raise ValueError("lacks model")
    inside = value.get("subfolder")
    return text(value["model"]) if inside is None else in_subfolder(text(value["model"]), text(inside))


def base_problem(base: str) -> str | None:
    """Why a reference cannot be that of a base: a base is a checkpoint, whose files the output has; None if it can."""
    if "+" not in base:
        return None
    try:
        places = parse_ref(base)
    except HfMergeError:
        return None  # the planner says what is wrong with it
    if len(places) == 1:
        return None
    under, adapter = (place.text for place in places)
    return (
        f"must be one full model, not base+adapter; merge {show(adapter)} onto {show(under)} first (method: linear), "
        "and name the result as the base"
    )


def option_names(method: type[MergeMethod]) -> tuple[str, ...]:
    """The options a method declares, in its order."""
    return tuple(key.name for key in keys_of(method))


def read_options(section: Section, method: type[MergeMethod]) -> dict[str, Option]:
    """All options of a method, its defaults filled in; one that is unset by default and not given is left out."""
    before = len(section.problems)
    options = {name: value for name, value in read_keys(section, keys_of(method)).items() if value is not None}
    if len(section.problems) == before:
        try:
            method(**options)
        except (ValueError, HfMergeError) as error:
            section.report("", f"{method.name} refuses these options: {error}")
    return options


def count_problem(count: int, method: type[MergeMethod]) -> str | None:
    """What is wrong with the number of models, or None."""
    low, high = method.arity
    if count >= low and (high is None or count <= high):
        return None
    span = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    return f"{method.name} takes {span} model{'' if (high or low) == 1 else 's'}, {count} given"


def weights_problem(weights: Sequence[Weight], method: type[MergeMethod] | None) -> str | None:
    """What is wrong with the weights together, or None.

    Which weights by pattern meet in one parameter depends on its name, so their sums are the planner's to check.
    """
    if not any(value for weight in weights for value in values_of(weight)):
        return "all weights are zero, nothing would be merged"
    numbers = [weight for weight in weights if not isinstance(weight, PatternWeights)]
    return sum_problem(numbers, method) if method is not None and len(numbers) == len(weights) else None


def sum_problem(weights: Sequence[float], method: type[MergeMethod]) -> str | None:
    """What is wrong with the weights that meet in one parameter, or None; sums at rounding level count as zero."""
    if not method.normalises_weights:
        return None
    # relative to the largest, since sums of huge weights overflow
    largest = max(abs(weight) for weight in weights) or 1.0
    if abs(math.fsum(weight / largest for weight in weights)) > 1e-12:
        return None
    return f"the weights sum to zero and {method.name} divides by their sum; change one"
