"""The merging methods, by name; third parties add theirs through the entry point group `hfmerge.methods`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from hfmerge.methods.arcee_fusion import arcee_fusion
from hfmerge.methods.base import Carry, Citation, FoldMethod, Form, JointMethod, MergeMethod, Site
from hfmerge.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties
from hfmerge.methods.consensus_ta import consensus_ta
from hfmerge.methods.dare import dare_linear, dare_ties
from hfmerge.methods.declare import Block, Member, method, option, tensors
from hfmerge.methods.della import della, della_linear
from hfmerge.methods.ema import Ema
from hfmerge.methods.exact_sum import AdditiveFold
from hfmerge.methods.gram import FlatGram, Gram
from hfmerge.methods.iso_cts import iso_cts
from hfmerge.methods.isotropic import IsoC, MdmOcIso
from hfmerge.methods.linear import Linear, TaskArithmetic
from hfmerge.methods.magmax import magmax
from hfmerge.methods.mdm_oc import MdmOc
from hfmerge.methods.mdm_oc_subspace import MdmOcSubspace
from hfmerge.methods.model_stock import model_stock
from hfmerge.methods.nearswap import nearswap
from hfmerge.methods.null_filter import NullFilter
from hfmerge.methods.opcm import OPCM
from hfmerge.methods.sce import sce
from hfmerge.methods.slerp import slerp
from hfmerge.methods.spheres import karcher, multislerp, nuslerp
from hfmerge.methods.ties import ties
from hfmerge.methods.tsv_m import tsv_m


__all__ = [
    "AdditiveFold",
    "Block",
    "Carry",
    "Citation",
    "FoldMethod",
    "Form",
    "JointMethod",
    "Member",
    "MergeMethod",
    "Site",
    "faulty",
    "method",
    "option",
    "registry",
    "tensors",
]

BUILT_IN: tuple[type[MergeMethod], ...] = (
    *(OPCM, Linear, TaskArithmetic, Gram, FlatGram, IsoC),
    *(MdmOc, MdmOcIso, MdmOcSubspace, ties, slerp),
    *(dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties, sce, magmax, consensus_ta),
    *(model_stock, nuslerp, multislerp, karcher, nearswap, arcee_fusion, Ema, tsv_m, iso_cts, NullFilter),
)


def registry() -> dict[str, type[MergeMethod]]:
    """All methods by name: the built-in ones, then those of installed packages, which need new names."""
    return {**_installed()[0], **{kind.name: kind for kind in BUILT_IN}}


def faulty() -> dict[str, str]:
    """Names of methods of installed packages that cannot be used, and why, on one line."""
    return dict(_installed()[1])


@cache
def _installed() -> tuple[dict[str, type[MergeMethod]], dict[str, str]]:
    """Methods of installed packages, and faults; finding them reads the metadata of every installed package."""
    methods: dict[str, type[MergeMethod]] = {}
    faults: dict[str, str] = {}
    for entry in entry_points(group="hfmerge.methods"):
        try:
            kind = entry.load()
        except Exception as error:  # a package of others may raise anything; only its own method is lost
            fault = " ".join(f"{type(error).__name__}: {error}".split())
        else:
            named = isinstance(kind, type) and issubclass(kind, MergeMethod) and kind.name == entry.name
            fault = "" if named else f"{entry.value} is no method called {entry.name}"
        if fault:
            package = entry.dist.name if entry.dist is not None else entry.value
            faults.setdefault(entry.name, f"the package {package} brings it, and it cannot be used: {fault}")
        else:
            methods.setdefault(entry.name, kind)
    return methods, faults
