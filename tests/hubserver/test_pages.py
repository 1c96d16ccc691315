"""The Hub's pages: every address that clients print opens, and shows what is there."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hfmerge.hubserver.serve import main_serve
from tests.hubserver.browser import browser
from tests.hubserver.harness import Client, Hub, commit
from tests.hubserver.hostile import Checker


pytestmark = pytest.mark.slow
CARD = b"""---
license: apache-2.0
base_model:
- acme/base
- elsewhere/other
tags: [merge]
---
# The card

Some *words*, a [file](config.json), a [site](https://example.org/x), ![a chart](charts/a.png).

<!-- a mark
for programs -->

| a | b |
|---|---|
| 1 | `2` |
"""


def step(number: int, action: str, models: list[str]) -> bytes:
    named = [{"name": name, "commit": f"{index}" * 40} for index, name in enumerate(models, start=1)]
    materials = {"base": {"name": "acme/base", "commit": "0" * 40}, "models": named}
    return json.dumps(
        {"step": number, "action": {"type": action, "models": models[-1:], "how": "told"}, "materials": materials}
    ).encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server with a merge, its base, a data set and a pull request."""
    made = Hub(tmp_path_factory.mktemp("pages"))
    for name, kind in (("base", "model"), ("merge", "model"), ("rows", "dataset")):
        made.ask("POST", "/api/repos/create", {"name": name, "organization": "acme", "type": kind})
    commit(made, "acme/merge", {"README.md": CARD, "config.json": b'{\n "a": 1,\n "b": 2\n}\n'}, summary="First words")
    steps = {"merge_history/0001.json": step(1, "merge", ["a/one", "b/two"])}
    steps["merge_history/0002.json"] = step(2, "unmerge", ["a/one"])
    steps["merge_history/0003.json"] = step(3, "add", ["a/one", "c/three"])
    commit(
        made, "acme/merge", {**steps, "config.json": b'{\n "a": 1,\n "b": 3\n}\n'}, summary="A step", description="Why"
    )
    made.ask("POST", "/api/models/acme/merge/branch/merge-state", {})
    made.ask("POST", "/api/models/acme/merge/tag/main", {"tag": "v1.0"})
    yield made
    made.close()


def page(hub: Hub, path: str, *, user: str | None = None) -> str:
    answer = hub.ask("GET", path, user=user)
    assert answer.status == 200, (path, answer.body)
    text = answer.body.decode()
    assert Checker(text).faults == []
    return text


def test_a_repository(hub: Hub) -> None:
    text = page(hub, "/acme/merge")
    for words in ("The card", "<em>words</em>", "apache-2.0", "config.json", "A step", "merge-state", "v1.0", "21 B"):
        assert words in text, words
    assert '<a href="/acme/merge/blob/main/config.json">file</a>' in text
    assert '<a href="https://example.org/x" rel="nofollow noopener noreferrer">site</a>' in text
    assert '<img src="/acme/merge/resolve/main/charts/a.png" alt="a chart" loading="lazy">' in text
    assert "for programs" not in text and "<td><code>2</code></td>" in text
    assert f"git clone {hub.server.endpoint}/acme/merge" in text
    data = page(hub, "/datasets/acme/rows")
    assert f"git clone {hub.server.endpoint}/datasets/acme/rows" in data and "Model tree" not in data


def test_the_model_tree_goes_both_ways(hub: Hub) -> None:
    text = page(hub, "/acme/merge")
    assert '<a href="/acme/base"><bdi>acme/base</bdi></a>' in text and "elsewhere/other</bdi> <span" in text
    assert '<a href="/acme/merge"><bdi>acme/merge</bdi></a>' in page(hub, "/acme/base")


def test_the_merge_history_is_drawn(hub: Hub) -> None:
    text = page(hub, "/acme/merge")
    assert text.count('class="joined"') == 3 and text.count('class="left" cx') == 1
    assert "a/one@11111111" in text and "b/two@22222222" in text and "c/three@22222222" in text
    assert "This page does not check them" in text and "<svg" not in page(hub, "/acme/base")


def test_files_commits_and_differences(hub: Hub) -> None:
    folder = page(hub, "/acme/merge/tree/main/merge_history")
    assert folder.index("0001.json") < folder.index("0003.json")
    assert "&#34;b&#34;: 3" in page(hub, "/acme/merge/blob/main/config.json")
    listed = page(hub, "/acme/merge/commits/main")
    assert listed.index("A step") < listed.index("First words") < listed.index("initial commit")
    oids = [item["id"] for item in hub.ask("GET", "/api/models/acme/merge/commits/main").json()]
    changed = page(hub, f"/acme/merge/commit/{oids[0]}")
    assert '<td class="sign">-</td><td><code> &#34;b&#34;: 2</code>' in changed and "Why" in changed
    assert '<td class="sign">+</td><td><code> &#34;b&#34;: 3</code>' in changed and "0002.json" in changed
    assert "initial commit" in page(hub, f"/acme/merge/commit/{oids[-1]}")
    for revision in ("v1.0", "refs/heads/merge-state", "refs%2Fheads%2Fmerge-state", oids[1][:8]):
        assert "config.json" in page(hub, f"/acme/merge/tree/{revision}")
    for path in (
        "/tree/none",
        "/tree/main/none",
        "/blob/main/none",
        "/blob/main/merge_history",
        "/commit/" + "0" * 40,
    ):
        assert hub.ask("GET", f"/acme/merge{path}").status == 404


def test_what_is_not_a_text_is_offered_for_download(hub: Hub) -> None:
    hub.ask("POST", "/api/repos/create", {"name": "binary"})
    commit(hub, "alice/binary", {"b.dat": b"\0\1", "long.txt": b"a" * 600_000, "odd.txt": b"\xff\xfe"})
    for name, words in (("b.dat", "not a text"), ("odd.txt", "not a text"), ("long.txt", "too long")):
        text = page(hub, f"/alice/binary/blob/main/{name}")
        assert words in text and f'href="/alice/binary/resolve/main/{name}" download' in text


def test_lists_search_and_pages(hub: Hub) -> None:
    text = page(hub, "/")
    assert "acme/merge" in text and "/datasets/acme/rows" in text
    assert "acme/rows" not in page(hub, "/models") and "acme/merge" not in page(hub, "/datasets")
    found = page(hub, "/?search=MERG")
    assert "acme/merge" in found and "acme/base" not in found and 'value="MERG"' in found
    organisation = page(hub, "/acme")
    assert "acme/merge" in organisation and "acme/rows" in organisation and ">alice<" in organisation
    assert "None." in page(hub, "/carol") and hub.ask("GET", "/nobody").status == 404
    for number in range(32):
        hub.ask("POST", "/api/repos/create", {"name": f"many-{number:02}"}, user="bob")
    first, second = page(hub, "/?search=many"), page(hub, "/?search=many&p=1")
    assert first.count("bob/many-") == 60 and second.count("bob/many-") == 4
    assert 'href="?search=many&amp;p=1"' in first and 'href="?search=many&amp;p=0"' in second


def test_discussions_and_pull_requests(hub: Hub) -> None:
    body = {"title": "A question", "description": "Is it *so*?"}
    hub.ask("POST", "/api/models/acme/merge/discussions", body, user="bob")
    hub.ask("POST", "/api/models/acme/merge/discussions/1/comment", {"comment": "Yes."})
    hub.ask("POST", "/api/models/acme/merge/discussions/1/title", {"title": "Another title"}, user="bob")
    hub.ask("POST", "/api/models/acme/merge/discussions/1/status", {"status": "closed"})
    text = page(hub, "/acme/merge/discussions/1")
    for words in ("Is it <em>so</em>?", "Yes.", "from “A question” to “Another title”", "set the status to closed"):
        assert words in text
    lines = [{"key": "header", "value": {"summary": "Better"}}]
    content = base64.b64encode(b'{\n "a": 1,\n "b": 4\n}\n').decode()
    lines.append({"key": "file", "value": {"path": "config.json", "content": content, "encoding": "base64"}})
    made = hub.ask(
        "POST", "/api/models/acme/merge/commit/main?create_pr=1", b"\n".join(json.dumps(x).encode() for x in lines)
    ).json()
    path = made["pullRequestUrl"].removeprefix(hub.server.endpoint)
    change = '<td class="sign">+</td><td><code> &#34;b&#34;: 4</code>'
    assert change in page(hub, path)
    assert "Another title" in page(hub, "/acme/merge/discussions") and "pull request" in page(hub, path)
    assert hub.ask("POST", f"/api/models/acme/merge/discussions/{path.rpartition('/')[2]}/merge", {}).status == 200
    assert change in page(hub, path) and "merged" in page(hub, path)
    assert hub.ask("GET", "/acme/merge/discussions/99").status == 404


def test_addresses_that_the_client_prints_open(hub: Hub, tmp_path: Path) -> None:
    client = Client(hub.server, tmp_path / "home")
    urls = client.run("""
url = api.create_repo("alice/printed")
commit = api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="alice/printed")
pull = api.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id="alice/printed", create_pr=True)
data = api.create_repo("alice/printed-rows", repo_type="dataset")
result = [str(url), commit.commit_url, str(commit), pull.pr_url, str(data)]
""")
    client.close()
    for url in urls:
        assert url.startswith(hub.server.endpoint) and page(hub, url.removeprefix(hub.server.endpoint))


def test_who_asks_decides_on_the_form_of_an_error(hub: Hub) -> None:
    as_program = hub.ask("GET", "/acme/none")
    assert as_program.json() == {"error": "Repository not found"} and as_program.status == 404
    as_person = hub.ask("GET", "/acme/none", Accept="text/html")
    assert as_person.status == 404 and "<h1>404</h1>" in as_person.body.decode()
    assert as_person.headers["X-Error-Code"] == "RepoNotFound"
    for path in ("/api/models/acme/none", "/api/nonsense", "/cas/a/b", "/_signed/object/x"):
        assert b"<html" not in hub.ask("GET", path, Accept="text/html").body
    assert hub.ask("GET", "/spaces/acme/x").status == 501
    moved = hub.ask("POST", "/api/repos/move", {"fromRepo": "acme/base", "toRepo": "acme/base-2", "type": "model"})
    assert moved.status == 200
    assert hub.ask("GET", "/acme/base/tree/main", Accept="text/html").headers["Location"] == "/acme/base-2/tree/main"
    hub.ask("POST", "/api/repos/move", {"fromRepo": "acme/base-2", "toRepo": "acme/base", "type": "model"})


def test_pictures_of_a_card_are_shown(hub: Hub, tmp_path: Path) -> None:
    png = bytes.fromhex("89504e470d0a1a0a0000000d49484452") + b"\0" * 20
    hub.ask("POST", "/api/repos/create", {"name": "pictures"})
    client = Client(hub.server, tmp_path / "home")
    client.run(
        "api.upload_file(path_or_fileobj=data.encode('latin-1'), path_in_repo='a.png', repo_id='alice/pictures')",
        data=png.decode("latin-1"),
    )
    client.close()
    answer = hub.ask("GET", "/alice/pictures/resolve/main/a.png", user=None)
    assert answer.headers["Content-Type"] == "image/png" and answer.body == png
    assert answer.headers["Content-Security-Policy"].startswith("sandbox")


def test_a_browser_shows_the_pages(hub: Hub, tmp_path: Path) -> None:
    chrome = browser(tmp_path)
    text = chrome.dom(f"{hub.server.endpoint}/acme/merge")
    for words in ("The card", "apache-2.0", "Merge history", "c/three", "Model tree"):
        assert words in text
    assert "acme/merge" in chrome.dom(f"{hub.server.endpoint}/acme")
    assert "/_pages/static/hub.css" in [record["path"] for record in hub.log()]


def test_serve_prints_the_address_of_the_pages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main_serve(["--help"])
    assert "pages" in capsys.readouterr().out
