"""Attacks on `verify --replay` and `certify --replay`: a ledger that agrees with itself and not with its sources."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from safetensors import safe_open
from safetensors.torch import save_file

import hfmerge
from hfmerge.hashing import canonical_json, sha256_bytes, sha256_file
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.card import card_facts, licence_note, render_card
from hfmerge.ledger.entry import check_chain
from tests.fixtures import launching, tiny
from tests.fixtures.shell import upload


pytestmark = pytest.mark.slow
Record = dict[str, Any]
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CLAIMS = {"cpu": "AVX9", "blas": "other", "machine": "sparc", "device": "Abacus", "threads_per_matrix": 2}
"""What a ledger may say of the machine that made it."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three fine-tunes of a base, and the merge of them after one has left; a key to sign with."""
    root = tmp_path_factory.mktemp("replayed")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    for i, name in enumerate(("m0", "m1", "m2"), 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    merge(root, root / "merged", "m0", "m1", "m2")
    tiny.done("unmerge", root / "merged", "--remove", "m1")
    (root / "key").write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (root / "key.pub").write_bytes(KEY.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return root


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Path:
    """A copy of the merge to spoil."""
    return Path(shutil.copytree(root / "merged", tmp_path / "merged"))


def merge(root: Path, out: Path, *models: str, method: str = "opcm") -> Path:
    flags = ("--base", root / "base", "--method", method, "--output", out)
    tiny.done("merge", *[root / model for model in models], *flags)
    return out


def ledger(out: Path) -> list[Path]:
    return sorted((out / "merge_history").glob("*.json"))


def record_of(out: Path) -> Record:
    found: Record = json.loads(ledger(out)[-1].read_bytes())
    return found


def forge(out: Path, *changes: Callable[[Record], object], record: Record | None = None) -> None:
    """Change the last entry, and all that names its digest, so that everything agrees with everything again."""
    path = ledger(out)[-1]
    record = record or json.loads(path.read_bytes())
    for change in changes:
        change(record)
    record["products"] |= {name: sha256_file(out / name) for name in record["products"] if name.endswith("tensors")}
    path.write_bytes(canonical_json(record))
    chain = check_chain({f"merge_history/{p.name}": p.read_bytes() for p in ledger(out)}, "here")
    (out / "README.md").write_text(render_card(chain, card_facts(chain[-1], None)), encoding="utf-8")
    note = licence_note([chain[-1].base, *chain[-1].models])
    if note is not None:
        (out / "LICENSE.md").write_text(note, encoding="utf-8")
    # the victim has not seen the merge before
    run = tiny.cli("verify", out, "--accept-rewritten")
    assert run.code == 0, run.out + run.err


def claims(**values: object) -> Callable[[Record], object]:
    return lambda record: record["environment"].update({**CLAIMS, **values})


def weights(out: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change every matrix of the merged weights."""
    tiny.edit(out, lambda held: held.update({key: change(value) for key, value in held.items() if value.dim() == 2}))


def refused(out: Path, *flags: object) -> str:
    """What a replay says that has to fail."""
    run = tiny.cli("verify", out, "--replay", *flags)
    lines = [line for line in run.out.splitlines() if line.startswith("FAIL replay: ")]
    assert run.code == 1 and lines, run.out + run.err
    return "\n".join(lines)


def certify(root: Path, out: Path, *flags: object, model: str = "m1") -> tiny.Run:
    return tiny.cli("certify", out, "--remove", model, "--key", root / "key", "--replay", *flags)


@pytest.mark.parametrize("told", [{"fingerprint": "0" * 64}, {"fingerprint": None}, {}, {"torch": "9.9"}])
def test_a_norm_of_1e30_buys_no_tolerance(root: Path, out: Path, told: Record) -> None:
    """The attacker publishes any weights, a norm of 1e30 and a processor that there is not."""
    weights(out, lambda value: torch.full_like(value, 7.0))
    forge(out, claims(**told), lambda record: record["byproducts"]["scalars"].update(merged_norm=1e30))
    text = refused(out)
    assert "the replay gives model.safetensors other bytes" in text
    assert "merged_norm is 1e+30 in merge_history/0002.json" in text
    for flags in ((), ("--accept-approximate",)):
        run = certify(root, out, *flags)
        assert run.code == 1 and "not certified; replay: " in run.err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_weights_that_are_not_finite_are_other_weights(out: Path, value: float) -> None:
    """The attacker puts one NaN into the weights, which no comparison with a bound finds."""

    def spoil(held: dict[str, torch.Tensor]) -> None:
        held["embeddings.word_embeddings.weight"][1, 2] = value

    tiny.edit(out, spoil)
    forge(out, claims(fingerprint="0" * 64))
    assert "embeddings.word_embeddings.weight " in refused(out)


def test_a_tensor_that_no_model_changes_has_no_tolerance(root: Path, tmp_path: Path) -> None:
    """The attacker changes what is copied from the base by less than other arithmetic could explain elsewhere."""
    out = tmp_path / "out"
    flags = ("--base", root / "base", "--method", "opcm", "--exclude", "*word_embeddings*", "--output", out)
    tiny.done("merge", root / "m0", root / "m1", *flags)

    def nudge(held: dict[str, torch.Tensor]) -> None:
        held["embeddings.word_embeddings.weight"] *= 1 + 2.0**-22

    tiny.edit(out, nudge)
    forge(out, claims(fingerprint="0" * 64))
    assert "word_embeddings.weight differs, and has to be the same everywhere" in refused(out)


def test_what_a_ledger_claims_of_its_machine_is_no_excuse(out: Path) -> None:
    """The attacker changes weights in their last bits and names another processor, library and device."""
    weights(out, lambda value: value * (1 + 2.0**-22))
    forge(out, claims())
    assert "the replay gives model.safetensors other bytes" in refused(out)


@pytest.mark.parametrize("told", ["0" * 64, None, "absent"])
def test_other_arithmetic_is_a_verdict_of_its_own(out: Path, told: str | None) -> None:
    """The attacker claims other arithmetic for changed last bits: no more than `approximate` can come of it."""
    weights(out, lambda value: value * (1 + 2.0**-22))

    def claim(record: Record) -> None:
        record["environment"]["fingerprint"] = told
        if told == "absent":
            del record["environment"]["fingerprint"]

    forge(out, claim)
    run = tiny.cli("verify", out, "--replay")
    assert run.code == 3 and "NEAR replay: " in run.out and "verified only within the tolerance" in run.out
    assert ("the arithmetic differs: fingerprint 000000000000, here " in run.out) is (told == "0" * 64)
    found = tiny.cli("verify", out, "--replay", "--json").json
    assert (found["ok"], found["verdict"], found["checks"][-1]["verdict"]) == (False, "approximate", "approximate")
    report = hfmerge.verify(out, replay=True)
    assert not report.ok and report.verdict == "approximate"


def test_equal_bytes_are_exact_whatever_is_claimed(out: Path) -> None:
    """Nobody attacks: a merge made elsewhere, whose bytes come out the same here, is verified."""
    forge(out, claims(fingerprint="0" * 64))
    assert "with the same bytes from 2 sources" in tiny.done("verify", out, "--replay").out


def test_a_certificate_over_approximate_weights_is_asked_for_and_says_so(
    root: Path, out: Path, tmp_path: Path
) -> None:
    """The attacker has a signer vouch for weights that the signer's machine does not give."""
    weights(out, lambda value: value * (1 + 2.0**-22))
    forge(out, claims(fingerprint="0" * 64))
    run = certify(root, out)
    assert run.code == 1 and "not certified" in run.err and "--accept-approximate" in run.err and not run.out
    file = tmp_path / "certificate.json"
    said = tiny.done(
        "certify", out, "--remove", "m1", "--key", root / "key", "--replay", "--accept-approximate", "--output", file,
        "--json",
    ).json["statement"]["predicate"]  # fmt: skip
    assert said["recomputed"] == "approximate" and "not byte for byte" in said["claim"]
    run = tiny.done("verify", out, "--certificate", file, "--public-key", root / "key.pub")
    assert "ok   recomputed: " in run.out and "not byte for byte" in run.out
    exact = tiny.done("certify", root / "merged", "--remove", "m1", "--replay", "--output", file, "--json").json
    assert exact["statement"]["predicate"]["recomputed"] == "exact"


def test_the_fingerprint_tells_what_no_name_does(root: Path, tmp_path: Path) -> None:
    """MKL_CBWR changes last bits, and neither processor nor version nor library shows it."""
    if not torch.backends.mkl.is_available():
        pytest.skip("torch is built without MKL here")

    def fresh(setting: str, *words: object) -> tiny.Run:
        """Python in a process of its own, in which the library reads the setting when it is loaded."""
        return tiny.finish(launching.start(*map(str, words), env={"MKL_CBWR": setting}, together=False))

    code = "import json; from hfmerge.engine.environment import environment as e; print(json.dumps([e(), e()]))"
    found = {}
    for setting in ("COMPATIBLE", "AVX2", "AVX2,STRICT"):
        twice = fresh(setting, "-c", code).json
        assert twice[0] == twice[1]
        found[setting] = twice[0]
    prints = {setting: one.pop("fingerprint") for setting, one in found.items()}
    assert found["COMPATIBLE"] == found["AVX2"], "nothing else shows it"
    assert prints["COMPATIBLE"] != prints["AVX2"] and len(prints["AVX2"]) == 64
    # and `verify` names it as the reason
    call = ("merge", root / "m0", root / "m1", "--base", root / "base", "--method", "opcm")
    run = fresh("COMPATIBLE", "-m", "hfmerge", *call, "--output", tmp_path / "out")
    assert run.code == 0, run.err
    run = fresh("AVX2", "-m", "hfmerge", "verify", tmp_path / "out", "--replay")
    same = "ok   replay: " in run.out
    assert run.code == (0 if same else 3), run.out
    assert same or "the arithmetic differs: fingerprint " in run.out


def test_a_run_is_not_gone_on_with_under_other_arithmetic(root: Path, tmp_path: Path) -> None:
    """A killed run whose other half comes from another arithmetic would be of both; it begins anew, or refuses."""
    if not torch.backends.mkl.is_available():
        pytest.skip("torch is built without MKL here")
    out = tmp_path / "out"
    call = ("merge", root / "m0", root / "m1", "--base", root / "base", "--method", "opcm", "--output", out)
    child = tiny.fork(tmp_path, call, steps=2, env={"MKL_CBWR": "COMPATIBLE"})
    child.wait_until_held()
    child.signal(9)
    assert child.end().code == -9
    again = ["-m", "hfmerge", *map(str, call), "--resume"]
    run = tiny.finish(launching.start(*again, env={"MKL_CBWR": "AVX2"}, together=False))
    assert run.code == 1 and "environment" in run.err


def strip(record: Record) -> None:
    """Leave out that a model is a merge itself, and what it holds."""
    for model in record["materials"]["models"]:
        model.pop("contains", None)
        model.pop("ledger", None)


def claim_removal(out: Path, before: Path, model: str, *changes: Callable[[Record], object]) -> None:
    """Make a merge the second step of another one, as if `model` had been taken out there."""
    record = record_of(out)
    first = ledger(before)[0].read_bytes()
    (out / "merge_history" / "0001.json").write_bytes(first)
    record |= {"step": 2, "parent": sha256_bytes(first)}
    record["action"] = {"type": "unmerge", "models": [model], "how": "merged again"}
    (out / "merge_history" / "0002.json").write_bytes(canonical_json(record))
    forge(out, *changes)


def test_a_removed_model_inside_a_merge_whose_record_was_stripped(root: Path, tmp_path: Path) -> None:
    """The attacker keeps a removed model within an inner merge, and strikes out what the ledger says of that one."""
    inner = merge(root, tmp_path / "inner", "m1", "m2")
    before = merge(root, tmp_path / "before", str(inner), "m0", "m1")
    out = merge(root, tmp_path / "out", str(inner), "m0")
    claim_removal(out, before, "m1", strip)
    text = refused(out)
    assert "materials.models[0].contains is nothing in merge_history/0002.json" in text
    assert "materials.models[0].ledger is nothing" in text
    run = certify(root, out)
    assert run.code == 1 and "not certified; replay: materials.models[0]." in run.err


def test_a_removed_model_under_another_name_within_an_inner_merge(root: Path, tmp_path: Path) -> None:
    """The attacker has merged a copy of the model under another name, and that merge into this one."""
    copy = Path(shutil.copytree(root / "m1", tmp_path / "innocent"))
    inner = merge(root, tmp_path / "inner", str(copy), "m2")
    before = merge(root, tmp_path / "before", str(inner), "m0", "m1")
    out = merge(root, tmp_path / "out", str(inner), "m0")
    claim_removal(out, before, "m1")
    for run in (certify(root, out), tiny.cli("certify", out, "--remove", "m1")):
        assert run.code == 1 and "the same weights are still in it as innocent@" in run.err, run.err


def test_a_folder_s_digests_have_to_give_its_own(root: Path, tmp_path: Path) -> None:
    """The attacker lists a copy of the removed model without the digest of its weights; no replay is needed."""
    copy = Path(shutil.copytree(root / "m1", tmp_path / "innocent"))
    before = merge(root, tmp_path / "before", "m0", "m1")
    out = merge(root, tmp_path / "out", "m0", str(copy))
    claim_removal(out, before, "m1")
    run = tiny.cli("certify", out, "--remove", "m1")
    assert run.code == 1 and "the same weights are still in it as innocent@" in run.err
    with pytest.raises(AssertionError, match="FAIL materials: innocent@"):
        forge(out, lambda record: record["materials"]["models"][1]["files"].pop("model.safetensors"))
    assert tiny.cli("certify", out, "--remove", "m1").code == 1


# On the Hub models are known by their commit, so that the ledger alone says what their files were.


@pytest.fixture(scope="module")
def hubbed(root: Path, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of a plain model, one with a head, a merge and an adapter on another model, all from the Hub."""
    folder = tmp_path_factory.mktemp("from-hub")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", num_hidden_layers=1))
    tiny.save(base, folder / "base")
    for i, name in enumerate(("m0", "m1", "under"), 1):
        tiny.save(tiny.fine_tune(base, i), folder / name)
    (folder / "m0" / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    shutil.copytree(folder / "m1", folder / "innocent")
    (folder / "innocent" / "README.md").write_text("Another model.\n")
    tiny.save(tiny.with_head("LlamaForSequenceClassification", base, 7, ["a", "b"]), folder / "headed")
    tiny.adapter(folder / "a0", {name: size for name, size in tiny.attention().items() if ".0." in name}, 9)
    names = ("base", "m0", "m1", "under", "innocent", "headed", "a0")
    upload(hub, tmp_path_factory.mktemp("home"), {f"rp/{name}": folder / name for name in names})
    tiny.done("merge", "rp/m0", "rp/m1", "--base", "rp/base", "--method", "linear", "--push-to", "rp/inner")
    models = ("rp/m0", "rp/headed", "rp/inner", "rp/under+rp/a0")
    flags = ("--base", "rp/base", "--method", "opcm", "--state", "all", "--output", folder / "out")
    tiny.done("merge", *models, *flags)
    return folder


def test_the_merge_from_the_hub_is_replayed_as_it_is(hubbed: Path) -> None:
    """Nobody attacks: every field comes out again."""
    run = tiny.done("verify", hubbed / "out", "--replay")
    assert "with the same bytes from 4 sources, and merge_history/0001.json with the same fields" in run.out


def test_a_removed_model_under_another_name_without_its_digest(root: Path, hubbed: Path, tmp_path: Path) -> None:
    """The attacker merges a copy of the removed model and leaves the digest of its weights out of the ledger."""
    flags = ("--base", "rp/base", "--method", "linear", "--output")
    tiny.done("merge", "rp/m0", "rp/m1", *flags, tmp_path / "before")
    tiny.done("merge", "rp/m0", "rp/innocent", *flags, tmp_path / "out")
    hide = lambda record: record["materials"]["models"][1]["files"].pop("model.safetensors")  # noqa: E731
    claim_removal(tmp_path / "out", tmp_path / "before", "rp/m1", hide)
    assert "materials.models[1].files.model.safetensors is nothing" in refused(tmp_path / "out")
    run = certify(root, tmp_path / "out", model="rp/m1")
    assert run.code == 1 and "not certified" in run.err


def put(*path: str | int, to: Any) -> Callable[[Record], object]:
    """Sets the value at a place; a function is given the old one."""

    def change(record: Any) -> None:
        for part in path[:-1]:
            record = record[part]
        record[path[-1]] = to(record[path[-1]]) if callable(to) else to

    return change


def model(i: int, *path: str, to: Any) -> Callable[[Record], object]:
    return put("materials", "models", i, *path, to=to)


def other(value: str) -> str:
    return "0" * len(value)


def a_little(value: float) -> float:
    return value * (1 + 1e-9)


FIELDS: dict[str, Callable[[Record], object]] = {
    "materials.base.files": put("materials", "base", "files", "model.safetensors", to=other),
    "materials.base.kind": put("materials", "base", "kind", to="adapter"),
    "materials.base.license": put("materials", "base", "license", to="mit"),
    "materials.base.squared_norm": put("materials", "base", "squared_norm", to=1.0),
    "materials.base.ledger": put("materials", "base", "ledger", to="0" * 64),
    "materials.base.contains": put("materials", "base", "contains", to=["rp/m9@" + "0" * 40]),
    "materials.base.head": put("materials", "base", "head", to="heads/rp--headed"),
    "materials.base.labels": put("materials", "base", "labels", to=["x"]),
    "materials.models[0].files": model(0, "files", "config.json", to=other),
    "materials.models[0].kind": model(0, "kind", to="adapter"),
    "materials.models[0].weight": model(0, "weight", to=1.5),
    "materials.models[0].squared_norm": model(0, "squared_norm", to=a_little),
    "materials.models[0].license": model(0, "license", to="apache-2.0"),
    "materials.models[0].subtracted": model(0, "subtracted", to=True),
    "materials.models[1].head": model(1, "head", to=None),
    "materials.models[1].labels": model(1, "labels", to=["good", "bad"]),
    "materials.models[2].ledger": model(2, "ledger", to=other),
    "materials.models[2].contains": model(2, "contains", to=lambda held: held[:-1]),
    "materials.models[3].beneath": model(3, "beneath", to=lambda held: held.replace("rp/under", "rp/m1")),
    "materials.models[3].files": model(3, "files", "+model.safetensors", to=other),
    "method.version": put("method", "version", to=lambda value: value + 1),
    "method.options": put("method", "options", "alpha", to=0.25),
    "method.norm": put("method", "norm", to=2.0),
    "settings.dtype": put("settings", "dtype", to="float16"),
    "settings.exclude": put("settings", "exclude", to=["*norm*"]),
    "settings.card": put("settings", "card", "pipeline_tag", to="fill-mask"),
    "settings.card.architecture": put("settings", "card", "architecture", to="GPT2Model"),
    "byproducts.scalars.scale": put("byproducts", "scalars", "scale", to=a_little),
    "byproducts.scalars.merged_norm": put("byproducts", "scalars", "merged_norm", to=a_little),
    "byproducts.scalars.grid": put("byproducts", "scalars", to=lambda held: {**held, "grid": 1.0}),
    "byproducts.scalars.gap": put("byproducts", "scalars", to=lambda held: {**held, "gap": 0.0, "gap_bound": 0.0}),
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_an_entry_is_compared(hubbed: Path, tmp_path: Path, field: str) -> None:
    """The attacker changes one field of the last entry, and everything that names the entry's digest."""
    out = Path(shutil.copytree(hubbed / "out", tmp_path / "out"))
    forge(out, FIELDS[field])
    text = refused(out)
    told = "no such branch, tag or commit" if field == "materials.models[3].beneath" else field
    # files are compared before anything is merged, and what a merge is made from shows in its weights
    before = field.endswith(".files") and "is not the file that was merged" in text
    assert told in text or before or "other bytes" in text, text


def test_a_kept_state_that_its_sources_do_not_give(hubbed: Path, tmp_path: Path) -> None:
    """The attacker poisons the carried state, from which the next `add` goes on; the weights are as they should be."""
    out = Path(shutil.copytree(hubbed / "out", tmp_path / "out"))
    for at in (0, 3):
        record = record_of(out)
        state = record["byproducts"]["states"][at]
        path = out / "merge_state" / f"{state['sha256']}.safetensors"
        with safe_open(path, "pt") as held:
            tensors = {key: held.get_tensor(key) for key in held.keys()}
        name = sorted(tensors)[0]
        save_file({**tensors, name: tensors[name] + 1}, path)
        state |= {"sha256": sha256_file(path), "nbytes": os.path.getsize(path)}
        os.rename(path, path.with_name(f"{state['sha256']}.safetensors"))
        forge(out, record=record)
        assert f"byproducts.states[{at}].sha256 is " in refused(out)


def test_a_file_that_no_replay_makes(hubbed: Path, tmp_path: Path) -> None:
    """The attacker adds a file to the output, and to the ledger."""
    out = Path(shutil.copytree(hubbed / "out", tmp_path / "out"))
    (out / "chat_template.jinja").write_text("{{ 'anything' }}")
    digest = sha256_file(out / "chat_template.jinja")
    forge(out, lambda record: record["products"].update({"chat_template.jinja": digest}))
    assert "the replay gives chat_template.jinja other bytes" in refused(out)


def test_states_that_a_ledger_does_not_list_are_not_asked_for(hubbed: Path, tmp_path: Path) -> None:
    """Nobody attacks: machines without a common disk keep no state, and some states are lost on the way."""
    out = Path(shutil.copytree(hubbed / "out", tmp_path / "out"))
    for left in (1, 0):
        record = record_of(out)
        for state in record["byproducts"]["states"][left:]:
            (out / "merge_state" / f"{state['sha256']}.safetensors").unlink()
        del record["byproducts"]["states"][left:]
        forge(out, record=record)
        assert "with the same fields" in tiny.done("verify", out, "--replay").out
