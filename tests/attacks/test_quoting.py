"""Attacks by text: names, labels, licences and messages of strangers that would act as markup or as lines of ours."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.ledger.card import BEGIN, END, render_card
from hfmerge.ledger.entry import Entry
from tests.fixtures import tiny


IMAGE = "<img src=x onerror=alert(1)>"
HOSTILE = {
    "image": f"mit {IMAGE}",
    "script": "</td><script>alert(1)</script>",
    "heading": "mit\n\n# Verified by Hugging Face\n\n",
    "link": "[click](javascript:alert(1))",
    "picture": "![](https://evil.example/pixel.png)",
    "cell": "mit | safe | <b>x</b>",
    "code": "mit` <b>x</b> `",
    "fence": "mit\n```\n# Verified by Hugging Face\n<b>x</b>\n```",
    "marker": f"mit {END}\n# Verified by Hugging Face",
    "autolink": "see https://evil.example or www.evil.example",
    "terminal": "mit\x1b[2K\x1b[1Aok   everything\x1b]0;title\x07",
    "line": "mit\nok   files: all verified",
    "return": "mit\rok   files: all verified",
    "next line": "mit\x85ok   files: all verified\u2028ok",
    "direction": "mit \u202e elif",
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of an encoder and a fine-tune with a head."""
    root = tmp_path_factory.mktemp("quoting")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 1, ["no", "yes"]), root / "m0")
    for number in (1, 2):
        tiny.save(tiny.fine_tune(base, number + 1), root / f"m{number}")
    tiny.done("merge", root / "m0", root / "m1", "--base", root / "base", "--method", "opcm", "--output", root / "out")
    return root


def forged(folder: Path, **changes: Any) -> Entry:
    """The merge's last entry with other texts in the places that are free text."""
    data = json.loads((folder / "merge_history" / "0001.json").read_bytes())
    model = data["materials"]["models"][0]
    model |= {key: changes[key] for key in ("license", "labels") if key in changes}
    data["action"]["how"] = changes.get("how", data["action"]["how"])
    return Entry.from_bytes(canonical_json(data), "forged")


def one_line_each(run: tiny.Run) -> None:
    """Nothing that a terminal obeys, and no line of theirs."""
    for line in (run.out + run.err).split("\n"):
        assert line.isprintable(), line
        assert not line.startswith("ok   files: all verified")


def harmless(card: str) -> None:
    """Nothing but our own markup: no tag, no heading, link or picture of theirs, one marker at either end."""
    body = card[card.index(BEGIN) + len(BEGIN) : card.rindex(END)]
    assert END not in body and "<!--" not in body
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"<[a-z/!]", outside, re.IGNORECASE), outside
    assert "# Verified" not in re.findall("^#.*", outside, re.MULTILINE)
    assert [line for line in outside.split("\n") if line.startswith("# ")] == ["# Merged model"]
    assert not re.search(r"(?<!\\)\]\((javascript:|https://evil)", outside)
    assert not re.search(r"(?<!\\)://evil|www\.evil", outside)
    assert all(c.isprintable() or c == "\n" for c in card)
    columns = [line.count("|") - line.count("\\|") for line in outside.split("\n") if line.startswith("|")]
    assert set(columns) <= {3, 6, 7, 8}, columns


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_markup_from_a_ledger_stays_text_in_the_card(merged: Path, text: str) -> None:
    """Somebody's ledger says in markup how it was computed, and gives licences and labels that are markup."""
    entry = forged(merged / "out", how=text, labels=[text, "yes"], license=text)
    facts = {"library_name": None, "architecture": None, **entry.settings["card"], "repo_id": None}
    harmless(render_card([entry], facts))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_markup_from_a_source_stays_text_in_what_is_published(merged: Path, tmp_path: Path, text: str) -> None:
    """A model's own card states a licence, and its configuration labels, that are markup; its user merges it."""
    root = merged
    model = tmp_path / "m2"
    model.mkdir()
    for name in ("model.safetensors", "config.json"):
        (model / name).write_bytes((root / "m0" / name).read_bytes())
    tiny.edit_config(model, id2label={"0": text, "1": "yes"}, label2id={text: 0, "yes": 1})
    front = json.dumps({"license": text})  # JSON is YAML
    (model / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
    out = tmp_path / "out"
    run = tiny.done("merge", model, "--base", root / "base", "--method", "opcm", "--output", out)
    harmless((out / "README.md").read_text(encoding="utf-8"))
    note = (out / "LICENSE.md").read_text(encoding="utf-8")
    assert not re.search(r"<[a-z/!]", note, re.IGNORECASE)
    assert re.findall("^#.*", note, re.MULTILINE) == ["# Licences of the merged models"]
    assert all(c.isprintable() or c == "\n" for c in note + run.out + run.err)
    assert tiny.cli("verify", out).code == 0


PLACES: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "how": lambda entry, text: entry["action"].update(how=text),
    "kind of a model": lambda entry, text: entry["materials"]["models"][0].update(kind=text),
    "name of a model": lambda entry, text: entry["materials"]["models"][0].update(name=text),
    "name of the base": lambda entry, text: entry["materials"]["base"].update(name=text),
    "setting": lambda entry, text: entry["settings"].update(norm=text),
    "product": lambda entry, text: entry["products"].update({text: "0" * 64}),
}
"""Texts of a ledger that some command prints, or names in the error that refuses them."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", [HOSTILE["terminal"], HOSTILE["line"], HOSTILE["return"]], ids=["esc", "lf", "cr"])
def test_a_ledger_prints_no_line_of_its_own(merged: Path, tmp_path: Path, place: str, text: str) -> None:
    """A ledger carries escape sequences and line breaks, to overwrite what the terminal shows or to add a line."""
    out = Path(shutil.copytree(merged / "out", tmp_path / "out"))
    path = out / "merge_history" / "0001.json"
    entry = json.loads(path.read_bytes())
    PLACES[place](entry, text)
    path.write_bytes(canonical_json(entry))
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(re.sub(r"sha256: \w+", f"sha256: {sha256_bytes(path.read_bytes())}", card))
    for command in (
        ("history", out),
        ("history", out, "--graph"),
        ("verify", out),
        ("diff", out, merged / "out"),
        ("add", out, merged / "m2", "--output", tmp_path / "new"),
    ):
        one_line_each(tiny.cli(*command))


@pytest.mark.parametrize("verb", ["merge", "history", "verify"])
def test_names_from_folders_and_errors_are_one_line(merged: Path, tmp_path: Path, verb: str) -> None:
    """A folder's name has a line break and an escape sequence, and is named in an error."""
    folder = tmp_path / "no\nok   files: all verified\x1b[1A"
    folder.mkdir()
    more = ("--base", merged / "base", "--method", "opcm", "--output", tmp_path / "x") if verb == "merge" else ()
    run = tiny.cli(verb, folder, *more)
    assert run.code == 1
    one_line_each(run)


def test_json_stays_json(merged: Path) -> None:
    """A delete character, which JSON allows as it is, must not break what machines read."""
    from hfmerge.cli.shared import print_json

    run = tiny.cli("history", merged / "out", "--json")
    assert run.json["entries"]
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_json({"name": "a\x7fb\x1b\n"})
    assert json.loads(out.getvalue()) == {"name": "a\x7fb\x1b\n"}


def test_everything_is_printed_through_one_function() -> None:
    """What prints past `validation.quoting.say` would print a stranger's text as it is."""
    package = Path(__file__).parents[2] / "hfmerge"
    allowed = {"quoting.py", "hashing.py"}
    for path in package.rglob("*.py"):
        if path.name in allowed or "hubserver" in path.parts:
            continue
        text = path.read_text()
        assert not re.search(r"(?<![\w.])print\(|std(out|err)\.write\(", text), path
