"""Tampering: every single-byte change of a published merge is caught, and so is every file more, less or elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from hfmerge.errors import LedgerError
from hfmerge.hashing import sha256_bytes
from hfmerge.ledger.card import BEGIN
from hfmerge.ledger.entry import Entry, check_chain
from hfmerge.lifecycle.verify import check_contents, verify_merge
from tests.fixtures import tiny


SMALL = {
    "hidden_size": 2,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 2,
    "vocab_size": 4,
    "max_position_embeddings": 2,
}
Files = Mapping[str, bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of two tiny models, one with a head, after the other has left; small enough to try every byte."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", **SMALL))
    tiny.save(base, root / "base")
    tiny.save(tiny.fine_tune(base, 0), root / "m0")
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 7, ["a", "b"]), root / "m1")
    out = root / "out"
    models = [root / "m0", root / "m1"]
    tiny.done("merge", *models, "--base", root / "base", "--method", "opcm", "--output", out, "--state", "all")
    tiny.done("unmerge", out, "--remove", "m0")
    return out


@pytest.fixture(scope="module")
def files(made: Path) -> Files:
    paths = [path for path in sorted(made.rglob("*")) if path.is_file()]
    held = {path.relative_to(made).as_posix(): path.read_bytes() for path in paths}
    assert [name for name in held if name.endswith(".safetensors") and name.startswith("heads/")]
    assert [name for name in held if name.startswith("merge_state/")]
    assert passes(held)
    return held


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the merge to spoil."""
    return Path(shutil.copytree(made, tmp_path / "merged"))


def passes(files: Files, entries: tuple[Entry, ...] | None = None, digests: Mapping[str, str] | None = None) -> bool:
    """What `verify` says of these files; ledger and digests may be given where they did not change."""
    if entries is None:
        try:
            entries = check_chain({n: data for n, data in files.items() if n.startswith("merge_history/")}, "here")
        except LedgerError:
            return False
    digests = digests or {name: sha256_bytes(data) for name, data in files.items()}
    return all(check.ok for check in check_contents(entries, digests, files.get("README.md"), files.get("LICENSE.md")))


def other_values(byte: int, at: int) -> list[int]:
    """A flipped bit, and a byte that depends on the place."""
    return [value for value in dict.fromkeys([byte ^ 1 << at % 8, (131 * at + 7) % 256]) if value != byte]


def changed(data: bytes, places: range | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Every change of one byte: place, new value, and the changed bytes."""
    for at in places or range(len(data)):
        for value in other_values(data[at], at):
            yield at, value, data[:at] + bytes([value]) + data[at + 1 :]


@pytest.mark.slow
def test_every_byte_of_every_ledger_file(files: Files) -> None:
    names = [name for name in files if name.startswith("merge_history/")]
    digests = {name: sha256_bytes(data) for name, data in files.items()}
    assert len(names) == 2
    cases = 0
    for name in names:
        for at, value, data in changed(files[name]):
            cases += 1
            assert not passes({**files, name: data}, digests=digests), (name, at, value)
    assert cases > 1.9 * sum(len(files[name]) for name in names)


def test_every_byte_of_all_that_the_ledger_lists(files: Files) -> None:
    """Weights, heads, configuration, kept state: whatever is loaded, or gone on from."""
    names = [name for name in files if not name.startswith("merge_history/") and not name.endswith(".md")]
    assert sum(name.endswith(".safetensors") for name in names) >= 3 and "config.json" in names
    entries = check_chain({name: data for name, data in files.items() if name.startswith("merge_history/")}, "here")
    digests = {name: sha256_bytes(data) for name, data in files.items()}
    for name in names:
        for at, value, data in changed(files[name]):
            assert not passes(files, entries, {**digests, name: sha256_bytes(data)}), (name, at, value)


@pytest.mark.slow
def test_every_byte_of_the_card_s_pointer_and_of_the_licences(files: Files) -> None:
    card = files["README.md"]
    start, end = card.index(b"hfmerge:\n"), card.index(b"\n---\n") + 1
    entries = check_chain({name: data for name, data in files.items() if name.startswith("merge_history/")}, "here")
    digests = {name: sha256_bytes(data) for name, data in files.items()}
    for at, value, data in changed(card, range(start, end)):
        assert not passes({**files, "README.md": data}, entries, digests), (at, value, data[start : end + 4])
    for at in range(start, end):  # what separates words and lines is another value to try
        for value in b" \n\r":
            if card[at] != value:
                data = card[:at] + bytes([value]) + card[at + 1 :]
                assert not passes({**files, "README.md": data}, entries, digests), (at, value, data[start : end + 4])
    for at, value, data in changed(card, range(card.index(BEGIN.encode()), len(card) - 1, 149)):
        assert not passes({**files, "README.md": data}, entries, digests), (at, value)
    for at, value, data in changed(files["LICENSE.md"], range(0, len(files["LICENSE.md"]), 29)):
        assert not passes({**files, "LICENSE.md": data}, entries, digests), (at, value)


@pytest.mark.slow
def test_the_same_through_the_folder(out: Path, files: Files) -> None:
    """Every 251st byte of every file on disk, through all that `verify` does."""
    for name, data in files.items():
        for at in range(0, len(data) - 1, 251):
            (out / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            report = verify_merge(str(out))
            assert not report.ok, (name, at)
        (out / name).write_bytes(data)
    assert verify_merge(str(out)).ok


def test_a_deleted_file_is_missed(out: Path, files: Files) -> None:
    for name, data in files.items():
        (out / name).unlink()
        # without the only kept state the folder is as one that was downloaded
        assert verify_merge(str(out)).ok == name.startswith("merge_state/"), name
        (out / name).write_bytes(data)
    assert verify_merge(str(out)).ok


@pytest.mark.slow
def test_a_cut_or_lengthened_file_is_noticed(out: Path, files: Files) -> None:
    for name, data in files.items():
        if name == "README.md":  # people may write below the block
            continue
        for spoilt in (data[:-1], data + b"\n", data + data, b""):
            (out / name).write_bytes(spoilt)
            assert not verify_merge(str(out)).ok, name
        (out / name).write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        *("model-00002-of-00002.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "model.gguf"),
        *("onnx/model.onnx", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
        *(
            "generation_config.json",
            "chat_template.jinja",
            "heads/other/model.safetensors",
            "merge_state/other.safetensors",
        ),
        *("merge_history/0003.json", "merge_history/0002.json.orig", "merge_history/1.json", "flax_model.msgpack"),
    ],
)
def test_a_file_more_that_is_loaded_is_noticed(out: Path, name: str) -> None:
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((out / "merge_history" / "0002.json").read_bytes())
    report = verify_merge(str(out))
    assert not report.ok and any("merge_history" in line or path.name in line for line in report.culprits)


def test_what_people_put_beside_a_merge_is_theirs(out: Path) -> None:
    scores = ".eval_results/hfmerge-tiny.yaml"
    for name in ("notes.md", ".gitattributes", ".git/config", "images/plot.png", "1_Pooling/why.md", scores):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    assert verify_merge(str(out)).ok


def test_without_any_kept_state_a_folder_is_as_downloaded(out: Path) -> None:
    shutil.rmtree(out / "merge_state")
    assert verify_merge(str(out)).ok


@pytest.mark.slow
def test_swapped_files_are_noticed(out: Path, files: Files) -> None:
    def swap(one: str, other: str) -> None:
        first, second = (out / one).read_bytes(), (out / other).read_bytes()
        (out / one).write_bytes(second)
        (out / other).write_bytes(first)

    names = list(files)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if files[one] != files[other]:
                swap(one, other)
                assert not verify_merge(str(out)).ok, (one, other)
                swap(one, other)
    assert verify_merge(str(out)).ok


def test_json_that_says_the_same_in_other_bytes_is_noticed(out: Path, files: Files) -> None:
    for name in (name for name in files if name.endswith(".json")):
        value = json.loads(files[name])
        twice = b'{"parent": 1,' + files[name].lstrip()[1:]
        spellings = [
            json.dumps(value),
            json.dumps(value, indent=2),
            json.dumps(value, indent=4, sort_keys=True),
            json.dumps(dict(reversed(list(value.items()))), indent=2) + "\n",
            files[name].decode().replace("e", "\\u0065"),
            files[name].decode().replace("\n", "\r\n"),
            "\ufeff" + files[name].decode(),
            twice.decode(),
        ]
        for text in spellings:
            if text.encode() != files[name]:
                (out / name).write_bytes(text.encode())
                assert not verify_merge(str(out)).ok, (name, text[:80])
        (out / name).write_bytes(files[name])


def test_without_its_last_entry_a_merge_does_not_get_back_what_left(out: Path) -> None:
    (out / "merge_history" / "0002.json").unlink()
    report = verify_merge(str(out))
    assert any(line.startswith("model.safetensors: sha256 is") for line in report.culprits)
