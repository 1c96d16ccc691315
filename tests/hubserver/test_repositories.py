"""The official client: repositories, uploads, downloads, revisions, branches, tags, history."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.hubserver.harness import Client, Hub


pytestmark = pytest.mark.slow


def test_who_am_i_and_create(client: Client, hub: Hub) -> None:
    client.run(
        """
me = api.whoami()
assert me["name"] == "alice" and me["auth"]["accessToken"]["role"] == "write"
url = api.create_repo("alice/first")
assert url == server + "/alice/first" and url.repo_id == "alice/first" and url.repo_type == "model"
assert api.create_repo("first", exist_ok=True) == url  # a name alone is in one's own namespace
assert api.create_repo("Alice/FIRST", exist_ok=True) == server + "/Alice/FIRST"
assert fails(HfHubHTTPError, api.create_repo, "first").response.status_code == 409
assert api.list_repo_files("alice/first") == [".gitattributes"]
assert [c.title for c in api.list_repo_commits("alice/first")] == ["initial commit"]
assert api.create_repo("acme/data", repo_type="dataset").repo_type == "dataset"
assert [org["name"] for org in api.whoami()["orgs"]] == ["acme"]
api.create_repo("bob/mine", token="hf_bob")
assert fails(HfHubHTTPError, api.create_repo, "bob/stolen").response.status_code == 403
assert fails(HfHubHTTPError, api.create_repo, "alice/x", repo_type="space", space_sdk="static"
    ).response.status_code == 501
api.delete_repo("alice/first")
fails(RepositoryNotFoundError, api.model_info, "alice/first")
fails(RepositoryNotFoundError, api.delete_repo, "alice/first")
api.delete_repo("alice/first", missing_ok=True)
assert not api.repo_exists("alice/first") and api.repo_exists("acme/data", repo_type="dataset")
fails(RepositoryNotFoundError, api.model_info, "gpt2")
fails(RepositoryNotFoundError, hf_hub_download, "gpt2", "config.json")
""",
        server=hub.server.endpoint,
    )


def test_folder_up_and_down(client: Client, hub: Hub, tmp_path: Path) -> None:
    files = {
        "config.json": b'{"model_type": "bert"}',
        "model.safetensors": bytes(range(256)) * 8000,
        "empty.bin": b"",
        "sub dir/deep/unicode é ü.txt": "grüße".encode(),
        "sub dir/100%/a+b&c=d.txt": b"x",
        ".gitignore": b"*.tmp\nbuild/\n",
        "left.tmp": b"no",
        "build/out.txt": b"no",
    }
    source = tmp_path / "source"
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    client.run(
        """
import hashlib
api.create_repo("acme/model")
info = api.upload_folder(repo_id="acme/model", folder_path=source, commit_message="add all", commit_description="why")
assert info.commit_url == server + "/acme/model/commit/" + info.oid and info.repo_url.repo_id == "acme/model"
again = api.upload_folder(repo_id="acme/model", folder_path=source)
assert again.oid == info.oid, "nothing changed, yet there is another commit"
wanted = {p.relative_to(source).as_posix(): p.read_bytes() for p in Path(source).rglob("*") if p.is_file()}
kept = {name: data for name, data in wanted.items() if not name.endswith(".tmp") and not name.startswith("build/")}
assert sorted(api.list_repo_files("acme/model")) == sorted([".gitattributes", *kept])
there = Path(snapshot_download("acme/model"))
assert there.name == info.oid
for name, data in kept.items():
    assert (there / name).read_bytes() == data, name
one = hf_hub_download("acme/model", "model.safetensors")
assert Path(one).resolve().name == hashlib.sha256(kept["model.safetensors"]).hexdigest()
assert Path(hf_hub_download("acme/model", "config.json")).resolve().name == api.get_paths_info(
    "acme/model", ["config.json"])[0].blob_id
siblings = {s.rfilename: s for s in api.model_info("acme/model", files_metadata=True).siblings}
assert siblings["model.safetensors"].lfs.sha256 == hashlib.sha256(kept["model.safetensors"]).hexdigest()
assert siblings["model.safetensors"].size == 2048000 and siblings["model.safetensors"].lfs.size == 2048000
assert siblings["empty.bin"].lfs is None and siblings["empty.bin"].size == 0
assert siblings["config.json"].lfs is None and siblings["config.json"].size == 22
commit = api.list_repo_commits("acme/model")[0]
assert (commit.title, commit.message, commit.authors) == ("add all", "why", ["alice"])
assert api.verify_repo_checksums("acme/model", local_dir=there).checked_count == len(kept) + 1
result = info.oid
""",
        source=str(source),
        server=hub.server.endpoint,
    )


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_finds_the_repositories_sound(client: Client, hub: Hub) -> None:
    client.run("""
api.create_repo("acme/sound")
add = [CommitOperationAdd(f"{name}/x.txt", b"x") for name in ("b", "a.b", "a", "a-b", "ab")]
api.create_commit("acme/sound", add, commit_message="names that sort in their own way")
api.create_tag("acme/sound", tag="t", tag_message="annotated")
api.delete_folder("a", "acme/sound")
""")
    repos = list((hub.folder / "store" / "repos").iterdir())
    assert repos
    for repo in repos:
        checked = subprocess.run(["git", "-C", repo, "fsck", "--strict"], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_commits_copies_and_deletions(client: Client) -> None:
    client.run("""
api.create_repo("acme/ops")
Add, Copy, Delete = CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
def names():
    return [name for name in api.list_repo_files("acme/ops") if name != ".gitattributes"]
big = b"B" * 3000
adds = [Add("a.txt", b"a"), Add("d/b.bin", big), Add("d/e/c.txt", b"c")]
first = api.create_commit("acme/ops", adds, commit_message="1")
assert names() == ["a.txt", "d/b.bin", "d/e/c.txt"]
copies = [Copy("d/b.bin", "copy.bin"), Copy("a.txt", "z.txt"), Delete("d/e/c.txt")]
api.create_commit("acme/ops", copies, commit_message="2")
assert names() == ["a.txt", "copy.bin", "d/b.bin", "z.txt"]
assert Path(hf_hub_download("acme/ops", "copy.bin")).read_bytes() == big
api.create_commit("acme/ops", [Copy("d/e/c.txt", "old.txt", src_revision=first.oid)], commit_message="3")
assert Path(hf_hub_download("acme/ops", "old.txt")).read_bytes() == b"c"
api.delete_folder("d", "acme/ops")
assert names() == ["a.txt", "copy.bin", "old.txt", "z.txt"]
api.delete_files("acme/ops", ["*.bin", "z*"])
assert names() == ["a.txt", "old.txt"]
fails(RemoteEntryNotFoundError, api.delete_file, "missing.txt", "acme/ops")
fails(RemoteEntryNotFoundError, api.delete_folder, "missing", "acme/ops")
# Deleting a folder and putting something in its place, in this order, in one commit.
api.create_commit("acme/ops", [Add("f/one", b"1"), Add("f/two", b"2")], commit_message="4")
api.create_commit("acme/ops", [Delete("f/"), Add("f", b"now a file")], commit_message="5")
assert names() == ["a.txt", "f", "old.txt"]
assert fails(BadRequestError, api.upload_file, path_or_fileobj=b"", path_in_repo="f/x", repo_id="acme/ops")
tip = api.model_info("acme/ops").sha
assert api.create_commit("acme/ops", [], commit_message="nothing").oid == tip
assert api.create_commit("acme/ops", [Add("a.txt", b"a")], commit_message="same").oid == tip
# The parent may be named in short; one that is no longer the newest is refused.
api.create_commit("acme/ops", [Add("p", b"1")], commit_message="6", parent_commit=tip)
error = fails(HfHubHTTPError, api.create_commit, "acme/ops", [Add("p", b"2")], commit_message="7", parent_commit=tip)
assert error.response.status_code == 412 and "The branch was updated since you opened this page" in str(error)
now = api.model_info("acme/ops").sha
api.create_commit("acme/ops", [Add("p", b"2")], commit_message="8", parent_commit=now[:7])
fails(RevisionNotFoundError, api.create_commit, "acme/ops", [Add("p", b"3")], commit_message="9", revision="nowhere")
fails(RepositoryNotFoundError, api.create_commit, "acme/none", [Add("p", b"3")], commit_message="9")
""")


def test_revisions_branches_tags_history(client: Client) -> None:
    client.run("""
repo = "acme/refs"
api.create_repo(repo)
root = api.model_info(repo).sha
one = api.upload_file(path_or_fileobj=b"one", path_in_repo="f.txt", repo_id=repo, commit_message="one").oid
two = api.upload_file(path_or_fileobj=b"two", path_in_repo="f.txt", repo_id=repo, commit_message="two").oid
def read(revision):
    return Path(hf_hub_download(repo, "f.txt", revision=revision, force_download=True)).read_text()
api.create_branch(repo, branch="feat/x", revision=one)
api.create_tag(repo, tag="v1", revision=one, tag_message="annotated")
api.create_tag(repo, tag="v2")
assert [read(r) for r in ("main", one, "feat/x", "v1", "v2", two[:10])] == ["two", "one", "one", "one", "two", "two"]
assert api.model_info(repo, revision="v1").sha == one == api.model_info(repo, revision="feat/x").sha
api.upload_file(path_or_fileobj=b"x", path_in_repo="f.txt", repo_id=repo, revision="feat/x")
assert read("feat/x") == "x" and read("main") == "two"
refs = api.list_repo_refs(repo)
assert {b.name: b.ref for b in refs.branches} == {"main": "refs/heads/main", "feat/x": "refs/heads/feat/x"}
assert {t.name: t.target_commit for t in refs.tags} == {"v1": one, "v2": two}
assert refs.pull_requests is None and api.list_repo_refs(repo, include_pull_requests=True).pull_requests == []
def says(status, text, call, *arguments, **options):
    error = fails(HfHubHTTPError, call, *arguments, **options)
    assert error.response.status_code == status and text in str(error), str(error)
says(409, "Reference refs/heads/feat/x already exists", api.create_branch, repo, branch="feat/x")
says(409, "clashes", api.create_branch, repo, branch="feat")
says(409, "Reference refs/tags/v1 already exists", api.create_tag, repo, tag="v1")
says(403, "Cannot delete refs/heads/main", api.delete_branch, repo, branch="main")
assert "Invalid reference for a branch" in str(fails(BadRequestError, api.create_branch, repo, branch="refs/pr/5"))
fails(BadRequestError, api.create_tag, repo, tag="not a tag")
fails(RevisionNotFoundError, api.create_tag, repo, tag="v3", revision="nowhere")
fails(RevisionNotFoundError, api.create_branch, repo, branch="b3", revision="nowhere")
api.create_branch(repo, branch="feat/x", exist_ok=True)
api.create_tag(repo, tag="v1", exist_ok=True)
fails(RevisionNotFoundError, api.delete_branch, repo, branch="v1")  # a tag is not a branch
fails(RevisionNotFoundError, api.delete_tag, repo, tag="main")
api.delete_tag(repo, tag="v1")
api.delete_branch(repo, branch="feat/x")
fails(RevisionNotFoundError, api.model_info, repo, revision="v1")
fails(RevisionNotFoundError, hf_hub_download, repo, "f.txt", revision="feat/x")
assert [c.commit_id for c in api.list_repo_commits(repo)] == [two, one, root]
assert api.list_repo_commits(repo, revision=one, formatted=True)[0].formatted_title == "one"
for number in range(52):  # more than a page of history
    api.upload_file(path_or_fileobj=str(number).encode(), path_in_repo="n", repo_id=repo, commit_message=str(number))
titles = [c.title for c in api.list_repo_commits(repo)]
assert titles == [str(n) for n in reversed(range(52))] + ["two", "one", "initial commit"]
files = api.list_repo_files(repo)
api.super_squash_history(repo, branch="main", commit_message="all in one")
assert [c.title for c in api.list_repo_commits(repo)] == ["all in one"] and api.list_repo_files(repo) == files
assert read("main") == "two" and read(one) == "one"
""")


def test_trees(client: Client) -> None:
    client.run("""
repo = "acme/tree"
api.create_repo(repo, repo_type="dataset")
Add = CommitOperationAdd
options = {"repo_id": repo, "repo_type": "dataset"}
many = [Add(f"data/{n:04}.txt", b"%d" % n) for n in range(1000)] + [Add(f"few/{n}.txt", b"x") for n in range(55)]
first = api.create_commit(operations=many, commit_message="many", **options)
change = [Add("few/3.txt", b"new"), Add("big.bin", b"0" * 999)]
api.create_commit(operations=change, commit_message="few", **options)
top = {e.path: e for e in api.list_repo_tree(**options)}
assert sorted(top) == [".gitattributes", "big.bin", "data", "few"]
assert type(top["data"]).__name__ == "RepoFolder" and top["big.bin"].lfs.size == top["big.bin"].size == 999
assert len(list(api.list_repo_tree(path_in_repo="data", **options))) == 1000
assert len({e.path for e in api.list_repo_tree(recursive=True, **options)}) == 1059  # two pages
expanded = {e.path: e for e in api.list_repo_tree(path_in_repo="few", expand=True, **options)}
assert len(expanded) == 55  # two pages, as these cost more
assert expanded["few/3.txt"].last_commit.title == "few" and expanded["few/2.txt"].last_commit.oid == first.oid
fails(RemoteEntryNotFoundError, lambda: list(api.list_repo_tree(path_in_repo="missing", **options)))
fails(RemoteEntryNotFoundError, lambda: list(api.list_repo_tree(path_in_repo="big.bin", **options)))
fails(RevisionNotFoundError, lambda: list(api.list_repo_tree(revision="nowhere", **options)))
info = api.get_paths_info(repo, ["few", "few/3.txt", "nothing"], repo_type="dataset", expand=True)
assert [(i.path, i.last_commit.title) for i in info] == [("few", "few"), ("few/3.txt", "few")]
assert api.file_exists(repo, "big.bin", repo_type="dataset") and not api.file_exists(repo, "no", repo_type="dataset")
""")


def test_information_and_lists(client: Client) -> None:
    client.run("""
Add = CommitOperationAdd
card = '''---
license: apache-2.0
library_name: transformers
pipeline_tag: text-classification
base_model: [acme/base, acme/other]
base_model_relation: merge
tags: [hfmerge, merge]
datasets: [acme/data]
language: en
hfmerge: {version: 1, steps: [{method: ties, when: 2024-01-02}]}
---
# Merged
'''
api.create_repo("lists/merged")
api.create_repo("lists/base")
api.create_repo("acme/base", exist_ok=True)
files = [Add("README.md", card.encode()), Add("config.json", b'{"model_type": "bert", "architectures": ["B"]}')]
files.append(Add(".eval_results/x.yaml", b"- dataset: {id: acme/data, task_id: t}\\n  value: 0.5\\n"))
api.create_commit("lists/merged", files, commit_message="card")
info = api.model_info("lists/merged")
assert info.card_data.base_model == ["acme/base", "acme/other"] and info.library_name == "transformers"
assert info.card_data.to_dict()["hfmerge"]["steps"][0] == {"method": "ties", "when": "2024-01-02"}
assert info.pipeline_tag == "text-classification" and info.config["model_type"] == "bert" and info.author == "lists"
assert {"hfmerge", "merge", "en", "base_model:acme/base", "base_model:merge:acme/base", "license:apache-2.0",
        "dataset:acme/data", "transformers", "base_model:merge:acme/other"} <= set(info.tags)
assert info.eval_results[0].value == 0.5
more = api.model_info("lists/merged", expand=["baseModels", "cardData", "evalResults"])
assert more.base_models["relation"] == "merge" and [m["id"] for m in more.base_models["models"]][0] == "acme/base"
assert more.sha is None and more.siblings is None
assert api.model_info("acme/base", expand=["childrenModelCount"]).children_model_count == 1
ids = lambda **options: sorted(m.id for m in api.list_models(**options))
assert ids(author="lists") == ["lists/base", "lists/merged"] and ids(search="MERG") == ["lists/merged"]
assert ids(filter="base_model:merge:acme/base") == ["lists/merged"] and ids(filter=["hfmerge", "none"]) == []
assert ids(pipeline_tag="text-classification") == ["lists/merged"]
assert len(list(api.list_models(author="lists", limit=1))) == 1
full = list(api.list_models(author="lists", full=True, cardData=True, sort="last_modified"))
assert [m.id for m in full] == ["lists/merged", "lists/base"] or full[0].last_modified == full[1].last_modified
assert all(m.sha and m.siblings for m in full)
api.create_repo("lists/table", repo_type="dataset")
assert [d.id for d in api.list_datasets(author="lists")] == ["lists/table"]
assert api.dataset_info("lists/table").tags == ["region:us"]
# A revision without the card has no tags of it.
oldest = api.list_repo_commits("lists/merged")[-1].commit_id
assert "hfmerge" not in api.model_info("lists/merged", revision=oldest).tags
""")


def test_move_and_settings(client: Client) -> None:
    client.run("""
api.create_repo("acme/before")
api.create_repo("acme/taken")
api.upload_file(path_or_fileobj=b"kept", path_in_repo="f.txt", repo_id="acme/before")
error = fails(HfHubHTTPError, api.move_repo, "acme/before", "acme/taken")
assert error.response.status_code == 409 and "A model repository called acme/taken already exists" in str(error)
assert fails(HfHubHTTPError, api.move_repo, "acme/before", "bob/after").response.status_code == 403
api.move_repo("acme/before", "other/after")
assert api.model_info("other/after").id == "other/after"
assert api.model_info("acme/before").id == "other/after"  # redirected
assert Path(hf_hub_download("acme/before", "f.txt")).read_bytes() == b"kept"
api.upload_file(path_or_fileobj=b"more", path_in_repo="g.txt", repo_id="acme/before")
assert "g.txt" in api.list_repo_files("other/after")
api.create_repo("acme/before")  # the name is free again, and the redirect ends
assert "f.txt" not in api.list_repo_files("acme/before")
for gated in ("auto", "manual", False):
    for private in (True, False):
        api.update_repo_settings("other/after", gated=gated, private=private)
        info = api.model_info("other/after")
        assert (info.gated, info.private) == (gated, private)
""")
