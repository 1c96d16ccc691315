"""Finds sources that vanished from the Hub or changed since the merge, before any work, and names the remedies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from hfmerge.checkpoint.model import Model
from hfmerge.errors import AccessError, CorruptFileError, HfMergeError, NotFoundError, RecipeError
from hfmerge.hashing import sha256_file
from hfmerge.hub.client import hub_errors, patiently
from hfmerge.hub.download import cached, fetch, pin
from hfmerge.hub.reference import Snapshot, hub_ref
from hfmerge.hub.state_branch import STATE_BRANCH
from hfmerge.ledger.entry import Material, archive_file, short
from hfmerge.ledger.repository import Merged
from hfmerge.validation.wording import call


_SMALL = 1 << 20
"""Bytes up to which a file that the Hub lists without a digest is read for it before any work."""


@contextlib.contextmanager
def naming_vanished(
    merged: Merged, materials: Sequence[Material], useless: Mapping[str, str] | None = None
) -> Iterator[None]:
    """If planning fails because materials are gone from the Hub, raise one line that says so and names the remedies.

    Args:
        useless: identity of a material -> reason why its kept copy cannot be used.

    Raises:
        NotFoundError: one or more materials are gone. Other errors of planning are raised unchanged.
    """
    try:
        yield
    except RecipeError as error:
        lost = [(material, *found) for material in materials if (found := _lost(material)) is not None]
        if not lost:
            raise
        why = {one: f", and its kept copy cannot take its place ({text})" for one, text in (useless or {}).items()}
        reasons = "; ".join(reason + why.get(material.identity, "") for material, reason, _ in lost)
        ways = list(dict.fromkeys(way for material, _, files in lost for way in _ways(merged, material, files)))
        raise NotFoundError(f"{merged.snapshot.label}: {reasons}. You can use: {'; '.join(ways)}.") from error


def check_unchanged(material: Material, source: Model) -> list[str]:
    """Compare the digests that are listed for a source now with those of the merged files; reads no weights.

    Returns:
        A warning if the source is gone from the Hub and this machine's cache stands in for it.

    Raises:
        CorruptFileError: a file differs, though it has the name and the commit of the one that was merged.
    """
    warnings = []
    places = [(source.snapshot, _own(material))]
    if source.beneath is not None:
        places.append((source.beneath.snapshot, _under(material)))
    for snapshot, files in places:
        if snapshot.commit is None:
            continue
        for name, digest in files.items():
            listed = _listed_digest(snapshot, name)
            if listed is not None and listed != digest:
                raise CorruptFileError(
                    f"{snapshot.label}: {name} is not the file that was merged (sha256 {listed[:12]}..., the ledger "
                    f"says {digest[:12]}...); somebody has changed what this commit gives, so it cannot be used."
                )
        if snapshot.vanished:
            warnings.append(f"{snapshot.label} is gone from the Hub; the copy in this machine's cache is used.")
    return warnings


def _own(material: Material) -> dict[str, str]:
    return {name: digest for name, digest in material.files.items() if not name.startswith("+")}


def _under(material: Material) -> dict[str, str]:
    return {name[1:]: digest for name, digest in material.files.items() if name.startswith("+")}


def _listed_digest(snapshot: Snapshot, name: str) -> str | None:
    """SHA-256 of a file, as the Hub lists it, or read where it is small, or where nothing but the cache is left."""
    info = snapshot.files.get(name)
    if info is None:
        return None
    if info.sha256 is None and (snapshot.vanished or (info.size <= _SMALL and not snapshot.offline)):
        return sha256_file(fetch(snapshot, name))
    return info.sha256


def _lost(material: Material) -> tuple[str, Mapping[str, str]] | None:
    """Why a material cannot be read from the Hub, and which files; None if it can, or lies in a folder."""
    return next(((reason, files) for _, reason, files in lost_places(material)), None)


def lost_places(material: Material) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """The parts of a material (itself, the model beneath it) that the Hub does not give: identity, reason, files."""
    for identity, files in ((material.identity, _own(material)), (material.beneath, _under(material))):
        if identity is None or "@sha256:" in identity:
            continue
        name, _, commit = identity.rpartition("@")
        try:
            _reach(pin(hub_ref(name, commit, identity)), files)
        except (NotFoundError, AccessError) as error:
            reason = str(error).removeprefix(f"{identity}: ").partition(";")[0].rstrip(".")
            yield identity, f"{short(identity)} can no longer be read from the Hub ({reason})", files


def _reach(snapshot: Snapshot, files: Mapping[str, str]) -> None:
    """Ask for the first file that is not on this machine; listing a gated repository is allowed, reading it is not."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    for name in files:
        if cached(snapshot, name) is not None:
            continue
        if snapshot.vanished:
            raise NotFoundError(
                f"{snapshot.label}: no such repository or commit, and {name} is not in the cache of this machine"
            )
        url = hf_hub_url(snapshot.repo_id, snapshot.path(name), revision=snapshot.commit)
        with hub_errors(snapshot.label):
            # mypy cannot infer the type of a lambda with a default
            patiently(lambda url=url: get_hf_file_metadata(url))  # type: ignore[misc]
        return


def _ways(merged: Merged, material: Material, files: Mapping[str, str]) -> list[str]:
    """The commands with which a user can go on without a material, the one closest to the request first."""
    ref, base = (
        merged.snapshot.name if merged.snapshot.folder is None else str(merged.snapshot.ref.text),
        merged.last.base,
    )
    ways = []
    again = _elsewhere(material.name, _own(material)) if files == _own(material) else None
    if again is not None:
        way = call("rebase", ref, base=again) if material is base else call("replace", ref, material.name, again)
        ways.append(f"{way}, which has the same files")
    if material is not base:
        if len(merged.last.models) > 1:
            ways.append(f"{call('unmerge', ref, remove=material.name)}, which does not read it")
        ways.append(call("replace", ref, material.name, "MODEL"))
    if len(merged.entries) > 1:
        ways.append(f"{call('restore', ref, step='N')}, which reads no model")
    if material.kept is not None:
        ways.append(f"an intact {archive_file(material.kept)}, its kept copy, in the folder or on {STATE_BRANCH}")
    return [*ways, "a machine whose Hugging Face cache (HF_HOME) still holds it"]


def _elsewhere(name: str, files: Mapping[str, str]) -> str | None:
    """The repository's present commit, if it holds the same files: its history was rewritten, or it was made anew."""
    try:
        snapshot = pin(hub_ref(name, None))
        same = all(_listed_digest(snapshot, file) == digest for file, digest in files.items())
    except HfMergeError:
        return None  # this is only a hint; the message already says why the material cannot be read
    return f"{name}@{snapshot.commit}" if same and not snapshot.offline else None
