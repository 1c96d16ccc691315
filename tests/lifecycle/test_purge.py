"""Purging a published merge's history, with the real client against a Hub on loopback; and what that Hub must do."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import BadRequestError, EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError

import hfmerge
from hfmerge.errors import HfMergeError, PushError, VerificationError
from hfmerge.hashing import sha256_bytes
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.repository import open_merged
from tests.fixtures import tiny
from tests.lifecycle.test_certificate import KEY, private_bytes, public_line


pytestmark = pytest.mark.slow
MODELS = ("p/m0", "p/m1", "p/m2")


@pytest.fixture(scope="module")
def api(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> HfApi:
    """A Hub with a base and three fine-tunes."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert"))
    folders = {"p/base": tiny.save(base, root / "base")}
    folders |= {name: tiny.save(tiny.fine_tune(base, i), root / name[2:]) for i, name in enumerate(MODELS)}
    for repo_id, folder in folders.items():
        import_folder(hub.endpoint, hub.token, folder, repo_id)
    return HfApi()


def publish(repo_id: str, *, add: bool = False) -> str:
    """Two or three steps, of which the last takes the second model out; all states kept. Gives the head of main."""
    flags = ("--base", "p/base", "--method", "opcm", "--state", "all", "--push-to", repo_id)
    tiny.done("merge", *MODELS[:2], *flags)
    if add:
        tiny.done("add", repo_id, MODELS[2], "--push-to", repo_id)
    tiny.done("unmerge", repo_id, "--remove", MODELS[1], "--push-to", repo_id)
    return str(HfApi().model_info(repo_id).sha)


def weights(repo_id: str, revision: str) -> str:
    path = hf_hub_download(repo_id, "model.safetensors", revision=revision, force_download=True)
    return sha256_bytes(Path(path).read_bytes())


def commits(api: HfApi, repo_id: str, branch: str) -> int:
    return len(api.list_repo_commits(repo_id, revision=branch))


def test_branches_become_one_commit_and_all_that_is_left_is_named(api: HfApi, tmp_path: Path) -> None:
    repo = "p/purged"
    head = publish(repo, add=True)
    now = weights(repo, "main")
    (tmp_path / "key").write_bytes(private_bytes(KEY))
    (tmp_path / "key.pub").write_text(public_line(KEY))
    tiny.done("certify", repo, "--remove", MODELS[1], "--key", tmp_path / "key", "--output", tmp_path / "c.json")
    api.create_branch(repo, branch="dev", revision="step-0002")
    api.create_tag(repo, tag="v1", revision="main")
    add = [CommitOperationAdd("notes.md", b"mine")]
    pull = api.create_commit(repo, add, commit_message="notes", create_pr=True)
    assert pull.pr_revision == "refs/pr/1"
    api.create_repo("p/child")
    card = [CommitOperationAdd("README.md", f"---\nbase_model: {repo}\n---\n".encode())]
    api.create_commit("p/child", card, commit_message="card")
    assert commits(api, repo, "main") >= 4 and commits(api, repo, "merge-state") >= 3

    data = tiny.done("purge-history", repo, "--yes", "--json").json

    assert commits(api, repo, "main") == commits(api, repo, "merge-state") == 1
    after = str(api.model_info(repo).sha)
    assert data["head"] == head != after == data["new_head"]
    assert data["leftovers"] == [
        "branch dev: holds the weights of step 2",
        "tag v1: its history leads to the earlier commits",
        "pull request 1: its history leads to the earlier commits",
    ]
    assert data["children"] == ["p/child"] and data["files"] is None
    assert any("cannot be listed" in note for note in data["notes"])
    assert any(f"still answers for the old commit {head[:8]}" in note for note in data["notes"])
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    assert tags == {"v1": head, "step-0003": after}
    # nothing of the merge has changed: ledger, weights, state, and a certificate made before
    assert weights(repo, "main") == now and hfmerge.verify(repo, replay=True).ok
    held = [item.path for item in api.list_repo_tree(repo, recursive=True, revision="merge-state")]
    states = sorted(state.file for state in open_merged(repo).last.states)
    assert states and sorted(path for path in held if path.endswith(".safetensors")) == states
    run = tiny.done("verify", repo, "--certificate", tmp_path / "c.json", "--public-key", tmp_path / "key.pub")
    assert f"made for {repo}@{head[:8]}, equal to {repo}@{after[:8]}" in run.out
    # and it goes on
    tiny.done("add", repo, MODELS[1], "--push-to", repo)
    assert hfmerge.verify(repo).ok and commits(api, repo, "main") == 2


def test_earlier_weights_leave_the_hub_s_storage_if_asked(api: HfApi) -> None:
    repo = "p/emptied"
    head = publish(repo, add=True)
    api.create_branch(repo, branch="dev", revision="step-0002")
    old = {weights(repo, f"step-000{step}") for step in (1, 2)}
    kept = weights(repo, "main")
    before = {file.file_oid for file in api.list_lfs_files(repo)}
    assert old | {kept} <= before and len(before) > 3
    run = tiny.done("purge-history", repo, "--yes", "--delete-files")
    assert "deleted from storage: " in run.out and "still answers" not in run.err
    left = {file.file_oid: file for file in api.list_lfs_files(repo)}
    assert kept in left and not old & set(left) and left[kept].filename == "model.safetensors"
    assert set(left) == {kept, *(state.sha256 for state in open_merged(repo).last.states)}
    assert hfmerge.verify(repo).ok
    assert weights(repo, "main") == kept == weights(repo, head)
    with pytest.raises(EntryNotFoundError):
        weights(repo, "dev")
    with pytest.raises(RevisionNotFoundError):
        weights(repo, "step-0002")
    assert tiny.done("purge-history", repo, "--yes").code == 0  # again does no harm


def test_nothing_is_certified_while_a_kept_state_has_stayed(api: HfApi) -> None:
    repo = "p/stray"
    publish(repo)
    tiny.done("certify", repo, "--remove", MODELS[1])
    stray = [CommitOperationAdd("merge_state/stray.safetensors", b"state" * 99)]
    api.create_commit(repo, stray, commit_message="left behind", revision="merge-state")
    run = tiny.cli("certify", repo, "--remove", MODELS[1])
    assert run.code == 1 and "merge_state/stray.safetensors: on the branch merge-state" in run.err
    tiny.done("purge-history", repo, "--yes")
    tiny.done("certify", repo, "--remove", MODELS[1])


def test_it_asks_first(api: HfApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    repo = "p/asked"
    head = publish(repo)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    refused = tiny.cli("purge-history", repo)
    assert refused.code == 1 and "pass --yes" in refused.err
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert tiny.cli("purge-history", repo).code == 1 and api.model_info(repo).sha == head
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    run = tiny.cli("purge-history", repo, "--delete-files")
    assert run.code == 1 and "nothing was changed" in run.err
    assert "branch main: " in run.out and "model.safetensors of step 1 (" in run.out and "step-0001" in run.out
    assert api.model_info(repo).sha == head and commits(api, repo, "main") > 1
    monkeypatch.setattr("sys.stdin", Terminal(f"{repo}\n"))
    assert tiny.cli("purge-history", repo).code == 0 and commits(api, repo, "main") == 1


def test_refusals_change_nothing(api: HfApi, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = "p/refused"
    publish(repo)

    def meanwhile(plan: hfmerge.PurgePlan) -> bool:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="notes.md", repo_id=repo)
        return True

    with pytest.raises(PushError, match="somebody pushed meanwhile"):
        hfmerge.purge_history(repo, confirm=meanwhile)
    assert hfmerge.purge_history(repo, confirm=lambda plan: False) is None
    with pytest.raises(HfMergeError, match="without a revision"):
        hfmerge.purge_history(f"{repo}@step-0001")
    tiny.done("merge", *MODELS[:2], "--base", "p/base", "--method", "linear", "--output", tmp_path / "folder")
    with pytest.raises(HfMergeError, match="name a repository on the Hub"):
        hfmerge.purge_history(str(tmp_path / "folder"))
    with pytest.raises(HfMergeError, match="not a merge"):
        hfmerge.purge_history("p/base")
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.tokens["other"])
        with pytest.raises(PushError, match="other has no right to write there"):
            hfmerge.purge_history(repo)
    before = commits(api, repo, "main")
    spoilt = [CommitOperationAdd("model.safetensors", b"other bytes" * 100)]
    api.create_commit(repo, spoilt, commit_message="tamper")
    with pytest.raises(VerificationError, match="not purged, since its history may be needed; model.safetensors"):
        hfmerge.purge_history(repo)
    assert before > 3 and commits(api, repo, "main") == before + 1


def test_the_hub_lists_and_deletes_large_files(api: HfApi, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = "p/files"
    api.create_repo(repo)
    for content in (b"one" * 99, b"two" * 99):
        add = [CommitOperationAdd("a.bin", content), CommitOperationAdd("same.bin", b"same")]
        api.create_commit(repo, add, commit_message="files")
    first = api.list_repo_commits(repo)[1].commit_id
    files = {file.filename: file for file in api.list_lfs_files(repo)}
    one, two, same = (sha256_bytes(data) for data in (b"one" * 99, b"two" * 99, b"same"))
    assert {name: (file.file_oid, file.size) for name, file in files.items()} == {
        "a.bin": (two, 297),
        "same.bin": (same, 4),
        one: (one, 297),  # no reference has it any more
    }
    with pytest.raises(HfHubHTTPError) as error:
        api.permanently_delete_lfs_files(repo, [files[one]])
    assert error.value.response.status_code == 501
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.tokens["other"])
        for attempt in (
            lambda: list(api.list_lfs_files(repo)),
            lambda: api.permanently_delete_lfs_files(repo, [files[one]], rewrite_history=False),
        ):
            with pytest.raises(HfHubHTTPError) as error:
                attempt()
            assert error.value.response.status_code == 403
    api.permanently_delete_lfs_files(repo, [files[one]], rewrite_history=False)
    assert one not in [file.file_oid for file in api.list_lfs_files(repo)]
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "a.bin", revision=first, force_download=True)
    assert Path(hf_hub_download(repo, "same.bin", revision=first, force_download=True)).read_bytes() == b"same"
    with pytest.raises(HfHubHTTPError) as error:
        api.permanently_delete_lfs_files(repo, [files[one]], rewrite_history=False)
    assert error.value.response.status_code == 404
    # what was deleted can be sent again
    api.create_commit(repo, [CommitOperationAdd("b.bin", b"one" * 99)], commit_message="again")
    assert Path(hf_hub_download(repo, "b.bin")).read_bytes() == b"one" * 99
    api.create_tag(repo, tag="v1")
    with pytest.raises(BadRequestError):
        api.super_squash_history(repo, branch="v1")
    with pytest.raises(RevisionNotFoundError):
        api.super_squash_history(repo, branch="nowhere")
