"""Files that a loader is led to, code that a third party names, and what else lies between two parts."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hfmerge
from hfmerge.errors import HfMergeError, SourceError
from hfmerge.evaluation.harnesses import mteb_score
from hfmerge.evaluation.models import open_subject
from hfmerge.evaluation.suite import Task
from hfmerge.hashing import canonical_json, sha256_bytes, sha256_file
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import tiny
from tests.fixtures.shell import upload


SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 12}


def models(root: Path) -> Path:
    base = tiny.build("BertModel", tiny.config("bert", **SMALL))
    tiny.save(base, root / "base")
    for i, name in enumerate(("m0", "m1"), 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    return root


def merge(root: Path, out: Path, *flags: object) -> tiny.Run:
    return tiny.cli(
        "merge", root / "m0", root / "m1", "--base", root / "base", "--method", "linear", "--output", out, *flags
    )


def relisted(out: Path, *, gone: Iterable[str] = (), new: Iterable[str] = ()) -> Path:
    """Have the last entry of a merge list other products, with a card that fits, as its owner could."""
    path = max((out / "merge_history").iterdir())
    before = sha256_bytes(path.read_bytes())
    entry = json.loads(path.read_bytes())
    products = {name: digest for name, digest in entry["products"].items() if name not in gone}
    entry["products"] = dict(sorted({**products, **{name: sha256_file(out / name) for name in new}}.items()))
    path.write_bytes(canonical_json(entry))
    after = sha256_bytes(path.read_bytes())
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace(before, after).replace(before[:12], after[:12]))
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models and a merge of them."""
    root = models(tmp_path_factory.mktemp("plain"))
    assert merge(root, root / "merged").code == 0
    return root


@pytest.mark.parametrize("place", ["text", "nested"])
def test_a_configuration_names_other_weights(place: str, plain: Path, tmp_path: Path) -> None:
    """The attacker's base has transformers read weights from a file that hfmerge neither merges nor looks at."""
    root = Path(shutil.copytree(plain, tmp_path / "root"))
    named = {"transformers_weights": ".cache/huggingface/x.safetensors"}
    tiny.edit_config(root / "base", **(named if place == "text" else {"text_config": named}))
    run = merge(root, tmp_path / "out")
    assert run.code == 1 and not (tmp_path / "out").exists()
    assert "transformers_weights: names" in run.err


def test_a_name_of_the_usual_weights_does_not_come_along(plain: Path, tmp_path: Path) -> None:
    """No attack: the base names its weights, which the output may store in other files."""
    root = Path(shutil.copytree(plain, tmp_path / "root"))
    tiny.edit_config(root / "base", transformers_weights="model.safetensors")
    assert merge(root, tmp_path / "out").code == 0
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())


def led_astray(out: Path, kind: str) -> str:
    """Make a loader of a merge read a file that only people or tools should have put there; its name."""
    if kind == "index":
        keys = list(load_file(out / "model.safetensors"))
        torch.save(load_file(out / "model.safetensors"), out / "plot.png")
        (out / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "plot.png")}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        relisted(out, gone=["model.safetensors"], new=["model.safetensors.index.json"])
        return "plot.png"
    hidden = ".cache/huggingface/x"
    (out / hidden).mkdir(parents=True)
    if kind == "configuration":
        hidden += "/w.safetensors"
        shutil.copy(out / "model.safetensors", out / hidden)
        tiny.edit_config(out, transformers_weights=hidden)
        relisted(out, new=["config.json"])
    elif kind == "modules":
        (out / "modules.json").write_text(json.dumps([{"path": hidden, "type": "sentence_transformers.models.Dense"}]))
        relisted(out, new=["modules.json"])
    elif kind == "twice":
        text = (out / "config.json").read_text().rstrip("}\n ")
        hidden += "/w.safetensors"
        text += f', "transformers_weights": "{hidden}", "transformers_weights": null}}'
        (out / "config.json").write_text(text)
        relisted(out, new=["config.json"])
    else:
        hidden = ".git/tokenizer.4.0.0.json"
        (out / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": [f"./{hidden}"]}))
        relisted(out, new=["tokenizer_config.json"])
    return hidden


@pytest.mark.parametrize("kind", ["index", "configuration", "twice", "modules", "tokenizer"])
def test_a_listed_file_leads_a_loader_to_one_that_is_not_listed(kind: str, plain: Path, tmp_path: Path) -> None:
    """The attacker lists a small file that has loaders read weights from a picture, or from where only tools write."""
    out = Path(shutil.copytree(plain / "merged", tmp_path / "out"))
    tiny.done("verify", out)
    name = led_astray(out, kind)
    run = tiny.cli("verify", out)
    assert run.code == 1 and f'makes a loader read "{name}", which the ledger does not know' in run.out


@pytest.mark.slow
def test_on_the_hub_a_listed_file_leads_to_a_picture(plain: Path, hub: HubServer, tmp_path: Path) -> None:
    """The attacker publishes such a merge; its weights, in a picture, could change later under the same history."""
    out = Path(shutil.copytree(plain / "merged", tmp_path / "out"))
    led_astray(out, "index")
    upload(hub, tmp_path / "home", {"evil/pictured": out})
    for words in ((), ("--download",)):
        run = tiny.cli("verify", "evil/pictured", *words)
        assert run.code == 1 and 'makes a loader read "plot.png"' in run.out


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that keeps the head of one of its sources."""
    root = models(tmp_path_factory.mktemp("headed"))
    base = tiny.build("BertModel", tiny.config("bert", **SMALL))
    shutil.rmtree(root / "m0")
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 3, ["a", "b"]), root / "m0")
    assert merge(root, root / "merged").code == 0
    return root / "merged"


HEADS: Mapping[str, dict[str, object]] = {
    "no class of models": {"architectures": ["pipeline"]},
    "a class that looks for code": {"architectures": ["AutoModel"], "auto_map": {"AutoModel": "evil/x--m.C"}},
    "other weights": {"transformers_weights": "x.safetensors"},
    "a quantiser": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "layers without end": {"num_hidden_layers": 10**7},
    "a width that is text": {"hidden_size": "8"},
    "a width of its own": {"hidden_size": 12},
    "no model type": {"model_type": ["bert"]},
    "no number of heads": {"num_attention_heads": 0},
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_configuration_of_a_head(kind: str, headed: Path, tmp_path: Path) -> None:
    """The attacker's merge holds a head whose configuration asks for other classes, code, libraries or sizes."""
    out = Path(shutil.copytree(headed, tmp_path / "out"))
    assert hfmerge.load_with_head(out, "m0").num_labels == 2
    tiny.edit_config(out / "heads" / "m0", **HEADS[kind])
    with pytest.raises(HfMergeError):
        hfmerge.load_with_head(out, "m0")


def test_a_head_gets_the_weights_of_the_model(headed: Path, tmp_path: Path) -> None:
    """The attacker's merge holds a second weight file, which transformers does not load."""
    out = Path(shutil.copytree(headed, tmp_path / "out"))
    wanted = hfmerge.load_with_head(out, "m0").state_dict()
    save_file({key: value + 1 for key, value in load_file(out / "model.safetensors").items()}, out / "z.safetensors")
    found = hfmerge.load_with_head(out, "m0").state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    (out / "heads" / "m0" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(HfMergeError):
        hfmerge.load_with_head(out, "m0")


def test_a_model_has_two_checkpoints(plain: Path, tmp_path: Path) -> None:
    """The attacker's model has an index of other weights beside the file that transformers loads."""
    root = Path(shutil.copytree(plain, tmp_path / "root"))
    keys = list(load_file(root / "m1" / "model.safetensors"))
    shutil.copy(root / "m1" / "model.safetensors", root / "m0" / "other.safetensors")
    index = {"weight_map": dict.fromkeys(keys, "other.safetensors")}
    (root / "m0" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merge(root, tmp_path / "out").code == 0
    wanted, found = tiny.tensors(plain / "merged"), tiny.tensors(tmp_path / "out")
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_the_output_names_no_code(plain: Path, tmp_path: Path) -> None:
    """The attacker's base names code of his other repository, which users of the merge would run at any commit."""
    root = Path(shutil.copytree(plain, tmp_path / "root"))
    named = {"auto_map": {"AutoModel": "evil/elsewhere--modeling.BertModel"}}
    tiny.edit_config(root / "base", **named, text_config=named)
    assert merge(root, tmp_path / "out").code == 0
    assert "evil/elsewhere" not in (tmp_path / "out" / "config.json").read_text()
    tiny.done("verify", tmp_path / "out", "--replay")


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for MTEB and sentence-transformers, which import what modules.json names; what they imported."""
    found: list[str] = []

    def encoder(name: str, **_: object) -> None:
        for module in json.loads((Path(name) / "modules.json").read_text()):
            config = Path(name, module["path"], "config.json")
            found.append(module["type"])
            if config.is_file():
                found.append(str(json.loads(config.read_text()).get("activation_function")))
        raise HfMergeError("reached")

    harness = types.ModuleType("mteb")
    encoders = types.ModuleType("sentence_transformers")
    vars(harness)["get_task"] = lambda *_, **__: types.SimpleNamespace(load_data=lambda: None)
    vars(encoders)["SentenceTransformer"] = encoder
    monkeypatch.setitem(sys.modules, "mteb", harness)
    monkeypatch.setitem(sys.modules, "sentence_transformers", encoders)
    return found


DENSE = "sentence_transformers.models.Dense"
MODULES: Mapping[str, tuple[str, str, str | None]] = {
    "a class of the folder": ("modeling_evil.Evil", "", None),
    "a class of another package": ("joblib.numpy_pickle.NumpyUnpickler", "", None),
    "a function": (DENSE, "1_Dense", "modeling_evil.run"),
    "a folder elsewhere": (DENSE, "../../elsewhere", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODULES)
def test_modules_of_sentence_transformers(kind: str, plain: Path, tmp_path: Path, imported: list[str]) -> None:
    """The attacker's modules.json names code of his folder, which sentence-transformers imports without a flag."""
    pytest.importorskip("datasets", reason="the extra evaluate is not installed")
    out = Path(shutil.copytree(plain / "merged", tmp_path / "out"))
    (out / "1_Dense").mkdir()
    task = Task("sts", "mteb", "main_score", benchmark="STSBenchmark")

    def scored(module: str, path: str, function: str | None) -> None:
        (out / "modules.json").write_text(json.dumps([{"type": module, "path": path}]))
        (out / "1_Dense" / "config.json").write_text(json.dumps({"activation_function": function or "torch.nn.Tanh"}))
        mteb_score(open_subject(str(out)), task, batch_size=1)

    with pytest.raises(SourceError):
        scored(*MODULES[kind])
    assert not imported
    with pytest.raises(HfMergeError, match="reached"):
        scored(DENSE, "1_Dense", None)
    assert imported == [DENSE, "torch.nn.Tanh"]


@pytest.mark.parametrize("kind", ["a weight", "a weight by pattern", "learned without being asked for"])
def test_values_of_a_ledger_that_fit_alone(kind: str, plain: Path, tmp_path: Path) -> None:
    """The attacker's ledger holds a number that no tensor can be multiplied with, or one part without another."""
    out = Path(shutil.copytree(plain / "merged", tmp_path / "out"))
    path = out / "merge_history" / "0001.json"
    entry = json.loads(path.read_bytes())
    if kind.startswith("learned"):
        learned = {"how": "", "groups": [], "steps": 0, "curve": [], "replay": [], "fisher": None}
        entry["byproducts"]["learned"] = learned
    else:
        entry["materials"]["models"][0]["weight"] = (
            1e308 if kind == "a weight" else [["*embeddings*", 1e39], ["*", 1.0]]
        )
        entry["method"] |= {"name": "ties", "options": {}}
    path.write_bytes(canonical_json(entry))
    places = (word for name in ("base", "m0", "m1") for word in ("--source", f"{name}={plain / name}"))
    run = tiny.cli("verify", out, "--replay", *places)
    assert run.code == 1 and "FAIL ledger: " in run.out
    assert ("what was asked" if kind.startswith("learned") else "in the range of float32") in run.out


@pytest.mark.parametrize("name", [".git/config", ".GIT/config", "heads/.Git/hooks/post-checkout"])
def test_a_product_that_git_would_obey(name: str, plain: Path, tmp_path: Path) -> None:
    """The attacker's ledger lists settings of git, which would have a program run where `restore` writes them."""
    out = Path(shutil.copytree(plain / "merged", tmp_path / "out"))
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("[core]\n\tfsmonitor = touch /tmp/x\n")
    run = tiny.cli("verify", relisted(out, new=[name]))
    assert run.code == 1 and "FAIL ledger: " in run.out and "must be a path inside of the repository" in run.out
