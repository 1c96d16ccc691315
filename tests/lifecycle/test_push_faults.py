"""Publishing through a Hub that fails: done in the end, or one line and a repository as it was before."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hfmerge.hubserver.serve import HubServer
from tests.fixtures import tiny
from tests.fixtures.faultproxy import Fault, FaultProxy
from tests.fixtures.hub import USERS
from tests.fixtures.shell import Shell


pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class World:
    """The Hub of this test session behind a proxy, and processes that push through it: by Xet and by Git-LFS."""

    proxy: FaultProxy
    shells: dict[str, Shell]
    api: HfApi
    first: Path
    second: Path

    def commits(self, repo_id: str, branch: str = "main") -> list[str]:
        """Titles of a branch's commits, newest first, without the first one."""
        return [commit.title for commit in self.api.list_repo_commits(repo_id, revision=branch)][:-1]

    def files(self, repo_id: str) -> dict[str, str]:
        """Path -> git object of what `main` holds."""
        info = self.api.model_info(repo_id, files_metadata=True)
        return {item.rfilename: str(item.blob_id) for item in info.siblings or ()}

    def head(self, repo_id: str) -> str:
        """What `main` is at."""
        return str(self.api.model_info(repo_id).sha)


@pytest.fixture(scope="module")
def started(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("push")
    base = tiny.build("BertModel", tiny.config("bert", vocab_size=2000))
    tiny.save(base, root / "base")
    for i, name in enumerate(("a", "b")):
        tiny.save(tiny.fine_tune(base, i + 1), root / name)
    flags = ("--base", root / "base", "--method", "task_arithmetic")
    tiny.done("merge", root / "a", *flags, "--output", root / "first")
    tiny.done("add", root / "first", root / "b", "--output", root / "second")
    with (
        FaultProxy(hub.endpoint) as proxy,
        Shell(HF_ENDPOINT=proxy.endpoint, HF_HOME=str(root / "xet"), HF_TOKEN=USERS["me"]) as xet,
        Shell(HF_ENDPOINT=proxy.endpoint, HF_HOME=str(root / "lfs"), HF_HUB_DISABLE_XET="1") as lfs,
    ):
        yield World(proxy, {"xet": xet, "lfs": lfs}, HfApi(), root / "first", root / "second")


@pytest.fixture
def world(started: World) -> World:
    started.proxy.faults()
    return started


def published(world: World, name: str, shell: str, tmp_path: Path) -> tuple[str, Path]:
    """A repository with the first merge, and a copy of the second one to push there next."""
    repo_id = f"org/push-{shell}-{re.sub('[^a-z]+', '-', name.lower())}"
    world.proxy.faults()
    world.shells[shell].done("push", shutil.copytree(world.first, tmp_path / "first"), repo_id)
    return repo_id, Path(shutil.copytree(world.second, tmp_path / "second"))


UPLOAD = "PUT |POST /cas/.*/(xorbs|shards)"
PASSING = {
    "errors": Fault(status=500, every=8),
    "overrun": Fault(status=429, headers={"Retry-After": "0"}, skip=1, every=9),
    "slow": Fault(delay=0.05),
    "cut off": Fault(drop=True, every=9),
    "commit refused": Fault("POST .*/commit/main", status=500, times=2),
    "commit not sent": Fault("POST .*/commit/main", drop=True, times=1),
    "answer lost": Fault("POST .*/commit/main", lose=True, times=1),
    "state's answer lost": Fault("POST .*/commit/merge-state", lose=True, times=1),
    "upload refused": Fault(UPLOAD, status=500, times=1),
    "upload cut off": Fault(UPLOAD, drop=True, times=1),
    "tag refused": Fault("POST .*/tag/", status=500, times=1),
    "no JSON": Fault("validate-yaml", status=500, times=1),
}


def ways(faults: Mapping[str, object]) -> list[tuple[str, str]]:
    """Faults of uploads in both ways to upload, the others in turn by one of them."""
    both = [name for name in faults if "upload" in name]
    turns = [(name, ("xet", "lfs")[i % 2]) for i, name in enumerate(faults) if name not in both]
    return [*turns, *((name, shell) for name in both for shell in ("xet", "lfs"))]


@pytest.mark.parametrize(("name", "shell"), ways(PASSING))
def test_faults_that_pass(world: World, name: str, shell: str, tmp_path: Path) -> None:
    repo_id, second = published(world, name, shell, tmp_path)
    before = world.head(repo_id)
    world.proxy.faults(PASSING[name])
    run = world.shells[shell].run("push", second, repo_id)
    assert run.code == 0 and not run.err, run.err
    assert [record for record in world.proxy.requests() if record.hit]
    assert world.commits(repo_id) == [
        "Add b with hfmerge (task_arithmetic, step 2)",
        "Merge a with hfmerge (task_arithmetic, step 1)",
    ], "one commit a push"
    assert world.head(repo_id) != before and world.head(repo_id) in run.out
    assert [tag.name for tag in world.api.list_repo_refs(repo_id).tags] == ["step-0001", "step-0002"]
    kept = [f.path for f in world.api.list_repo_tree(repo_id, recursive=True, revision="merge-state")]
    assert [path for path in kept if path.endswith(".safetensors")] == [
        f"merge_state/{state}" for state in tiny.states(second)
    ]
    world.proxy.faults()
    assert tiny.done("verify", repo_id).code == 0


LASTING = {
    "commit": (Fault("POST .*/commit/main", status=403), "refused the token (HTTP 403)"),
    "overrun": (Fault("POST .*/commit/main", status=429, headers={"Retry-After": "4000"}), "HTTP 429"),
    "upload": (Fault(UPLOAD, status=403), ""),
}


@pytest.mark.parametrize(("name", "shell"), ways(LASTING))
def test_faults_that_last_leave_the_repository_as_it_was(world: World, name: str, shell: str, tmp_path: Path) -> None:
    fault, words = LASTING[name]
    repo_id, second = published(world, f"lasting {name}", shell, tmp_path)
    before = world.files(repo_id)
    head = world.head(repo_id)
    world.proxy.faults(fault)
    run = world.shells[shell].run("push", second, repo_id)
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1, run.err
    assert run.err.startswith(f"hfmerge: {repo_id}: ") and words in run.err
    assert world.head(repo_id) == head
    assert world.files(repo_id) == before
    world.proxy.faults()
    assert tiny.done("verify", repo_id).code == 0
    world.shells[shell].done("push", second, repo_id)
    assert tiny.done("verify", repo_id).code == 0


def test_what_follows_the_commit_is_told_not_raised(world: World, tmp_path: Path) -> None:
    repo_id, second = published(world, "follow-up", "xet", tmp_path)
    world.proxy.faults(Fault("POST .*/tag/", status=403), Fault("GET .*/refs", status=403))
    run = world.shells["xet"].done("push", second, repo_id)
    assert "published, but without the tag step-0002" in run.err and "obsolete states are still" in run.err
    assert len(world.commits(repo_id)) == 2
    world.proxy.faults()
    again = world.shells["xet"].done("push", second, repo_id)
    assert not again.err and len(world.commits(repo_id)) == 2
    assert [tag.name for tag in world.api.list_repo_refs(repo_id).tags] == ["step-0001", "step-0002"]
    kept = [f.path for f in world.api.list_repo_tree(repo_id, recursive=True, revision="merge-state")]
    assert len([path for path in kept if path.endswith(".safetensors")]) == len(tiny.states(second)) == 1


def test_somebody_else_s_commit_is_not_taken_for_ours(world: World, tmp_path: Path) -> None:
    """The request is lost, and before it is sent again somebody else commits."""
    repo_id, second = published(world, "meanwhile", "xet", tmp_path)
    world.proxy.faults(Fault("POST .*/commit/main", drop=True, times=1), Fault("GET .*/commits/main", delay=4.0))
    with ThreadPoolExecutor(1) as pool:
        push = pool.submit(world.shells["xet"].run, "push", second, repo_id)
        while not world.proxy.requests("POST .*/commit/main"):
            assert not push.done(), push.result().err
            time.sleep(0.01)
        theirs = world.api.upload_file(path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id=repo_id)
        run = push.result()
    assert run.code == 1 and "main moved since" in run.err
    assert world.head(repo_id) == theirs.oid


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(world: World, tmp_path: Path) -> None:
    repo_id, second = published(world, "pull request", "xet", tmp_path)
    world.proxy.faults(Fault("POST .*/commit/main", lose=True, times=1))
    run = world.shells["xet"].run("push", second, repo_id, "--create-pr")
    assert run.code == 1 and "was lost" in run.err and "community page" in run.err
    assert len(list(world.api.get_repo_discussions(repo_id))) == 1
