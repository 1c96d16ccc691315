"""Checks the target of a push: the right to write, the files it would replace, and the people who could read it.

The checks run before any work, so that no result is computed in vain. The push itself makes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfmerge.checkpoint.side_files import is_side_file
from hfmerge.errors import AccessError, LedgerError, NotFoundError, OfflineError, PushError
from hfmerge.hashing import git_blob_id, sha256_bytes
from hfmerge.hub.client import hub_api, hub_errors, patiently
from hfmerge.hub.commits import download, listed, moved
from hfmerge.hub.privacy import WORDS, level_of, restricted, snapshot_of
from hfmerge.hub.reference import split_name
from hfmerge.hub.state_branch import STATE_BRANCH, strange_files
from hfmerge.ledger.card import FILE, licence_note, parse_card
from hfmerge.ledger.entry import LEDGER_FOLDER, Entry, check_chain, ledger_files
from hfmerge.ledger.removal import ContainedModel
from hfmerge.lifecycle.verify import LICENCES, WEIGHTS
from hfmerge.validation.limits import CARD_BYTES
from hfmerge.validation.wording import call, parameter


CONFIGS = ("config.json", "adapter_config.json", "model_index.json", "params.json", "config.yaml")
"""Names of files, at any depth, that describe a model."""
_ASSETS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".gitattributes", ".gitignore")
"""Endings of files that people put beside a model. A push does not delete such files."""
MAY_WRITE = ("admin", "write", "contributor")
"""Roles in an organisation that may create repositories there."""
TOKEN = "`hf auth login`, or HF_TOKEN"


@dataclass(frozen=True)
class Destination:
    """The repository to which a result is pushed, and what its user allows.

    Attributes:
        repo_id: the repository; it is created if it does not exist.
        private: visibility of a new repository; None: the Hub's default, but private if an input is (see `privacy`).
        create_pr: open a pull request instead of committing to `main`.
        parent_commit: commit that `main` must be at; None: its commit when the push begins.
        overwrite: replace files of the repository that are not of this merge.
        publish_private: names of inputs whose merge more people may read than may read the input.
        message: first line of the commit; None: what was done.
    """

    repo_id: str
    private: bool | None = None
    create_pr: bool = False
    parent_commit: str | None = None
    overwrite: bool = False
    publish_private: tuple[str, ...] = ()
    message: str | None = None

    def withheld(self, levels: Mapping[str, int], level: int) -> list[str]:
        """Inputs that are more private than a repository of `level`, without those in `publish_private`."""
        allowed = [name.partition("@")[0].lower() for name in self.publish_private]
        return [name for name, own in levels.items() if own > level and name.lower() not in allowed]


@dataclass(frozen=True)
class Target:
    """A repository now: its ID as the Hub writes it, the commit of `main`, its level of privacy, its files."""

    repo_id: str
    head: str
    level: int
    files: Mapping[str, Any]


def destination(
    push_to: str | None,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    publish_private: Sequence[str] = (),
    commit_message: str | None = None,
) -> Destination | None:
    """The destination of a verb's arguments; None if nothing is to be published."""
    if push_to is None:
        return None
    return Destination(push_to, private, create_pr, None, overwrite, tuple(publish_private), commit_message)


def find_target(to: Destination) -> Target | None:
    """The repository as it is now; None if there is none, or none that the token may see.

    Raises:
        SourceError: no right, no connection; no repository to open a pull request for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    api = hub_api()
    with hub_errors(to.repo_id, "write"):
        try:
            info = patiently(lambda: api.model_info(to.repo_id, revision="main"))
        except RepositoryNotFoundError:
            if to.create_pr:
                raise
            return None
        head = str(info.sha)
        return Target(str(info.id), head, level_of(info), listed(api, to.repo_id, head))


def make_target(to: Destination, levels: Mapping[str, int]) -> None:
    """Create the repository, private if an input that may not be published is.

    Args:
        levels: inputs that are not public (see `privacy.restricted`).

    Raises:
        PushError: the user asked for a public repository, and an input is not public. SourceError: no right, no
            connection.
    """
    check_levels(to, None, levels)
    private = True if to.withheld(levels, 0) else to.private
    api = hub_api()
    with hub_errors(to.repo_id, "write"):
        patiently(lambda: api.create_repo(to.repo_id, private=private, exist_ok=True))


def admit(
    to: Destination,
    inputs: Collection[ContainedModel],
    *,
    history: Mapping[str, bytes],
    again: Callable[[Entry], bool] | None = None,
    create: bool = True,
) -> tuple[int | None, str | None]:
    """Check before any work: may the token write to the target, and which files would the push replace?

    Args:
        inputs: the materials of the result.
        history: path -> bytes of the ledger that the result continues.
        again: tells for a ledger entry whether the result would be the same merge, so that a merge may be repeated.
        create: create a repository that does not exist, where the token does not tell whether it may.

    Returns:
        The level of privacy of the repository, None if it does not exist yet; and what the push will replace, if that
        is allowed.

    Raises:
        PushError: it may not go there. OfflineError: the Hub cannot be reached. SourceError: it cannot be asked.
    """
    try:
        me = _user(to)
        target = find_target(to)
        if target is not None and not to.create_pr:
            require_writer(to.repo_id, me["name"])
        if target is not None and to.parent_commit not in (None, target.head):
            raise moved(to.repo_id, str(to.parent_commit))
        if target is None:
            _require_namespace(to, me, inputs, create=create)
            return None, None
        card_there(to.repo_id, target)
        said = (check_replacement(to, target, inputs, history, again=again)[1], check_branch(to)[1])
        return target.level, "; ".join(line for line in said if line is not None) or None
    except OfflineError as error:
        raise OfflineError(
            f"{to.repo_id}: the Hub cannot be reached, so nothing was begun. Name an {parameter('output')} instead of "
            f"{parameter('push_to')} and publish later with {call('push', 'FOLDER', to.repo_id)}. Or unset "
            "HF_HUB_OFFLINE."
        ) from error


def card_there(repo_id: str, target: Target) -> str | None:
    """The card of a repository, whose text a push keeps; None if it has none.

    Raises:
        PushError: it is too large, no UTF-8, or has front matter that nobody can read. SourceError: no connection.
    """
    if FILE not in target.files:
        return None
    try:
        CARD_BYTES.check(target.files[FILE].size)
        with hub_errors(repo_id):
            text = download(hub_api(), repo_id, FILE, target.head).decode("utf-8")
        parse_card(text)
    except (ValueError, LedgerError) as error:
        raise PushError(f"{repo_id}: the {FILE} there cannot be kept ({error}); correct it, or delete it.") from error
    return text


def admit_card(repo_id: str, *, create_pr: bool) -> None:
    """Check before any work: may the token change the card of an existing repository?

    Raises:
        PushError: no right to write. SourceError: no such repository, no connection.
    """
    me = _user(Destination(repo_id, create_pr=create_pr))
    if not create_pr:
        require_writer(repo_id, me["name"])


def require_writer(repo_id: str, user: str | None = None) -> None:
    """Check that the token may write to an existing repository.

    Args:
        user: owner of the token, if known already.

        Raises:
            PushError: the token may not write. SourceError: the Hub cannot be asked.
    """
    api = hub_api()
    user = user or _user(Destination(repo_id))["name"]
    try:
        with hub_errors(repo_id, "write"):
            patiently(lambda: api.auth_check(repo_id, write=True))
    except (AccessError, NotFoundError) as error:
        raise PushError(
            f"{repo_id}: {user} has no right to write there; push to a repository of your own, such as "
            f"{user}/{repo_id.rpartition('/')[2]}, or open a pull request with {parameter('create_pr', True)}."
        ) from error


def _user(to: Destination) -> Mapping[str, Any]:
    """The Hub's answer on the token's user; the key `name` holds the name."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    api = hub_api()
    try:
        with hub_errors(to.repo_id, "write"):
            me: Mapping[str, Any] = patiently(api.whoami)
    except LocalTokenNotFoundError as error:
        raise PushError(
            f"{to.repo_id}: nobody is logged in; a push needs a token that may write there: {TOKEN}."
        ) from error
    if _role(me) == "read" and not to.create_pr:
        raise PushError(
            f"{to.repo_id}: the token of {me['name']} may only read; a push needs one that may write there: {TOKEN}."
            + ("" if _is_own(to, me) or "/" not in to.repo_id else f" And {_foreign(to, me)}")
        )
    try:
        validate_repo_id(to.repo_id)
        valid = "/" in to.repo_id
    except HFValidationError:
        valid = False
    if not valid:
        raise PushError(
            f"{to.repo_id}: names no repository to write to; write NAMESPACE/NAME, such as {me['name']}/NAME."
        )
    return me


def _role(me: Mapping[str, Any]) -> str | None:
    token = (me.get("auth") or {}).get("accessToken") or {}
    return token.get("role")


def _require_namespace(
    to: Destination, me: Mapping[str, Any], inputs: Collection[ContainedModel], *, create: bool
) -> None:
    """Whether the user may create a repository there; where their token does not say, it is created at once."""
    own = _is_own(to, me)
    if own and (_role(me) == "write" or not create):
        return
    if not create:
        raise PushError(f"{to.repo_id}: {_foreign(to, me)}")
    try:
        make_target(to, restricted(part.identity for part in inputs))
    except (AccessError, NotFoundError) as error:
        raise PushError(f"{to.repo_id}: {_foreign(to, me)}") from error


def _is_own(to: Destination, me: Mapping[str, Any]) -> bool:
    """Whether the target lies under the user's name, or under an organisation in which they may write."""
    namespace = to.repo_id.partition("/")[0].lower()
    roles = {str(org.get("name")).lower(): org.get("roleInOrg") for org in me.get("orgs") or ()}
    return namespace == str(me["name"]).lower() or roles.get(namespace) in MAY_WRITE


def _foreign(to: Destination, me: Mapping[str, Any]) -> str:
    namespace, _, name = to.repo_id.partition("/")
    return f"{me['name']} has no right to write under {namespace}; check the name, or push to {me['name']}/{name}."


def with_snapshots(inputs: Iterable[ContainedModel], places: Mapping[str, str]) -> list[ContainedModel]:
    """Inputs, and the repositories whose snapshots in a cache were merged as folders.

    Args:
        places: identity of an input -> its folder.
    """
    found = list(inputs)
    for part in tuple(found):
        repository = snapshot_of(places[part.identity]) if part.identity in places else None
        if repository is not None:
            found.append(ContainedModel(repository, part.role, {}))
    return found


def check_readers(to: Destination, level: int | None, inputs: Collection[ContainedModel]) -> None:
    """Check that everybody who may read the target may also read the inputs of the result.

    Args:
        level: level of privacy of the target; None: the target is new and will be as private as necessary.

    Raises:
        PushError: an input is more private than the target, and may not be published. SourceError: the Hub cannot be
            asked.
    """
    check_levels(to, level, restricted(part.identity for part in inputs))


def check_levels(to: Destination, level: int | None, levels: Mapping[str, int]) -> None:
    """As `check_readers`.

    Args:
        levels: inputs that are not public (see `privacy.restricted`).
    """
    if level is None and to.private is not False:
        return
    if held := to.withheld(levels, level or 0):
        what = "would be public" if level is None else f"is {WORDS[level]}"
        raise PushError(_too_public(to, held[0], levels, what))


def _too_public(to: Destination, name: str, levels: Mapping[str, int], what: str) -> str:
    own = WORDS[levels[name]] if levels[name] < len(WORDS) - 1 else "private, or gone"
    return (
        f"{to.repo_id}: {what}, and {name}, from which the result is made, is {own}. Push to a private repository. Or "
        f"pass {parameter('publish_private', [name])} to publish the result all the same; if the result keeps a copy "
        f"of {name}, the copy is published too."
    )


def check_replacement(
    to: Destination,
    target: Target,
    inputs: Collection[ContainedModel],
    history: Mapping[str, bytes],
    *,
    written: Collection[str] = (),
    again: Callable[[Entry], bool] | None = None,
) -> tuple[list[str], str | None]:
    """Find the files that a push would replace or delete and that are not of this merge.

    Args:
        inputs, history, again: as for `admit`.
        written: files that the push would write, as far as known.

    Returns:
        Those files, and a line that names them, or None.

    Raises:
        PushError: there are such files, or the target is itself an input, and the user did not allow to replace them.
    """
    theirs = ledger_files(name for name in target.files if name.endswith(".json"))
    # the Hub's listing has their digests, and a ledger may be long
    strange = next((name for name in theirs if not _is_file(target.files[name], history.get(name))), None)
    known = {name: history[name] for name in theirs if strange is None}
    if strange is not None and again is not None and len(theirs) == 1:
        only = {strange: download(hub_api(), to.repo_id, strange, target.head)}
        if _is_again(only, again):
            known, strange = only, None
    if theirs and strange is None:
        lost, why = _changed_since(target, to.repo_id, known, history), "holds files that its ledger does not describe"
        role = None
    else:
        own = (to.repo_id.lower(), target.repo_id.lower())
        role = next((p.role for p in inputs if split_name(p.name)[0].lower() in own), None)
        held = role is not None or any(_of_a_model(name) or name in written for name in target.files if name != FILE)
        lost = [name for name in sorted(target.files) if not _is_asset(name)] if held else []
        why = "holds a model that is not of this merge"
        if role is not None:
            why = f"is itself in this merge ({role})"
        elif strange is not None:
            why = f"holds another merge ({strange} differs)"
    if not lost and role is None:
        return [], None
    shown = _shown(lost)
    if not to.overwrite and (strange is not None or not to.create_pr):
        on = f"go on from it with {call('add', to.repo_id, ['MODEL'])}, or " if strange is not None else ""
        raise PushError(
            f"{to.repo_id}: {why}; a push would replace {shown or 'what it is'}; {on}push to another repository, or "
            f"pass {parameter('overwrite', True)} to replace them."
        )
    verb = "the pull request would replace" if to.create_pr else "replaced"
    return lost, f"{to.repo_id} {why}: {verb} {shown or 'nothing'}, of commit {target.head[:12]}"


def check_branch(to: Destination) -> tuple[list[str], str | None]:
    """Find files of other people on the branch of kept states, which a push would delete.

    Returns:
        Those files, and a line that names them, or None.

    Raises:
        PushError: there are such files, and the user did not allow to delete them. SourceError: the Hub cannot be
            asked.
    """
    if to.create_pr:
        return [], None
    with hub_errors(to.repo_id, "write"):
        lost = strange_files(hub_api(), to.repo_id)
    if lost and not to.overwrite:
        raise PushError(
            f"{to.repo_id}: its branch {STATE_BRANCH}, where kept states go, holds what is not of a merge; a push "
            f"would delete {_shown(lost)}; move them to another branch, or pass {parameter('overwrite', True)} to "
            "delete them."
        )
    return lost, f"{to.repo_id}: deleted from its branch {STATE_BRANCH}: {_shown(lost)}" if lost else None


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more files" if len(names) > 4 else "")


def _is_file(listed: Any, data: bytes | None) -> bool:
    """Whether a file that the Hub lists has these bytes."""
    if data is None:
        return False
    if listed.lfs is not None:
        return bool(listed.lfs.sha256 == sha256_bytes(data))
    return bool(listed.blob_id == git_blob_id(data))


def _is_again(theirs: Mapping[str, bytes], again: Callable[[Entry], bool]) -> bool:
    try:
        return again(check_chain(theirs, "")[-1])
    except LedgerError:
        return False


def _changed_since(target: Target, repo_id: str, theirs: Mapping[str, bytes], ours: Mapping[str, bytes]) -> list[str]:
    """Files that a push would replace or delete, or that a loader reads, and that neither ledger lists.

    Args:
        theirs: path -> bytes of the ledger there.
        ours: of the ledger that the result continues or brings; empty: the one there.
    """
    before = made_by(check_chain(theirs, repo_id)[-1])
    after = made_by(check_chain(ours, repo_id)[-1]) if ours else before
    lost = []
    for name, item in sorted(target.files.items()):
        known = [made[name] for made in (before, after) if name in made]
        if (known and _digest(repo_id, target, item) not in known) or (not known and _loaded(name)):
            lost.append(name)
    return lost


def _loaded(name: str) -> bool:
    return name.endswith(WEIGHTS) or is_side_file(name)


def made_by(entry: Entry) -> dict[str, str]:
    """Path -> SHA-256 of all files that a step writes, except card, ledger and states."""
    note = licence_note([entry.base, *entry.models])
    return {**entry.products, **({LICENCES: sha256_bytes(note.encode())} if note is not None else {})}


def _digest(repo_id: str, target: Target, item: Any) -> str:
    if item.lfs is not None:
        return str(item.lfs.sha256)
    return sha256_bytes(download(hub_api(), repo_id, item.path, target.head))


def _of_a_model(name: str) -> bool:
    """Whether a file is of a model, or is one that a merge may need the place of."""
    if _loaded(name) or name.rpartition("/")[2] in CONFIGS:
        return True
    return name == LICENCES or name.startswith((f"{LEDGER_FOLDER}/", "heads/"))


def _is_asset(name: str) -> bool:
    return name.endswith(_ASSETS) and name != LICENCES
