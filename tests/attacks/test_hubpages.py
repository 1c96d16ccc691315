"""Attacks on the Hub's pages: who may write a repository, a comment or a name writes what others' browsers read."""

from __future__ import annotations

import base64
import hashlib
import html
import http.client
import json
import os
import re
import resource
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from dulwich.object_format import SHA1
from dulwich.objects import Blob, Commit, Tree
from dulwich.pack import write_pack_objects

from hfmerge.cli import main
from tests.hubserver.browser import browser
from tests.hubserver.harness import USERS, Answer, Hub, commit
from tests.hubserver.hostile import MARKDOWN, TEXTS, Checker, filled


pytestmark = pytest.mark.slow
BROWSER = {"Accept": "text/html,*/*;q=0.8"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    made = Hub(tmp_path_factory.mktemp("pages"))
    yield made
    made.close()


def _page(hub: Hub, path: str, *, user: str | None = None, status: int = 200) -> str:
    """A page as a browser gets it, checked for everything that could do something."""
    answer = hub.ask("GET", path, user=user, **BROWSER)
    assert answer.status == status, (path, answer.status, answer.body[:500])
    assert answer.headers["Content-Type"].startswith("text/html")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "base-uri 'none'" in policy
    assert "script-src" not in policy and "unsafe" not in policy
    text = answer.body.decode()
    assert Checker(text).faults == []
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", text)
    return text


def _lines(*lines: tuple[str, dict[str, Any]]) -> bytes:
    return b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in lines)


def _encoded(path: str, data: bytes) -> tuple[str, dict[str, Any]]:
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


def _send_large(hub: Hub, repo: str, path: str, data: bytes, *, user: str = "alice") -> str:
    """A large file into a repository; returns its id."""
    oid = hashlib.sha256(data).hexdigest()
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(data)}]}
    batch = hub.ask("POST", f"/{repo}.git/info/lfs/objects/batch", body, user=user).json()["objects"][0]
    href = batch["actions"]["upload"]["href"].removeprefix(hub.server.endpoint)
    assert hub.ask("PUT", href, data, user=None).status == 200
    lines = _lines(("header", {"summary": "large"}), ("lfsFile", {"path": path, "algo": "sha256", "oid": oid}))
    assert hub.ask("POST", f"/api/models/{repo}/commit/main", lines, user=user).status == 200
    return oid


def test_a_card_of_raw_html_and_running_addresses_is_text(hub: Hub) -> None:
    """A stranger's card holds scripts, event handlers, javascript: and data: links, frames and foreign pictures."""
    hub.ask("POST", "/api/repos/create", {"name": "card"})
    for payload in filled(MARKDOWN, hub.server.endpoint):
        assert commit(hub, "alice/card", {"README.md": f"# A card\n\n{payload}\n".encode()}).status == 200
        text = _page(hub, "/alice/card")
        assert "A card" in text
        assert "<img" not in text or 'src="/alice/card/resolve/main/' in text


def test_front_matter_is_text(hub: Hub) -> None:
    """A stranger's front matter holds markup in keys and values, and values that are lists and mappings of it."""
    hub.ask("POST", "/api/repos/create", {"name": "matter"})
    texts = filled(TEXTS, hub.server.endpoint)
    data = {"license": texts[0], "tags": texts, texts[1]: {"nested": texts}, "pretty_name": texts[4], "many": [texts]}
    for card in (f"---\n{json.dumps(data)}\n---\nbody\n", f"---\nlicense: {texts[0]}\nbroken: [\n---\nbody\n"):
        status = commit(hub, "alice/matter", {"README.md": card.encode()}).status
        if status == 200:  # a card that the Hub refuses cannot do harm either
            assert "owned" in _page(hub, "/alice/matter")
    assert status == 400


def test_names_of_files_and_messages_of_commits_are_text(hub: Hub) -> None:
    """A stranger names files, folders, branches and tags like markup, and writes markup into a commit message."""
    hub.ask("POST", "/api/repos/create", {"name": "names"})
    texts = [text.replace("/", "\u2044") for text in filled(TEXTS, hub.server.endpoint)]
    files = {f"{text}/{text}.txt": text.encode() for text in texts}
    made = commit(hub, "alice/names", files, summary=texts[1] + "\n" + texts[0], description="\n".join(texts))
    assert made.status == 200
    branch = quote('"><script>alert(1)<\u2044script>', safe="")
    assert hub.ask("POST", f"/api/models/alice/names/branch/{branch}", {}).status == 200
    assert hub.ask("POST", "/api/models/alice/names/tag/main", {"tag": "<img\u2044src=x>"}).status == 200
    folder = quote(texts[1], safe="")
    pages = ["", "/tree/main", f"/tree/main/{folder}", f"/blob/main/{folder}/{folder}.txt", "/commits/main"]
    pages += [f"/commit/{made.json()['commitOid']}", f"/tree/{branch}", f"/commits/{branch}"]
    for path in pages:
        assert "alert" in _page(hub, f"/alice/names{path}") or "owned" in _page(hub, f"/alice/names{path}"), path
    assert "&lt;img src=x onerror=" in _page(hub, "/alice/names/commits/main")
    for text in texts:
        _page(hub, f"/alice/names/tree/main/{quote(text)}-nowhere", status=404)
        _page(hub, f"/alice/names/tree/{quote(text, safe='')}", status=404)
        _page(hub, f"/?search={quote(text)}")


def test_discussions_are_text(hub: Hub) -> None:
    """Anybody with an account writes markup into titles, comments and commits of pull requests."""
    hub.ask("POST", "/api/repos/create", {"name": "talk"})
    for number, text in enumerate(filled(TEXTS + MARKDOWN, hub.server.endpoint), start=1):
        body = {"title": (text.strip() + " - - -")[:200], "description": text}
        made = hub.ask("POST", "/api/models/alice/talk/discussions", body, user="bob")
        if made.status != 200:
            body["title"] = "a title"
            made = hub.ask("POST", "/api/models/alice/talk/discussions", body, user="bob")
        assert made.json()["num"] == number
        hub.ask("POST", f"/api/models/alice/talk/discussions/{number}/title", {"title": text[:150]}, user="bob")
        _page(hub, f"/alice/talk/discussions/{number}")
    lines = _lines(("header", {"summary": TEXTS[0]}), _encoded("<b>x.html", b"<script>alert(1)</script>\n"))
    pull = hub.ask("POST", "/api/models/alice/talk/commit/main?create_pr=1", lines, user="bob").json()
    text = _page(hub, pull["pullRequestUrl"].removeprefix(hub.server.endpoint))
    assert "&lt;script&gt;alert(1)" in text and "&lt;b&gt;x.html" in text
    _page(hub, "/alice/talk/discussions")


def test_a_merge_history_is_a_claim(hub: Hub) -> None:
    """A stranger's merge_history holds markup, a thousand steps, deep nesting, and files that are no steps."""
    hub.ask("POST", "/api/repos/create", {"name": "history"})

    def step(name: str) -> bytes:
        models = [{"name": name, "commit": name}, {"name": "a/b", "commit": None}]
        action = {"type": name, "models": [name], "how": name}
        return json.dumps({"action": action, "materials": {"base": models[0], "models": models}}).encode()

    texts = filled(TEXTS, hub.server.endpoint)
    files = {f"merge_history/{number:04}.json": step(text) for number, text in enumerate(texts, start=1)}
    for number, data in enumerate((b"[" * 100_000, b'{"action": 1}', b"\xff", b"[]", b"NaN", step("x" * 5000)), 20):
        files[f"merge_history/{number:04}.json"] = data
    files["merge_history/0030.json"] = step("a/b").replace(b'"a/b"', b'{"a": ["b"]}')
    assert commit(hub, "alice/history", files).status == 200
    text = _page(hub, "/alice/history")
    assert "&lt;script&gt;document.title" in text and "0020.json" in text and "not a step" in text
    many = {f"merge_history/{number}.json": step(f"org/model-{number}") for number in range(100, 1100)}
    assert commit(hub, "alice/history", many).status == 200
    start = time.monotonic()
    text = _page(hub, "/alice/history")
    assert time.monotonic() - start < 5 and len(text) < 500_000 and "earlier steps are not shown" in text


def test_names_of_users_and_base_models_are_text(tmp_path: Path) -> None:
    """The server's users, or the models a card says it comes from, are called like markup."""
    with_markup = Hub(tmp_path)
    card = b"---\nbase_model: [a/b, 'c/d']\n---\n# x\n"
    with_markup.ask("POST", "/api/repos/create", {"name": "r"})
    commit(with_markup, "alice/r", {"README.md": card})
    assert "a/b" in _page(with_markup, "/alice/r")
    for name in ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "..%2f..%2fetc", "%00", "\u202e"):
        _page(with_markup, f"/{quote(name, safe='%')}", status=404)
    with_markup.close()


@pytest.mark.parametrize("name", ["page.html", "picture.svg", "page.xhtml", "script.js", "page.pdf.xml"])
def test_a_file_does_not_run_in_the_hubs_origin(hub: Hub, name: str) -> None:
    """A stranger stores a page or picture with a script and has a signed-in person open it from the Hub."""
    hub.ask("POST", "/api/repos/create", {"name": "files"})
    data = b"<html xmlns='http://www.w3.org/1999/xhtml'><script>alert(1)</script></html>"
    assert commit(hub, "alice/files", {name: data}).status == 200
    _send_large(hub, "alice/files", f"large-{name}", data + name.encode())
    for path in (f"resolve/main/{name}", f"raw/main/{name}", f"resolve/main/large-{name}"):
        for headers in ({}, {"Range": "bytes=0-20"}):
            answer = hub.ask("GET", f"/alice/files/{path}", user=None, **headers)
            kind = answer.headers["Content-Type"]
            assert kind.startswith(("text/plain", "application/octet-stream")), kind
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Content-Security-Policy"].startswith("sandbox;")
    _page(hub, f"/alice/files/blob/main/{name}")


def test_what_is_private_stays_private(hub: Hub) -> None:
    """Somebody without rights opens every page of a private and of a gated repository, and lists that name them."""
    for name, wish in (("private", {"visibility": "private"}), ("gated", {})):
        hub.ask("POST", "/api/repos/create", {"name": name, **wish})
        card = b"---\nbase_model: alice/open\n---\n# the secret word\n"
        history = {"merge_history/0001.json": b'{"the": "secret word"}'}
        assert commit(hub, f"alice/{name}", {"README.md": card, "a.txt": b"secret word", **history}).status == 200
        lines = _lines(("header", {"summary": "pull"}), _encoded("a.txt", b"secret word, changed"))
        hub.ask("POST", f"/api/models/alice/{name}/commit/main?create_pr=1", lines)
    hub.ask("POST", "/api/repos/create", {"name": "open"})
    assert hub.ask("PUT", "/api/models/alice/gated/settings", {"gated": "manual"}).status == 200
    pages = ("", "/tree/main", "/blob/main/a.txt", "/commits/main", "/commit/main", "/discussions", "/discussions/1")
    for user in (None, "bob"):
        for path in pages:
            text = _page(hub, f"/alice/private{path}", user=user, status=404)
            assert text == _page(hub, f"/alice/nothing{path}", user=user, status=404)
            answer = hub.ask("GET", f"/alice/gated{path}", user=user, **BROWSER)
            assert b"secret word" not in answer.body, path
        for path in ("/blob/main/a.txt", "/commit/main"):
            _page(hub, f"/alice/gated{path}", user=user, status=401 if user is None else 403)
        for path in ("/", "/models", "/alice", "/?search=private", "/alice/open"):
            assert "private<" not in _page(hub, path, user=user)
    for path in pages:
        _page(hub, f"/alice/private{path}", user="alice")
    for path in ("", "/blob/main/a.txt", "/commit/main", "/discussions/1"):
        assert "secret word" in _page(hub, f"/alice/gated{path}", user="alice")
    assert "alice/private" in _page(hub, "/alice/open", user="alice")


def test_a_pointer_written_by_hand_opens_nothing(hub: Hub) -> None:
    """Somebody who knows the id of another's private object writes its pointer into a file of a public repository."""
    hub.ask("POST", "/api/repos/create", {"name": "vault", "visibility": "private"})
    words = b"# the private words\n" * 3000
    oid = _send_large(hub, "alice/vault", "big.txt", words)
    hub.ask("POST", "/api/repos/create", {"name": "thief"}, user="bob")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(words)}\n".encode()
    files = {name: pointer for name in ("README.md", "big.txt", "merge_history/0001.json")}
    commit(hub, "bob/thief", files, user="bob")
    for path in ("", "/blob/main/README.md", "/blob/main/big.txt", "/commit/main", "/tree/main"):
        answer = hub.ask("GET", f"/bob/thief{path}", user="bob", **BROWSER)
        assert answer.status == 200 and b"private words" not in answer.body, path
    assert b"private words" in hub.ask("GET", "/alice/vault/blob/main/big.txt", **BROWSER).body


def test_a_page_of_another_site_changes_nothing(hub: Hub) -> None:
    """Another site's page has a browser that is signed in send a form; browsers add name and token by themselves."""
    basic = "Basic " + base64.b64encode(f"alice:{USERS['alice']}".encode()).decode()

    def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        return hub.ask(method, path, body, user=None, Authorization=basic, **headers)

    signed_in = ask("GET", "/login", **BROWSER)
    assert signed_in.status == 303 and signed_in.headers["Location"] == "/"
    asked = hub.ask("GET", "/login", user=None, **BROWSER)
    assert asked.status == 401 and asked.headers["WWW-Authenticate"].startswith("Basic")
    body = json.dumps({"name": "forged"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json"):
        assert ask("POST", "/api/repos/create", body, Content_Type=kind).status == 401
    assert ask("DELETE", "/api/repos/delete", body).status == 401
    assert hub.ask("GET", "/api/models/alice/forged").status == 404
    wrong = "Basic " + base64.b64encode(b"alice:hf_guess").decode()
    answer = hub.ask("GET", "/", user=None, Authorization=wrong, **BROWSER)
    assert answer.status == 401 and answer.headers["WWW-Authenticate"].startswith("Basic")


def test_hostile_texts_cost_little_time(hub: Hub) -> None:
    """A stranger writes a card, or two versions of a file, on which a parser or a comparison works for minutes."""
    hub.ask("POST", "/api/repos/create", {"name": "slow"})
    size = 250_000
    cards = ["[" * size, "![" * (size // 2), "*a " * (size // 3), "> " * (size // 2), "`" * size, "- " * (size // 2)]
    cards += [
        "[a](" * (size // 4),
        "<!--" * (size // 4),
        "|" * size,
        "a|b\n-|-\n" + "|\n" * (size // 2),
        "_*" * (size // 2),
    ]
    cards += ["[a]: /x\n" * (size // 8), "&" * size, "\\" * size, "<a" * (size // 2), "a\n" * (size // 2)]
    for card in cards:
        commit(hub, "alice/slow", {"README.md": card.encode()})
        start = time.monotonic()
        _page(hub, "/alice/slow")
        assert time.monotonic() - start < 10, card[:20]
    one = "".join(f"{number % 7}\n{number % 11}\n" for number in range(20_000))
    other = "".join(f"{number % 11}\n{number % 5}\n" for number in range(20_000))
    commit(hub, "alice/slow", {f"{n}.txt": one.encode() for n in range(30)})
    commit(hub, "alice/slow", {f"{n}.txt": other.encode() for n in range(30)})
    start = time.monotonic()
    _page(hub, "/alice/slow/commit/main")
    assert time.monotonic() - start < 10


def test_a_browser_runs_nothing_of_a_hostile_repository(hub: Hub, tmp_path: Path) -> None:
    """A person opens a hostile card, commit and discussion in a real browser."""
    chrome = browser(tmp_path)
    hub.ask("POST", "/api/repos/create", {"name": "hostile"})
    endpoint = hub.server.endpoint
    card = "---\nlicense: \"<script>document.title='owned'</script>\"\n---\n# The card itself\n\n"
    card += "\n\n".join(filled(MARKDOWN, endpoint)) + "\n\n# The end of the card\n"
    names = {f"{text.replace('/', '')}.txt": text.encode() for text in filled(TEXTS, endpoint)}
    svg = f"<svg xmlns='http://www.w3.org/2000/svg'><script>fetch('{endpoint}/canary/file')</script></svg>".encode()
    files = {"README.md": card.encode(), "a.svg": svg, "a.html": svg, **names}
    assert commit(hub, "alice/hostile", files, summary=TEXTS[1]).status == 200
    body = {"title": TEXTS[1], "description": "\n\n".join(filled(MARKDOWN, endpoint))}
    hub.ask("POST", "/api/models/alice/hostile/discussions", body)
    for path in ("", "/discussions/1", "/resolve/main/a.html"):
        text = chrome.dom(f"{endpoint}/alice/hostile{path}")
        title = re.search("<title>(.*?)</title>", text)
        assert title is None or title[1] in ("alice/hostile", f"alice/hostile: {html.escape(TEXTS[1], quote=False)}")
        assert ("The end of the card" in text) == (path == "")
    asked = [record["path"] for record in hub.log()]
    assert not [path for path in asked if path.startswith("/canary")]
    assert "/_pages/static/hub.css" in asked


def test_a_browser_would_ask_the_canary(hub: Hub, tmp_path: Path) -> None:
    """The same words as a page of their own do run: the test above can fail."""
    chrome = browser(tmp_path)
    page = tmp_path / "page.html"
    page.write_text("".join(filled(MARKDOWN[:3], hub.server.endpoint)))
    assert "owned" in chrome.dom(page.as_uri())
    assert [record for record in hub.log() if record["path"].startswith("/canary/")]


def _bundle(folder: Path, entries: list[tuple[bytes, int, bytes]], **changes: Any) -> Path:
    """An export as somebody else's program might write it: a tree of any names and modes, and any manifest."""
    folder.mkdir()
    tree, objects = Tree(), []
    for name, mode, data in entries:
        blob = Blob.from_string(data)
        objects.append(blob)
        tree.add(name, mode, blob.id)
    made = Commit()
    made.tree, made.parents, made.message = tree.id, [], b"x"
    made.author = made.committer = b"x <x@x>"
    made.author_time = made.commit_time = made.author_timezone = made.commit_timezone = 0
    with (folder / "repository.bundle").open("wb") as file:
        file.write(b"# v2 git bundle\n" + made.id + b" refs/heads/main\n\n")
        write_pack_objects(file.write, [*objects, tree, made], object_format=SHA1)
    manifest = {"format": "hfmerge/hub-export/1", "kind": "model", "id": "me/taken", "private": False, "gated": None}
    manifest |= {"refs": {"refs/heads/main": made.id.decode()}, "objects": [], **changes}
    (folder / "repository.json").write_text(json.dumps(manifest))
    return folder


def _import(folder: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["hub", "import", str(folder), "--store", str(store)])
    return code, "".join(capsys.readouterr())


def test_an_export_of_a_stranger_is_checked_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger's export holds paths that leave it, links, foreign objects, wrong digests, broken references."""
    store, file = tmp_path / "store", 0o100644
    good = _bundle(tmp_path / "good", [(b"a.txt", file, b"a")])
    assert _import(good, store, capsys)[0] == 0
    secret = tmp_path / "secret"
    secret.write_bytes(b"the user's own")
    oid = hashlib.sha256(b"the user's own").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 14\n".encode()
    main_ref = json.loads((good / "repository.json").read_text())["refs"]["refs/heads/main"]
    entries: list[list[tuple[bytes, int, bytes]]] = [
        [(b"..", file, b"x")],
        [(b".git", file, b"x")],
        [(b"a\\b", file, b"x")],
        [(b"a\nb", file, b"x")],
        [(b"\xff", file, b"x")],
        [(b"link", 0o120000, b"/etc/passwd")],
        [(b"module", 0o160000, b"x")],
        [(b"folder", 0o40000, b"not a tree")],
    ]
    for number, made in enumerate(entries):
        code, said = _import(_bundle(tmp_path / f"tree-{number}", made, id=f"me/t{number}"), store, capsys)
        assert code == 1 and said.startswith("error: ") and said.count("\n") == 1, (number, said)
    changes: list[dict[str, Any]] = [
        {"refs": {"refs/heads/main": "1" * 40}},
        {"refs": {"refs/heads/../../x": main_ref, "refs/heads/main": main_ref}},
        {"refs": {"refs/heads/main": main_ref, "refs/pr/1": main_ref}},
        {"refs": {"HEAD": main_ref}},
        {"refs": [1]},
        {"id": "../../x"},
        {"id": "a/b/c"},
        {"kind": "space"},
        {"format": "other"},
        {"objects": ["../../secret"]},
        {"objects": [oid]},
        {"objects": {"a": 1}},
        {"private": "no"},
        {"gated": []},
    ]
    for number, change in enumerate(changes):
        folder = _bundle(
            tmp_path / f"manifest-{number}", [(b"a.txt", file, b"a")], **{"id": f"me/m{number}", **change}
        )
        code, said = _import(folder, store, capsys)
        assert code == 1 and said.startswith("error: ") and said.count("\n") == 1, (change, said)
    for number, how in enumerate(("missing", "link", "other", "folder", "pipe")):
        folder = _bundle(tmp_path / f"large-{number}", [(b"b", file, pointer)], id=f"me/l{number}", objects=[oid])
        place = folder / "lfs" / "objects" / oid[:2] / oid[2:4] / oid
        place.parent.mkdir(parents=True)
        if how == "link":
            place.symlink_to(secret)
        elif how == "other":
            place.write_bytes(b"the user's 0wn")
        elif how == "folder":
            place.mkdir()
        elif how == "pipe":
            os.mkfifo(place)
        code, said = _import(folder, store, capsys)
        assert code == 1 and said.startswith("error: "), (how, said)
    (good / "repository.json").write_text("[" * 100_000)
    assert _import(good, store, capsys)[0] == 1
    assert main(["hub", "fsck", "--store", str(store)]) == 0  # nothing of all that was left
    assert len(list((store / "repos").iterdir())) == 1


def test_a_bundle_that_unpacks_to_more_than_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger's bundle of a few kilobytes unpacks to gigabytes, or says so, or is cut off anywhere."""
    store = tmp_path / "store"
    folder = _bundle(tmp_path / "bomb", [(b"a.txt", 0o100644, b"a" * 1000)])
    whole = (folder / "repository.bundle").read_bytes()
    head, mark, pack = whole.partition(b"\n\n")

    def tried(data: bytes) -> tuple[int, str]:
        (folder / "repository.bundle").write_bytes(head + mark + data)
        start = time.monotonic()
        result = _import(folder, store, capsys)
        assert time.monotonic() - start < 10
        return result

    def size(count: int) -> bytes:
        text, count = [0x30 | count & 15], count >> 4
        while count:
            text[-1] |= 0x80
            text.append(count & 0x7F)
            count >>= 7
        return bytes(text)

    zeros = zlib.compress(b"\0" * (50 << 20), 9)
    count = b"PACK\0\0\0\2\0\0\0\1"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data, words in (
        (count + size(10) + zeros, "longer than announced"),
        (count + size(50 << 20) + zeros[:-100], "ends early"),
        (count + size(3 << 30) + zeros, "the limit is"),
        (count + b"\xb0" + b"\x80" * 20 + zeros, "a size that is none"),
        (b"PACK\0\0\0\2\xff\xff\xff\xff" + size(1) + zlib.compress(b"x"), "ends early"),
        (b"nothing", "not a pack"),
    ):
        code, said = tried(data)
        assert code == 1 and words in said, said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    for end in range(0, len(pack), 29):
        assert tried(pack[:end])[0] == 1
    for place in range(0, len(pack), 23):
        code, said = tried(pack[:place] + bytes([pack[place] ^ 0x55]) + pack[place + 1 :])
        assert code == 1 and said.startswith("error: ") and said.count("\n") == 1, said
    assert tried(pack)[0] == 0


def test_an_import_follows_no_link_out_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder or a cache from a stranger holds links to the user's own files, and pipes that never end."""
    (tmp_path / "key").write_text("the user's own")
    for number, make in enumerate(("notes.txt", "snapshot", "pipe")):
        folder = tmp_path / f"folder-{number}"
        if make == "snapshot":
            folder = tmp_path / "cache" / "models--a--b"
            (folder / "snapshots" / ("1" * 40)).mkdir(parents=True)
            (folder / "snapshots" / ("1" * 40) / "config.json").symlink_to(tmp_path / "key")
        else:
            folder.mkdir()
            (folder / "notes.txt").symlink_to("../key") if make == "notes.txt" else os.mkfifo(folder / "pipe")
        code = main(["hub", "import", str(folder), "--as", "me/x", "--store", str(tmp_path / "store")])
        said = capsys.readouterr().err
        assert code == 1 and ("leads out of" in said or "not a regular file" in said), said
    assert main(["hub", "fsck", "--store", str(tmp_path / "store")]) == 0


def test_a_half_sent_request_is_no_fault(hub: Hub) -> None:
    """Somebody sends addresses that no browser would: they are refused, and the server goes on."""
    connection = http.client.HTTPConnection(hub.server.endpoint.removeprefix("http://"), timeout=10)
    for path in (
        "//evil.example/x",
        "/%ff%fe",
        "/a/%00",
        "/a/b/blob/main/%2e%2e/%2e%2e",
        "/" + "a" * 3000,
        "/a/b/tree/%",
    ):
        connection.request("GET", path, headers=BROWSER)
        answer = connection.getresponse()
        assert 400 <= answer.status < 500 and Checker(answer.read().decode()).faults == []
        assert "Location" not in answer.headers
    connection.close()
