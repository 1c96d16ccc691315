"""The ledger: what it records, what `verify` catches, what people may write, and folders that move or change."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import hfmerge
from hfmerge.errors import LedgerError
from hfmerge.hashing import sha256_bytes, sha256_file
from hfmerge.ledger.card import BEGIN, END, card_differs, card_facts, present_site, render_card
from hfmerge.ledger.entry import check_chain
from hfmerge.ledger.repository import open_merged
from tests.fixtures import tiny


MODELS = ("m0", "m1", "m2")
HEADED = "headed"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    for i, name in enumerate(MODELS, 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 7, ["a", "b", "c"]), root / HEADED)
    return root


def merge(root: Path, out: Path, *models: str, flags: tuple[str, ...] = ()) -> Path:
    folders = [root / model for model in models or MODELS]
    tiny.done("merge", *folders, "--base", root / "base", "--method", "opcm", "--output", out, *flags)
    return out


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of two models, one with a head, to which a third was added; all states kept."""
    out = tmp_path_factory.mktemp("made") / "merged"
    merge(root, out, "m0", HEADED, flags=("--state", "all"))
    tiny.done("add", out, root / "m1")
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the merge to spoil."""
    return Path(shutil.copytree(made, tmp_path / "merged"))


def entries(out: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_bytes()) for path in sorted((out / "merge_history").iterdir())]


def culprits(out: Path) -> list[str]:
    run = tiny.cli("verify", out)
    assert run.code == 1 and "NOT what its ledger says" in run.out and not run.err
    return [line.removeprefix("FAIL ") for line in run.out.splitlines() if line.startswith("FAIL ")]


def flip(path: Path, at: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def test_entries_name_their_parents_and_everything_that_went_in(root: Path, out: Path) -> None:
    first, second = (out / "merge_history" / f"000{i}.json" for i in (1, 2))
    records = entries(out)
    assert records[0]["parent"] is None and records[1]["parent"] == sha256_file(first)
    assert [record["action"]["type"] for record in records] == ["merge", "add"]  # type: ignore[index]
    assert records[1]["action"]["models"] == ["m1"]  # type: ignore[index]
    models = records[1]["materials"]["models"]  # type: ignore[index]
    assert [model["name"] for model in models] == ["m0", HEADED, "m1"]
    for model in models:
        assert model["files"] == {
            name: sha256_file(root / model["name"] / name) for name in ("config.json", "model.safetensors")
        }
    products = records[1]["products"]
    assert isinstance(products, dict)
    assert products == {name: sha256_file(out / name) for name in products}
    assert set(products) == {path for path in tiny.files(out, states=False)}
    norm = sum(
        float((tiny.tensors(root / "m1")[key].double() - value.double()).pow(2).sum())
        for key, value in tiny.tensors(root / "base").items()
    )
    assert models[2]["squared_norm"] == pytest.approx(norm, rel=1e-6)
    assert str(root) not in first.read_text() + second.read_text() + (out / "README.md").read_text()


def test_history_tells_the_steps(root: Path, out: Path) -> None:
    tiny.done("unmerge", out, "--remove", "m0")
    run = tiny.done("history", out)
    lines = [line.split() for line in run.out.splitlines()]
    assert [line[:2] for line in lines[1:4]] == [["1", "merge"], ["2", "add"], ["3", "unmerge"]]
    digests = [sha256_file(path)[:12] for path in sorted((out / "merge_history").iterdir())]
    assert [line[2] for line in lines[1:4]] == digests
    assert "now: base@" in run.out and "m0" not in run.out.partition("now:")[2]
    data = tiny.done("history", out, "--json").json
    assert [entry["step"] for entry in data["entries"]] == [1, 2, 3]
    assert data["entries"] == entries(out)


@pytest.mark.slow
def test_every_changed_byte_of_a_ledger_file_is_noticed(out: Path) -> None:
    """Of an earlier entry by the digest in its successor, of the last one by the digest in the card."""
    files = {f"merge_history/{path.name}": path.read_bytes() for path in sorted((out / "merge_history").iterdir())}
    card = (out / "README.md").read_text()
    assert len(check_chain(files, "here")) == 2
    unnoticed = []
    for name, data in files.items():
        for at in range(len(data)):
            changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            try:
                check_chain({**files, name: changed}, "here")
            except LedgerError as error:
                assert name in str(error) or "0002.json" in str(error)
            else:
                if name.endswith("0001.json") or sha256_bytes(changed) in card:
                    unnoticed.append((name, at))
    assert not unnoticed


@pytest.mark.parametrize("step", [1, 2])
def test_verify_names_a_changed_ledger_file(out: Path, step: int) -> None:
    path = out / "merge_history" / f"000{step}.json"
    data = path.read_bytes()
    for at in range(0, len(data), 211):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        found = culprits(out)
        assert any(path.name in line for line in found), (at, found)
    path.write_bytes(data)
    assert tiny.cli("verify", out).code == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"card": {', b'"carc": {'),
        (b'"library_name"', b'"library_nane"'),
        (b'"merged_norm": ', b'"merged_norm": 1e999, "x": '),
        (b'"scale"', b'"scalf"'),
        (b'"products": {', b'"products": [], "p": {'),
        (b'"schema": "hfmerge/ledger/1"', b'"schema": "hfmerge/ledger/2"'),
    ],
)
def test_an_entry_of_another_form_is_one_line_and_no_crash(out: Path, old: bytes, new: bytes) -> None:
    path = out / "merge_history" / "0002.json"
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    assert any("0002.json" in line for line in culprits(out))
    for command in (("history",), ("unmerge", "--remove", "m0")):
        run = tiny.cli(command[0], out, *command[1:])
        assert run.code in (0, 1) and "Traceback" not in run.err


def test_a_missing_entry_is_named(out: Path) -> None:
    (out / "merge_history" / "0001.json").unlink()
    assert any("0001.json is missing; the chain is broken" in line for line in culprits(out))
    (out / "merge_history" / "0002.json").unlink()
    run = tiny.cli("verify", out)
    assert run.code == 1 and run.out.endswith("there is nothing to verify it against\n"), run.out


def test_what_never_was_a_merge_is_said_to_be_none(root: Path) -> None:
    run = tiny.cli("verify", root / "base")
    assert run.code == 1 and "NOT what its ledger says" not in run.out
    assert "not a merge made by hfmerge, or its ledger was deleted" in run.out.splitlines()[-1]


def test_the_links_of_a_card_lead_to_the_hub_that_was_asked(root: Path, out: Path) -> None:
    """And a card whose links lead to the site of a stranger is not what its ledger gives."""
    last = open_merged(str(out)).last
    base = dataclasses.replace(last.base, commit="0" * 40, name="org/base")
    entry = dataclasses.replace(last, base=base)
    facts = card_facts(entry, "org/m", present_site())
    text = render_card([entry], facts)
    assert f"]({present_site()}/org/base)" in text and "huggingface.co" not in text
    assert card_differs(text, [entry]) is None
    moved = text.replace(present_site(), "http://127.0.0.1:1")
    assert card_differs(moved, [entry]) is None
    assert card_differs(text.replace(present_site(), "https://evil.example"), [entry]) is not None
    assert "](https://huggingface.co/org/base)" in render_card([entry], card_facts(entry, "org/m"))


def test_the_card_of_a_language_model_shows_its_use(tmp_path: Path) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.fine_tune(base, 1), tmp_path / "m0")
    out = tmp_path / "out"
    tiny.done("merge", tmp_path / "m0", "--base", tmp_path / "base", "--method", "linear", "--output", out)
    entry = open_merged(str(out)).last
    assert entry.settings["card"]["pipeline_tag"] == "text-generation"
    inside = render_card([entry], card_facts(entry, None))
    assert 'AutoTokenizer.from_pretrained("path/to/this/folder")' in inside and "model.generate(" in inside
    assert "apply_chat_template" not in inside and "--push-to" not in inside
    chats = dataclasses.replace(entry, products={**entry.products, "chat_template.jinja": "0" * 64})
    published = render_card([chats], card_facts(chats, "org/m"))
    assert "tokenizer.apply_chat_template(messages" in published and "--push-to org/m\n" in published


def test_without_its_last_entry_a_merge_is_not_what_the_ledger_says(out: Path) -> None:
    (out / "merge_history" / "0002.json").unlink()
    assert any(line.startswith("model.safetensors: sha256 is") for line in culprits(out))


def test_any_byte_of_any_file_is_covered(out: Path) -> None:
    """Sampled bytes of weights (header, first, last), and one of every other file."""
    weights = out / "model.safetensors"
    size = weights.stat().st_size
    places = [(weights, at) for at in (0, 9, 200, size // 2, size // 2 + 1, size - 1)]
    others = [path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix in (".safetensors", ".json")]
    places += [(path, path.stat().st_size // 2) for path in others]
    assert len(places) >= 15
    for path, at in places:
        flip(path, at, 0x40)
        assert any(path.name in line for line in culprits(out)), path
        flip(path, at, 0x40)
    assert tiny.cli("verify", out).code == 0


def test_missing_and_foreign_files_are_named(out: Path) -> None:
    (out / "model-00002-of-00002.safetensors").write_bytes(b"stale")
    assert any(
        "model-00002-of-00002.safetensors: weights that the ledger does not know" in line for line in culprits(out)
    )
    (out / "model-00002-of-00002.safetensors").unlink()
    (out / "config.json").unlink()
    assert culprits(out) == ["config.json: missing"]


def test_an_edited_card_is_noticed(out: Path) -> None:
    path = out / "README.md"
    text = path.read_text()
    edits = [
        ("opcm", "magic"),
        ("| 2 | add |", "| 2 | merge |"),
        ("library_name: transformers", "library_name: diffusers"),
        ("license: other", "license: mit"),
        ("- merge\n", ""),
        (f"{END}\n", ""),
        ("---\n", "---\n- 1\n"),
        ("steps: 2", "steps: 2\n2000-13-45: x"),
        ("sha256: ", "sha256: 0"),
    ]
    for old, new in edits:
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert any(line.startswith("card: ") and "README.md" in line for line in culprits(out)), (old, new)
    path.unlink()
    assert culprits(out) == ["card: README.md is missing"]


def test_an_edited_list_of_licences_is_noticed(out: Path) -> None:
    path = out / "LICENSE.md"
    path.write_text(path.read_text().replace("not stated", "mit", 1))
    assert culprits(out) == ["card: LICENSE.md is not the file that follows from the ledger"]


@pytest.mark.slow
def test_what_people_write_stays(root: Path, out: Path) -> None:
    path = out / "README.md"
    text = path.read_text()
    front, body = text.removeprefix("---\n").split("---\n", 1)
    data = yaml.safe_load(front)
    data |= {"datasets": ["imdb"], "tags": ["ours", *data["tags"]], "released": "soon"}
    front = yaml.safe_dump(data, sort_keys=False)
    path.write_text(f"---\n{front}---\n\nBefore: Grüße.\n{body}\n## After\n\nThanks to <b>all</b>.\n")
    assert tiny.cli("verify", out).code == 0
    tiny.done("add", out, root / "m2")
    tiny.done("unmerge", out, "--remove", HEADED)
    assert tiny.cli("verify", out).code == 0
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert "Before: Grüße." in text.partition(BEGIN)[0]
    assert text.rstrip().endswith("## After\n\nThanks to <b>all</b>.")
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["datasets"] == ["imdb"] and data["released"] == "soon" and "ours" in data["tags"]
    assert data["hfmerge"]["steps"] == 4 and data["hfmerge"]["sha256"] == sha256_file(
        out / "merge_history" / "0004.json"
    )
    assert HEADED not in text.partition("## Merge history")[0]


@pytest.mark.parametrize(("data", "reason"), [(b"---\n- a\n---\n", "front matter"), (b"caf\xe9", "not UTF-8")])
def test_a_card_that_cannot_be_kept_stops_the_change_before_any_work(
    root: Path, out: Path, data: bytes, reason: str
) -> None:
    (out / "README.md").write_bytes(data)
    before = tiny.everything(out)
    run = tiny.cli("add", out, root / "m2")
    assert run.code == 1 and reason in run.err and "README.md" in run.err
    assert tiny.everything(out) == before


def test_a_source_with_an_unreadable_card_has_no_licence(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "m0", tmp_path / "m0")
    (tmp_path / "m0" / "README.md").write_text("---\nlicense: [mit\n---\n")
    run = tiny.done(
        "merge", tmp_path / "m0", "--base", root / "base", "--method", "linear", "--output", tmp_path / "out"
    )
    assert "m0@" in run.err and " no licence." in run.err


@pytest.mark.slow
def test_licences_of_the_sources(root: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(root / name, tmp_path / name)) for name in ("base", "m0", "m1")]
    for folder in folders:
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    out = tmp_path / "out"
    run = tiny.done("merge", *folders[1:], "--base", folders[0], "--method", "linear", "--output", out)
    assert "licence" not in run.err and "license: apache-2.0" in (out / "README.md").read_text()
    assert not (out / "LICENSE.md").exists()
    shutil.copytree(root / "m2", tmp_path / "m2")
    (tmp_path / "m2" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    run = tiny.done("add", out, tmp_path / "m2")
    assert "m2@" in run.err and "no commercial use" in run.err
    assert "license: other" in (out / "README.md").read_text() and "cc-by-nc-4.0" in (out / "LICENSE.md").read_text()
    tiny.done("unmerge", out, "--remove", "m2")
    assert "license: apache-2.0" in (out / "README.md").read_text() and not (out / "LICENSE.md").exists()


@pytest.mark.slow
def test_a_moved_folder_is_asked_for_and_taken_with_source(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "m1", tmp_path / "m1")
    out = merge(root, tmp_path / "out", "m0", str(tmp_path / "m1"), "m2")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m1").rename(tmp_path / "elsewhere" / "m1")
    before = tiny.everything(out)
    run = tiny.cli("unmerge", out, "--remove", "m0")
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1
    assert "--source m1=FOLDER" in run.err and str(tmp_path / "m1") in run.err
    assert tiny.everything(out) == before
    failed = tiny.cli("verify", out, "--replay")
    assert failed.code == 1 and "--source m1=FOLDER" in failed.out
    source = f"m1={tmp_path / 'elsewhere' / 'm1'}"
    assert tiny.done("verify", out, "--replay", "--source", source).code == 0
    tiny.done("unmerge", out, "--remove", "m0", "--source", source)
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "never", "m1", "m2"))
    # the new place is remembered
    tiny.done("unmerge", out, "--remove", "m2")
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "one", "m1"))


@pytest.mark.slow
def test_a_removed_model_need_not_be_there(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "m1", tmp_path / "m1")
    out = merge(root, tmp_path / "out", "m0", str(tmp_path / "m1"), "m2")
    shutil.rmtree(tmp_path / "m1")
    tiny.done("unmerge", out, "--remove", "m1")
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "never", "m0", "m2"))


@pytest.mark.slow
def test_a_merge_carried_to_another_machine_asks_for_its_folders(root: Path, out: Path) -> None:
    with tiny.elsewhere():
        run = tiny.cli("add", out, root / "m2")
        assert run.code == 1 and "--source base=FOLDER" in run.err
        wrong = tiny.cli("add", out, root / "m2", "--source", "m9=somewhere")
        assert wrong.code == 1 and "--source m9: no model of that name was merged from a folder." in wrong.err
        unclear = tiny.cli("add", out, root / "m2", "--source", "m9")
        assert unclear.code == 1 and "write NAME=FOLDER" in unclear.err
        given = [part for name in ("base", "m0", HEADED, "m1") for part in ("--source", f"{name}={root / name}")]
        tiny.done("add", out, root / "m2", *given)
        assert tiny.files(out) == tiny.files(
            merge(root, out.parent / "all", "m0", HEADED, "m1", "m2", flags=("--state", "all"))
        )


@pytest.mark.parametrize("state", ["none", "all"])
@pytest.mark.parametrize("which", ["base", "m0", HEADED])
def test_a_folder_that_changed_since_is_refused_where_it_is_read(
    root: Path, tmp_path: Path, which: str, state: str
) -> None:
    """Whether its weights are read again or only its configuration: it may be another model by now."""
    places = {name: Path(shutil.copytree(root / name, tmp_path / name)) for name in ("base", "m0", HEADED)}
    out = tmp_path / "out"
    tiny.done(
        "merge",
        places["m0"],
        places[HEADED],
        "--base",
        places["base"],
        "--method",
        "opcm",
        "--output",
        out,
        "--state",
        state,
    )
    name = "bert.pooler.dense.bias" if which == HEADED else "pooler.dense.bias"
    tiny.edit(places[which], lambda held: held.update({name: held[name] + 1.0}))
    before = tiny.everything(out)
    run = tiny.cli("add", out, root / "m1")
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1
    assert (
        f"{which}@" in run.err
        and "are not those that were merged" in run.err
        and f"--source {which}=FOLDER" in run.err
    )
    assert tiny.everything(out) == before


def test_the_model_beneath_an_adapter_is_checked_too(tmp_path: Path) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, tmp_path / "base")
    for seed, name in ((1, "m0"), (2, "under")):
        tiny.save(tiny.fine_tune(base, seed), tmp_path / name)
    tiny.adapter(tmp_path / "lora", tiny.attention(), 3)
    out = tmp_path / "out"
    pair = f"{tmp_path / 'under'}+{tmp_path / 'lora'}"
    tiny.done("merge", tmp_path / "m0", pair, "--base", tmp_path / "base", "--method", "linear", "--output", out)
    shutil.copytree(tmp_path / "under", tmp_path / "copy")
    name = "model.norm.weight"
    tiny.edit(tmp_path / "under", lambda held: held.update({name: held[name] + 1.0}))
    run = tiny.cli("unmerge", out, "--remove", "m0", "--output", tmp_path / "never")
    assert run.code == 1 and "under@" in run.err and "--source under=FOLDER" in run.err
    tiny.done("unmerge", out, "--remove", "m0", "--source", f"under={tmp_path / 'copy'}")
    difference = tiny.tensors(out)[name] - tiny.tensors(tmp_path / "copy")[name]
    assert torch.allclose(difference, torch.zeros(16), atol=1e-6)


def test_replay_compares_every_file(root: Path, out: Path) -> None:
    report = hfmerge.verify(out, replay=True)
    assert report.ok and report.checks[-1].detail.startswith(
        "the replay made 4 files with the same bytes from 3 sources"
    )


def rewrite_last(out: Path, **changes: object) -> None:
    """Change the last ledger entry, and what names its digest, so that the whole agrees with itself again."""
    from hfmerge.hashing import canonical_json
    from hfmerge.ledger.card import card_facts, render_card

    path = out / "merge_history" / "0002.json"
    record = json.loads(path.read_bytes())
    record["products"]["model.safetensors"] = sha256_file(out / "model.safetensors")
    record["environment"] |= changes
    path.write_bytes(canonical_json(record))
    history = {f"merge_history/{p.name}": p.read_bytes() for p in (out / "merge_history").iterdir()}
    chain = check_chain(history, "here")
    (out / "README.md").write_text(render_card(chain, card_facts(chain[-1], None)))
    assert tiny.done("verify", out, "--accept-rewritten").code == 0


def test_replay_catches_a_ledger_that_was_rewritten_as_a_whole(root: Path, out: Path) -> None:
    """Weights, ledger and card changed together agree with each other, but not with the sources."""
    flip(out / "model.safetensors", -1)
    rewrite_last(out)
    run = tiny.cli("verify", out, "--replay")
    assert run.code == 1 and "FAIL replay: the replay gives model.safetensors other bytes" in run.out


@pytest.mark.slow
def test_replay_of_a_merge_made_elsewhere_allows_for_other_arithmetic_and_no_more(root: Path, out: Path) -> None:
    name = sorted(tiny.tensors(out))[0]
    tiny.edit(out, lambda held: held.update({name: held[name] * (1 + 2.0**-22)}))
    rewrite_last(out)
    assert "other bytes" in tiny.cli("verify", out, "--replay").out
    rewrite_last(out, device="another device", fingerprint="of another device")
    run = tiny.cli("verify", out, "--replay")
    assert (
        run.code == 3
        and "of the change but with other bytes" in run.out
        and "device another device, here cpu" in run.out
    )
    tiny.edit(out, lambda held: held.update({name: held[name] * 1.01}))
    rewrite_last(out, device="another device", fingerprint="of another device")
    run = tiny.cli("verify", out, "--replay")
    assert run.code == 1 and f"other bytes: {name} differs by up to" in run.out


@pytest.mark.slow
def test_names_of_models_are_found_in_all_their_forms(root: Path, made: Path, tmp_path: Path) -> None:
    digest = next(iter(entries(made)[1]["materials"]["models"]))["digest"]  # type: ignore[index]
    for i, name in enumerate(("m0", f"m0@{digest[:7]}", f"{root}/m0", "some/where/m0/")):
        out = tmp_path / f"out-{i}"
        tiny.done("unmerge", made, "--remove", name, "--output", out)
        assert [m["name"] for m in entries(out)[2]["materials"]["models"]] == [HEADED, "m1"]  # type: ignore[index]
    run = tiny.cli("unmerge", made, "--remove", "m0@beef", "--output", tmp_path / "none")
    assert run.code == 1 and not (tmp_path / "none").exists()
