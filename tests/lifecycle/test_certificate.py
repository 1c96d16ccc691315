"""Certificates of removal: made, signed, checked by somebody else, and refused for every reason there is."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import hfmerge
from hfmerge.errors import CertificateError
from hfmerge.hashing import canonical_json, sha256_file
from hfmerge.ledger.entry import Entry, contained
from hfmerge.ledger.removal import contained_models, find_removed
from hfmerge.ledger.repository import open_merged
from hfmerge.lifecycle.certificate import check_signature, check_statement
from hfmerge.lifecycle.dsse import Envelope, Signature
from hfmerge.lifecycle.keys import PASSPHRASE, Trusted, allowed_signers, key_fingerprint, private_key, public_keys
from tests.fixtures import tiny


KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
STATED = ("validity", "subjects", "ledger head", "removed", "statement", "recomputed")
"""The checks of a statement, in order."""
NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)


def private_bytes(key: Any, form: PrivateFormat = PrivateFormat.OpenSSH, passphrase: bytes | None = None) -> bytes:
    lock = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    data: bytes = key.private_bytes(Encoding.PEM, form, lock)
    return data


def public_line(key: Any) -> str:
    text: bytes = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return text.decode()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that lost a model, keys, and a certificate; the models that went in lie beside it."""
    root = tmp_path_factory.mktemp("certificate")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    for i, name in enumerate(("m0", "m1", "m2"), 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    models = [root / name for name in ("m0", "m1", "m2")]
    tiny.done("merge", *models, "--base", root / "base", "--method", "opcm", "--output", root / "merged")
    shutil.copytree(root / "merged", root / "before")
    tiny.done("unmerge", root / "merged", "--remove", "m1")
    for name, key in (("key", KEY), ("other", OTHER)):
        (root / name).write_bytes(private_bytes(key))
        (root / f"{name}.pub").write_text(f"{public_line(key)} {name}@here\n")
    tiny.done(*certify(root, "certificate.json", "--key", root / "key", "--expires", "30"))
    return root


def certify(root: Path, name: str, *flags: object) -> tuple[object, ...]:
    return "certify", root / "merged", "--remove", "m1", "--output", root / name, *flags


def verify(root: Path, *flags: object, merged: str = "merged", certificate: str = "certificate.json") -> tiny.Run:
    return tiny.cli("verify", root / merged, "--certificate", root / certificate, *flags)


def refusal(run: tiny.Run) -> str:
    """The one line that says why, of a command that had to fail."""
    lines = [line for line in run.out.splitlines() if line.startswith("FAIL ")]
    assert run.code == 1 and not run.err and len(lines) == 1 and "NOT verified" in run.out, run.out
    return lines[0].removeprefix("FAIL ")


def envelope(root: Path) -> Envelope:
    return Envelope.from_bytes((root / "certificate.json").read_bytes(), "here")


def resigned(root: Path, change: Callable[[dict[str, Any]], object]) -> Envelope:
    """The certificate with another statement, signed by the right key: what a signer who lies could make."""
    statement = json.loads(envelope(root).payload)
    change(statement)
    plain = Envelope(canonical_json(statement))
    return dataclasses.replace(plain, signatures=(Signature("", KEY.sign(plain.signed_bytes)),))


def test_it_states_what_the_ledger_says_in_in_toto_s_words(made: Path) -> None:
    raw = json.loads((made / "certificate.json").read_bytes())
    assert raw["payloadType"] == "application/vnd.in-toto+json"
    statement = json.loads(base64.b64decode(raw["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    weights = sha256_file(made / "merged" / "model.safetensors")
    assert statement["subject"] == [{"name": "model.safetensors", "digest": {"sha256": weights}}]
    predicate, last = statement["predicate"], json.loads((made / "merged/merge_history/0002.json").read_bytes())
    assert {key: predicate[key] for key in ("materials", "method", "settings", "environment")} == {
        key: last[key] for key in ("materials", "method", "settings", "environment")
    }
    assert predicate["ledger"]["sha256"] == sha256_file(made / "merged/merge_history/0002.json")
    removed = predicate["removed"]
    assert removed["identity"].startswith("m1@sha256:") and removed["files"]["model.safetensors"] == sha256_file(
        made / "m1" / "model.safetensors"
    )
    assert (removed["firstStep"], removed["lastStep"], removed["removedByStep"]) == (1, 1, 2)
    assert not predicate["recomputed"] and len(predicate["notProved"]) == 4
    assert str(made) not in raw["payload"] and str(made).encode() not in base64.b64decode(raw["payload"])


def test_the_encoding_that_is_signed_is_that_of_the_specification() -> None:
    """The example of the DSSE protocol."""
    signed = Envelope(b"hello world", "http://example.com/HelloWorld").signed_bytes
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_signatures_that_name_no_key_count_all_the_same(made: Path) -> None:
    """DSSE lets signers leave out `keyid`, and gives several of them no order."""
    good = envelope(made)
    signatures = (Signature("", bytes(64)), Signature("", good.signatures[0].sig))
    read = Envelope.from_bytes(dataclasses.replace(good, signatures=signatures).to_bytes(), "here")
    assert read.signatures == signatures and check_signature(read, public_keys(made / "key.pub")).ok


def test_the_fingerprint_is_that_of_openssh() -> None:
    line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB6CzM6RrJ6OszdSQEyFKcCY/CBZIg1wQ2iwQ4YdnUzl"
    key = serialized(line)
    assert key_fingerprint(key) == "SHA256:3s+z/fO/FOx+1IdACmMH7m3s53D24zaBvg0bRPOcVRQ"  # by ssh-keygen -l


def serialized(line: str) -> ed25519.Ed25519PublicKey:
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    key = load_ssh_public_key(line.encode())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    return key


def test_another_checks_it_with_the_key_and_recomputes_the_weights(made: Path) -> None:
    run = verify(made, "--public-key", made / "key.pub", "--replay")
    assert run.code == 0, run.out
    assert "ok   signature: made by key@here (SHA256:" in run.out and "files with the same bytes" in run.out
    assert "ok   removed: m1@" in run.out and "was taken out by step 2" in run.out
    report = hfmerge.verify(made / "merged", certificate=made / "certificate.json", public_key=made / "key.pub")
    assert report.ok and [check.what for check in report.checks if check.what in STATED] == list(STATED)


def test_with_replay_the_signer_merges_again_and_says_so(made: Path) -> None:
    tiny.done(*certify(made, "again.json", "--key", made / "key", "--replay"))
    statement = json.loads(Envelope.from_bytes((made / "again.json").read_bytes(), "").payload)
    assert statement["predicate"]["recomputed"] and statement["predicate"]["expires"] is None
    assert verify(made, "--public-key", made / "key.pub", certificate="again.json").code == 0


def test_without_output_it_is_printed(made: Path) -> None:
    run = tiny.done("certify", made / "merged", "--remove", "m1", "--key", made / "key")
    assert Envelope.from_bytes(run.out.encode(), "stdout").signatures


def test_wrong_key(made: Path) -> None:
    text = refusal(verify(made, "--public-key", made / "other.pub"))
    assert text.startswith("signature: made with another key") and key_fingerprint(KEY.public_key()) in text
    assert key_fingerprint(OTHER.public_key()) in text
    assert "--public-key or --allowed-signers" in refusal(verify(made))


def test_expired(made: Path) -> None:
    tiny.done(*certify(made, "short.json", "--key", made / "key", "--expires", "1e-9"))
    text = refusal(verify(made, "--public-key", made / "key.pub", certificate="short.json"))
    assert text.startswith("validity: the certificate expired on 20")
    for days in ("0", "-1", "nan", "1e9"):
        run = tiny.cli(*certify(made, "never.json", "--expires", days))
        assert run.code == 1 and "--expires" in run.err and not (made / "never.json").exists()


def test_not_valid_yet(made: Path) -> None:
    early = open_merged(str(made / "merged"))
    now = datetime.now(timezone.utc)
    good, bad = (check_statement(envelope(made), early, now - timedelta(minutes=m))[0] for m in (4, 7))
    assert good.ok and not bad.ok and "in the future" in bad.detail


def test_other_weights(made: Path) -> None:
    run = verify(made, "--public-key", made / "key.pub", merged="before")
    lines = [line for line in run.out.splitlines() if line.startswith("FAIL ")]
    assert run.code == 1 and lines[0].startswith(
        "FAIL subjects: the certificate is for other weights: model.safetensors"
    )
    assert lines[1].startswith("FAIL ledger head: the certificate is for another history")
    assert lines[2].startswith("FAIL removed: m1@") and "still in " in lines[2]


def test_unsigned(made: Path) -> None:
    run = tiny.done(*certify(made, "unsigned.json"))
    assert "warning: the certificate is unsigned" in run.err
    for flags in (("--public-key", made / "key.pub"), ()):
        assert refusal(verify(made, *flags, certificate="unsigned.json")).startswith(
            "signature: the certificate is unsig"
        )
    run = verify(made, "--allow-unsigned", certificate="unsigned.json")
    assert run.code == 0 and "nobody vouches" in run.out
    stray = tiny.cli("verify", made / "merged", "--public-key", made / "key.pub")
    assert stray.code == 1 and "--certificate" in stray.err


@pytest.mark.slow
def test_every_changed_byte_of_the_statement_breaks_the_signature(made: Path) -> None:
    good = envelope(made)
    trusted = public_keys(made / "key.pub")
    assert check_signature(good, trusted).ok
    for at in range(len(good.payload)):
        changed = good.payload[:at] + bytes([good.payload[at] ^ 1]) + good.payload[at + 1 :]
        check = check_signature(dataclasses.replace(good, payload=changed), trusted)
        assert not check.ok and check.detail.startswith("the statement was changed after it was signed"), at
    sig = good.signatures[0].sig
    for at in range(len(sig)):
        other = Signature(good.signatures[0].keyid, sig[:at] + bytes([sig[at] ^ 128]) + sig[at + 1 :])
        assert not check_signature(dataclasses.replace(good, signatures=(other,)), trusted).ok
    assert not check_signature(dataclasses.replace(good, payload_type="text/plain"), trusted).ok


def test_a_changed_statement_is_not_even_read(made: Path) -> None:
    raw = json.loads((made / "certificate.json").read_bytes())
    raw["payload"] = base64.b64encode(base64.b64decode(raw["payload"]).replace(b"m1@", b"m2@")).decode()
    (made / "changed.json").write_text(json.dumps(raw))
    text = refusal(verify(made, "--public-key", made / "key.pub", certificate="changed.json"))
    assert text.startswith("signature: the statement was changed after it was signed")


LIES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("subject", lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "other weights"),
    ("no subject", lambda s: s["subject"].clear(), "other weights"),
    ("ledger", lambda s: s["predicate"]["ledger"].update(sha256="0" * 64), "another history"),
    ("weight", lambda s: s["predicate"]["materials"]["models"][0].update(weight=2.0), "materials are not those"),
    ("fewer", lambda s: s["predicate"]["materials"]["models"].pop(), "materials are not those"),
    ("method", lambda s: s["predicate"]["method"].update(name="linear"), "method are not those"),
    ("machine", lambda s: s["predicate"]["environment"].update(torch="0"), "environment are not those"),
    ("settings", lambda s: s["predicate"]["settings"].update(dtype="float16"), "settings are not those"),
    ("never in", lambda s: s["predicate"]["removed"].update(identity="m9@sha256:00"), "never was in"),
    ("other bytes", lambda s: s["predicate"]["removed"]["files"].update(x="0"), "differently from the certificate"),
    ("other step", lambda s: s["predicate"]["removed"].update(removedByStep=7), "differently from the certificate"),
    ("predicate", lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "this version reads"),
    ("type", lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "not an in-toto statement"),
    ("empty", lambda s: s["predicate"].clear(), "not a whole certificate"),
    ("no date", lambda s: s["predicate"].update(issued="soon"), "not a whole certificate"),
    ("a list", lambda s: s.update(subject=3), "not a whole certificate"),
]


@pytest.mark.parametrize(("change", "reason"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_signed_lie_is_found_without_trust_in_the_signer(
    made: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    merged = open_merged(str(made / "merged"))
    assert all(
        check.ok for check in check_statement(resigned(made, lambda s: None), merged, datetime.now(timezone.utc))
    )
    lie = resigned(made, change)
    assert check_signature(lie, public_keys(made / "key.pub")).ok
    checks = check_statement(lie, merged, datetime.now(timezone.utc))
    assert any(reason in check.detail for check in checks if not check.ok), checks


def test_a_removed_model_that_is_still_there_is_found(made: Path) -> None:
    def change(statement: dict[str, Any]) -> None:
        model = statement["predicate"]["materials"]["models"][0]
        statement["predicate"]["removed"]["identity"] = f"{model['name']}@sha256:{model['digest']}"

    checks = check_statement(resigned(made, change), open_merged(str(made / "merged")), datetime.now(timezone.utc))
    assert [check.what for check in checks if not check.ok] == ["removed"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"payload": "!", "payloadType": "a", "signatures": []}',
        b"[" * 100_000,
        b"\xff\x00",
    ],
)
def test_a_file_that_is_no_envelope_is_one_line(made: Path, data: bytes) -> None:
    (made / "broken.json").write_bytes(data)
    run = verify(made, "--public-key", made / "key.pub", certificate="broken.json")
    assert run.code == 1 and "not a DSSE envelope" in run.err and len(run.err.strip().splitlines()) == 1
    run = verify(made, "--public-key", made / "key.pub", certificate="missing.json")
    assert run.code == 1 and "cannot be read" in run.err


def test_what_a_certificate_says_cannot_pass_for_lines_of_the_report(made: Path) -> None:
    good = envelope(made)
    keyid = "x\nok   signature: made by you\x1b[2J"
    (made / "spoof.json").write_bytes(
        dataclasses.replace(good, signatures=(Signature(keyid, good.signatures[0].sig),)).to_bytes()
    )
    assert refusal(verify(made, certificate="spoof.json")).startswith("signature: signed with x\\nok   signature: ")

    def rename(statement: dict[str, Any]) -> None:
        statement["predicate"]["merge"]["name"] = keyid
        statement["subject"].append({"name": keyid, "digest": {"sha256": keyid}})

    checks = check_statement(resigned(made, rename), open_merged(str(made / "merged")), datetime.now(timezone.utc))
    assert all(check.detail.isprintable() for check in checks) and not all(check.ok for check in checks)


def test_a_merge_that_is_not_what_its_ledger_says_is_not_certified(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "merged", tmp_path / "merged")
    weights = tmp_path / "merged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    run = tiny.cli("certify", tmp_path / "merged", "--remove", "m1", "--key", made / "key")
    assert run.code == 1 and "not certified; model.safetensors: sha256 is" in run.err and not run.out


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("m0", "m0: still in "),
        ("base", "still in "),
        ("mm1", "never was in "),
        ("mm1", "Did you mean m"),
        ("m1@beef", "never was in "),
    ],
)
def test_only_what_has_left_can_be_certified(made: Path, model: str, reason: str) -> None:
    run = tiny.cli("certify", made / "merged", "--remove", model, "--key", made / "key")
    assert run.code == 1 and reason in run.err and len(run.err.strip().splitlines()) == 1


# What no folder at hand has: entries made from real ones


def entries(made: Path) -> tuple[Entry, ...]:
    return open_merged(str(made / "merged")).entries


def test_parts_are_what_the_ledger_calls_contained(made: Path) -> None:
    first, last = entries(made)
    under = dataclasses.replace(
        last.models[0], beneath="org/under@" + "a" * 40, files={**last.models[0].files, "+model.safetensors": "9" * 64}
    )
    whole = dataclasses.replace(last.models[1], contains=("org/x@" + "b" * 40, "org/y@" + "c" * 40))
    last = dataclasses.replace(last, models=(under, whole))
    assert [part.identity for part in contained_models(last)] == list(contained(last))
    assert [part.role for part in contained_models(last)] == [
        "base",
        "model",
        "beneath m0",
        "model",
        *["part of m2"] * 2,
    ]
    assert contained_models(last)[2].files == {"model.safetensors": "9" * 64}


def test_a_model_beneath_an_adapter_or_within_a_merge_is_still_there(made: Path) -> None:
    first, last = entries(made)
    gone = next(model for model in first.models if model.name == "m1")
    assert find_removed((first, last), "m1", "here").model.identity == gone.identity
    inside = dataclasses.replace(last.models[0], contains=("org/x@" + "b" * 40, gone.identity))
    under = dataclasses.replace(last.models[0], beneath=gone.identity)
    faded = dataclasses.replace(gone, subtracted=True)
    for model, role in ((inside, "part of m0"), (under, "beneath m0"), (faded, "only approximately subtracted")):
        step = dataclasses.replace(last, models=(model, last.models[1]))
        with pytest.raises(CertificateError, match=f"still in here .*{role}"):
            find_removed((first, step), "m1", "here")
    based = dataclasses.replace(last, base=gone)
    with pytest.raises(CertificateError, match="still in here .*base"):
        find_removed((first, based), "m1", "here")


def test_the_same_weights_under_another_name_are_still_there(made: Path) -> None:
    first, last = entries(made)
    gone = next(model for model in first.models if model.name == "m1")
    copy = dataclasses.replace(gone, name="org/copy", commit="d" * 40, digest=None)
    step = dataclasses.replace(last, models=(*last.models, copy))
    with pytest.raises(CertificateError, match="the same weights are still in it as org/copy@dddddddd"):
        find_removed((first, step), "m1", "here")


def test_of_two_revisions_the_removed_one_is_to_be_named(made: Path) -> None:
    first, last = entries(made)
    old, new = (
        dataclasses.replace(
            first.models[0], name="org/m", commit=letter * 40, digest=None, files={"model.safetensors": letter * 64}
        )
        for letter in "ab"
    )
    chain = (dataclasses.replace(first, models=(old,)), dataclasses.replace(last, models=(new,)))
    with pytest.raises(
        CertificateError, match=r"2 states: org/m@aaaaaaaa \(removed\), org/m@bbbbbbbb \(still there\)"
    ):
        find_removed(chain, "org/m", "here")
    removal = find_removed(chain, "org/m@aaaa", "here")
    assert (removal.first, removal.last, removal.removed) == (1, 1, 2)
    with pytest.raises(CertificateError, match="still in here"):
        find_removed(chain, f"org/m@{'b' * 40}", "here")


# Keys


@pytest.mark.slow
@pytest.mark.parametrize("form", [PrivateFormat.OpenSSH, PrivateFormat.PKCS8])
def test_private_keys_in_both_forms_with_and_without_passphrase(
    tmp_path: Path, form: PrivateFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    path.write_bytes(private_bytes(KEY, form))
    assert key_fingerprint(private_key(path).public_key()) == key_fingerprint(KEY.public_key())
    path.write_bytes(private_bytes(KEY, form, b"secret"))
    monkeypatch.delenv(PASSPHRASE, raising=False)
    assert key_fingerprint(private_key(path, lambda _: "secret").public_key()) == key_fingerprint(KEY.public_key())
    with pytest.raises(CertificateError, match="has a passphrase; set HFMERGE_KEY_PASSPHRASE"):
        private_key(path, lambda _: None)
    monkeypatch.setenv(PASSPHRASE, "secret")
    assert key_fingerprint(private_key(path).public_key()) == key_fingerprint(KEY.public_key())
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with pytest.raises(CertificateError, match="does not open with this passphrase"):
        private_key(path)


def test_files_that_are_no_ed25519_keys(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(private_bytes(rsa.generate_private_key(65537, 2048), PrivateFormat.PKCS8))
    with pytest.raises(CertificateError, match="not an ed25519 key"):
        private_key(path)
    with pytest.raises(CertificateError, match="is a private key"):
        public_keys(path)
    path.write_text("-----BEGIN PUBLIC KEY-----\nnonsense\n-----END PUBLIC KEY-----\n")
    for read in (private_key, public_keys):
        with pytest.raises(CertificateError, match="not a public key|cannot be read as a private key"):
            read(path)
    path.write_text("# nobody\nssh-rsa AAAA someone\n")
    with pytest.raises(CertificateError, match="no ed25519 public key"):
        public_keys(path)
    path.write_text("ssh-ed25519 AAAA someone\n")
    with pytest.raises(CertificateError, match="is not a key"):
        public_keys(path)
    with pytest.raises(CertificateError, match="cannot be read"):
        public_keys(tmp_path / "none")


def test_public_keys_in_pem_and_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert [one.keyid for one in public_keys(path)] == [key_fingerprint(KEY.public_key())]
    path.write_text(f"# ours\nssh-rsa AAAA old\n{public_line(OTHER)} a b\n\n{public_line(KEY)}\n")
    assert [(one.name, one.keyid) for one in public_keys(path)] == [
        ("a b", key_fingerprint(OTHER.public_key())),
        ("keys", key_fingerprint(KEY.public_key())),
    ]


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ("", True),
        ('namespaces="hfmerge"', True),
        ('namespaces="git,hfmerge"', True),
        ('namespaces="git,file"', False),
        ("cert-authority", False),
        ('valid-after="20291231",valid-before="20300201"', True),
        ('valid-before="20291230Z"', False),
        ('valid-after="203001010001Z"', False),
        ('valid-before="20300101000001Z",namespaces="hfmerge"', True),
    ],
)
def test_allowed_signers_of_openssh(tmp_path: Path, options: str, counts: bool) -> None:
    path = tmp_path / "allowed"
    path.write_text(f"# list\nme@org,you@org {options} {public_line(KEY)} a comment\n")
    if counts:
        assert [(one.name, one.keyid) for one in allowed_signers(path, NOW)] == [
            ("me@org,you@org", key_fingerprint(KEY.public_key()))
        ]
    else:
        with pytest.raises(CertificateError, match="allows no ed25519 key now"):
            allowed_signers(path, NOW)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"me {public_line(KEY).split()[1]}", "not a line of allowed signers"),
        (f"me verify-required {public_line(KEY)}", "is not known"),
        (f'me valid-before="soon" {public_line(KEY)}', "is not a time"),
        ("me ssh-rsa AAAA", "allows no ed25519 key now"),
    ],
)
def test_lists_of_allowed_signers_that_cannot_be_used(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "allowed").write_text(line + "\n")
    with pytest.raises(CertificateError, match=reason):
        allowed_signers(tmp_path / "allowed", NOW)


def test_a_list_of_allowed_signers_on_the_command_line(made: Path) -> None:
    (made / "allowed").write_text(f"them@org {public_line(OTHER)}\nus@org {public_line(KEY)}\n")
    run = verify(made, "--allowed-signers", made / "allowed")
    assert run.code == 0 and "made by us@org" in run.out
    trusted = [Trusted("us", KEY.public_key())]
    assert check_signature(envelope(made), trusted).ok


def test_without_cryptography_the_remedy_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    run = tiny.cli(*certify(made, "no.json", "--key", made / "key"))
    assert run.code == 1 and "pip install 'hfmerge[certify]'" in run.err
    run = verify(made, "--public-key", made / "key.pub")
    assert run.code == 1 and "pip install 'hfmerge[certify]'" in run.err
    # without a signature to make or to check the library is not needed
    assert tiny.cli(*certify(made, "unsigned-too.json")).code == 0
    assert verify(made, "--allow-unsigned").code == 0 and "--public-key" in refusal(verify(made))
