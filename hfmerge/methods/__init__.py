"""The merging methods, by name; third parties add theirs through the entry point group `hfmerge.methods`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from hfmerge.methods.base import Carry, Citation, FoldMethod, Form, JointMethod, MergeMethod, Site
from hfmerge.methods.declare import Block, Member, method, option, tensors
from hfmerge.methods.exact_sum import AdditiveFold
from hfmerge.methods.gram import Gram
from hfmerge.methods.isotropic import IsoC, MdmOcIso
from hfmerge.methods.linear import Linear, TaskArithmetic
from hfmerge.methods.mdm_oc import MdmOc
from hfmerge.methods.mdm_oc_subspace import MdmOcSubspace
from hfmerge.methods.opcm import OPCM
from hfmerge.methods.slerp import slerp
from hfmerge.methods.ties import ties


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
    "method",
    "option",
    "registry",
    "tensors",
]

BUILT_IN: tuple[type[MergeMethod], ...] = (
    *(OPCM, Linear, TaskArithmetic, Gram, IsoC),
    *(MdmOc, MdmOcIso, MdmOcSubspace, ties, slerp),
)


def registry() -> dict[str, type[MergeMethod]]:
    """All methods by name: the built-in ones, then those of installed packages, which need new names."""
    return {**_installed(), **{kind.name: kind for kind in BUILT_IN}}


@cache
def _installed() -> dict[str, type[MergeMethod]]:
    """Methods of installed packages; finding them reads the metadata of every installed package."""
    methods: dict[str, type[MergeMethod]] = {}
    for entry in entry_points(group="hfmerge.methods"):
        methods.setdefault(entry.name, entry.load())
    return methods
