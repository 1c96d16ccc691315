"""Who may do what: private and gated repositories, bad tokens, people without write access, pull requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hubserver.harness import Client, Hub


@pytest.mark.slow
def test_private(client: Client, hub: Hub) -> None:
    client.run("""
api.create_repo("alice/secret", private=True)
api.upload_file(path_or_fileobj=b"s" * 100, path_in_repo="s.bin", repo_id="alice/secret")
assert api.model_info("alice/secret").private is True
for token, status in ((False, 401), ("hf_bob", 404)):
    other = HfApi(token=token)
    for call in (
        lambda: other.model_info("alice/secret"),
        lambda: other.hf_hub_download("alice/secret", "s.bin"),
        lambda: list(other.list_repo_tree("alice/secret")),
        lambda: other.auth_check("alice/secret"),
        lambda: other.list_repo_refs("alice/secret"),
        lambda: other.model_info("alice/does-not-exist"),
    ):
        error = fails(RepositoryNotFoundError, call)
        assert error.response.status_code == status and error.response.headers["X-Request-Id"]
    assert [m.id for m in other.list_models(author="alice")] == []
assert [m.id for m in api.list_models(author="alice")] == ["alice/secret"]
api.auth_check("alice/secret")
api.update_repo_settings("alice/secret", private=False)
assert HfApi(token=False).model_info("alice/secret").private is False
error = fails(HfHubHTTPError, HfApi(token="hf_wrong").model_info, "alice/secret")  # public, but the token is bad
assert error.response.status_code == 401 and "Invalid credentials in Authorization header" in str(error)
assert fails(HfHubHTTPError, HfApi(token="hf_wrong").whoami).response.status_code == 401
""")
    # The address of a private file that was moved tells nobody where it went.
    hub.ask("POST", "/api/repos/create", {"name": "hidden", "visibility": "private"})
    hub.ask("POST", "/api/repos/move", {"fromRepo": "alice/hidden", "toRepo": "alice/hidden2", "type": "model"})
    assert hub.ask("GET", "/api/models/alice/hidden").status == 307
    assert hub.ask("GET", "/api/models/alice/hidden", user="bob").status == 404


@pytest.mark.slow
def test_gated(client: Client) -> None:
    client.run("""
api.create_repo("alice/gated")
api.upload_file(path_or_fileobj=b"g" * 100, path_in_repo="g.bin", repo_id="alice/gated")
api.update_repo_settings("alice/gated", gated="manual")
bob = HfApi(token="hf_bob")
nobody = HfApi(token=False)
assert bob.model_info("alice/gated").gated == "manual" and nobody.model_info("alice/gated").siblings
for other, status in ((nobody, 401), (bob, 403)):
    for call in (lambda: other.hf_hub_download("alice/gated", "g.bin"), lambda: other.auth_check("alice/gated")):
        assert fails(GatedRepoError, call).response.status_code == status
fails(GatedRepoError, lambda: bob.snapshot_download("alice/gated"))
api.hf_hub_download("alice/gated", "g.bin")
api.grant_access("alice/gated", "bob")
assert Path(bob.hf_hub_download("alice/gated", "g.bin")).read_bytes() == b"g" * 100
bob.auth_check("alice/gated")
assert [r.username for r in api.list_accepted_access_requests("alice/gated")] == ["bob"]
api.reject_access_request("alice/gated", "bob", rejection_reason="changed my mind")
fails(GatedRepoError, bob.auth_check, "alice/gated")
assert fails(HfHubHTTPError, bob.grant_access, "alice/gated", "bob").response.status_code == 403
""")


def test_no_write_access(client: Client) -> None:
    client.run("""
api.create_repo("alice/readonly")
bob, nobody = HfApi(token="hf_bob"), HfApi(token=False)
Add = CommitOperationAdd
calls = lambda who: [
    lambda: who.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="alice/readonly"),
    lambda: who.upload_file(path_or_fileobj=b"x" * 99, path_in_repo="x.bin", repo_id="alice/readonly"),
    lambda: who.delete_file(".gitattributes", "alice/readonly"),
    lambda: who.create_branch("alice/readonly", branch="b"),
    lambda: who.create_tag("alice/readonly", tag="t"),
    lambda: who.super_squash_history("alice/readonly"),
    lambda: who.update_repo_settings("alice/readonly", private=True),
    lambda: who.move_repo("alice/readonly", "bob/mine-now"),
    lambda: who.delete_repo("alice/readonly"),
    lambda: who.auth_check("alice/readonly", write=True),
]
for who, status in ((bob, 403), (nobody, 401)):
    for number, call in enumerate(calls(who)):
        error = fails(HfHubHTTPError, call)
        assert error.response.status_code == status, (number, error)
assert api.list_repo_files("alice/readonly") == [".gitattributes"]
""")


@pytest.mark.slow
def test_pull_requests(client: Client, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("from bob")
    (tmp_path / "new.bin").write_bytes(b"n" * 5000)
    client.run(
        """
repo = "alice/prs"
api.create_repo(repo)
Add, Delete = CommitOperationAdd, CommitOperationDelete
base = api.create_commit(repo, [Add("a.txt", b"a\\n"), Add("gone.txt", b"g")], commit_message="base").oid
bob, carol = HfApi(token="hf_bob"), HfApi(token="hf_carol")

# By one commit, from somebody without write access, with a large file.
ops = [Add("b.txt", b"b"), Add("b.bin", b"B" * 4000), Delete("gone.txt")]
info = bob.create_commit(repo, ops, commit_message="add b", commit_description="because", create_pr=True)
assert info.pr_num == 1 and info.pr_revision == "refs/pr/1" and info.pr_url == server + "/alice/prs/discussions/1"
assert "b.txt" in api.list_repo_files(repo, revision="refs/pr/1") and "b.txt" not in api.list_repo_files(repo)
assert Path(api.hf_hub_download(repo, "b.bin", revision="refs/pr/1")).read_bytes() == b"B" * 4000
details = api.get_discussion_details(repo, 1)
assert (details.author, details.status, details.title, details.is_pull_request) == ("bob", "open", "add b", True)
assert details.target_branch == "refs/heads/main" and details.conflicting_files == []
assert details.merge_commit_oid is None
assert [e.type for e in details.events] == ["comment", "commit"] and details.events[0].content == "because"
assert details.events[1].oid == info.oid and "+b" in details.diff and "deleted file" in details.diff

# Pushing more to one's own request, not to another's.
more = bob.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id=repo, revision="refs/pr/1")
bob.upload_file(path_or_fileobj=b"L" * 4000, path_in_repo="c.bin", repo_id=repo, revision="refs/pr/1")
assert fails(HfHubHTTPError, carol.upload_file, path_or_fileobj=b"c", path_in_repo="x", repo_id=repo,
    revision="refs/pr/1").response.status_code == 403
assert fails(HfHubHTTPError, carol.merge_pull_request, repo, 1).response.status_code == 403
assert fails(HfHubHTTPError, bob.merge_pull_request, repo, 1).response.status_code == 403
api.upload_file(path_or_fileobj=b"moved on", path_in_repo="main-only.txt", repo_id=repo)
api.merge_pull_request(repo, 1, comment="thanks")
details = api.get_discussion_details(repo, 1)
assert details.status == "merged" and details.merge_commit_oid == api.model_info(repo).sha
assert [e.type for e in details.events][-2:] == ["comment", "status-change"]
assert details.events[-1].new_status == "merged"
names = {".gitattributes", "a.txt", "b.txt", "b.bin", "c.txt", "c.bin", "main-only.txt"}
assert set(api.list_repo_files(repo)) == names
merged = api.list_repo_commits(repo)[0]
assert merged.title == "add b (#1)" and merged.authors == ["bob"] and info.oid in merged.message
fails(BadRequestError, api.merge_pull_request, repo, 1)
assert fails(HfHubHTTPError, bob.upload_file, path_or_fileobj=b"c", path_in_repo="x", repo_id=repo,
    revision="refs/pr/1").response.status_code == 403

# A folder: the client opens the request first, as a draft, and pushes to it.
info = bob.upload_folder(repo_id=repo, folder_path=folder, create_pr=True, commit_message="a folder")
assert info.pr_num == 2 and api.get_discussion_details(repo, 2).status == "draft"
error = fails(BadRequestError, api.merge_pull_request, repo, 2)
assert "draft" in str(error)
api.change_discussion_status(repo, 2, "open")
api.merge_pull_request(repo, 2)
assert Path(api.hf_hub_download(repo, "new.bin")).read_bytes() == b"n" * 5000

# Conflicts.
three = bob.create_commit(repo, [Add("a.txt", b"bob\\n")], commit_message="mine", create_pr=True)
api.upload_file(path_or_fileobj=b"alice\\n", path_in_repo="a.txt", repo_id=repo)
assert api.get_discussion_details(repo, 3).conflicting_files == ["a.txt"]
assert fails(HfHubHTTPError, api.merge_pull_request, repo, 3).response.status_code == 409
assert Path(api.hf_hub_download(repo, "a.txt")).read_bytes() == b"alice\\n"

# Against a branch, and against what is none.
api.create_branch(repo, branch="dev")
four = api.create_commit(repo, [Add("d", b"d")], commit_message="on dev", create_pr=True, revision="dev")
assert api.get_discussion_details(repo, 4).target_branch == "refs/heads/dev"
api.merge_pull_request(repo, 4)
assert "d" in api.list_repo_files(repo, revision="dev") and "d" not in api.list_repo_files(repo)
for revision in (base, "nowhere"):
    fails(RevisionNotFoundError, api.create_commit, repo, [Add("d", b"d")], commit_message="x", create_pr=True,
        revision=revision)
refs = api.list_repo_refs(repo, include_pull_requests=True).pull_requests
assert [r.ref for r in refs] == ["refs/pr/1", "refs/pr/2", "refs/pr/3", "refs/pr/4"]
assert fails(HfHubHTTPError, HfApi(token=False).create_pull_request, repo, "nobody").response.status_code == 401
""",
        server=hub.server.endpoint,
        folder=str(tmp_path),
    )


@pytest.mark.slow
def test_discussions(client: Client) -> None:
    client.run("""
import warnings
repo = "alice/talk"
api.create_repo(repo, repo_type="dataset")
options = {"repo_id": repo, "repo_type": "dataset"}
bob = HfApi(token="hf_bob")
opened = bob.create_discussion(title=" A question ", description="**why?** & how <b>", **options)
assert (opened.num, opened.title, opened.author, opened.is_pull_request) == (1, "A question", "bob", False)
assert opened.url == api.endpoint + "/datasets/alice/talk/discussions/1" and opened.status == "open"
pull = api.create_pull_request(title="A change", **options)
assert api.get_discussion_details(discussion_num=1, **options) == opened
assert api.get_discussion_details(discussion_num=2, **options) == pull
assert pull.status == "draft" and api.dataset_info(repo, revision="refs/pr/2").sha == api.dataset_info(repo).sha
comment = api.comment_discussion(discussion_num=1, comment="because", **options)
edited = api.edit_discussion_comment(discussion_num=1, comment_id=comment.id, new_content="so", **options)
assert edited.content == "so" and edited.edited and edited.number_of_edits == 1
assert fails(HfHubHTTPError, bob.edit_discussion_comment, discussion_num=1, comment_id=comment.id, new_content="no",
    **options).response.status_code == 403
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    hidden = api.hide_discussion_comment(discussion_num=1, comment_id=opened.events[0].id, **options)
assert hidden.hidden and hidden.content == ""
assert bob.rename_discussion(discussion_num=1, new_title="Another", **options).old_title == "A question"
assert bob.change_discussion_status(discussion_num=1, new_status="closed", **options).new_status == "closed"
assert fails(HfHubHTTPError, bob.change_discussion_status, discussion_num=2, new_status="closed", **options
    ).response.status_code == 403
found = lambda **filters: [d.num for d in api.get_repo_discussions(**options, **filters)]
assert found() == [2, 1]
assert found(discussion_type="pull_request") == [2] and found(discussion_type="discussion") == [1]
assert found(author="bob") == [1] and found(author="nobody") == []
assert found(discussion_status="open") == [2] and found(discussion_status="closed") == [1]
for number in range(51):
    api.create_discussion(title=f"number {number}", **options)
assert found() == list(range(53, 0, -1))
assert fails(HfHubHTTPError, api.get_discussion_details, discussion_num=99, **options).response.status_code == 404
fails(BadRequestError, api.create_discussion, title="x", **options)
""")
