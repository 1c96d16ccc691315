"""Attacks by size and form: files that declare little and unfold much, never end, or are not of the kind they claim.

Commands that a file could keep busy run in a child process, which is ended beyond a bound of processor time or memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hfmerge.checkpoint.archive import read_manifest, unpack
from tests.fixtures import tiny


MB = 1 << 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes, an adapter, and a merge of the first fine-tune."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i in range(2):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    tiny.adapter(root / "a", {"encoder.layer.0.attention.self.query": (16, 16)}, 1)
    tiny.done("merge", root / "m0", "--base", root / "base", "--method", "linear", "--output", root / "merged")
    # what a child process needs is imported and remembered once, here
    tiny.done("plan", root / "a", "--base", root / "base", "--method", "linear")
    tiny.done("verify", root / "merged")
    return root


@pytest.fixture
def bad(root: Path, tmp_path: Path) -> Path:
    """A copy of the fine-tune, to spoil."""
    return Path(shutil.copytree(root / "m0", tmp_path / "bad"))


@pytest.fixture
def merged(root: Path, tmp_path: Path) -> Path:
    """A copy of the merge, to spoil."""
    return Path(shutil.copytree(root / "merged", tmp_path / "merged"))


def bounded(work: Callable[[], object], *, seconds: int = 10, megabytes: int = 1500, file: int = 0) -> tiny.Run:
    """Work in a child process: its exit code and what it printed, or a negative code where it was beyond a bound.

    Args:
        seconds: of processor time.
        megabytes: of memory beyond what this process has.
        file: bytes of the longest file that it may write; 0: any.
    """
    here, there = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which do nothing here
        child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * MB,) * 2)
            if file:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
            try:
                found = work()
                run = found if isinstance(found, tiny.Run) else tiny.Run(0, str(found), "")
            except BaseException as error:
                run = tiny.Run(99, "", "".join(traceback.format_exception_only(error))[-500:])
            with open(there, "wb") as pipe:
                pipe.write(json.dumps([run.code, run.out[-5000:], run.err[-5000:]]).encode())
        finally:
            os._exit(0)
    os.close(there)
    with open(here, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return tiny.Run(-os.WTERMSIG(status), "", "ended by a bound")
    return tiny.Run(*json.loads(said)) if said else tiny.Run(-1, "", "ended without a word")


def refused(run: tiny.Run, *words: str) -> None:
    """One line of error, which says all of the words."""
    assert run.code == 1, run
    text = run.err or run.out
    assert all(word in text for word in words), text


def plan(root: Path, *models: object, base: object = None, **bounds: Any) -> tiny.Run:
    arguments = ["plan", *models, "--base", base or root / "base", "--method", "linear"]
    return bounded(lambda: tiny.cli(*arguments), **bounds)


def write_header(path: Path, header: bytes, size: int = 0) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)


# --- archives -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_zip_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    """The attacker keeps a copy of 300 KB whose member unfolds to 300 MB; its manifest declares ten bytes."""
    path = tmp_path / "copy.zip"
    manifest = {"schema": "hfmerge/kept/1", "base": None, "against": {}}
    manifest["files"] = {"notes.txt": {"size": 10, "sha256": "0" * 64}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("files/notes.txt", "w") as member:
            for _ in range(300):
                member.write(b"\0" * MB)
        archive.writestr("manifest.json", json.dumps(manifest))

    def work() -> None:
        unpack(path, read_manifest(path), {"notes.txt": tmp_path / "out" / "notes.txt"}, lambda: None)  # type: ignore[arg-type,return-value]

    run = bounded(work, file=8 * MB)
    assert run.code == 99 and "longer than the manifest says" in run.err, run
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_manifest_that_fills_the_memory(tmp_path: Path) -> None:
    """The attacker's manifest of 100 KB unfolds to 100 MB of JSON, and to gigabytes of lists."""
    path = tmp_path / "copy.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b"[" + b"[]," * (33 * MB) + b"[]]")
    run = bounded(lambda: read_manifest(path), megabytes=1000)
    assert run.code == 99 and "CorruptFileError" in run.err and "bytes of manifest; the limit is" in run.err, run


def test_a_copy_that_declares_petabytes(root: Path, tmp_path: Path) -> None:
    """The attacker's manifest declares a file of a petabyte, so that what is streamed up to it has no end."""
    from hfmerge.checkpoint.archive import check_total

    path = tmp_path / "copy.zip"
    manifest = {"schema": "hfmerge/kept/1", "base": None, "against": {}}
    manifest["files"] = {"notes.txt": {"size": 10**15, "sha256": "0" * 64}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
    run = bounded(lambda: check_total(read_manifest(path), path, 10 * MB))
    assert run.code == 99 and "16 times its merge" in run.err, run


# --- YAML ---------------------------------------------------------------------------------------------------------

LAUGHS = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10))]
)
LISTS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))])


@pytest.mark.parametrize("text", [LAUGHS, LISTS], ids=["merged keys", "lists"])
def test_a_recipe_of_aliases(tmp_path: Path, text: str) -> None:
    """The attacker's recipe of 1 KB names aliases of aliases, 9^9 values once they are written out."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{text}\nbase: a\nmodels: [b]\nmethod: linear\n")
    refused(bounded(lambda: tiny.cli("plan", path)), "values once aliases are written out; the limit is")


@pytest.mark.parametrize("text", [LAUGHS, LISTS], ids=["merged keys", "lists"])
def test_a_card_of_aliases(root: Path, merged: Path, text: str) -> None:
    """The attacker's card holds such aliases under a key of its own, which `add` would write out into the new card."""
    card = merged / "README.md"
    card.write_text(card.read_text().replace("---\n", f"---\n{text}\n", 1))
    run = bounded(lambda: tiny.cli("add", merged, root / "m1"))
    refused(run, "values once aliases are written out; the limit is")


def test_a_number_of_a_card_that_takes_hours(root: Path, merged: Path) -> None:
    """The attacker's card holds `1:1:1:...`, which YAML 1.1 reads as a number of base 60, digit by digit."""
    card = merged / "README.md"
    card.write_text(card.read_text().replace("---\n", f"---\nx: {':'.join(['1'] * 400_000)}\n", 1))
    refused(bounded(lambda: tiny.cli("verify", merged), seconds=15), "the limit is")


# --- nesting ------------------------------------------------------------------------------------------------------

DEEP = "[" * 200_000


def test_json_that_is_nested_too_deeply(root: Path, merged: Path, tmp_path: Path) -> None:
    """The attacker nests lists 200,000 deep in every JSON file that is read, so that the reader's stack ends."""
    (merged / "merge_history" / "0001.json").write_text(f'{{"schema": {DEEP}')
    refused(bounded(lambda: tiny.cli("history", merged)), "0001.json", "levels of nesting; the limit is 64")
    for file in ("config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json"):
        folder = Path(shutil.copytree(root / ("a" if file.startswith("adapter") else "m0"), tmp_path / file))
        if file == "model.safetensors":
            write_header(folder / file, f'{{"x": {DEEP}'.encode())
        else:
            (folder / file).write_text(f'{{"x": {DEEP}')
        if file.endswith("index.json"):
            (folder / "model.safetensors").unlink()  # beside it the index is not read
        refused(plan(root, folder), "levels of nesting; the limit is 64")


def test_a_moderate_nesting_is_refused_too(root: Path, bad: Path) -> None:
    """The attacker nests 500 levels: the reader takes them, and whatever walks over the values later does not."""
    data = json.loads((bad / "config.json").read_text())
    text = json.dumps(data)[:-1] + f', "x": {"[" * 500}{"]" * 500}}}'
    (bad / "config.json").write_text(text)
    refused(plan(root, bad), "levels of nesting; the limit is 64")


# --- headers and configurations -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_hundred_thousand_tensors(root: Path, bad: Path) -> None:
    """The attacker's header names 300,000 empty tensors, each of which is matched by some hundred expressions."""
    one = '"encoder.layer.%d.attention.self.query.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    header = "{" + ", ".join(one % i for i in range(300_000)) + "}"
    write_header(bad / "model.safetensors", header.encode())
    refused(plan(root, bad, seconds=10), "has 300,000 tensors; the limit is 250,000")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers: has 10,000,000 layers"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: has 1,000,000,000,000 layers"),
        ({"num_hidden_layers": 9_999}, "modules for each stored tensor; the limit is 8"),
        ({"num_labels": 10**9}, "labels; the limit is"),
        ({"vocab_size": 10**11}, "times as many elements in one parameter as all weights"),
        ({"x": {"depths": [3, [10**8]]}}, "depths: has 100,000,000 layers"),
    ],
    ids=str,
)
def test_a_configuration_of_ten_million_layers(root: Path, bad: Path, change: dict[str, Any], words: str) -> None:
    """The attacker's config.json asks for a class so large that building it, even without weights, never ends."""
    tiny.edit_config(bad, **change)
    refused(plan(root, bad, seconds=10, megabytes=1000), words)


def test_a_class_whose_constructor_counts_positions(root: Path, tmp_path: Path) -> None:
    """The attacker's config.json has a class fill a table of 10^9 sines, number by number, as it is built."""
    folder = tiny.save(tiny.build("DistilBertModel", small_distilbert()), tmp_path / "bad")
    tiny.edit_config(folder, sinusoidal_pos_embds=True, max_position_embeddings=10**9)
    refused(plan(root, root / "m0", base=folder, seconds=10), "elements in one parameter as all weights")


def small_distilbert() -> Any:
    import transformers

    return transformers.DistilBertConfig(vocab_size=tiny.WORDS, dim=16, hidden_dim=32, n_layers=1, n_heads=2)


@pytest.mark.parametrize(
    "name", ["rank_pattern", "alpha_pattern"],
)  # fmt: skip
@pytest.mark.parametrize("pattern", [r"([a-z0-9.]+)+X", r"(.|.|.)*X", r"(.*)*X"])
def test_an_expression_that_backtracks_for_ever(root: Path, tmp_path: Path, name: str, pattern: str) -> None:
    """The attacker's adapter gives ranks by an expression that takes 2^36 steps on the name of a module."""
    folder = Path(shutil.copytree(root / "a", tmp_path / "a"))
    tiny.edit_config(folder, "adapter_config.json", **{name: {pattern: 4}})
    assert plan(root, folder, seconds=10).code == 0  # it fits no module, so the rank stays what it was


def test_an_expression_that_unfolds(root: Path, tmp_path: Path) -> None:
    """The attacker's adapter repeats a repetition of a repetition, a thousand times each."""
    folder = Path(shutil.copytree(root / "a", tmp_path / "a"))
    tiny.edit_config(folder, "adapter_config.json", rank_pattern={"(((a{1,900}){1,900}){1,900}){1,900}X": 4})
    refused(plan(root, folder), "states once its repeats are written out; the limit is")


def test_an_expression_that_says_which_modules_are_changed(root: Path, tmp_path: Path) -> None:
    """The attacker's adapter names its modules by such an expression, which peft would match before an evaluation."""
    folder = Path(shutil.copytree(root / "a", tmp_path / "a"))
    changes = {"target_modules": r"([a-z0-9.]+)+X|.*\.query", "alpha_pattern": {r"(.|.)*X": 9}}
    tiny.edit_config(folder, "adapter_config.json", **changes)

    def digest(adapter: Path) -> str:
        from hfmerge.checkpoint.describe import describe
        from hfmerge.evaluation.loading import adapter_config, adapter_weights

        source = describe(f"{root / 'base'}+{adapter}")
        tensors = adapter_weights(source, adapter_config(source))
        return hashlib.sha256(b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))).hexdigest()

    run = bounded(lambda: digest(folder), seconds=30, megabytes=4000)
    assert run.code == 0 and run.out == digest(root / "a") != digest_of_base(root), run


def digest_of_base(root: Path) -> str:
    tensors = tiny.tensors(root / "base")
    return hashlib.sha256(b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))).hexdigest()


# --- one value under one key, and only numbers that are some --------------------------------------------------------


@pytest.mark.parametrize(
    "text", ['"r": 2, "r": 2', '"lora_alpha": NaN', '"lora_alpha": 1e999', '"r": true', '"r": "2"']
)
def test_values_of_an_adapter_that_are_none(root: Path, tmp_path: Path, text: str) -> None:
    """The attacker writes a key twice, so that two readers see two adapters, or a number that is none."""
    folder = Path(shutil.copytree(root / "a", tmp_path / "a"))
    data = json.loads((folder / "adapter_config.json").read_text())
    key = text.partition(":")[0].strip('"')
    rest = json.dumps({name: value for name, value in data.items() if name != key})
    (folder / "adapter_config.json").write_text(rest[:-1] + ", " + text + "}")
    refused(plan(root, folder), "adapter_config.json cannot be used")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_key_that_is_written_twice(root: Path, bad: Path, file: str) -> None:
    """The attacker writes a key twice, so that a scanner sees one model and the loader another."""
    if file == "config.json":
        text = (bad / file).read_text().rstrip().rstrip("}")
        (bad / file).write_text(text + ', "hidden_size": 16}')
    else:
        data = (bad / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + length])
        name = next(key for key in head if key != "__metadata__")
        text = json.dumps(head)[:-1] + f', "{name}": {json.dumps(head[name])}}}'
        write_header(bad / file, text.encode())
        with open(bad / file, "ab") as out:
            out.write(data[8 + length :])
    refused(plan(root, bad), "twice")


# --- the ledger ---------------------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def put(value: Any, path: Sequence[str | int], new: Any) -> None:
    for part in path[:-1]:
        value = value[part]
    value[path[-1]] = new


BASE, ONE = ("materials", "base"), ("materials", "models", 0)
WRONG: list[tuple[tuple[str | int, ...], Any]] = [
    (("step",), "1"), (("step",), True), (("step",), 1.0), (("parent",), 7), (("parent",), "A" * 64),
    (("schema",), []), (("action",), None), (("action", "type"), "conquer"), (("action", "type"), ["merge"]),
    (("action", "models"), "m0"), (("action", "models"), ["m0\nverified"]), (("action", "how"), {}),
    (("action", "restored"), "1"), (("materials", "models"), {}), (("materials", "models"), []), (BASE, []),
    ((*ONE, "name"), "m0\n  verified: 3 files"), ((*ONE, "name"), "../../m0"), ((*ONE, "name"), "a/b/c"),
    ((*ONE, "name"), 5), ((*ONE, "name"), ""), ((*ONE, "name"), ".."), ((*ONE, "commit"), "main"),
    ((*ONE, "digest"), "../x"), ((*ONE, "digest"), None), ((*ONE, "kind"), "pickle"), ((*ONE, "weight"), None),
    ((*ONE, "weight"), True), ((*ONE, "weight"), [["*"]]), ((*ONE, "weight"), [["a", 1.0]]),
    ((*ONE, "weight"), [[7, 1.0], ["*", 1.0]]), ((*ONE, "weight"), "1.0"), ((*ONE, "files"), []),
    ((*ONE, "files"), {"../config.json": "0" * 64}), ((*ONE, "files"), {"config.json": "0" * 63}),
    ((*ONE, "files"), {"/etc/passwd": "0" * 64}), ((*ONE, "beneath"), "x"), ((*ONE, "squared_norm"), "big"),
    ((*ONE, "squared_norm"), -1.0), ((*ONE, "head"), "../heads"), ((*ONE, "labels"), "abc"), ((*ONE, "labels"), [1]),
    ((*ONE, "license"), 3), ((*ONE, "unverified"), "x"), ((*ONE, "ledger"), "x"), ((*ONE, "contains"), ["m1"]),
    ((*ONE, "subtracted"), "no"), ((*ONE, "kept"), "../x"), ((*ONE, "surprise"), 1),
    (("method", "name"), ["linear"]), (("method", "version"), "1"), (("method", "options"), []),
    (("method", "options"), {"surprise": 1}), (("method", "norm"), "huge"), (("method", "surprise"), 1),
    (("settings", "dtype"), "int3"), (("settings", "include"), "a"), (("settings", "state"), -1),
    (("settings", "allow_pickle"), "yes"), (("settings", "card"), []), (("settings", "learn"), {"rows": -1}),
    (("settings", "learn"), 3), (("settings", "surprise"), 1), (("byproducts", "scalars", "scale"), "1.0"),
    (("byproducts", "scalars", "merged_norm"), -1.0), (("byproducts", "scalars", "surprise"), 1.0),
    (("byproducts", "states"), {}), (("byproducts", "states"), [{"count": 1}]),
    (("byproducts", "states"), [{"count": 1, "sha256": "../../x", "nbytes": 1}]),
    (("byproducts", "states"), [{"count": True, "sha256": "0" * 64, "nbytes": 1}]), (("byproducts", "learned"), 1),
    (("byproducts", "learned"), {"replay": [], "fisher": "../x"}), (("products",), []),
    (("products",), {"../../x": "0" * 64}), (("products",), {"a\\b": "0" * 64}), (("products",), {"a": "x"}),
    (("environment",), []), (("environment", "torch"), [2]), (("environment", "torch"), 2.5), (("surprise",), 1),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda value: str(value)[:40])
def test_a_value_of_a_ledger_of_another_kind(merged: Path, path: tuple[str | int, ...], value: Any) -> None:
    """The attacker writes an entry in canonical form in which one value is of another kind than hfmerge writes."""
    file = merged / "merge_history" / "0001.json"
    data = json.loads(file.read_bytes())
    put(data, path, value)
    file.write_bytes(canonical(data))
    run = tiny.cli("history", merged)
    refused(run, "0001.json: not a ledger entry: ")
    run = tiny.cli("verify", merged)
    assert run.code == 1 and "FAIL ledger" in run.out, run


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_scalar_that_is_no_number(merged: Path, number: str) -> None:
    """The attacker's norm is no number, so that no comparison with it is ever false."""
    file = merged / "merge_history" / "0001.json"
    data = json.loads(file.read_bytes())
    put(data, ("byproducts", "scalars", "merged_norm"), "HERE")
    file.write_bytes(canonical(data).replace(b'"HERE"', number.encode()))
    refused(tiny.cli("history", merged), "holds", number.lstrip("-"))


def chained(folder: Path, count: int) -> None:
    """A ledger of so many entries, each the first one again under another number."""
    first = json.loads((folder / "merge_history" / "0001.json").read_bytes())
    put(first, ("step",), "STEP")
    put(first, ("parent",), "PARENT")
    text, parent = canonical(first), b"null"
    for step in range(1, count + 1):
        data = text.replace(b'"STEP"', str(step).encode()).replace(b'"PARENT"', parent)
        (folder / "merge_history" / f"{step:04d}.json").write_bytes(data)
        parent = b'"' + hashlib.sha256(data).hexdigest().encode() + b'"'


@pytest.mark.slow
def test_a_ledger_of_ten_thousand_entries_is_read(merged: Path) -> None:
    """No attack: the ten-thousandth change of a merge, whose file `10000.json` text sorts before `1001.json`."""
    chained(merged, 10_001)
    began = time.process_time()
    run = tiny.done("history", merged, "--json")
    assert time.process_time() - began < 60
    assert [entry["step"] for entry in run.json["entries"]] == list(range(1, 10_002))


@pytest.mark.slow
def test_a_ledger_without_end(merged: Path) -> None:
    """The attacker's ledger has more entries than anybody reads, each of which is parsed and held in memory."""
    for step in range(1, 20_002):
        (merged / "merge_history" / f"{step:04d}.json").touch()
    refused(bounded(lambda: tiny.cli("history", merged)), "has 20,001 ledger entries; the limit is 20,000")


def test_an_entry_without_end(merged: Path) -> None:
    """The attacker's entry has a gigabyte, most of it a hole in the file, and is read whole."""
    with open(merged / "merge_history" / "0001.json", "r+b") as file:
        file.truncate(1 << 30)
    run = bounded(lambda: tiny.cli("history", merged), megabytes=500)
    refused(run, "has 1,073,741,824 bytes of ledger entry; the limit is 16,000,000")


@pytest.mark.slow
def test_a_card_without_end(merged: Path) -> None:
    """The attacker's card has a gigabyte, most of it a hole in the file, and is read whole."""
    with open(merged / "README.md", "r+b") as file:
        file.truncate(1 << 30)
    run = bounded(lambda: tiny.cli("verify", merged), megabytes=500)
    refused(run, "has 1,073,741,824 bytes of card; the limit is 16,000,000")
