"""Attacks by paths: copies in the Hub's cache, links and special files in folders, names that lead elsewhere.

Each test plays somebody who gives a merge to a victim, and the victim, who runs an ordinary command on it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

import hfmerge
from hfmerge.checkpoint.digests import folder_digest
from hfmerge.errors import HfMergeError
from hfmerge.hashing import canonical_json, sha256_file
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import tiny
from tests.fixtures.evaluating import TOKENS, labelled, suite
from tests.fixtures.hub import HOME, USERS


SECRET = "the victim's private key"
CLAIMED = "a" * 40
"""A commit that a made-up ledger names."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three fine-tunes of it, and a merge of two of them that keeps their copies."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i in range(3):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 7, ["ill", "well"]), root / "patients")
    merge(root, root / "merged", "m0", "m1")
    merge(root, root / "keeping", "m0", "m1", flags=("--keep-sources",))
    return root


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Path:
    """A merge to spoil."""
    return Path(shutil.copytree(root / "merged", tmp_path / "out"))


@pytest.fixture
def keeping(root: Path, tmp_path: Path) -> Path:
    """A merge to spoil that keeps copies of its sources, none of which was unpacked yet."""
    shutil.rmtree(Path(HOME) / "hfmerge/kept", ignore_errors=True)
    return Path(shutil.copytree(root / "keeping", tmp_path / "out"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the victim outside of all that is merged."""
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


def merge(root: Path, out: Path, *models: str | Path, flags: tuple[str, ...] = ()) -> tiny.Run:
    places = [root / model for model in models]
    return tiny.done("merge", *places, "--base", root / "base", "--method", "linear", "--output", out, *flags)


def lie(folder: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Rewrite the only ledger entry of a merge, in canonical form; gives it as it is then."""
    path = folder / "merge_history" / "0001.json"
    entry: dict[str, Any] = json.loads(path.read_bytes())
    change(entry)
    path.write_bytes(canonical_json(entry))
    return entry


def refused(*arguments: object) -> str:
    """What a command says, in one line, that must not do what was asked."""
    run = tiny.cli(*arguments)
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1, (run.code, run.out, run.err)
    return run.err


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def no_repository(repo_id: str) -> bool:
    """Whether nothing was published under a name."""
    return not HfApi().repo_exists(repo_id, token=USERS["me"])


# copies of sources


def claimed(entry: dict[str, Any]) -> None:
    """The first model is said to be a commit of a repository that the victim cannot read."""
    entry["materials"]["models"][0] |= {"name": "corp/secret", "commit": CLAIMED, "digest": None}


def test_a_kept_copy_does_not_get_into_the_hubs_cache(hub: HubServer, keeping: Path, root: Path) -> None:
    """A ledger claims that a copy of the attacker's is a commit of a repository; the cache would then say so too."""
    lie(keeping, claimed)
    sources = [part for name in ("base", "m1") for part in ("--source", f"{name}={root / name}")]
    tiny.done("add", keeping, root / "m2", *sources)
    assert not list((Path(HOME) / "hub").rglob("*corp--secret*"))
    place = Path(HOME) / "hfmerge" / "kept"
    (found,) = place.rglob("corp--secret")
    assert tiny.everything(found)["model.safetensors"] == sha256_file(root / "m0" / "model.safetensors")
    # the merge is what it would be with the commit, and says the same of it
    after = hfmerge.history(keeping)[-1].entry
    assert after.models[0].identity == f"corp/secret@{CLAIMED}"
    merge(root, keeping.parent / "never", "m0", "m1", "m2")
    assert hfmerge.history(keeping.parent / "never")[-1].entry.products == after.products


@pytest.mark.slow
def test_a_published_copy_does_not_get_into_the_hubs_cache(hub: HubServer, root: Path, tmp_path: Path) -> None:
    """The same with a merge on the Hub, whose branch of states holds the copy."""
    keeping = Path(shutil.copytree(root / "keeping", tmp_path / "made-up"))
    entry = lie(keeping, lambda entry: entry["materials"]["models"][0].update(
        name="corp/other", commit=CLAIMED, digest=None))  # fmt: skip
    repo_id = "attacker/made-up"
    HfApi().create_repo(repo_id, exist_ok=True)
    HfApi().upload_folder(repo_id=repo_id, folder_path=keeping, ignore_patterns=["merge_state/*"])
    HfApi().create_branch(repo_id, branch="merge-state", exist_ok=True)
    kept = f"merge_state/sources/{entry['materials']['models'][0]['kept']}.zip"
    HfApi().upload_file(
        repo_id=repo_id, path_or_fileobj=keeping / kept, path_in_repo=kept, revision="merge-state"
    )  # fmt: skip
    sources = [part for name in ("base", "m1") for part in ("--source", f"{name}={root / name}")]
    run = tiny.done("unmerge", repo_id, "--remove", "m1", "--output", tmp_path / "out", *sources)
    assert "corp/other@aaaaaaaa is gone; the copy of it that the merge keeps is used" in run.err
    assert not list((Path(HOME) / "hub").rglob("*corp--other*"))


@pytest.mark.slow
def test_copies_are_for_their_user_alone(root: Path, keeping: Path) -> None:
    """Another user of the machine reads the victim's private sources where they are kept or unpacked."""
    previous = os.umask(0o022)
    try:
        for part in (keeping, root / "keeping"):
            zips = list((part / "merge_state/sources").iterdir())
            assert len(zips) == 3 and {mode(path) for path in zips} == {0o600}
        assert mode(root / "keeping" / "merge_state/sources") == 0o700
        tiny.done("unmerge", keeping, "--remove", "m1")
        assert {mode(path) for path in (keeping / "merge_state/sources").iterdir()} == {0o600}
        assert mode(keeping / "merge_state/sources") == 0o700
        gone = Path(shutil.copytree(root / "m0", keeping.parent / "m0"))
        kept = keeping.parent / "kept"
        merge(root, kept, gone, "m2", flags=("--keep-sources",))
        shutil.rmtree(gone)
        tiny.done("unmerge", kept, "--remove", "m2")
    finally:
        os.umask(previous)
    unpacked = [Path(HOME) / "hfmerge" / "kept", *(Path(HOME) / "hfmerge" / "kept").rglob("*")]
    assert any(path.name == "model.safetensors" for path in unpacked)
    assert all(mode(path) == (0o700 if path.is_dir() else 0o600) for path in unpacked)


# names in a ledger


def first(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry["materials"]["models"][0].update({key: value})


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "kept": first("kept", "../../../escaped"),
    "kept that is absolute": first("kept", "/tmp/hfmerge-escaped"),
    "folder": first("name", "../../escaped"),
    "folder with a line break": first("name", "m0\n# Verified"),
    "folder's digest": first("digest", "../escaped"),
    "repository": lambda entry: entry["materials"]["models"][0].update(name="a/../b", commit=CLAIMED, digest=None),
    "commit": lambda entry: entry["materials"]["models"][0].update(name="a/b", commit="../../main", digest=None),
    "head": first("head", "heads/.."),
    "head elsewhere": first("head", "../escaped"),
    "beneath": first("beneath", "../../escaped@main"),
    "contains": first("contains", ["../../escaped@sha256:" + "0" * 64]),
    "ledger": first("ledger", "../escaped"),
    "files": lambda entry: entry["materials"]["models"][0]["files"].update({"../escaped": "0" * 64}),
    "files beneath": lambda entry: entry["materials"]["models"][0]["files"].update({"+/etc/passwd": "0" * 64}),
    "base": lambda entry: entry["materials"]["base"].update(name=".."),
    "state": lambda entry: entry["byproducts"]["states"][0].update(sha256="../../escaped"),
    "products": lambda entry: entry["products"].update({"../escaped.py": "0" * 64}),
    "products that are absolute": lambda entry: entry["products"].update({"/tmp/hfmerge-escaped": "0" * 64}),
    "rows": lambda entry: entry["byproducts"].update(
        learned={"how": "", "replay": [{"sha256": "../escaped"}], "fisher": None, "curve": [], "groups": "model"}
    ),
}


@pytest.mark.parametrize("what", LIES)
def test_names_that_lead_elsewhere(out: Path, what: str) -> None:
    """A ledger holds a name or a digest that becomes a path outside of the merge, or another address."""
    lie(out, LIES[what])
    text = refused("history", out)
    assert "0001.json" in text and "not a ledger entry" in text
    run = tiny.cli("verify", out)
    assert run.code == 1 and "FAIL ledger" in run.out and "not a ledger entry" in run.out
    assert "not a ledger entry" in refused("add", out, out.parent / "none")


def test_a_digest_of_a_copy_makes_no_file_elsewhere(root: Path, keeping: Path) -> None:
    """The digest of a kept copy leads out of the folder of copies, where a lock would be made."""
    lie(keeping, first("kept", "../../escaped"))
    refused("unmerge", keeping, "--remove", "m1", "--source", f"m0={root / 'm2'}")
    assert not [*Path(HOME).rglob("*escaped*")]


def test_a_state_is_no_file_of_the_victim(hub: HubServer, out: Path) -> None:
    """A ledger names a file beside the merge as its kept state, for `push` to upload; held before, by its check."""
    private = out.parent / "private.safetensors"
    private.write_text(SECRET)
    lie(out, lambda entry: entry["byproducts"]["states"][0].update(sha256="../../private"))
    refused("push", out, "victim/state")
    assert no_repository("victim/state")


def test_a_folder_whose_name_is_none(root: Path, tmp_path: Path) -> None:
    """A source folder is called so that its name writes lines of its own into ledger, card and terminal."""
    shutil.copytree(root / "m0", tmp_path / "m0\n\nverified")
    (tmp_path / "model").symlink_to("m0\n\nverified")
    command = ("merge", tmp_path / "model", "--base", root / "base", "--method", "linear")
    text = refused(*command, "--output", tmp_path / "out")
    assert "rename the folder" in text and not (tmp_path / "out").exists()


def test_an_index_that_names_a_file_elsewhere(root: Path, tmp_path: Path) -> None:
    """An index of weights names a file outside of its model; held before, and goes on holding."""
    source = Path(shutil.copytree(root / "m0", tmp_path / "source"))
    (source / "model.safetensors").rename(tmp_path / "private.safetensors")
    for name in ("../private.safetensors", str(tmp_path / "private.safetensors"), "../../../private.safetensors"):
        weight_map = dict.fromkeys(tiny.tensors(root / "m0"), name)
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        text = refused("merge", source, "--base", root / "base", "--method", "linear", "--output", tmp_path / "out")
        assert "must be a path inside of the repository" in text and not (tmp_path / "out").exists()


# links and special files


def test_push_publishes_no_file_through_a_link(hub: HubServer, out: Path, secret: Path) -> None:
    """A link in the merge's folder leads to a private file of the victim."""
    (out / "notes.md").symlink_to(secret)
    text = refused("push", out, "victim/linked")
    assert f"notes.md is a link to {secret}" in text and no_repository("victim/linked")


def test_add_publishes_no_file_through_a_link(hub: HubServer, root: Path, out: Path, secret: Path) -> None:
    """The same with `add --push-to`, which also copies people's own files into the new folder."""
    (out / "images").mkdir()
    (out / "images" / "plot.png").symlink_to(os.path.relpath(secret, out / "images"))
    before = tiny.everything(out)
    text = refused("add", out, root / "m2", "--push-to", "victim/added")
    assert f"images/plot.png is a link to {secret}" in text
    assert tiny.everything(out) == before and no_repository("victim/added")


def test_folders_are_not_read_through_a_link(hub: HubServer, out: Path, secret: Path) -> None:
    """A link to a whole folder of the victim, one to nothing yet, and one through another link."""
    private = out.parent / "private"
    for target in (secret.parent, secret.parent / "coming", private):
        private.unlink(missing_ok=True)
        private.symlink_to(secret)
        (out / "images").symlink_to(target)
        assert "images is a link to" in refused("push", out, "victim/folder")
        (out / "images").unlink()
    assert no_repository("victim/folder")


def test_a_models_weights_are_no_link_out_of_it(root: Path, tmp_path: Path) -> None:
    """A model's weights are a link to those of a private model, which the merge would then contain."""
    source = Path(shutil.copytree(root / "m0", tmp_path / "source"))
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(root / "m1" / "model.safetensors")
    text = refused("merge", source, "--base", root / "base", "--method", "linear", "--output", tmp_path / "out")
    assert "model.safetensors is a link to" in text and not (tmp_path / "out").exists()


def test_copies_of_sources_hold_no_file_through_a_link(root: Path, tmp_path: Path, secret: Path) -> None:
    """A licence file that is a link to a private file is packed into the copy that is kept, and published with it."""
    source = Path(shutil.copytree(root / "m0", tmp_path / "source"))
    (source / "LICENSE").symlink_to(secret)
    flags = ("--base", root / "base", "--method", "linear", "--keep-sources", "--output", tmp_path / "out")
    assert f"LICENSE is a link to {secret}" in refused("merge", source, *flags)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_reads_nothing_through_a_link(root: Path, tmp_path: Path, secret: Path) -> None:
    """A data set's rows, a model's licence, or the card that results are written to, lie elsewhere by a link."""
    model = Path(shutil.copytree(root / "patients", tmp_path / "model"))
    tiny.tokenizer(model, TOKENS)
    labelled(tmp_path / "data" / "test.jsonl", ["ill", "well"], 4, 1)
    task = {"name": "t", "kind": "text-classification", "dataset": "./data", "split": "test", "text": "text"}
    path = suite(tmp_path / "suite.yaml", {**task, "label": "label"})
    (tmp_path / "data" / "more.jsonl").symlink_to(secret)
    assert f"more.jsonl is a link to {secret}" in refused("evaluate", model, "--suite", path, "--no-cache")
    (tmp_path / "data" / "more.jsonl").unlink()
    for name in ("LICENSE", "README.md"):
        (model / name).symlink_to(secret)
        command = ("evaluate", model, "--suite", path, "--no-cache", "--write-card")
        assert f"{name} is a link to {secret}" in refused(*command)
        (model / name).unlink()
    assert secret.read_text() == SECRET


def test_an_import_uploads_nothing_through_a_link(hub: HubServer, root: Path, tmp_path: Path, secret: Path) -> None:
    """A folder to import into the local Hub holds a link to a private file."""
    folder = Path(shutil.copytree(root / "m0", tmp_path / "m0"))
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(HfMergeError, match=r"vocab\.txt is a link to"):
        import_folder(hub.endpoint, USERS["me"], folder, "victim/imported")
    assert no_repository("victim/imported")


def test_peoples_links_stay_links(root: Path, out: Path, secret: Path) -> None:
    """What git keeps in the folder may be links out of it; a change copies the links, not what they lead to."""
    (out / ".git" / "hooks").mkdir(parents=True)
    (out / ".git" / "hooks" / "pre-push").symlink_to(secret)
    (out / ".git" / "config").write_text("[core]")
    (out / "notes.md").write_text("mine")
    (out / "same.md").symlink_to("notes.md")
    tiny.done("add", out, root / "m2")
    assert (out / ".git" / "hooks" / "pre-push").is_symlink() and (out / ".git" / "config").read_text() == "[core]"
    assert (out / "same.md").is_symlink() and (out / "same.md").read_text() == "mine"


def snapshot(cache: Path, model: Path) -> Path:
    """A model as it lies in a Hugging Face cache."""
    repository = cache / "models--org--model"
    folder = repository / "snapshots" / CLAIMED
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in model.iterdir():
        blob = shutil.copy(path, repository / "blobs" / sha256_file(path))
        (folder / path.name).symlink_to(os.path.relpath(blob, folder))
    return folder


def test_a_snapshot_of_the_cache_is_a_folder_like_any_other(root: Path, tmp_path: Path, secret: Path) -> None:
    """Its links lead to the blobs of its own repository; one that is planted among them, or made up, leads on."""
    folder = snapshot(tmp_path / "hub", root / "m0")
    merge(root, tmp_path / "out", folder)
    merge(root, tmp_path / "never", "m0")
    assert tiny.files(tmp_path / "out") == tiny.files(tmp_path / "never")
    (folder.parents[1] / "blobs" / "planted").symlink_to(secret)
    (folder / "LICENSE").symlink_to("../../blobs/planted")
    flags = ("--base", root / "base", "--method", "linear", "--output", tmp_path / "more")
    assert f"LICENSE is a link to {secret}" in refused("merge", folder, *flags)
    (folder / "LICENSE").unlink()
    other = snapshot(tmp_path / "elsewhere" / "hub", root / "m1")
    blob = (other / "config.json").resolve()
    (folder / "LICENSE").symlink_to(blob)
    assert f"LICENSE is a link to {blob}" in refused("merge", folder, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge_history/0002.json", "notes.md"])
def test_a_pipe_is_refused_and_not_waited_for(hub: HubServer, out: Path, name: str) -> None:
    """A file of the merge's folder is a pipe that nobody writes to, on which a command waits for ever."""
    os.mkfifo(out / name)
    for command in (("push", out, "victim/pipe"), ("verify", out)):
        run = tiny.finish(tiny.start(*command), timeout=60)
        assert run.code == 1 and f"{name} is a pipe" in run.out + run.err
    assert no_repository("victim/pipe")


# paths of this machine


def private_note(folder: Path, places: dict[str, Path]) -> None:
    """What earlier versions believed of where folders lie."""
    path = folder / "merge_state" / "sources.local.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({identity: str(place) for identity, place in places.items()}))


def identities(folder: Path) -> dict[str, str]:
    entry = hfmerge.history(folder)[-1].entry
    return {one.name: one.identity for one in (entry.base, *entry.models)}


def test_a_merge_does_not_say_where_folders_of_its_reader_lie(root: Path, out: Path) -> None:
    """A stranger's merge names a private folder of the victim, whose head and labels `add` copied into the output."""
    names = identities(out)
    private_note(out, {names["m0"]: root / "patients", names["m1"]: root / "m1", names["base"]: root / "base"})
    before = tiny.everything(out)
    given = [part for name in ("base", "m1") for part in ("--source", f"{name}={root / name}")]
    with tiny.elsewhere():
        text = refused("add", out, root / "m2", *given)
        assert "m0: was merged from a folder; say where it is now with --source m0=FOLDER" in text
        # and what the victim names is compared, though its weights would not be read again
        text = refused("add", out, root / "m2", *given, "--source", f"m0={root / 'patients'}")
        assert "are not those that were merged" in text
    assert tiny.everything(out) == before and not (out / "heads").exists()


def test_another_merge_in_the_same_place_finds_no_folders(root: Path, tmp_path: Path) -> None:
    """A stranger's merge takes the place of the victim's, and would have the private model, whole, in its output.

    It knows the private folder's digest from a ledger that the victim published. A note that goes by the place of the
    merge alone would serve it.
    """
    out = tmp_path / "out"
    merge(root, out, "patients", "m1")
    patients = identities(out)["patients"]
    shutil.rmtree(out)
    shutil.copytree(root / "merged", out)
    files = tiny.everything(root / "patients")
    digest = patients.rpartition(":")[2]
    assert folder_digest({name: files[name] for name in ("config.json", "model.safetensors")}) == digest

    def named(entry: dict[str, Any]) -> None:
        del entry["materials"]["models"][1]
        wanted = {name: files[name] for name in ("config.json", "model.safetensors")}
        entry["materials"]["models"][0].update(name="patients", digest=digest, files=wanted)
        entry["byproducts"]["states"] = []

    lie(out, named)
    text = refused("add", out, root / "m2", "--source", f"base={root / 'base'}")
    assert "--source patients=FOLDER" in text and not (out / "heads").exists()


@pytest.mark.slow
def test_the_user_s_own_folders_are_known_wherever_the_merge_goes(hub: HubServer, root: Path, tmp_path: Path) -> None:
    """Moved, copied or published, a merge by this user finds its folders without being told."""
    with tiny.elsewhere() as notes:
        merge(root, tmp_path / "out", "m0", "m1")
        assert mode(notes) == 0o700 and [mode(path) for path in notes.iterdir()] == [0o600]
        assert not (tmp_path / "out" / "merge_state" / "sources.local.json").exists()
        (tmp_path / "out").rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", tmp_path / "copied")
        tiny.done("push", tmp_path / "moved", "victim/own")
        merge(root, tmp_path / "never", "m0", "m1", "m2")
        for place in ("moved", "copied"):
            tiny.done("add", tmp_path / place, root / "m2")
            assert tiny.files(tmp_path / place) == tiny.files(tmp_path / "never")
        tiny.done("add", "victim/own", root / "m2", "--push-to", "victim/own")
        assert hfmerge.verify("victim/own").ok
        # a note that an earlier version left, or somebody planted, goes nowhere
        private_note(tmp_path / "moved", {"m0@sha256:" + "0" * 64: root})
        tiny.done("unmerge", tmp_path / "moved", "--remove", "m0", "--push-to", "victim/moved")
    assert not (tmp_path / "moved" / "merge_state" / "sources.local.json").exists()
    for revision in ("main", "merge-state"):
        assert not [n for n in HfApi().list_repo_files("victim/moved", revision=revision) if "local" in n]


# the place of the output


@pytest.mark.parametrize("part", ["lock", "partial", "old", "journal"])
def test_a_link_in_the_place_of_a_working_file_is_refused(root: Path, tmp_path: Path, part: str) -> None:
    """In a folder that others write to too, one of them has put a link where a merge writes."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "file").write_text(SECRET)
    target = private / "new" if part == "lock" else private
    planted = tmp_path / f".out.hfmerge-{part}"
    planted.symlink_to(target)
    command = ("merge", root / "m0", "--base", root / "base", "--method", "linear", "--output", tmp_path / "out")
    assert f"{planted}: is a link to {target}" in refused(*command)
    assert [path.name for path in private.iterdir()] == ["file"] and not (tmp_path / "out").exists()


def test_a_folder_that_somebody_planted_is_not_taken_for_the_users(root: Path, tmp_path: Path) -> None:
    """Beside a name that the victim will use, a link stands for a merge that was about to be replaced."""
    (tmp_path / ".out.hfmerge-old").symlink_to(root / "merged")
    assert "is a link to" in refused("history", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to another user")
def test_what_another_user_left_is_not_gone_on_from(root: Path, tmp_path: Path) -> None:
    """Another user of the machine has put a whole unfinished run in the place, or a link for the output itself."""
    shared, elsewhere = tmp_path / "shared", tmp_path / "elsewhere"
    for folder in (shared, elsewhere, shared / ".out.hfmerge-partial", shared / ".out.hfmerge-journal"):
        folder.mkdir()
    shared.chmod(0o1777)
    os.chown(shared / ".out.hfmerge-partial", 12345, 12345)
    command = ("merge", root / "m0", "--base", root / "base", "--method", "linear", "--output")
    assert "belongs to another user" in refused(*command, shared / "out")
    (shared / "link").symlink_to(elsewhere)
    os.lchown(shared / "link", 12345, 12345)
    assert "belongs to another user" in refused(*command, shared / "link")
    assert not list(elsewhere.iterdir())
    os.lchown(shared / "link", os.geteuid(), os.getegid())
    tiny.done(*command, shared / "link")
