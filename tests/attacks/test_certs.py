"""Attacks on certificates, on what `verify` believes, and on the memory of who verified a merge before."""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download

import hfmerge
from hfmerge.errors import LedgerError
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.repository import open_merged
from hfmerge.lifecycle import verify
from hfmerge.lifecycle.certificate import check_statement
from hfmerge.lifecycle.dsse import Envelope, Signature
from tests.fixtures import tiny
from tests.fixtures.faultproxy import Fault, FaultProxy
from tests.lifecycle.test_certificate import KEY, private_bytes, public_line


REPO = "certs/merge"
MODELS = ("certs/m0", "certs/m1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that lost a model, a certificate of it, the signer's key, and another merge; all in folders."""
    root = tmp_path_factory.mktemp("certs")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    for seed, name in enumerate(("m0", "m1", "m2")):
        tiny.save(tiny.fine_tune(base, seed), root / name)
    flags = ("--base", root / "base", "--method", "linear", "--output")
    tiny.done("merge", *(root / name for name in ("m0", "m1", "m2")), *flags, root / "merged")
    tiny.done("unmerge", root / "merged", "--remove", "m1")
    tiny.done("merge", root / "m0", root / "m2", *flags, root / "anew")
    (root / "key").write_bytes(private_bytes(KEY))
    (root / "key.pub").write_text(public_line(KEY))
    tiny.done(
        "certify", root / "merged", "--remove", "m1", "--key", root / "key", "--output", root / "certificate.json"
    )
    return root


@pytest.fixture(scope="module")
def models(hub: HubServer, made: Path) -> HfApi:
    """The base and two models on the Hub."""
    for name, folder in (("certs/base", "base"), ("certs/m0", "m0"), ("certs/m1", "m1")):
        import_folder(hub.endpoint, hub.token, made / folder, name)
    return HfApi()


@pytest.fixture
def published(models: HfApi) -> Iterator[str]:
    """A published merge of two steps, gone after the test."""
    publish(*MODELS)
    tiny.done("unmerge", REPO, "--remove", MODELS[1], "--push-to", REPO)
    yield REPO
    models.delete_repo(REPO)


def publish(*names: str) -> None:
    """A merge of models, as a new repository."""
    tiny.done("merge", *names, "--base", "certs/base", "--method", "linear", "--push-to", REPO)


def rewrite(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the repository's owner does at a machine of their own: another history, in which the model never was."""
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(home))
        HfApi().delete_repo(REPO)
        publish(MODELS[0])


def failed(run: tiny.Run) -> list[str]:
    """What did not hold, of a command that had to find something."""
    assert run.code == 1 and not run.err, (run.out, run.err)
    return [line.removeprefix("FAIL ") for line in run.out.splitlines() if line.startswith("FAIL ")]


# A signer who lies


def lie(root: Path, name: str, change: Callable[[bytes], bytes]) -> tiny.Run:
    """What `verify` says of a statement that was changed before the trusted key signed it."""
    good = Envelope.from_bytes((root / "certificate.json").read_bytes(), "here")
    plain = Envelope(change(good.payload))
    assert plain.payload != good.payload
    signed = Envelope(plain.payload, plain.payload_type, (Signature("", KEY.sign(plain.signed_bytes)),))
    (root / name).write_bytes(signed.to_bytes())
    return checked(root, name)


def checked(root: Path, name: str) -> tiny.Run:
    return tiny.cli("verify", root / "merged", "--certificate", root / name, "--public-key", root / "key.pub")


def told(root: Path, name: str, change: Callable[[dict[str, Any]], object]) -> tiny.Run:
    """The same, of a change to the statement's values."""

    def changed(payload: bytes) -> bytes:
        statement = json.loads(payload)
        change(statement)
        return canonical_json(statement)

    return lie(root, name, changed)


@pytest.mark.slow
def test_a_weight_file_is_named_twice(made: Path) -> None:
    """The signer names a file with a digest of other weights first, and with the right one second."""

    def twice(statement: dict[str, Any]) -> None:
        (right,) = statement["subject"]
        statement["subject"].insert(0, {"name": right["name"], "digest": {"sha256": "0" * 64}})

    (line, *_) = failed(told(made, "twice.json", twice))
    assert line.startswith("subjects: the certificate names a file twice")


@pytest.mark.parametrize("key", ["claim", "notProved", "subject"])
def test_a_key_of_the_statement_is_there_twice(made: Path, key: str) -> None:
    """The signer writes a key twice: some readers take the first value, hfmerge the last."""

    def twice(payload: bytes) -> bytes:
        return payload.replace(f'"{key}": '.encode(), f'"{key}": [],\n"{key}": '.encode(), 1)

    (line,) = failed(lie(made, "keys.json", twice))
    assert line.startswith("certificate: not a whole certificate") and f'"{key}" twice' in line


def test_a_key_of_the_envelope_is_there_twice(made: Path) -> None:
    """Somebody puts a second payload before the signed one, for readers that take the first."""
    other = base64.b64encode(b'{"claim": "nothing was ever merged"}')
    text = (made / "certificate.json").read_bytes()
    (made / "payloads.json").write_bytes(text.replace(b'"payload": ', b'"payload": "' + other + b'",\n"payload": ', 1))
    run = checked(made, "payloads.json")
    assert run.code == 1 and "not a DSSE envelope" in run.err and '"payload" twice' in run.err


LIES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("claim", lambda p: p.update(claim="hfmerge proves that nobody was ever harmed."), "claim is not what follows"),
    ("role", lambda p: p["removed"].update(role="base"), "differently from the certificate"),
    ("name", lambda p: p["removed"].update(identity="m1"), "differently from the certificate"),
    ("recomputed", lambda p: p.update(recomputed=True), "claim is not what follows"),
    ("recomputed", lambda p: p.update(recomputed="exact"), "claim is not what follows"),
    ("recomputed", lambda p: p.update(recomputed="by a notary"), "recomputed is 'by a notary'"),
    ("recomputed", lambda p: p.update(recomputed=0), "recomputed is 0"),
    ("notProved", lambda p: p.update(notProved=[]), "notProved is not what follows"),
    ("notProved", lambda p: p["notProved"].pop(), "notProved is not what follows"),
    ("tool", lambda p: p["tool"].update(name="a laboratory of the state"), "tool is not what follows"),
    ("tool", lambda p: p["tool"].update(accredited=True), "tool is not what follows"),
    ("merge", lambda p: p["merge"].update(commit="the last one"), "is no commit"),
    ("merge", lambda p: p["merge"].update(audited=True), "merge is not what follows"),
    ("another", lambda p: p.update(audit="passed"), "says predicate.audit, which no certificate has"),
    ("issued", lambda p: p.update(issued="2026-1-1T0:0:0Z"), "is not written as"),
    ("weight", lambda p: p["materials"]["models"][0].update(weight=1), "materials are not those of"),
    ("missing", lambda p: p.pop("notProved"), "lacks predicate.notProved"),
]


@pytest.mark.parametrize(("change", "reason"), [one[1:] for one in LIES], ids=[one[0] for one in LIES])
def test_a_field_says_what_does_not_follow(
    made: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    """The signer, whose key is trusted, words a field otherwise than the merge does."""
    lines = failed(told(made, "field.json", lambda statement: change(statement["predicate"])))
    assert reason in lines[0]


def test_a_statement_that_is_written_otherwise(made: Path) -> None:
    """The signer adds a key beside the predicate, or writes the same values in another form."""
    (line,) = failed(told(made, "beside.json", lambda statement: statement.update(audit="passed")))
    assert "says audit, which no certificate has" in line
    (line,) = failed(lie(made, "form.json", lambda payload: json.dumps(json.loads(payload)).encode()))
    assert "is not written as hfmerge writes one" in line


ODD: tuple[Any, ...] = (None, True, -1, 1.5, "", "x" * 20_000, [], {}, [[]], {"": None})
"""What stands in the place of a value."""


def replaced(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values within a value."""
    if path:
        yield path
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from replaced(one, (*path, key))


def with_odd(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """A copy with another value at a path."""
    copied = copy.deepcopy(value)
    place = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = odd
    return copied


@pytest.mark.slow
def test_any_value_of_a_statement_is_replaced(made: Path) -> None:
    """The signer replaces any one value by something odd: it is refused, and never with an error of Python."""
    merged, now = open_merged(str(made / "merged")), datetime.now(timezone.utc)
    good = Envelope.from_bytes((made / "certificate.json").read_bytes(), "here")
    assert all(check.ok for check in check_statement(good, merged, now))
    statement, cases = json.loads(good.payload), 0
    for path in replaced(statement):
        for odd in ODD:
            data = canonical_json(with_odd(statement, path, odd))
            told = path in (("predicate", "expires"), ("predicate", "merge", "commit"))  # null already
            named = path == ("predicate", "merge", "name") and isinstance(odd, str) and odd  # where it was made
            if data != good.payload and not (told and odd is None) and not named:
                cases += 1
                checks = check_statement(Envelope(data), merged, now)
                assert not all(check.ok for check in checks), (path, odd)
    assert cases > 900


def test_any_value_of_the_log_is_replaced(made: Path, tmp_path: Path) -> None:
    """Somebody replaces any one value of a record by something odd: the error says which line it is."""
    from hfmerge.lifecycle.witness import append, read_log

    merged, log = open_merged(str(made / "merged")), tmp_path / "log.jsonl"
    append(log, merged, "verified")
    append(log, merged, "verified")
    first, second = log.read_bytes().splitlines(keepends=True)
    record, other, cases = json.loads(second), tmp_path / "other.jsonl", 0
    for path in replaced(record):
        for odd in ODD:
            line = json.dumps(with_odd(record, path, odd), sort_keys=True, separators=(",", ":")).encode()
            named = path in (("merge", "name"), ("merge", "place")) and isinstance(odd, str) and len(line) < 4096
            if line + b"\n" != second and not named:
                cases += 1
                other.write_bytes(first + line + b"\n")
                with pytest.raises(LedgerError, match="line 2|record 2"):
                    read_log(other)
    assert cases > 100


def test_what_the_signer_did_is_called_the_signer_s_word(made: Path) -> None:
    """The signer says that the weights were computed again, and did not do it: the report does not vouch for it."""

    def boast(predicate: dict[str, Any]) -> None:
        honest, claimed = (
            "compared with the ledger, and not merged again",
            "merged again from the materials, with the same bytes",
        )
        predicate.update(recomputed="exact", claim=predicate["claim"].replace(honest, claimed))

    run = told(made, "boast.json", lambda statement: boast(statement["predicate"]))
    assert run.code == 0
    said = "recomputed: the signer says that the subjects were merged again from the materials, with the same bytes"
    assert f"{said}; not checked here; --replay checks it" in run.out


# A Hub that does not serve what it lists


@pytest.mark.slow
def test_a_hub_serves_other_bytes_than_it_lists(
    hub: HubServer, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub, or who sits before it, lists the right LFS ids, and sends other weights."""
    (info,) = [one for one in HfApi().list_repo_tree(published) if one.path == "model.safetensors"]
    commit = str(HfApi().model_info(published).sha)
    with FaultProxy(hub.endpoint) as proxy, monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", proxy.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", proxy.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        run = tiny.done("verify", published, "--download")
        assert "downloaded and hashed" in run.out and f"checked commit {commit}" in run.out
        proxy.faults(Fault("GET", flip=info.size - 100))
        run = tiny.done("verify", published)
        assert "by LFS id, as the Hub lists it" in run.out and f"checked commit {commit}" in run.out
        weights, state = failed(tiny.cli("verify", published, "--download"))
        assert weights.startswith("model.safetensors: sha256 is ")
        assert state.startswith("merge_state/") and "holds other bytes" in state
        proxy.faults(Fault("GET", cut=5000, times=3))  # no attack: it goes on where it was
        tiny.done("verify", published, "--download")


@pytest.mark.slow
def test_a_file_of_the_cache_is_changed(published: str) -> None:
    """Somebody changes the weights in this machine's cache, which is what a model is loaded from."""
    blob = Path(hf_hub_download(published, "model.safetensors")).resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        (line,) = failed(tiny.cli("verify", published, "--download"))
        assert line.startswith("model.safetensors: the cache of this machine holds other bytes") and str(blob) in line
    finally:
        blob.unlink()
    assert tiny.cli("verify", published, "--download").code == 0


@pytest.mark.slow
def test_the_commit_is_named_though_the_branch_moves(published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody pushes while `verify` runs: all that is reported is of one commit, which is named in full."""
    before = str(HfApi().model_info(published).sha)
    check = verify.check_contents

    def moved(*given: Any, **named: Any) -> Any:
        spoilt = [CommitOperationAdd("config.json", b"{}"), CommitOperationAdd("merge_history/0003.json", b"{}")]
        HfApi().create_commit(published, spoilt, commit_message="meanwhile")
        return check(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(verify, "check_contents", moved)
        data = tiny.done("verify", published, "--json").json
    assert data["ok"] and data["commit"] == before and len(before) == 40
    assert not hfmerge.verify(published).ok
    assert hfmerge.verify(f"{published}@{before}").commit == before


# A history that was rewritten


@pytest.mark.slow
def test_the_home_notices_that_a_published_history_was_rewritten(
    published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner publishes another history in which the removed model never was; its chain and its files hold."""
    tiny.done("verify", published)
    rewrite(tmp_path, monkeypatch)
    (line,) = failed(tiny.cli("verify", published))
    assert line.startswith("history: the history was rewritten: on 20") and "step 1 had the digest" in line
    assert f"`hfmerge verify {published} --accept-rewritten`" in line
    for command in (
        ("add", published, MODELS[1], "--push-to", published),
        ("unmerge", published, "--remove", MODELS[0], "--push-to", published),
        ("restore", published, "--step", "1", "--output", tmp_path / "restored"),
        ("certify", published, "--remove", MODELS[1]),
        ("purge-history", published, "--yes"),
    ):
        run = tiny.cli(*command)
        assert run.code == 1 and "the history was rewritten" in run.err and "--accept-rewritten" in run.err, command
        assert len(run.err.strip().splitlines()) == 1
    assert "note: the history was rewritten" in tiny.done("history", published).err
    run = tiny.done("verify", published, "--accept-rewritten")
    assert "ok   history: the history was rewritten" in run.out and "accepted, as asked" in run.out
    assert "ok   history: holds the 1 steps that were seen on 20" in tiny.done("verify", published).out
    tiny.done("add", published, MODELS[1], "--push-to", published)


@pytest.mark.slow
def test_a_history_is_cut_back(published: str) -> None:
    """The owner sets `main` back to an earlier step, so that a removed model is in it again."""
    tiny.done("verify", published)
    api = HfApi()
    files = api.list_repo_files(published, revision="step-0001")
    add = [CommitOperationAdd(name, hf_hub_download(published, name, revision="step-0001")) for name in sorted(files)]
    api.create_commit(published, add, commit_message="back")
    api.delete_file("merge_history/0002.json", published)
    line, *strays = failed(tiny.cli("verify", published))
    assert line.startswith("history: the history was rewritten") and "the ledger ends with step 1 now" in line
    assert all("that the ledger does not know" in stray for stray in strays)  # states of the step that is gone
    assert tiny.cli("verify", f"{published}@step-0001").code == 0  # an older step, asked for, is none


@pytest.mark.slow
def test_what_is_no_attack_is_let_through(published: str, tmp_path: Path) -> None:
    """Older revisions, pull requests, restored and purged histories go on from what was seen."""
    tiny.done("verify", published)
    tiny.done("verify", f"{published}@step-0001")
    proposed = tiny.done("add", published, MODELS[1], "--push-to", published, "--create-pr", "--json").json
    assert proposed["pushed"]["pull_request"]
    tiny.done("verify", f"{published}@refs/pr/1")
    tiny.done("restore", published, "--step", "1", "--push-to", published)  # another step 3 than the proposed one
    tiny.done("verify", published)
    tiny.done("verify", f"{published}@refs/pr/1")
    tiny.done("purge-history", published, "--yes")
    tiny.done("verify", published)
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_a_folder_s_history_is_rewritten(made: Path, tmp_path: Path) -> None:
    """Somebody puts another merge in the place of one that was verified."""
    folder = tmp_path / "merged"
    shutil.copytree(made / "merged", folder)
    tiny.done("verify", folder)
    shutil.rmtree(folder)
    shutil.copytree(made / "anew", folder)
    (line,) = failed(tiny.cli("verify", folder))
    assert line.startswith("history: the history was rewritten")
    run = tiny.cli("unmerge", folder, "--remove", "m2")
    assert run.code == 1 and "--accept-rewritten" in run.err
    # who makes it anew with hfmerge knows of it
    shutil.rmtree(folder)
    tiny.done("merge", made / "m0", "--base", made / "base", "--method", "linear", "--output", folder)
    tiny.done("verify", folder)
    notes = [*(Path(constants.HF_HOME) / "hfmerge" / "seen").glob("*.json")]
    assert notes and all(note.stat().st_mode & 0o777 == 0o600 for note in notes)
    assert not any(str(folder) in note.read_text() for note in notes)


# The log of a witness


def witnessed(made: Path, folder: Path) -> tuple[Path, Path]:
    """A merge, and a log in which it was certified and twice verified."""
    shutil.copytree(made / "merged", folder / "merged")
    log, certificate = folder / "log.jsonl", folder / "c.json"
    tiny.done(
        "certify", folder / "merged", "--remove", "m1", "--key", made / "key", "--output", certificate, "--log", log
    )
    tiny.done("verify", folder / "merged", "--log", log)
    flags = ("--certificate", certificate, "--public-key", made / "key.pub")
    run = tiny.done("verify", folder / "merged", *flags, "--log", log)
    lines = log.read_bytes().splitlines()
    assert f"record 3 was added, and the head is {sha256_bytes(lines[-1])}" in run.out
    records = [json.loads(line) for line in lines]
    assert [(one["number"], one["did"]) for one in records] == [(1, "certified"), (2, "verified"), (3, "verified")]
    assert [one["previous"] for one in records] == [None, *map(sha256_bytes, lines[:2])]
    digest = sha256_bytes(certificate.read_bytes())
    assert [one["certificate"] for one in records] == [digest, None, digest]
    head = folder / "merged" / "merge_history" / "0002.json"
    assert records[0]["ledger"]["sha256"] == sha256_bytes(head.read_bytes()) and log.stat().st_mode & 0o777 == 0o600
    return folder / "merged", log


@pytest.mark.slow
def test_the_log_notices_that_a_published_history_was_rewritten(
    published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rewritten history, before a witness whose home knows nothing, but whose log does."""
    log = tmp_path / "log.jsonl"
    tiny.done("verify", published, "--log", log)
    tiny.done("add", published, MODELS[1], "--push-to", published)
    tiny.done("verify", published, "--log", log)  # the history went on
    rewrite(tmp_path / "theirs", monkeypatch)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "fresh"))
    assert tiny.cli("verify", published).code == 0
    before = log.read_bytes()
    (line,) = failed(tiny.cli("verify", published, "--log", log))
    assert line.startswith("log: the history was rewritten at step 2 or before: record 1 of ")
    run = tiny.cli("certify", published, "--remove", MODELS[1], "--log", log)
    assert run.code == 1 and "not certified; the history was rewritten" in run.err and log.read_bytes() == before
    tiny.done("verify", published, "--log", log, "--accept-rewritten")
    assert json.loads(log.read_bytes().splitlines()[-1])["did"] == "accepted"
    assert "2 of them" not in tiny.done("verify", published, "--log", log).out


@pytest.mark.parametrize("how", ["changed", "left out", "swapped", "put in", "cut off", "emptied", "binary"])
def test_a_log_that_was_edited_is_refused(made: Path, tmp_path: Path, how: str) -> None:
    """Somebody edits the log, so that it no longer tells what was seen."""
    merged, log = witnessed(made, tmp_path)
    first, second, third = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(
        {
            "changed": first.replace(b'"did":"certified"', b'"did":"verified"') + second + third,
            "left out": first + third,
            "swapped": second + first + third,
            "put in": first + second + second + third,
            "cut off": first + second,
            "emptied": b"",
            "binary": first + b"\0" * len(second) + third,
        }[how]
    )
    before = log.read_bytes()
    (line,) = failed(tiny.cli("verify", merged, "--log", log))
    assert line.startswith(f"log: {log}: ") and log.read_bytes() == before
    run = tiny.cli("certify", merged, "--remove", "m1", "--log", log)
    assert run.code == 1 and str(log) in run.err and log.read_bytes() == before


def test_a_torn_last_line_is_put_right(made: Path, tmp_path: Path) -> None:
    """A writer is killed while it adds a record: no attack, and nothing of the log is lost."""
    merged, log = witnessed(made, tmp_path)
    whole = log.read_bytes()
    for torn, said in (
        (b'{"certificate":null,"di', "was incomplete (23 bytes) and was deleted"),
        (b"", "was incomplete and was completed"),
    ):
        log.write_bytes(whole + torn if torn else whole[:-1])
        run = tiny.done("verify", merged, "--log", log)
        assert said in run.out and log.read_bytes().startswith(whole)
        assert log.read_bytes().count(b"\n") == whole.count(b"\n") + 1
        whole = log.read_bytes()
    log.write_bytes(whole + b"x" * 5000)
    assert failed(tiny.cli("verify", merged, "--log", log))[0].startswith("log: ")


def test_writers_take_turns(made: Path, tmp_path: Path) -> None:
    """Many write to one log at one time: each record follows the one before, and none is lost."""
    from hfmerge.lifecycle.witness import append, read_log

    merged, log = open_merged(str(made / "merged")), tmp_path / "log.jsonl"

    def write() -> None:
        for _ in range(10):
            append(log, merged, "verified")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.number for record in read_log(log).records] == list(range(1, 41))


def test_a_log_that_cannot_be_written_is_one_line(made: Path, tmp_path: Path) -> None:
    """Not an attack: a folder that is not there, and names that are no files; a pipe must not be waited for."""
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        ("nowhere/log.jsonl", "cannot be opened as a log"),
        (".", "not a regular"),
        ("pipe", "not a reg"),
    ):
        run = tiny.cli("verify", made / "merged", "--log", tmp_path / path)
        assert run.code == 1 and said in run.err and len(run.err.strip().splitlines()) == 1
