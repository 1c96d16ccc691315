"""Synthetic replay: every generator makes rows that its model accepts, the same ones again, in a file that holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hfmerge.errors import (
    CorruptFileError,
    HeadError,
    HfMergeError,
    NonFiniteError,
    NotFoundError,
    RecipeError,
    SourceError,
)
from hfmerge.evaluation.models import Subject, open_subject
from hfmerge.evaluation.processors import load_tokenizer
from hfmerge.learning.replay.dataset import Replay, load_replay, save_replay
from hfmerge.learning.replay.generate import generate
from hfmerge.learning.replay.search import shared_out
from hfmerge.learning.replay.targets import divergence, token_targets
from hfmerge.learning.replay.words import read_vocabulary
from hfmerge.recipe.replay import GENERATORS, ReplaySettings, read_replay
from hfmerge.validation.values import Section
from tests.fixtures import evaluating, tiny


TOKENS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", *(f"w{i}" for i in range(tiny.WORDS - 6))]
LABELS = ["red", "green", "blue"]
PROCESSOR = {
    "do_resize": True, "size": {"height": 8, "width": 8}, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3, "do_rescale": True, "resample": 2, "image_processor_type": "ViTImageProcessor",
}  # fmt: skip
FEW = ReplaySettings(rows=12, length=12, seed=7, steps=6, batch_size=5, top=8)


def wordpieces(folder: Path) -> Path:
    """A tokenizer as BERT's: [CLS] text [SEP], with a mask."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    raw = Tokenizer(WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, mask_token="[MASK]", **named).save_pretrained(folder)
    return folder


def classifier(folder: Path, **settings: Any) -> Path:
    base = tiny.build("BertModel", tiny.config("bert", **settings))
    return wordpieces(tiny.save(tiny.with_head("BertForSequenceClassification", base, 1, LABELS), folder))


def images(folder: Path, title: str = "ViTForImageClassification") -> Path:
    if title.startswith("ViT"):
        model = tiny.with_head(title, tiny.build("ViTModel", tiny.config("vit")), 1, LABELS)
    else:
        torch.manual_seed(0)
        settings = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
        model = transformers.ResNetForImageClassification(settings).eval()
    tiny.save(model, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def masked(folder: Path) -> Path:
    return wordpieces(tiny.save(tiny.build("BertForMaskedLM", tiny.config("bert")), folder))


def causal(folder: Path) -> Path:
    model = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    return tiny.tokenizer(tiny.save(model, folder), ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(45))])


MAKERS: dict[str, Callable[[Path], Path]] = {
    "text-classification": classifier, "image-classification": images, "masked": masked, "causal": causal,
}  # fmt: skip
ALL = [(kind, name) for kind, names in GENERATORS.items() for name in names]


def opened(kind: str, folder: Path, name: str = "auto") -> tuple[Subject, Subject | None]:
    """A model for a kind, and for the generator that needs it its base with a masked language head."""
    if name == "statistics":
        return open_subject(str(images(folder / "model", "resnet"))), None
    spare = open_subject(str(masked(folder / "spare"))) if (kind, name) == (ALL[2][0], "masked") else None
    return open_subject(str(MAKERS[kind](folder / "model"))), spare


def outputs(subject: Subject, replay: Replay, rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the model itself says of some rows, and what is kept of it."""
    head = subject.own_head()
    model = subject.whole(replay.kind) if head is None else subject.with_head(head, replay.kind)
    if replay.pad is not None:
        model.config.pad_token_id = replay.pad
    inputs, targets = replay.batch(rows)
    with torch.inference_mode():
        return model(**inputs).logits, targets


def test_a_search_that_finds_few_rows_says_so(tmp_path: Path) -> None:
    model = open_subject(str(classifier(tmp_path / "model")))
    asked = {**FEW.to_dict(), "generator": "contrast", "steps": 1}
    said: list[str] = []
    generate(model, "text-classification", ReplaySettings(**{**asked, "confidence": 0.999}), notify=said.append)
    assert said[0] == "model: 12 rows by contrast, in at most 1 passes over them"
    assert "only 0 of 12 replay rows reached a confidence of 0.999 in 1 passes" in said[1] and len(said) == 2
    said.clear()
    generate(model, "text-classification", ReplaySettings(**{**asked, "confidence": 0.0}), notify=said.append)
    assert len(said) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_generator_makes_rows_whose_targets_are_the_models(kind: str, name: str, tmp_path: Path) -> None:
    subject, spare = opened(kind, tmp_path, name)
    asked = ReplaySettings(**{**FEW.to_dict(), "generator": name})
    made = generate(subject, kind, asked, spare=spare)
    assert (len(made), made.generator, made.held_out, made.learned) == (12, name, 2, range(10))
    assert made.passes > 0 and made.seconds > 0 and made.source.startswith("model@sha256:")
    for rows in ([0, 3, 11], list(range(12))):
        logits, targets = outputs(subject, made, rows)
        assert divergence(made.scores, targets, logits).abs().max() < 1e-5
        assert divergence(made.scores, targets, logits.flip(-1)).max() > 1e-2
    if made.pad is not None:
        ids, mask = made.inputs["input_ids"], made.inputs["attention_mask"].bool()
        assert ids.dtype == torch.int32 and ids.shape == mask.shape and ids.shape[1] <= 12
        assert len(mask.sum(1).unique()) > 1 or name == "sampled", "all of one length"
        assert (ids[~mask] == made.pad).all() and (mask.int().diff(dim=1) <= 0).all(), "padding is on the right"
        if kind in ("text-classification", "masked"):
            text = mask.clone()
            text[:, 0] = False
            text[torch.arange(12), mask.sum(1) - 1] = False
            assert (ids[:, 0] == 2).all() and (ids[text] >= 6).logical_or(ids[text] == 4).all()
    again = generate(opened(kind, tmp_path / "again", name)[0], kind, asked, spare=spare)
    assert again.data == made.data and again.digest == made.digest
    other = generate(subject, kind, ReplaySettings(**{**asked.to_dict(), "seed": 8}), spare=spare)
    assert other.digest != made.digest


def test_a_file_gives_the_rows_back(tmp_path: Path) -> None:
    made = generate(open_subject(str(classifier(tmp_path / "model"))), "text-classification", FEW)
    path = save_replay(made, tmp_path / "replay" / "model.safetensors")
    back = load_replay(path)
    assert back.to_dict() == made.to_dict() and back.data == made.data == path.read_bytes()
    assert made.to_dict()["classes"]["of"] == 3 and json.dumps(made.to_dict())
    assert b"may reflect the data it was trained on" in path.read_bytes()[:1000]


def test_broken_files_are_refused(tmp_path: Path) -> None:
    made = generate(open_subject(str(classifier(tmp_path / "model"))), "text-classification", FEW)
    path = save_replay(made, tmp_path / "rows.safetensors")
    with pytest.raises(NotFoundError, match="no such file of replay rows"):
        load_replay(tmp_path / "none.safetensors")
    path.write_bytes(made.data[:-9])
    with pytest.raises(CorruptFileError, match="not a readable file"):
        load_replay(path)
    path.write_bytes(made.data.replace(b'\\"schema\\": 1', b'\\"schema\\": 9'))
    with pytest.raises(CorruptFileError, match="is of schema 9"):
        load_replay(path)
    path.write_bytes(made.data.replace(b'\\"source\\"', b'\\"sourse\\"'))
    with pytest.raises(CorruptFileError, match="does not say its source"):
        load_replay(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CorruptFileError, match="holds no replay rows"):
        load_replay(path)


@pytest.mark.slow
def test_the_search_moves_rows_to_their_classes_and_leaves_the_rest(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model")

    def sharpen(state: dict[str, torch.Tensor]) -> None:
        # a random model says almost the same of every text
        state["classifier.weight"] *= 30

    tiny.edit(folder, sharpen)
    subject = open_subject(str(folder))
    both = {}
    for name in ("unigram", "contrast"):
        asked = ReplaySettings(rows=30, length=14, generator=name, seed=1, steps=40, confidence=0.6)
        both[name] = generate(subject, "text-classification", asked)
    logs = {name: made.targets["logits"].log_softmax(-1) for name, made in both.items()}
    wanted = shared_out(logs["unigram"])
    assert wanted.bincount().tolist() == [10, 10, 10]
    logs = {name: values[range(30), wanted] for name, values in logs.items()}
    assert logs["contrast"].mean() > logs["unigram"].mean() + 1
    kept = logs["unigram"].exp() >= 0.6
    before, after = both["unigram"].inputs["input_ids"], both["contrast"].inputs["input_ids"]
    assert kept.any() and torch.equal(before[kept], after[kept])
    assert not torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["contrast", "statistics"])
def test_images_become_what_the_classifier_is_sure_of(name: str, tmp_path: Path) -> None:
    subject = open_subject(str(images(tmp_path / "model", "resnet")))
    sure = {}
    for generator in ("noise", name):
        asked = ReplaySettings(rows=9, generator=generator, steps=30, confidence=0.6)
        made = generate(subject, "image-classification", asked)
        pixels = made.inputs["pixel_values"]
        assert pixels.dtype == torch.float16 and pixels.shape == (9, 3, 8, 8)
        assert pixels.min() >= -2 and pixels.max() <= 2 and pixels.float().std() > 0.1
        sure[generator] = made.targets["logits"].log_softmax(-1)
    wanted = shared_out(sure["noise"])
    gains = (sure[name] - sure["noise"])[range(9), wanted]
    assert gains.mean() > 0.02 and wanted.bincount().tolist() == [3, 3, 3]
    assert generate(subject, "image-classification", ReplaySettings(rows=2, steps=1)).generator == "statistics"


def test_rows_are_shared_out_to_the_classes_they_are_nearest_to() -> None:
    known = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.6, 0.2], [0.5, 0.4], [0.3, 0.0]])
    assert shared_out(known).tolist() == [0, 0, 0, 1, 1]
    assert shared_out(torch.zeros(3, 5)).unique().numel() == 3
    assert shared_out(torch.rand(50, 7)).bincount().tolist().count(7) == 6


@pytest.mark.slow
def test_heads_of_numbers_and_of_independent_labels(tmp_path: Path) -> None:
    subject = open_subject(str(classifier(tmp_path / "several")))
    tiny.edit_config(tmp_path / "several", problem_type="multi_label_classification")
    subject = open_subject(str(tmp_path / "several"))
    several = generate(subject, "text-classification", FEW)
    assert (several.scores, several.generator) == ("labels", "contrast")
    logits, targets = outputs(subject, several, [1, 2])
    assert divergence("labels", targets, logits).abs().max() < 1e-5
    assert divergence("labels", targets, logits + 1).min() > 1e-3
    base = tiny.build("BertModel", tiny.config("bert"))
    wordpieces(tiny.save(tiny.with_head("BertForSequenceClassification", base, 1, ["score"]), tmp_path / "number"))
    number = open_subject(str(tmp_path / "number"))
    found = generate(number, "text-classification", FEW)
    assert (found.scores, found.generator) == ("values", "unigram") and found.targets["logits"].shape == (12, 1)
    with pytest.raises(HfMergeError, match="gives numbers and no classes"):
        generate(number, "text-classification", ReplaySettings(rows=4, generator="contrast"))


def test_a_decoder_without_padding_token_classifies(tmp_path: Path) -> None:
    base = tiny.build("LlamaModel", tiny.config("llama"))
    folder = tiny.save(tiny.with_head("LlamaForSequenceClassification", base, 1, LABELS), tmp_path / "model")
    tiny.tokenizer(folder, evaluating.TOKENS)
    subject = open_subject(str(folder))
    made = generate(subject, "text-classification", FEW)
    assert made.pad == 0 and not (made.inputs["input_ids"][made.inputs["attention_mask"].bool()] == 0).any()
    logits, targets = outputs(subject, made, list(range(12)))
    assert divergence("classes", targets, logits).abs().max() < 1e-5


def test_kept_tokens_bound_the_whole_divergence_from_below() -> None:
    torch.manual_seed(0)
    one, other = (3 * torch.randn(2, 4, 40)).double(), torch.randn(2, 4, 40).double()
    positions = torch.tensor([[0, 1, 3], [2, -1, -1]])
    found = [divergence("tokens", token_targets(one, positions, top), other) for top in (1, 8, 39)]
    whole = (one.softmax(-1) * (one.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
    exact = torch.stack([whole[0, [0, 1, 3]].mean(), whole[1, 2]])
    assert (found[0] < found[1]).all() and (found[1] < exact).all()
    torch.testing.assert_close(found[2].double(), exact, rtol=1e-3, atol=1e-3)
    student = other.float().requires_grad_()
    divergence("tokens", token_targets(one, positions, 8), student).sum().backward()
    assert student.grad is not None and student.grad.isfinite().all() and student.grad[0, 2].eq(0).all()


def test_common_tokens_are_drawn_more_often(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_subject(str(classifier(tmp_path / "model"))).snapshots[0])
    words = read_vocabulary(tokenizer, tiny.WORDS, "it")
    assert words.before == (2,) and words.after == (3,) and words.mask == 4
    assert words.weights[:6].eq(0).all() and (words.weights[6:].diff() < 0).all() and len(words.weights) == tiny.WORDS
    assert words.weights.sum() == pytest.approx(1) and words.weights[6] / words.weights[7] == pytest.approx(3.7 / 2.7)
    assert read_vocabulary(tokenizer, 20, "it").weights.shape == (20,)


def test_a_unigram_tokenizer_says_itself_what_is_common() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    pieces = [("<unk>", 0.0), ("<extra_id_0>", -1.0), ("▁a", -3.0), ("▁the", -1.0), ("▁added", 0.0), ("b", -4.0)]
    raw = Tokenizer(Unigram(pieces, unk_id=0))
    words = read_vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"), 6, "it")
    chances = torch.tensor([0, 0, -3.0, -1.0, 0, -4.0]).double().exp() * torch.tensor([0, 0, 1, 1, 0, 1])
    torch.testing.assert_close(words.weights, chances / chances.sum())


def test_the_alphabet_comes_last_and_characters_alone_are_even() -> None:
    def weights(tokens: list[str]) -> torch.Tensor:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        raw = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<u>"))
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<u>")
        return read_vocabulary(fast, len(tokens), "it").weights

    ranked = weights(["<u>", "!", "##s", "the", "##ing", "Ġof"])
    assert ranked.argsort(descending=True).tolist() == [3, 4, 5, 1, 2, 0]
    assert weights(["<u>", "一", "丁", "七", "the"]).tolist() == [0, 0.25, 0.25, 0.25, 0.25]
    with pytest.raises(SourceError, match="no token of its tokenizer is text"):
        weights(["<u>", "[unused1]"])


def test_what_is_asked_is_checked_all_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        ReplaySettings(rows=1, generator="contrasts", held_out=0.7, seed=-1, temperature=0.0)
    told = str(caught.value)
    for part in ("must be at least 2, not 1", "did you mean", "must be at most 0.5", "seed", "temperature"):
        assert part in told
    problems: list[Any] = []
    found = read_replay(Section({"rows": "many", "lenght": 3}, "learn.replay", problems))
    assert [problem.path for problem in problems] == ["learn.replay.lenght", "learn.replay.rows"]
    assert found == ReplaySettings() and ReplaySettings(**json.loads(json.dumps(FEW.to_dict()))) == FEW


@pytest.mark.slow
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    texts = open_subject(str(classifier(tmp_path / "texts")))
    pictures = open_subject(str(images(tmp_path / "pictures")))
    encoder = tiny.save(tiny.build("BertModel", tiny.config("bert")), tmp_path / "encoder")
    bare = tiny.save(tiny.build("BertForSequenceClassification", tiny.config("bert")), tmp_path / "bare")
    words = open_subject(str(tiny.tokenizer(masked(tmp_path / "words"), evaluating.TOKENS)))
    cases: list[tuple[type[HfMergeError], str, Subject, str, dict[str, Any]]] = [
        (HfMergeError, "no kind poems", texts, "poems", {}),
        (HfMergeError, "has no generator noise", texts, "text-classification", {"generator": "noise"}),
        (HfMergeError, "needs a model with a masked language head", texts, "text-classification",
         {"generator": "masked"}),
        (HfMergeError, "3 at least", texts, "text-classification", {"length": 2}),
        (HfMergeError, "has no batch normalisation", pictures, "image-classification", {"generator": "statistics"}),
        (HeadError, "has no head for image", texts, "image-classification", {}),
        (HeadError, "has no classification head of its own", open_subject(str(encoder)), "text-classification", {}),
        (HeadError, "not a language model that continues a text", texts, "causal", {}),
        (HeadError, "not a language model that fills gaps", texts, "masked", {}),
        (SourceError, "has no tokenizer", open_subject(str(bare)), "text-classification", {}),
        (HfMergeError, "has no mask token", words, "masked", {}),
    ]  # fmt: skip
    for error, told, subject, kind, options in cases:
        with pytest.raises(error, match=told):
            generate(subject, kind, ReplaySettings(rows=4, **options))
    with pytest.raises(HfMergeError, match="words: its tokenizer has other tokens than texts's"):
        generate(texts, "text-classification", ReplaySettings(rows=4, generator="masked"), spare=words)
    state = load_file(tmp_path / "texts" / "model.safetensors")
    state["classifier.bias"][1] = float("nan")
    save_file(state, tmp_path / "texts" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="its logits on replay rows are not finite"):
        generate(open_subject(str(tmp_path / "texts")), "text-classification", FEW)
