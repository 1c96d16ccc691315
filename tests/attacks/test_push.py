"""Attacks on pushes: they overwrite what is not theirs, publish what is private, and leave removed models behind."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import tiny
from tests.fixtures.faultproxy import Fault, FaultProxy, Gate
from tests.fixtures.hub import USERS


pytestmark = pytest.mark.slow
PAIR = ("a", "b")


@dataclass(frozen=True)
class World:
    """Models in folders and on the Hub, where everything of this file is in the namespace `push`."""

    hub: HubServer
    root: Path
    log: Path
    api: HfApi

    def merge(self, repo_id: str, *models: str, base: str = "push/base", more: tuple[object, ...] = ()) -> tiny.Run:
        """Merge models by name of their repository, and push."""
        flags = ("--base", base, "--method", "task_arithmetic", "--state", "last", "--push-to", repo_id, *more)
        return tiny.cli("merge", *models, *flags)

    def heads(self, repo_id: str) -> dict[str, str]:
        """Branch -> commit."""
        return {branch.name: branch.target_commit for branch in self.api.list_repo_refs(repo_id).branches}

    def files(self, repo_id: str, revision: str = "main") -> list[str]:
        """Paths that a branch holds."""
        tree = self.api.list_repo_tree(repo_id, recursive=True, revision=revision)
        return sorted(item.path for item in tree if hasattr(item, "size"))

    def requests(self, since: int = 0) -> list[dict[str, Any]]:
        """What the Hub was asked."""
        return [json.loads(line) for line in self.log.read_text().splitlines()][since:]

    def upload(self, repo_id: str, folder: Path, **settings: Any) -> str:
        """A folder in a repository of its own."""
        private = settings.pop("private", False)
        self.api.create_repo(repo_id, private=private)
        self.api.upload_folder(repo_id=repo_id, folder_path=folder)
        if settings:
            self.api.update_repo_settings(repo_id, **settings)
        return repo_id


@pytest.fixture(scope="module")
def world(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i, name in enumerate(("a", "b", "c")):
        tiny.save(tiny.fine_tune(base, i + 1), root / name)
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 9, ["no", "yes"]), root / "tuned")
    for name in ("base", "a", "b", "c", "tuned"):
        import_folder(hub.endpoint, USERS["me"], root / name, f"push/{name}")
    log = next(tmp_path_factory.getbasetemp().glob("hub-end-to-end*/requests.jsonl"))
    return World(hub, root, log, HfApi())


def refused(run: tiny.Run, *words: str) -> None:
    """A command that failed with one line."""
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1, (run.code, run.out, run.err)
    for word in words:
        assert word in run.err, run.err


# rule 8: nothing is replaced that hfmerge did not make


@pytest.mark.parametrize(
    ("target", "why"), [("push/base", "base"), ("push/a", "model"), ("PUSH/Tuned", "model of its own")]
)
def test_a_push_over_a_model(world: World, target: str, why: str) -> None:
    """A recipe's `push_to` names the base, a source, or somebody's fine-tune with its classifier."""
    name, since = target.lower(), len(world.requests())
    before = world.heads(name)
    run = world.merge(target, "push/a", "push/b")
    assert world.heads(name) == before
    words = "holds a model that is not of this merge" if why == "model of its own" else f"in this merge ({why})"
    refused(run, target, words, "config.json, model.safetensors", "--overwrite")
    # the faults of the models are told in the same line, so headers are read, and no weights
    asked = [row for row in world.requests(since) if "safetensors" in row["path"] and row["method"] == "GET"]
    assert {row["status"] for row in asked} <= {206, 302}, "refused before weights were read"


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "q4.gguf", "onnx/model.onnx", "config.json"]
)
def test_a_push_over_weights_of_any_framework(world: World, name: str) -> None:
    """The target holds a model that is no safetensors file."""
    repo_id = f"push/holds-{name.replace('/', '-').partition('.')[0].replace('_', '-')}"
    world.api.create_repo(repo_id)
    world.api.create_commit(repo_id, [CommitOperationAdd(name, b"{}")], commit_message="mine")
    before = world.heads(repo_id)
    run = world.merge(repo_id, "push/a", "push/b")
    assert world.heads(repo_id) == before
    refused(run, repo_id, name, "--overwrite")


def test_overwrite_replaces_all_of_it(world: World) -> None:
    repo_id = world.upload("push/old-tune", world.root / "tuned")
    extra = [CommitOperationAdd(name, b"{}") for name in ("vocab.json", "notes.md", "q4.gguf")]
    world.api.create_commit(repo_id, extra, commit_message="more")
    run = world.merge(repo_id, "push/a", "push/b", more=("--overwrite",))
    assert run.code == 0, run.err
    assert "config.json, model.safetensors, q4.gguf, vocab.json" in run.err
    assert "notes.md" in world.files(repo_id) and not {"vocab.json", "q4.gguf"} & {*world.files(repo_id)}
    assert tiny.done("verify", repo_id).code == 0


def test_overwrite_of_another_merge(world: World) -> None:
    assert world.merge("push/other-merge", "push/a", "push/b", "push/c").code == 0
    tiny.done("unmerge", "push/other-merge", "--remove", "push/b", "--push-to", "push/other-merge")
    refused(world.merge("push/other-merge", "push/a", "push/b"), "push/other-merge", "holds another merge")
    run = world.merge("push/other-merge", "push/a", "push/b", more=("--overwrite",))
    assert run.code == 0 and tiny.done("verify", "push/other-merge").code == 0, run.err
    (tag,) = world.api.list_repo_refs("push/other-merge").tags
    assert tag.name == "step-0001" and tag.target_commit == world.heads("push/other-merge")["main"]


def test_a_pull_request_says_what_it_would_replace(world: World) -> None:
    repo_id = world.upload("push/their-tune", world.root / "tuned")
    before = world.heads(repo_id)
    run = world.merge(repo_id, "push/a", "push/b", more=("--create-pr",))
    assert run.code == 0 and "the pull request would replace config.json, model.safetensors" in run.err
    assert world.heads(repo_id) == before


def test_a_fine_tune_of_the_merge_with_its_ledger(world: World) -> None:
    """Somebody tuned a copy of the merge, whose ledger came along, and a change of the merge is pushed there."""
    for repo_id in ("push/first", "push/tuned-copy"):
        assert world.merge(repo_id, "push/a", "push/b").code == 0
    weights = (world.root / "tuned" / "model.safetensors").read_bytes()
    world.api.upload_file(path_or_fileobj=weights, path_in_repo="model.safetensors", repo_id="push/tuned-copy")
    before = world.heads("push/tuned-copy")
    run = tiny.cli("add", "push/first", "push/c", "--push-to", "push/tuned-copy")
    assert world.heads("push/tuned-copy") == before
    refused(run, "push/tuned-copy", "model.safetensors", "--overwrite")


def test_the_merge_itself_may_be_repeated_and_another_is_refused_at_once(world: World) -> None:
    assert world.merge("push/twice", "push/a", "push/b").code == 0
    before = world.heads("push/twice")["main"]
    assert world.merge("push/twice", "push/a", "push/b").code == 0
    assert world.heads("push/twice")["main"] == before
    since = len(world.requests())
    refused(world.merge("push/twice", "push/a", "push/c"), "push/twice", "holds another merge")
    assert not [row for row in world.requests(since) if "safetensors" in row["path"]]


@pytest.mark.parametrize("target", ["me/new", "push/kept", "nowhere"])
def test_a_token_without_the_right_to_write(world: World, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Hours of work end in a 403: the repository is another user's, its namespace is, or none is named."""
    world.api.create_repo("push/kept", exist_ok=True)
    monkeypatch.setenv("HF_TOKEN", USERS["other"])
    since = len(world.requests())
    run = world.merge(target, "push/a", "push/b")
    asked = [row["path"] for row in world.requests(since)]
    assert not [path for path in asked if "/resolve/" in path or "preupload" in path], "nothing was read"
    refused(run, target, "other", "write")


def test_scores_for_a_card_that_may_not_be_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All models are scored before the push of the results is refused."""
    monkeypatch.setenv("HF_TOKEN", USERS["other"])
    run = tiny.cli("evaluate", "push/a", "--suite", "no-such-suite", "--push-to", "push/a")
    refused(run, "push/a: other has no right to write there")


@pytest.mark.parametrize("how", ["offline", "unreachable", "nobody", "wrong token"])
def test_a_hub_that_cannot_be_asked_at_the_start(world: World, tmp_path: Path, how: str) -> None:
    """The result would be lost with its temporary folder once it cannot be pushed."""
    out = tmp_path / "merged"
    models = ("merge", world.root / "a", "--base", world.root / "base", "--method", "linear", "--output", out)
    environment = {
        "offline": {"HF_HUB_OFFLINE": "1"},
        "unreachable": {"HF_ENDPOINT": "http://127.0.0.1:9"},
        "nobody": {"HF_TOKEN": "", "HF_HOME": str(tmp_path / "home")},
        "wrong token": {"HF_TOKEN": "hf_wrong"},
    }[how]
    run = tiny.finish(tiny.start(*models, "--push-to", "push/late", **environment))
    assert run.code == 1 and "push/late" in run.err and not out.exists()
    words = {"offline": "nothing was begun", "unreachable": "nothing was begun", "nobody": "nobody is logged in"}
    assert words.get(how, "refused the token") in run.err


# rule 7: no more public than the most private input


def private_source(world: World, name: str, **settings: Any) -> str:
    """A repository that not everybody may read."""
    return world.upload(f"push/{name}", world.root / "c", **settings)


@pytest.mark.parametrize("settings", [{"private": True}, {"gated": "auto"}, {"gated": "manual"}])
def test_a_private_source_in_a_public_merge(world: World, tmp_path: Path, settings: dict[str, Any]) -> None:
    """A merge of a model that few may read is published to everybody: to a new repository, then to a public one."""
    kind = "-".join(map(str, settings.values())).lower()
    secret = private_source(world, f"secret-{kind}", **settings)
    new, public = f"push/new-{kind}", f"push/public-{kind}"
    run = world.merge(new, "push/a", secret)
    assert run.code == 0 and world.api.model_info(new).private, run.err
    assert f"{new} is a private repository" in run.err and secret in run.err
    world.api.create_repo(public)
    before = world.heads(public)
    since = len(world.requests())
    run = world.merge(public, "push/a", secret, more=("--keep-sources",))
    assert world.heads(public) == before
    refused(run, public, secret, "--publish-private")
    assert not [row for row in world.requests(since) if "safetensors" in row["path"]]
    refused(world.merge(public, "push/a", secret, more=("--create-pr",)), public, secret, "--publish-private")
    run = world.merge(public, "push/a", secret, more=("--publish-private", secret))
    assert run.code == 0 and not world.api.model_info(public).private, run.err


def test_a_folder_of_a_private_source_is_pushed_later(world: World, tmp_path: Path) -> None:
    """The merge is made into a folder today; tomorrow `push` publishes it."""
    secret = private_source(world, "secret-later", private=True)
    out = tmp_path / "merged"
    tiny.done("merge", "push/a", secret, "--base", "push/base", "--method", "linear", "--output", out)
    world.api.create_repo("push/later")
    before = world.heads("push/later")
    run = tiny.cli("push", out, "push/later")
    assert world.heads("push/later") == before
    refused(run, "push/later", secret, "--publish-private")
    world.api.delete_repo(secret)
    refused(tiny.cli("push", out, "push/later"), secret, "gone")
    tiny.done("push", out, "push/later", "--publish-private", secret)


def test_a_private_model_within_a_public_merge_and_beneath_an_adapter(world: World, tmp_path: Path) -> None:
    """The private model is not named: it is within a merge, in a folder, or lies beneath an adapter."""
    secret = private_source(world, "secret-within", private=True)
    inner = tmp_path / "inner"
    tiny.done("merge", "push/a", secret, "--base", "push/base", "--method", "linear", "--output", inner)
    shapes = {"encoder.layer.0.attention.self.query": (16, 16)}
    tiny.adapter(tmp_path / "adapter", shapes, 3)
    world.api.create_repo("push/outer")
    before = world.heads("push/outer")
    for model in (inner, f"{secret}+{tmp_path / 'adapter'}"):
        run = world.merge("push/outer", str(model), "push/b")
        assert world.heads("push/outer") == before
        refused(run, "push/outer", secret, "--publish-private")


def test_a_private_base_and_a_removal_that_takes_the_private_model_out(world: World) -> None:
    base = world.upload("push/secret-base", world.root / "base", private=True)
    run = world.merge("push/of-secret-base", "push/a", base=base)
    assert run.code == 0 and world.api.model_info("push/of-secret-base").private
    secret = private_source(world, "secret-leaves", private=True)
    assert world.merge("push/held", "push/a", secret).code == 0
    refused(tiny.cli("add", "push/held", "push/b", "--push-to", "push/a-copy", "--create-pr"), "push/a-copy")
    tiny.done("unmerge", "push/held", "--remove", secret, "--push-to", "push/without")
    assert not world.api.model_info("push/without").private


# rule 9: a removal is done when nothing reachable holds the model


def states(world: World, repo_id: str) -> list[str]:
    """What the branch of kept states holds."""
    return [name for name in world.files(repo_id, "merge-state") if name != ".gitattributes"]


@pytest.mark.parametrize("verb", ["unmerge", "replace", "restore", "add"])
def test_killed_between_the_commit_and_the_clean_up(world: World, tmp_path: Path, verb: str) -> None:
    """The process dies after its commit: states that hold the model stay, and the same command fails ever after."""
    repo_id = f"push/killed-{verb}"
    assert world.merge(repo_id, "push/a", "push/b").code == 0
    if verb == "restore":
        tiny.done("unmerge", repo_id, "--remove", "push/a", "--push-to", repo_id)
    before, held = world.heads(repo_id)["main"], states(world, repo_id)
    change = {
        "unmerge": ("--remove", "push/a"),
        "replace": ("push/a", "push/c"),
        "restore": ("--step", "1"),
        "add": ("push/c",),
    }[verb]
    command = (verb, repo_id, *change, "--push-to", repo_id)
    with FaultProxy(world.hub.endpoint) as proxy:
        proxy.faults(Fault("POST .*/tag/", delay=60.0, drop=True))
        child = tiny.start(*command, HF_ENDPOINT=proxy.endpoint, HF_HOME=str(tmp_path / "home"))
        while world.heads(repo_id)["main"] == before:
            assert child.poll() is None, child.communicate()
            time.sleep(0.1)
        child.kill()
        child.communicate()
    assert {*held} < {*states(world, repo_id)}
    run = tiny.cli("verify", repo_id)
    assert run.code == 1 and held[0] in run.out and "on the branch merge-state" in run.out, run.out
    head = world.heads(repo_id)["main"]
    run = tiny.done(*command)
    assert "did this before" in run.out and world.heads(repo_id)["main"] == head
    assert not {*held} & {*states(world, repo_id)} and tiny.done("verify", repo_id).code == 0
    assert f"step-000{3 if verb == 'restore' else 2}" in [t.name for t in world.api.list_repo_refs(repo_id).tags]
    assert tiny.done(*command).code == 0, "done twice is done"


def test_repeating_is_no_excuse_for_a_wrong_name(world: World) -> None:
    assert world.merge("push/named", "push/a", "push/b", "push/c").code == 0
    for verb, change in (("unmerge", ("--remove", "push/a")), ("replace", ("push/b", "push/a"))):
        tiny.done(verb, "push/named", *change, "--push-to", "push/named")
        run = tiny.cli("unmerge", "push/named", "--remove", "push/never", "--push-to", "push/named")
        refused(run, "push/never: not in this merge")
    refused(tiny.cli("unmerge", "push/named", "--remove", "push/b", "--push-to", "push/named"), "not in this merge")


@contextlib.contextmanager
def held(world: World, tmp_path: Path, request: str, *command: object) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, held at a request (a pattern); it goes on when the block ends."""
    gate = Gate()
    with FaultProxy(world.hub.endpoint) as proxy:
        proxy.faults(Fault(request, gate=gate, times=1))
        child = tiny.start(*command, HF_ENDPOINT=proxy.endpoint, HF_HOME=str(tmp_path / f"home-{id(gate)}"))
        while not gate.reached.wait(0.1):
            assert child.poll() is None, child.communicate()
        try:
            yield child
        finally:
            gate.opened.set()
            child.wait(120)


def test_a_lost_race_leaves_no_state(world: World, tmp_path: Path) -> None:
    """Of two people the one who comes too late publishes a state of the model that the other took out meanwhile."""
    repo_id = "push/lost"
    assert world.merge(repo_id, "push/a", "push/b").code == 0
    with held(world, tmp_path, "POST .*/branch/", "add", repo_id, "push/c", "--push-to", repo_id) as late:
        tiny.done("unmerge", repo_id, "--remove", "push/a", "--push-to", repo_id)
    run = tiny.finish(late)
    assert run.code == 1 and "somebody pushed meanwhile" in run.err
    assert len(states(world, repo_id)) == 1 and tiny.done("verify", repo_id).code == 0


def test_a_restore_that_comes_too_late_leaves_no_state(world: World, tmp_path: Path) -> None:
    """The state of an earlier step, with the model that left, is brought back, and the commit then fails."""
    repo_id = "push/late-restore"
    assert world.merge(repo_id, "push/a", "push/b").code == 0
    tiny.done("unmerge", repo_id, "--remove", "push/a", "--push-to", repo_id)
    command = ("restore", repo_id, "--step", "1", "--push-to", repo_id)
    with held(world, tmp_path, "POST .*/commit/merge-state", *command) as late:
        tiny.done("add", repo_id, "push/c", "--push-to", repo_id)
    run = tiny.finish(late)
    assert run.code == 1 and "somebody pushed meanwhile" in run.err
    assert len(states(world, repo_id)) == 1 and tiny.done("verify", repo_id).code == 0


@pytest.mark.parametrize("order", ["ledger first", "state deleted first", "state deleted last"])
def test_a_repeated_removal_takes_no_state_of_a_push_meanwhile(world: World, tmp_path: Path, order: str) -> None:
    """A removal is repeated while somebody adds a model: its clean-up deletes the state of the addition."""
    repo_id = f"push/meanwhile-{order.replace(' ', '-')}"
    assert world.merge(repo_id, "push/a", "push/b").code == 0
    repeat = ("unmerge", repo_id, "--remove", "push/a", "--push-to", repo_id)
    add = ("add", repo_id, "push/c", "--push-to", repo_id)
    tiny.done(*repeat)
    if order == "ledger first":
        with held(world, tmp_path, "POST .*/tag/", *repeat) as repeated:
            tiny.done(*add)
        assert tiny.finish(repeated).code == 0
    elif order == "state deleted first":
        with held(world, tmp_path, "POST .*/commit/main", *add) as adding:
            assert len(states(world, repo_id)) == 2
            tiny.done(*repeat)
            assert len(states(world, repo_id)) == 1
        assert tiny.finish(adding).code == 0
    else:
        with contextlib.ExitStack() as stack:
            adding = stack.enter_context(held(world, tmp_path, "POST .*/commit/main", *add))
            with held(world, tmp_path, "POST .*/commit/merge-state", *repeat) as repeated:
                stack.close()
                assert tiny.finish(adding).code == 0
            assert tiny.finish(repeated).code == 0
    assert len(states(world, repo_id)) == 1
    assert "not published" not in tiny.done("verify", repo_id).out


# the branch of kept states


def theirs(world: World, repo_id: str, *names: str) -> None:
    """Somebody makes a branch `merge-state` for what is not of a merge."""
    world.api.create_branch(repo_id, branch="merge-state", exist_ok=True)
    adds = [CommitOperationAdd(name, name.encode()) for name in names]
    world.api.create_commit(repo_id, adds, commit_message="mine", revision="merge-state")


def test_a_branch_of_the_same_name_is_not_emptied(world: World, tmp_path: Path) -> None:
    """The target has a branch `merge-state` for something else, which kept states are put on, and all else goes."""
    repo_id, out = "push/their-branch", tmp_path / "out"
    world.api.create_repo(repo_id)
    world.api.upload_file(path_or_fileobj=b"# Mine", path_in_repo="notes.md", repo_id=repo_id)
    theirs(world, repo_id, "thesis.txt", "notes.md")
    before, since = world.heads(repo_id), len(world.requests())
    refused(world.merge(repo_id, "push/a", "push/b"), repo_id, "merge-state", "notes.md, thesis.txt", "--overwrite")
    assert not [row for row in world.requests(since) if "/resolve/" in row["path"] and "safetensors" in row["path"]]
    flags = ("--base", "push/base", "--method", "task_arithmetic", "--state", "last")
    tiny.done("merge", "push/a", "push/b", *flags, "--output", out)
    refused(tiny.cli("push", out, repo_id), "merge-state", "notes.md, thesis.txt", "--overwrite")
    assert world.heads(repo_id) == before
    tiny.done("push", out, repo_id, "--create-pr")
    assert world.heads(repo_id) == before
    run = tiny.done("push", out, repo_id, "--overwrite")
    assert f"{repo_id}: deleted from its branch merge-state: notes.md, thesis.txt" in run.out + run.err
    assert len(states(world, repo_id)) == 1 and tiny.done("verify", repo_id).code == 0


def test_a_killed_first_push_is_repeated_though_main_went_on(world: World, tmp_path: Path) -> None:
    """The branch was made from `main`, whose files lie there; then some of them changed and went on `main`."""
    repo_id, command = "push/killed-first", ("push/a", "push/b")
    world.api.create_repo(repo_id)
    for name in ("notes.md", "old.md"):
        world.api.upload_file(path_or_fileobj=b"1", path_in_repo=name, repo_id=repo_id)
    world.api.create_branch(repo_id, branch="merge-state")
    state = CommitOperationAdd(f"merge_state/{'0' * 64}.safetensors", b"of the killed push")
    world.api.create_commit(repo_id, [state], commit_message="Keep state", revision="merge-state")
    world.api.upload_file(path_or_fileobj=b"2", path_in_repo="notes.md", repo_id=repo_id)
    world.api.delete_file("old.md", repo_id)
    run = world.merge(repo_id, *command)
    assert run.code == 0, run.err
    assert len(states(world, repo_id)) == 1 and tiny.done("verify", repo_id).code == 0


def test_a_file_that_comes_on_the_branch_during_a_push_stays(world: World, tmp_path: Path) -> None:
    repo_id = "push/during"
    assert world.merge(repo_id, "push/a", "push/b").code == 0
    with held(world, tmp_path, "POST .*/commit/main", "add", repo_id, "push/c", "--push-to", repo_id) as adding:
        theirs(world, repo_id, "thesis.txt")
    assert tiny.finish(adding).code == 0
    assert "thesis.txt" in states(world, repo_id) and len(states(world, repo_id)) == 2


def test_a_history_is_not_squashed_with_what_others_have_on_the_branch(world: World) -> None:
    repo_id = "push/squashed"
    assert world.merge(repo_id, "push/a", "push/b").code == 0
    theirs(world, repo_id, "thesis.txt")
    before = world.heads(repo_id)
    refused(tiny.cli("purge-history", repo_id, "--yes"), "merge-state", "thesis.txt")
    assert world.heads(repo_id) == before


# tags


def tags(world: World, repo_id: str) -> dict[str, str]:
    """Tag -> commit."""
    return {tag.name: tag.target_commit for tag in world.api.list_repo_refs(repo_id).tags}


def test_a_tag_that_exists_is_neither_moved_nor_claimed(world: World) -> None:
    """Somebody has tagged another commit with the name that the next step will have."""
    repo_id = "push/tagged"
    assert world.merge(repo_id, "push/a", "push/b").code == 0
    first = world.heads(repo_id)["main"]
    world.api.create_tag(repo_id, tag="step-0002", revision=first)
    command = ("add", repo_id, "push/c", "--push-to", repo_id)
    for _ in range(2):
        run = tiny.done(*command, "--json")
        pushed = json.loads(run.out)["pushed"]
        assert pushed["tag"] is None
        (note,) = pushed["notes"]
        assert "without the tag step-0002" in note and first[:12] in note
        assert f"hf repos tag delete {repo_id} step-0002" in note
    assert tags(world, repo_id) == {"step-0001": first, "step-0002": first}
    world.api.delete_tag(repo_id, tag="step-0002")
    assert json.loads(tiny.done(*command, "--json").out)["pushed"]["tag"] == "step-0002"
    assert tags(world, repo_id)["step-0002"] == world.heads(repo_id)["main"]


def test_a_tag_of_the_same_step_counts_though_the_card_was_edited_since(world: World, tmp_path: Path) -> None:
    repo_id, out = "push/edited", tmp_path / "out"
    tiny.done("merge", "push/a", "push/b", "--base", "push/base", "--method", "linear", "--output", out)
    tiny.done("push", out, repo_id)
    first = world.heads(repo_id)["main"]
    world.api.upload_file(path_or_fileobj=b"# Mine", path_in_repo="notes.md", repo_id=repo_id)
    pushed = json.loads(tiny.done("push", out, repo_id, "--json").out)
    assert pushed["tag"] == "step-0001" and not pushed["notes"]
    assert tags(world, repo_id) == {"step-0001": first}


def test_tags_that_an_overwritten_merge_had_are_named(world: World) -> None:
    repo_id = "push/tags-gone"
    assert world.merge(repo_id, "push/a", "push/b").code == 0
    first = world.heads(repo_id)["main"]
    run = world.merge(repo_id, "push/a", "push/c", more=("--overwrite",))
    assert run.code == 0
    assert f"deleted the tags of the merge that was there before: step-0001 ({first[:12]})" in run.err
    assert tags(world, repo_id) == {"step-0001": world.heads(repo_id)["main"]}


# what people changed since


CODE = ("--trust-remote-code", "--method", "task_arithmetic", "--state", "last")


@pytest.fixture(scope="module")
def coded(world: World) -> str:
    """A base with a file of code, which a merge takes over where its user allows that."""
    world.upload("push/coded", world.root / "base")
    world.api.upload_file(path_or_fileobj=b"x = 1\n", path_in_repo="helper.py", repo_id="push/coded")
    return "push/coded"


@pytest.mark.parametrize("name", ["helper.py", "LICENSE.md"])
def test_a_product_that_somebody_changed_is_not_replaced(world: World, coded: str, name: str) -> None:
    """Somebody corrects the code or the licences of a merge on the Hub, and the next step overwrites it."""
    repo_id = f"push/corrected-{name.partition('.')[0].lower()}"
    tiny.done("merge", "push/a", "push/b", "--base", coded, *CODE, "--push-to", repo_id)
    assert name in world.files(repo_id)
    world.api.upload_file(path_or_fileobj=b"corrected = 1\n", path_in_repo=name, repo_id=repo_id)
    before, since = world.heads(repo_id), len(world.requests())
    command = ("add", repo_id, "push/c", "--push-to", repo_id, "--trust-remote-code")
    refused(tiny.cli(*command), repo_id, name, "--overwrite")
    assert world.heads(repo_id) == before
    assert not [row for row in world.requests(since) if "/resolve/" in row["path"] and "safetensors" in row["path"]]
    assert tiny.done(*command, "--overwrite").code == 0 and tiny.done("verify", repo_id).code == 0


def test_a_file_of_the_name_of_an_earlier_product_stays(world: World, coded: str, tmp_path: Path) -> None:
    """A step of long ago had a file of this name; what lies there now is somebody's own."""
    out, own = tmp_path / "out", b"mine = 1\n"
    tiny.done("merge", "push/a", "push/b", "--base", coded, *CODE, "--output", out)
    assert (out / "helper.py").is_file()
    tiny.done("rebase", out, "--base", "push/base")
    assert not (out / "helper.py").exists()
    for repo_id, first in (("push/helper", False), ("push/helper-later", True)):
        world.api.create_repo(repo_id)
        if first:
            tiny.done("push", out, repo_id)
        world.api.upload_file(path_or_fileobj=own, path_in_repo="helper.py", repo_id=repo_id)
    tiny.done("push", out, "push/helper")
    tiny.done("add", "push/helper-later", "push/c", "--push-to", "push/helper-later")
    for repo_id in ("push/helper", "push/helper-later"):
        assert Path(world.api.hf_hub_download(repo_id, "helper.py")).read_bytes() == own


# rule 9 again


def test_any_file_on_the_branch_of_states(world: World) -> None:
    """What a killed push left has not the ending of a state; what lies elsewhere is somebody's, and asked for."""
    repo_id, names = "push/stray", ["notes.md", "merge_state/old.txt", "model.bin", f"merge_state/{'0' * 64}.pt"]
    assert world.merge(repo_id, "push/a", "push/b").code == 0
    command = ("unmerge", repo_id, "--remove", "push/a", "--push-to", repo_id)
    tiny.done(*command)
    adds = [CommitOperationAdd(name, b"a model") for name in names]
    world.api.create_commit(repo_id, adds, commit_message="left", revision="merge-state")
    run = tiny.cli("verify", repo_id)
    assert run.code == 1 and all(f"FAIL {name}: on the branch merge-state" in run.out for name in names)
    refused(tiny.cli(*command), "model.bin, notes.md", "--overwrite")
    tiny.done(*command, "--overwrite")
    assert len(states(world, repo_id)) == 1 and tiny.done("verify", repo_id).code == 0


def test_what_is_left_in_and_beside_a_folder(world: World, tmp_path: Path) -> None:
    """The folder as it was with the model lies under a hidden name, a killed run's files beside it, a state in it."""
    out, root = tmp_path / "merged", world.root
    tiny.done("merge", root / "a", root / "b", "--base", root / "base", "--method", "linear", "--output", out)
    shutil.copytree(out, tmp_path / "before")
    command = ("unmerge", out, "--remove", "a")
    tiny.done(*command)
    clean = tiny.everything(out)
    for part in ("old", "partial", "journal"):
        shutil.copytree(tmp_path / "before", tmp_path / f".merged.hfmerge-{part}")
    (out / "merge_state" / "sources").mkdir(parents=True, exist_ok=True)
    for name in ("left.pt", "sources/left", "left.safetensors.incomplete"):
        (out / "merge_state" / name).write_bytes(b"a model")
    run = tiny.cli("verify", out)
    wanted = [".merged.hfmerge-old", ".merged.hfmerge-partial", "merge_state/left.pt", "merge_state/sources/left"]
    assert run.code == 1 and all(f"FAIL {name}: " in run.out for name in wanted), run.out
    assert tiny.cli("certify", out, "--remove", "a").code == 1
    run = tiny.done(*command)
    assert "did this before" in run.out
    assert tiny.everything(out) == clean and tiny.done("verify", out).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "merged"]


def test_a_merge_at_work_is_no_leftover(world: World, tmp_path: Path) -> None:
    out, root = tmp_path / "merged", world.root
    tiny.done("merge", root / "a", "--base", root / "base", "--method", "linear", "--output", out)
    child = tiny.fork(tmp_path, ["add", out, root / "b"], hold="write")
    child.wait_until_held()
    assert (tmp_path / ".merged.hfmerge-partial").is_dir() and tiny.done("verify", out).code == 0
    assert child.end().code == 0
