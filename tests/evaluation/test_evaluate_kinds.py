"""Every kind of task against an independent computation: pairs, numbers, images, zero-shot, language models."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import hfmerge
from hfmerge.errors import HeadError, HfMergeError
from hfmerge.evaluation.evaluator import Settings
from hfmerge.evaluation.processors import decode_image
from tests.fixtures import evaluating, tiny


FRESH = Settings(cache=False, batch_size=3)
SHAPES = ["round", "square", "flat"]
PROCESSOR = {
    "do_resize": True, "size": {"height": 8, "width": 8}, "do_center_crop": False, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True,
}  # fmt: skip


def score(model: Path, tmp_path: Path, **task: Any) -> hfmerge.Score:
    suite = evaluating.suite(tmp_path / "suite.yaml", {"name": "t", **task})
    found = hfmerge.evaluate([model], suite, settings=FRESH).scores[0][0]
    assert found is not None
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with all modes there are, and a copy of it as Parquet with encoded images."""
    import datasets

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    modes = ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "I;16", "RGB", "L", "RGB", "RGB"]
    for i, mode in enumerate(modes):
        picture = Image.fromarray(rng.integers(0, 255, (10 + i, 12, 3), dtype=np.uint8))
        if mode == "I;16":
            picture = Image.fromarray(rng.integers(0, 65535, (9, 9), dtype=np.uint16))
        else:
            picture = picture.convert(mode)
        target = folder / "test" / SHAPES[i % 3] / f"{i}.{'tiff' if mode == 'CMYK' else 'png'}"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
    rows = datasets.load_dataset(str(folder), split="test")
    rows.to_parquet(str(folder.parent / "images.parquet"))
    return folder


def looked_at(images: Path) -> list[tuple[torch.Tensor, str]]:
    """Pixels and labels in the order of the folder, resized by Pillow itself."""
    found = []
    for path in sorted((images / "test").rglob("*.*")):
        picture = decode_image(str(path), "test").resize((8, 8), Image.Resampling.BILINEAR)
        values = (np.asarray(picture, dtype=np.float32) / 255 - 0.5) / 0.5
        found.append((torch.from_numpy(values).permute(2, 0, 1)[None], path.parent.name))
    return found


def test_images_of_any_mode_become_rgb(images: Path, tmp_path: Path) -> None:
    for path in (images / "test").rglob("*.*"):
        picture = decode_image({"bytes": path.read_bytes(), "path": None}, "here")
        assert picture.mode == "RGB" and np.asarray(picture).std() > 5, path
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(HfMergeError, match="here: not a readable image"):
        decode_image(str(tmp_path / "no.png"), "here")


@pytest.mark.slow
def test_image_classification_with_a_head(images: Path, tmp_path: Path) -> None:
    base = tiny.build("ViTModel", tiny.config("vit"))
    model = tiny.with_head("ViTForImageClassification", base, 1, ["flat", "round", "square"])
    tiny.save(model, tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "resample": 2, **PROCESSOR})
    )
    task = {"kind": "image-classification", "image": "image", "label": "label"}
    found = score(tmp_path / "vit", tmp_path, dataset=str(images), **task)
    names = model.config.id2label
    with torch.inference_mode():
        right = [names[int(model(pixels).logits.argmax())] == label for pixels, label in looked_at(images)]
    assert found.n == len(right) == 12 and found.value == pytest.approx(sum(right) / len(right))
    again = score(tmp_path / "vit", tmp_path, dataset=str(images.parent / "images.parquet"), **task)
    assert again == found
    with pytest.raises(HeadError, match="has no head for image-classification"):
        sentences = tiny.with_head(
            "BertForSequenceClassification", tiny.build("BertModel", tiny.config("bert")), 1, SHAPES
        )
        tiny.save(sentences, tmp_path / "bert")
        (tmp_path / "bert" / "preprocessor_config.json").write_text("{}")
        score(tmp_path / "bert", tmp_path, dataset=str(images), **task)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-tower model, two fine-tunes of its vision tower alone, and a merge of them."""
    root = tmp_path_factory.mktemp("clip")
    words = [*evaluating.TOKENS[:2], "a", "photo", "of", "the", *SHAPES, *(f"x{i}" for i in range(tiny.WORDS - 9))]
    model = tiny.build("CLIPModel", tiny.config("clip"))
    tiny.save(model, root / "clip")
    tiny.tokenizer(root / "clip", words)
    tiny.edit_config(root / "clip", file="tokenizer_config.json", model_max_length=16, pad_token="[PAD]")
    (root / "clip" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "resample": 2, **PROCESSOR})
    )
    for i, name in enumerate(("one", "two")):
        vision = transformers.CLIPVisionModel(model.config.vision_config)
        vision.load_state_dict(model.vision_model.state_dict())
        tiny.save(tiny.fine_tune(vision, i, 0.2), root / name)
    tiny.done("merge", root / "one", root / "two", "--base", root / "clip", "--method", "linear", "-q",
              "--output", root / "merged")  # fmt: skip
    return root


@pytest.mark.slow
def test_zero_shot_from_class_names_and_prompts(images: Path, clip: Path, tmp_path: Path) -> None:
    prompts = ["a photo of the {}", "{} of a photo"]
    task = {"kind": "zero-shot-image-classification", "image": "image", "label": "label", "dataset": str(images),
            "templates": prompts, "head": str(clip / "clip")}  # fmt: skip
    words = json.loads((clip / "clip" / "tokenizer.json").read_text())["model"]["vocab"]
    order = sorted(SHAPES)

    def plain(towers: transformers.CLIPModel) -> float:
        right = 0
        with torch.inference_mode():
            texts = []
            for name in order:
                ids = [torch.tensor([[words[w] for w in p.replace("{}", name).split()]]) for p in prompts]
                states = [towers.get_text_features(input_ids=i) for i in ids]
                each = [getattr(s, "pooler_output", s)[0] for s in states]
                mean = torch.stack([e / e.norm() for e in each]).mean(0)
                texts.append(mean / mean.norm())
            for pixels, label in looked_at(images):
                state = towers.get_image_features(pixel_values=pixels)
                seen = getattr(state, "pooler_output", state)[0]
                right += order[int((torch.stack(texts) @ seen).argmax())] == label
        return right / 12

    towers = transformers.CLIPModel.from_pretrained(clip / "clip").eval()
    assert score(clip / "clip", tmp_path, **task).value == pytest.approx(plain(towers))
    merged = transformers.CLIPModel.from_pretrained(clip / "merged").eval()
    assert score(clip / "merged", tmp_path, **task).value == pytest.approx(plain(merged))
    towers.vision_model.load_state_dict(transformers.CLIPVisionModel.from_pretrained(clip / "one").state_dict())
    assert score(clip / "one", tmp_path, **task).value == pytest.approx(plain(towers.eval()))
    named = {**task, "classes": ["flat", "round", "square"]}
    assert score(clip / "clip", tmp_path, **named) == score(clip / "clip", tmp_path, **task)
    with pytest.raises(HfMergeError, match="sees images only"):
        score(clip / "one", tmp_path, **{k: v for k, v in task.items() if k != "head"})
    with pytest.raises(HfMergeError, match="outside of the range"):
        score(clip / "clip", tmp_path, **{**task, "classes": ["flat", "round"]})


@pytest.mark.slow
def test_pairs_and_numbers(tmp_path: Path) -> None:
    base = tiny.build("BertModel", tiny.config("bert"))
    model = tiny.with_head("BertForSequenceClassification", base, 1, ["LABEL_0"])
    tiny.save(model, tmp_path / "bert")
    tiny.tokenizer(tmp_path / "bert", evaluating.TOKENS)
    tiny.edit_config(
        tmp_path / "bert", file="tokenizer_config.json", model_input_names=["input_ids", "token_type_ids"]
    )
    first, second = evaluating.sentences(30, 1, 5), evaluating.sentences(30, 2, 5)
    numbers = [random.Random(i).random() * 5 for i in range(30)]
    rows = [{"a": a, "b": b, "y": y} for a, b, y in zip(first, second, numbers, strict=True)]
    evaluating.write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    with torch.inference_mode():
        outputs = [
            float(model(**tokenizer(a, b, return_tensors="pt")).logits) for a, b in zip(first, second, strict=True)
        ]
    from scipy.stats import spearmanr

    task = {"kind": "text-classification", "dataset": "./rows.jsonl", "text": ["a", "b"], "label": "y"}
    found = score(tmp_path / "bert", tmp_path, metric="spearman", **task)
    assert found.value == pytest.approx(spearmanr(outputs, numbers)[0], abs=1e-6)
    assert found.interval == "bootstrap" and found.low < found.value < found.high
    two = tiny.with_head("BertForSequenceClassification", base, 1, ["x", "y"])
    tiny.save(two, tmp_path / "two")
    tiny.tokenizer(tmp_path / "two", evaluating.TOKENS)
    with pytest.raises(HeadError, match="needs a head of one number"):
        score(tmp_path / "two", tmp_path, metric="pearson", **task)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "llama"
    tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), folder)
    return tiny.tokenizer(folder, evaluating.TOKENS)


def nll(model: Any, row: list[int], start: int = 1) -> float:
    """Negative log-likelihood of a row's tokens from `start` on."""
    with torch.inference_mode():
        scores = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), -1)
    return -sum(float(scores[i - 1, row[i]]) for i in range(start, len(row)))


@pytest.mark.slow
def test_perplexity_of_texts_and_of_one_text(llama: Path, tmp_path: Path) -> None:
    texts = evaluating.sentences(12, 3, 14)
    evaluating.write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    task = {"kind": "perplexity", "dataset": "./rows.jsonl", "text": "text"}
    rows = [row for text in texts if len(row := evaluating.ids(text)) > 1]
    found = score(llama, tmp_path, **task)
    wanted = math.exp(sum(nll(model, row) for row in rows) / sum(len(row) - 1 for row in rows))
    assert found.value == pytest.approx(wanted, rel=1e-5) and found.n == len(rows)
    assert found.low < found.value < found.high
    whole = evaluating.ids(" ".join(texts))
    pieces = [piece for at in range(0, len(whole), 5) if len(piece := whole[at : at + 5]) > 1]
    found = score(llama, tmp_path, join=" ", max_length=5, **task)
    wanted = math.exp(sum(nll(model, piece) for piece in pieces) / sum(len(piece) - 1 for piece in pieces))
    assert found.value == pytest.approx(wanted, rel=1e-5) and found.n == len(pieces)
    tiny.save(tiny.build("LlamaModel", tiny.config("llama")), tmp_path / "bare")
    tiny.tokenizer(tmp_path / "bare", evaluating.TOKENS)
    with pytest.raises(HfMergeError, match="not a language model"):
        score(tmp_path / "bare", tmp_path, **task)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["accuracy", "accuracy_norm"])
def test_multiple_choice(metric: str, llama: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    rng = random.Random(5)
    rows, right = [], 0
    for i in range(15):
        prompt, options = evaluating.sentences(1, i, 6)[0], evaluating.sentences(3, 100 + i, 5)
        answer = rng.randrange(3)
        rows.append(
            {"q": prompt, "c": {"text": options, "label": list("ABC")}, "key": "ABC"[answer], "o1": options[0],
             "o2": options[1], "o3": options[2], "number": answer}
        )  # fmt: skip
        before = evaluating.ids(prompt)
        sums = [-nll(model, before + evaluating.ids(option), len(before)) for option in options]
        if metric == "accuracy_norm":
            sums = [s / len(option) for s, option in zip(sums, options, strict=True)]
        right += max(range(3), key=lambda k: sums[k]) == answer
    evaluating.write_rows(tmp_path / "rows.jsonl", rows)
    task = {"kind": "multiple-choice", "dataset": "./rows.jsonl", "prompt": "{q}", "metric": metric}
    one = score(llama, tmp_path, choices="c.text", label="key", **task)
    assert one.value == pytest.approx(right / 15) and one.interval == "wilson"
    assert score(llama, tmp_path, choices=["o1", "o2", "o3"], label="number", **task) == one
    with pytest.raises(HfMergeError, match="is not one of its 2 choices"):
        score(llama, tmp_path, choices=["o1", "o2"], label="number", **task)
    with pytest.raises(HfMergeError, match="prompt does not fit"):
        score(llama, tmp_path, choices="c.text", label="key", **{**task, "prompt": "{question}"})


def test_a_decoder_that_classifies_without_a_padding_token(tmp_path: Path) -> None:
    base = tiny.build("LlamaModel", tiny.config("llama"))
    model = tiny.with_head("LlamaForSequenceClassification", base, 1, ["no", "yes"])
    tiny.save(model, tmp_path / "llama")
    tiny.tokenizer(tmp_path / "llama", evaluating.TOKENS)
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["pad_token_id"] is None
    rows = evaluating.labelled(tmp_path / "rows.jsonl", ["no", "yes"], 20, 4)
    task = {"kind": "text-classification", "dataset": "./rows.jsonl", "text": "text", "label": "label"}
    assert score(tmp_path / "llama", tmp_path, **task).value == pytest.approx(evaluating.accuracy(model, rows))


@pytest.mark.parametrize(("kind", "extra"), [("lm-eval", "hfmerge[lm-eval]"), ("mteb", "hfmerge[mteb]")])
def test_harnesses_say_what_to_install(
    kind: str, extra: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind.replace("-", "_"), None)
    task = {"kind": kind, "benchmark": "arc_easy"} | ({"metric": "acc"} if kind == "lm-eval" else {})
    with pytest.raises(HfMergeError) as caught:
        score(llama, tmp_path, **task)
    assert f"pip install {extra}" in str(caught.value)


def test_what_lm_eval_reports_becomes_a_score(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in at the documented boundary of the harness, an extra; test_evaluate_harnesses runs the real one."""
    llama = Path(shutil.copytree(llama, tmp_path / "llama"))
    tiny.edit_config(llama, file="tokenizer_config.json", eos_token="[PAD]")
    asked: dict[str, Any] = {}

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        asked.update(given)
        values = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 20}
        return {"results": {"some_task": values}, "n-samples": {"some_task": {"original": 99, "effective": 20}}}

    names = {"lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.models": {}}
    names["lm_eval.models.huggingface"] = {"HFLM": lambda **given: given}
    names["lm_eval.tasks"] = {"TaskManager": lambda: types.SimpleNamespace(all_tasks=["some_task"])}
    for name, members in names.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    task = {"kind": "lm-eval", "benchmark": "some_task", "metric": "acc", "limit": 20, "shots": 2}
    found = score(llama, tmp_path, **task)
    assert (found.value, found.n, found.interval) == (0.5, 20, "reported")
    assert (found.low, found.high) == pytest.approx((0.304, 0.696), abs=1e-3)
    assert (asked["limit"], asked["num_fewshot"], asked["tasks"]) == (20, 2, ["some_task"])
    assert type(asked["model"]["pretrained"]).__name__ == "LlamaForCausalLM"
    with pytest.raises(HfMergeError, match="has no metric f1; it has acc"):
        score(llama, tmp_path, **{**task, "metric": "f1"})
    with pytest.raises(HfMergeError, match="has no task other"):
        score(llama, tmp_path, **{**task, "benchmark": "other"})
