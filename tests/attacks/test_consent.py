"""Consent comes from the caller: neither a ledger nor a repository gets code run, a pickle read, or a file loaded."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from safetensors.torch import load_file

import hfmerge
from hfmerge.engine.options import RunOptions
from hfmerge.errors import HfMergeError
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import tiny
from tests.fixtures.shell import upload


MODELS = ("m0", "m1", "m2", "m3")
CODE = """
import os
import transformers

if "CANARY" in os.environ:
    with open(os.environ["CANARY"], "a") as file:
        file.write("ran")


class BertModel(transformers.BertModel):
    pass
"""
"""What a stranger's repository would have run; a merge does not need it, since transformers has such a class."""
SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 12}


def with_code(folder: Path) -> None:
    """Give a model code of its own; new text every time, because transformers runs a text once in a process."""
    tiny.edit_config(folder, auto_map={"AutoModel": "modeling_stranger.BertModel"})
    (folder / "modeling_stranger.py").write_text(f"{CODE}# {uuid.uuid4()}\n")


def models(root: Path) -> Path:
    """A base and fine-tunes, of which the base and m1 have code of their own; another base without any."""
    base = tiny.build("BertModel", tiny.config("bert", **SMALL))
    tiny.save(base, root / "base")
    tiny.save(tiny.fine_tune(base, 50, 0.01), root / "base2")
    for i, name in enumerate(MODELS, 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    with_code(root / "base")
    with_code(root / "m1")
    return root


def merge(root: Path, out: Path, *flags: object, count: int = 3) -> Path:
    named = [root / name for name in MODELS[:count]]
    tiny.done("merge", *named, "--base", root / "base", "--method", "ties", "--output", out, *flags)
    return out


def lying(out: Path, **settings: object) -> Path:
    """Have the ledger say other settings in every entry, with a chain and a card that fit, as its owner could."""
    parent: str | None = None
    card = (out / "README.md").read_text()
    for path in sorted((out / "merge_history").iterdir()):
        before = sha256_bytes(path.read_bytes())
        entry = json.loads(path.read_bytes())
        entry["settings"] |= settings
        path.write_bytes(canonical_json(entry | {"parent": parent}))
        parent = sha256_bytes(path.read_bytes())
        card = card.replace(before, parent).replace(before[:12], parent[:12])
    (out / "README.md").write_text(card)
    run = tiny.cli("verify", out)
    assert run.code == 0, run.out
    return out


def places(root: Path, *names: str) -> list[str]:
    """Where the folders lie that were merged, said by the caller."""
    return [word for name in names for word in ("--source", f"{name}={root / name}")]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with code of their own, and merges of them whose ledgers say that it may be run."""
    root = models(tmp_path_factory.mktemp("stranger"))
    lying(merge(root, root / "merged"), trust_remote_code=True)
    lost = merge(root, root / "lost")
    tiny.done("unmerge", lost, "--remove", "m2")
    lying(lost, trust_remote_code=True)
    return root


@pytest.fixture
def canary(stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the stranger's code writes if anybody runs it."""
    for name in ("base", "m1"):
        (stranger / name / "modeling_stranger.py").write_text(f"{CODE}# {uuid.uuid4()}\n")
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    return tmp_path / "canary"


def signing_key(path: Path) -> Path:
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return path


COMMANDS: Mapping[str, tuple[str, ...]] = {
    "verify": ("verify", "{merged}", "--replay"),
    "unmerge": ("unmerge", "{merged}", "--remove", "m0", "--output", "{out}"),
    "add": ("add", "{merged}", "{root}/m3", "--output", "{out}"),
    "replace": ("replace", "{merged}", "m0", "{root}/m3", "--output", "{out}"),
    "reorder": ("reorder", "{merged}", "m2", "m1", "m0", "--output", "{out}"),
    "rebase": ("rebase", "{merged}", "--base", "{root}/base2", "--output", "{out}"),
    "inspect": ("inspect", "{merged}", "--no-spectra"),
    "certify": ("certify", "{lost}", "--remove", "m2", "--replay", "--key", "{key}", "--output", "{out}"),
}


def command(name: str, root: Path, tmp_path: Path) -> list[str]:
    """A command on a copy of the merge, with the places of all folders that its ledger names."""
    which, names = ("lost", ("base", "m0", "m1")) if name == "certify" else ("merged", ("base", "m0", "m1", "m2"))
    shutil.copytree(root / which, tmp_path / which)
    place = {"merged": tmp_path / "merged", "lost": tmp_path / "lost", "root": root, "out": tmp_path / "out"}
    words = [word.format(**place, key=signing_key(tmp_path / "key")) for word in COMMANDS[name]]
    return [*words, *places(root, *names)]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_ledger_gets_no_code_run(name: str, stranger: Path, canary: Path, tmp_path: Path) -> None:
    """The attacker's base and model name code of their own, and the ledger of the merge says that it may be run."""
    run = tiny.cli(*command(name, stranger, tmp_path))
    assert not canary.exists()
    assert run.code == 1 and not (tmp_path / "out").exists()
    said = run.out + run.err
    assert "--trust-remote-code" in said and "modeling_stranger" in said
    assert str(stranger / ("m1" if name == "rebase" else "base")) in said


@pytest.mark.slow
def test_without_a_need_of_code_a_ledger_that_says_so_is_no_hindrance(
    stranger: Path, canary: Path, tmp_path: Path
) -> None:
    """The attacker's ledger says that code may be run, though no model has any, and the flag is not given."""
    root = tmp_path / "plain"
    shutil.copytree(stranger, root)
    for name in ("base", "m1"):
        tiny.edit_config(root / name, auto_map=None)
        (root / name / "modeling_stranger.py").unlink()
    out = lying(merge(root, tmp_path / "out"), trust_remote_code=True)
    tiny.done("verify", out, "--replay", *places(root, "base", "m0", "m1", "m2"))
    tiny.done("add", out, root / "m3", *places(root, "base", "m0", "m1", "m2"))
    assert json.loads((out / "merge_history" / "0002.json").read_bytes())["settings"]["trust_remote_code"] is False


@pytest.mark.slow
def test_on_the_hub_too(stranger: Path, canary: Path, hub: HubServer, tmp_path: Path) -> None:
    """The attacker publishes such a base and such a merge, and the victim replays it, adds to it and looks into it."""
    names = ("base", *MODELS)
    upload(hub, tmp_path / "home", {f"evil/{name}": stranger / name for name in names})
    recipe = hfmerge.Recipe(
        base="evil/base",
        models=tuple(hfmerge.ModelEntry(f"evil/{name}") for name in MODELS[:2]),
        method=hfmerge.MethodChoice("ties", {}, "none"),
    )
    hfmerge.merge(recipe, output=tmp_path / "merged")
    upload(hub, tmp_path / "home", {"evil/merged": lying(tmp_path / "merged", trust_remote_code=True)})
    for words in (
        ("verify", "evil/merged", "--replay"),
        ("add", "evil/merged", "evil/m2", "--output", tmp_path / "out"),
        ("inspect", "evil/merged", "--no-spectra"),
    ):
        run = tiny.cli(*words)
        assert run.code == 1 and not canary.exists()
        assert "--trust-remote-code" in run.out + run.err and "evil/base@" in run.out + run.err
    tiny.done("verify", "evil/merged")


@pytest.mark.slow
def test_the_flag_of_this_run_allows_it(stranger: Path, canary: Path, tmp_path: Path) -> None:
    """No attack: who gives the flag, or a recipe that says so, gets what it says, and the code with its digest."""
    folders = places(stranger, "base", "m0", "m1")
    out = merge(stranger, tmp_path / "out", "--trust-remote-code", count=2)
    assert canary.exists()
    entry = json.loads((out / "merge_history" / "0001.json").read_bytes())
    assert entry["settings"]["trust_remote_code"] is True and "modeling_stranger.py" in entry["products"]
    tiny.done("verify", out, "--replay", "--trust-remote-code", *folders)
    assert hfmerge.verify(out, replay=True, trust_remote_code=True).ok
    with pytest.raises(HfMergeError, match="pass `trust_remote_code=True` if you trust"):
        hfmerge.add(out, [str(stranger / "m2")])
    hfmerge.add(out, [str(stranger / "m2")], options=RunOptions(trust_remote_code=True))
    assert (out / "modeling_stranger.py").is_file()
    tiny.done("reorder", out, "m2", "m1", "m0", "--trust-remote-code")
    tiny.done("verify", out, "--replay", "--trust-remote-code")
    tiny.done("inspect", out, "--no-spectra", "--trust-remote-code")


@pytest.mark.slow
def test_a_branch_called_like_a_commit_gives_no_other_code(
    stranger: Path, canary: Path, hub: HubServer, tmp_path: Path
) -> None:
    """The attacker names a branch with the first digits of the commit whose code the caller has read and trusts."""
    from huggingface_hub import HfApi

    api = HfApi()
    upload(hub, tmp_path / "home", {"evil/pinned": stranger / "base"})
    commit = str(api.model_info("evil/pinned").sha)
    api.create_branch("evil/pinned", branch=commit[:8])
    other = CODE.replace('"ran"', '"other code ran"').encode()
    api.upload_file(
        repo_id="evil/pinned", path_or_fileobj=other, path_in_repo="modeling_stranger.py", revision=commit[:8]
    )
    words = ("merge", stranger / "m0", stranger / "m2", "--base", f"evil/pinned@{commit}", "--method", "ties")
    tiny.done(*words, "--trust-remote-code", "--output", tmp_path / "out")
    assert set(canary.read_text().split("ran")) == {""}


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


class Bomb:
    """An object whose pickle runs a command when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {os.environ['CANARY']}",)


@pytest.fixture(scope="module")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of a base and models whose weights are pickles, those of the base and of m1."""
    root = models(tmp_path_factory.mktemp("pickles"))
    for name in ("base", "m1"):
        pickled(root / name)
    merge(root, root / "merged", "--allow-pickle")
    assert json.loads((root / "merged/merge_history/0001.json").read_bytes())["settings"]["allow_pickle"] is True
    return root


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("rebase", "certify")])
def test_a_ledger_gets_no_pickle_read(
    name: str, malicious: bool, pickles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attacker's base is a pickle, maybe one that runs a command, and the ledger says that it may be read."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    root = Path(shutil.copytree(pickles, tmp_path / "root"))
    if malicious:
        torch.save({"weights": Bomb()}, root / "base" / "pytorch_model.bin")
    run = tiny.cli(*command(name, root, tmp_path))
    assert run.code == 1 and not (tmp_path / "canary").exists() and not (tmp_path / "out").exists()
    assert "only pickled weights (pytorch_model.bin)" in run.out + run.err and "--allow-pickle" in run.out + run.err


@pytest.mark.slow
def test_a_certificate_needs_the_flag_for_pickles(pickles: Path, tmp_path: Path) -> None:
    """The attacker asks for a replayed certificate of a merge whose base is a pickle."""
    root = Path(shutil.copytree(pickles, tmp_path / "root"))
    shutil.copytree(root / "merged", root / "lost")
    tiny.done("unmerge", root / "lost", "--remove", "m2", "--allow-pickle", *places(root, "base", "m0", "m1", "m2"))
    words = command("certify", root, tmp_path)
    run = tiny.cli(*words)
    assert run.code == 1 and "--allow-pickle" in run.err and not (tmp_path / "out").exists()
    tiny.done(*words, "--allow-pickle")


@pytest.mark.slow
def test_the_flag_of_this_run_allows_pickles(pickles: Path, tmp_path: Path) -> None:
    """No attack: with the flag pickles are read as before, and the ledger says so only while they are needed."""
    out = Path(shutil.copytree(pickles / "merged", tmp_path / "out"))
    folders = places(pickles, "base", "m0", "m1", "m2")
    tiny.done("verify", out, "--replay", "--allow-pickle", *folders)
    tiny.done("add", out, pickles / "m3", "--allow-pickle", *folders)
    tiny.done("unmerge", out, "--remove", "m0", "--allow-pickle", *folders)
    tiny.done("rebase", out, "--base", pickles / "base2", "--allow-pickle", *places(pickles, "m1", "m2"))
    tiny.done("unmerge", out, "--remove", "m1", "--allow-pickle", *places(pickles, "base2", "m1", "m2"))
    assert json.loads((out / "merge_history" / "0005.json").read_bytes())["settings"]["allow_pickle"] is False
    tiny.done("verify", out, "--replay")


@pytest.mark.slow
def test_code_that_nobody_asked_for_is_not_in_the_output(stranger: Path, canary: Path, tmp_path: Path) -> None:
    """The attacker's base holds code under many names, also under those of a tokenizer; nobody has trusted it."""
    base = Path(shutil.copytree(stranger / "base", tmp_path / "base"))
    for name in ("tokenizer.py", "vocab.pkl", "custom_generate/generate.py", "custom_generate/requirements.txt"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("print('code')")
    named = [stranger / name for name in MODELS[:2]]
    flags = ("--base", base, "--method", "linear")
    tiny.done("merge", *named, *flags, "--output", tmp_path / "out")
    held = tiny.everything(tmp_path / "out")
    assert not [name for name in held if name.endswith((".py", ".pkl")) or name.startswith("custom_generate/")]
    tiny.done("verify", tmp_path / "out")
    tiny.done("merge", *named, *flags, "--output", tmp_path / "trusted", "--trust-remote-code")
    products = json.loads((tmp_path / "trusted/merge_history/0001.json").read_bytes())["products"]
    code = ["custom_generate/generate.py", "custom_generate/requirements.txt", "modeling_stranger.py", "tokenizer.py"]
    assert [name for name in products if name in code or name.endswith((".py", ".pkl"))] == code
    tiny.done("verify", tmp_path / "trusted")
    (tmp_path / "trusted" / "tokenizer.py").write_text("print('other code')")
    assert tiny.cli("verify", tmp_path / "trusted").code == 1


@pytest.mark.slow
def test_restore_copies_no_code_that_nobody_allowed(stranger: Path, hub: HubServer, tmp_path: Path) -> None:
    """The attacker's merge had files of code at an earlier step, and the victim goes back to it."""
    out = merge(stranger, tmp_path / "merged", "--trust-remote-code")
    tiny.done("push", lying(out, trust_remote_code=False), "evil/earlier")
    folders = places(stranger, "base", "m0", "m1", "m2")
    tiny.done("unmerge", "evil/earlier", "--remove", "m2", "--push-to", "evil/earlier", *folders)
    words = ("restore", "evil/earlier", "--step", "1", "--output", tmp_path / "out")
    run = tiny.cli(*words)
    assert run.code == 1 and not (tmp_path / "out").exists()
    assert "modeling_stranger.py" in run.err and "--trust-remote-code" in run.err
    tiny.done(*words, "--trust-remote-code")
    assert (tmp_path / "out" / "modeling_stranger.py").is_file()


def test_what_a_folder_holds_beside_its_ledger_does_not_come_along(stranger: Path, tmp_path: Path) -> None:
    """The attacker's merge folder holds a file of code that its ledger does not know, and the victim adds a model."""
    out = Path(shutil.copytree(stranger / "lost", tmp_path / "merged"))
    lying(out, trust_remote_code=False)
    (out / "custom_generate").mkdir()
    (out / "custom_generate" / "generate.py").write_text("print('code')")
    before = tiny.everything(out)
    words = ("add", out, stranger / "m3", *places(stranger, "base", "m0", "m1"))
    run = tiny.cli(*words)
    assert run.code == 1 and "holds custom_generate/generate.py" in run.err and tiny.everything(out) == before
    tiny.done(*words, "--output", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "custom_generate").exists()


UNLISTED = (
    *("modeling.py", "custom_generate/generate.py", "custom_generate/requirements.txt", "src/deep/handler.py"),
    *("chat_template.json", "chat_template.jinja", "spm.model", "sentencepiece.model", "entity_vocab.json"),
    *("tekken.json", "tokenizer.model", "added_tokens.json", "audio_tokenizer_config.json", "source.spm"),
    *("emoji.json", "target_vocab.json", "decision.json", "export.json", "router_config.json", "notes.txt"),
    *("flax_model.msgpack", "tf_model.h5", "model.onnx", "model.gguf", "rust_model.ot", "model.ckpt.index"),
    *("pytorch_model.bin", "model.safetensors.index.json", "spk_dict.pt", "training_args.bin", "openvino_model.xml"),
    *("onnx/model.onnx", "onnx/model.onnx_data", "coreml/model.mlpackage/Data/weights", "unet/config.json"),
    *("text_encoder/tokenizer/vocab.json", "model_index.json", "1_Pooling/config.json", "2_Dense/pytorch_model.bin"),
    *("heads/other/config.json", "adapter_config.json", "adapter_model.safetensors", "eval.json", "run.sh"),
    *(".eval_results/other.yaml", ".eval_results/hfmerge-x/generate.py", ".cache/model.py", "merge_state/x.json"),
    *("merge_state/sources/other.zip", "images/plot.png.py", "model.safetensors.md5"),
)
"""Whatever some loader may read, and what nobody knows the use of."""
ADDED = (
    *("notes.md", "docs/how.md", "plot.png", "images/Photo.JPG", "images/a.gif", "b.svg", "c.webp", "d.jpeg"),
    *(".gitattributes", ".gitignore", ".git/config", ".cache/huggingface/download/model.safetensors.metadata"),
    *("figures/spectra.png", "figures/spectra.svg", ".eval_results/hfmerge-glue.yaml"),
)
"""What people and hfmerge add to a merge."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = models(tmp_path_factory.mktemp("plain"))
    merge(root, root / "merged", count=2)
    return root / "merged"


@pytest.mark.parametrize("name", UNLISTED)
def test_a_file_that_the_ledger_does_not_know_fails_verification(plain: Path, name: str) -> None:
    """The attacker puts a file into a merge that a loader reads, under a name that the ledger does not have."""
    path = plain / name
    made = [folder for folder in path.relative_to(plain).parents if not (plain / folder).exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    run = tiny.cli("verify", plain)
    path.unlink()
    for folder in made:
        (plain / folder).rmdir()
    assert run.code == 1 and f"FAIL {name}: " in run.out
    assert tiny.cli("verify", plain).code == 0


def test_what_people_may_add_verifies(plain: Path, tmp_path: Path) -> None:
    """No attack: pictures, Markdown, and what git, the Hub's client and hfmerge's own commands leave."""
    out = Path(shutil.copytree(plain, tmp_path / "out"))
    for name in ADDED:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    tiny.done("verify", out)


@pytest.mark.slow
def test_files_more_in_a_repository_of_the_hub(plain: Path, hub: HubServer, tmp_path: Path) -> None:
    """The attacker puts such files into a published merge, by a commit of his own."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    upload(hub, tmp_path / "home", {"evil/listed": plain})
    api = HfApi()
    api.create_commit(
        "evil/listed",
        [CommitOperationAdd(name, b"mine") for name in ("notes.md", "a/plot.png")],
        commit_message="card",
    )
    tiny.done("verify", "evil/listed")
    bad = ("custom_generate/generate.py", "modeling.py", "spm.model", "onnx/model.onnx", "chat_template.json")
    api.create_commit("evil/listed", [CommitOperationAdd(name, b"{}") for name in bad], commit_message="more")
    run = tiny.cli("verify", "evil/listed")
    assert run.code == 1 and all(f"FAIL {name}: " in run.out for name in bad)
    api.create_commit("evil/listed", [CommitOperationDelete(name) for name in bad], commit_message="less")
    tiny.done("verify", "evil/listed")


@pytest.mark.slow
def test_what_a_tokenizer_reads_comes_from_the_base_and_is_in_the_ledger(tmp_path: Path) -> None:
    """The attacker changes a file that only some tokenizers read; it has to be in the output for that, and listed."""
    root = models(tmp_path / "root")
    read = ("spm.model", "sentencepiece.model", "entity_vocab.json", "tekken.json", "chat_template.json", "source.spm")
    read += ("audio_tokenizer_config.json", "video_preprocessor_config.json", "bpe.codes", "qwen.tiktoken")
    read += ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json")
    for name in read:
        (root / "base" / name).parent.mkdir(exist_ok=True)
        (root / "base" / name).write_text("{}")
    out = merge(root, tmp_path / "out", count=2)
    products = json.loads((out / "merge_history" / "0001.json").read_bytes())["products"]
    assert set(read) <= set(products)
    tiny.done("verify", out)
    for name in read:
        (out / name).write_text("{} ")
        assert f"FAIL {name}: " in tiny.cli("verify", out).out
        (out / name).write_text("{}")
    tiny.done("verify", out)
