"""Sources whose vocabulary differs from the base's: rows are matched by token string, or the merge is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import hfmerge
from tests.fixtures import tiny


BASE = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "a", "mat"]
LONGER = [*BASE, "alpha", "beta"]
SHUFFLED = ["<unk>", "<s>", "</s>", "mat", "a", "on", "beta", "sat", "cat", "gamma", "the"]
SHORTER = ["<unk>", "<s>", "</s>", "cat", "the", "mat"]
OTHER = [*BASE[:-1], "rug"]
"""As many tokens as the base, one of them another."""
UNION = [*BASE, "alpha", "beta", "gamma"]

VOCABULARIES = {"longer": LONGER, "shuffled": SHUFFLED, "shorter": SHORTER, "other": OTHER, "plain": BASE}


def resized(base: PreTrainedModel, tokens: Sequence[str], seed: int) -> PreTrainedModel:
    """A fine-tune of the base with one row per token of its own vocabulary, taken from the base's where it has it."""
    torch.manual_seed(seed)
    tuned = tiny.fine_tune(base, seed)
    old = {name: value.clone() for name, value in tuned.state_dict().items()}
    tuned.resize_token_embeddings(len(tokens), mean_resizing=False)
    with torch.no_grad():
        for name, value in tuned.state_dict().items():
            if value.shape != old[name].shape:
                value.copy_(0.3 * torch.randn(value.shape))
                for row, token in enumerate(tokens):
                    if token in BASE:
                        value[row] = old[name][BASE.index(token)]
    return tuned


def family(root: Path, title: str, kind: str, **changes: object) -> Path:
    """A base, and a fine-tune for each of `VOCABULARIES`, all with tokenizers."""
    base = tiny.build(title, tiny.config(kind, vocab_size=len(BASE), **changes))
    tiny.tokenizer(tiny.save(base, root / "base"), BASE)
    for seed, (name, tokens) in enumerate(VOCABULARIES.items(), 1):
        tiny.tokenizer(tiny.save(resized(base, tokens, seed), root / name), tokens)
    return root


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("tied"), "LlamaForCausalLM", "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("untied"), "LlamaForCausalLM", "llama")


def merge(root: Path, out: Path, *models: str, method: str = "linear", **flags: str) -> tiny.Run:
    folders = [root / model for model in models]
    options = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return tiny.cli("merge", *folders, "--base", root / "base", "--method", method, "--output", out, *options)


def merged(root: Path, out: Path, *models: str, method: str = "linear", **flags: str) -> Path:
    run = merge(root, out, *models, method=method, **flags)
    assert run.code == 0, run.err
    return out


def rows(root: Path, name: str, models: Sequence[str], tokens: Sequence[str]) -> Tensor:
    """By hand: one row per token of the output; tokens a model lacks are unchanged by it."""
    base = tiny.tensors(root / "base")[name]
    held = {model: tiny.tensors(root / model)[name] for model in models}
    result = []
    for token in tokens:
        theirs = {m: held[m][VOCABULARIES[m].index(token)] for m in models if token in VOCABULARIES[m]}
        start = (
            base[BASE.index(token)] if token in BASE else sum(theirs.values(), torch.zeros_like(base[0])) / len(theirs)
        )
        result.append(start + sum((row - start for row in theirs.values()), torch.zeros_like(start)) / len(models))
    return torch.stack(result)


@pytest.mark.parametrize("model", ["longer", "shuffled", "shorter", "other"])
def test_another_vocabulary_is_refused_with_both_remedies(llama: Path, tmp_path: Path, model: str) -> None:
    run = merge(llama, tmp_path / "out", "plain", model)
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1
    assert f"{llama / model}: its vocabulary has" in run.err
    assert "`vocabulary: base`" in run.err and "`vocabulary: union`" in run.err
    number = "as many tokens as the base's, but other ones" if model == "other" else f"{len(VOCABULARIES[model])} rows"
    assert number in run.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_base_keeps_the_tokens_of_the_base(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    models = ["longer", "shuffled", "shorter", "other", "plain"]
    out = merged(root, tmp_path / "out", *models, vocabulary="base")
    got, base = tiny.tensors(out), tiny.tensors(root / "base")
    assert {name: value.shape for name, value in got.items()} == {name: value.shape for name, value in base.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in base:
            assert torch.allclose(got[name], rows(root, name, models, BASE), atol=1e-6)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (root / "base" / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(BASE)


@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_union_appends_the_tokens_of_the_sources(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    models = ["longer", "plain", "shuffled", "shorter"]
    out = merged(root, tmp_path / "out", *models, vocabulary="union")
    got, base = tiny.tensors(out), tiny.tensors(root / "base")
    assert list(got) == list(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in base:
            assert torch.allclose(got[name], rows(root, name, models, UNION), atol=1e-6)
    # a token of one source keeps that source's row
    source = tiny.tensors(root / "longer")["model.embed_tokens.weight"]
    assert torch.equal(got["model.embed_tokens.weight"][UNION.index("alpha")], source[LONGER.index("alpha")])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(UNION)
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert len(words) == len(UNION) and words.convert_ids_to_tokens(range(len(UNION))) == UNION
    assert words("the gamma sat alpha")["input_ids"] == [3, 11, 5, 9]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model(input_ids=torch.tensor([[3, 11, 5, 9]])).logits.shape == (1, 4, len(UNION))
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == (kind == "llama")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "opcm", "ties"])
def test_union_goes_back_to_what_was_never_merged(llama: Path, tmp_path: Path, method: str) -> None:
    """Rows come and go with the models that bring them, in the weights, the tokenizer and the configuration."""
    flags = {"method": method, "vocabulary": "union", "state": "all"}
    out = merged(llama, tmp_path / "out", "longer", "shuffled", "plain", **flags)
    never = merged(llama, tmp_path / "never", "shuffled", "plain", **flags)
    tiny.done("unmerge", out, "--remove", "longer")
    assert tiny.files(out) == tiny.files(never)
    assert transformers.AutoTokenizer.from_pretrained(out).convert_ids_to_tokens(range(11)) == [*BASE, "beta", "gamma"]
    tiny.done("add", out, llama / "other")
    four = merged(llama, tmp_path / "four", "shuffled", "plain", "other", **flags)
    assert tiny.files(out) == tiny.files(four)
    tiny.done("unmerge", out, "--remove", "shuffled", "--remove", "other")
    assert tiny.files(out) == tiny.files(merged(llama, tmp_path / "plain", "plain", **flags))
    assert tiny.done("verify", out, "--replay").code == 0


def test_base_goes_back_to_what_was_never_merged_from_the_kept_state(llama: Path, tmp_path: Path) -> None:
    flags = {"method": "opcm", "vocabulary": "base", "state": "all"}
    out = merged(llama, tmp_path / "out", "longer", "shuffled", "plain", **flags)
    run = tiny.done("unmerge", out, "--remove", "plain")
    assert "no model is read" in run.out
    assert tiny.files(out) == tiny.files(merged(llama, tmp_path / "never", "longer", "shuffled", **flags))


@pytest.mark.slow
def test_an_output_bias_has_rows_too(tmp_path: Path) -> None:
    """BERT's masked-word head has a bias of one number per token beside the tied matrix."""
    root = family(tmp_path / "bert", "BertForMaskedLM", "bert")
    models = ["shuffled", "longer"]
    out = merged(root, tmp_path / "out", *models, vocabulary="union")
    tokens = [*BASE, "beta", "gamma", "alpha"]
    got = tiny.tensors(out)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        assert torch.allclose(got[name], rows(root, name, models, tokens), atol=1e-6)
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert model(input_ids=torch.tensor([[3, 11]])).logits.shape[-1] == len(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_heads_run_on_the_merged_vocabulary(vocabulary: str, tmp_path: Path) -> None:
    """The head's own configuration has the source's number of tokens, the backbone the merge's."""
    base = tiny.build("BertModel", tiny.config("bert", vocab_size=len(BASE)))
    tiny.tokenizer(tiny.save(base, tmp_path / "base"), BASE)
    for seed, name in ((1, "longer"), (2, "shuffled")):
        tuned = tiny.with_head("BertForSequenceClassification", base, seed, ["x", "y", "z"])
        tiny.tokenizer(tiny.save(resized(tuned, VOCABULARIES[name], seed), tmp_path / name), VOCABULARIES[name])
    out = merged(tmp_path, tmp_path / "out", "longer", "shuffled", vocabulary=vocabulary)
    model = hfmerge.load_with_head(out, "shuffled")
    size = len(UNION) if vocabulary == "union" else len(BASE)
    assert model.config.vocab_size == size and model.get_input_embeddings().num_embeddings == size
    embedding = tiny.tensors(out)["embeddings.word_embeddings.weight"]
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert model(input_ids=torch.tensor([[3, size - 1]])).logits.shape == (1, 3)


def test_an_adapter_beside_a_longer_vocabulary(llama: Path, tmp_path: Path) -> None:
    """The adapter changes the base's rows only, here the embedding's too."""
    tiny.adapter(tmp_path / "lora", tiny.attention(), 1)
    out = merged(llama, tmp_path / "out", "longer", str(tmp_path / "lora"), vocabulary="union")
    name = "model.embed_tokens.weight"
    base, source = tiny.tensors(llama / "base")[name], tiny.tensors(llama / "longer")[name]
    assert torch.allclose(tiny.tensors(out)[name][: len(BASE)], base + (source[: len(BASE)] - base) / 2, atol=1e-6)
    held: Mapping[str, tuple[int, int]] = {"model.embed_tokens": (len(BASE), 16)}
    embedding = tiny.adapter(tmp_path / "embedding", held, 2)
    tiny.edit(embedding, _as_embedding, "adapter_model.safetensors")
    out = merged(llama, tmp_path / "both", "longer", str(embedding), vocabulary="union")
    factors = tiny.tensors(embedding)
    change = 2.0 * (factors[f"{PATH}_B"] @ factors[f"{PATH}_A"]).T
    wanted = base + (source[: len(BASE)] - base + change) / 2
    assert torch.allclose(tiny.tensors(out)[name][: len(BASE)], wanted, atol=1e-6)
    assert torch.equal(tiny.tensors(out)[name][len(BASE) :], source[len(BASE) :])


def test_an_adapter_on_a_model_with_another_vocabulary_is_refused(llama: Path, tmp_path: Path) -> None:
    tiny.adapter(tmp_path / "lora", tiny.attention(), 1)
    run = merge(llama, tmp_path / "out", f"shuffled+{tmp_path / 'lora'}", vocabulary="union")
    assert run.code == 1 and f"{llama / 'shuffled'} has another vocabulary than the base" in run.err


@pytest.mark.slow
def test_the_text_tower_of_a_larger_model_grows(tmp_path: Path) -> None:
    """A CLIPModel says in its `text_config` how many tokens it knows."""
    settings = tiny.config("clip")
    settings.text_config.vocab_size = len(BASE)
    base = tiny.build("CLIPModel", settings)
    tiny.tokenizer(tiny.save(base, tmp_path / "base"), BASE)
    for seed, name in ((1, "longer"), (2, "shuffled")):
        tower = tiny.build("CLIPTextModel", settings.text_config, seed)
        tower.load_state_dict(base.text_model.state_dict())
        tiny.tokenizer(tiny.save(resized(tower, VOCABULARIES[name], seed), tmp_path / name), VOCABULARIES[name])
    out = merged(tmp_path, tmp_path / "out", "longer", "shuffled", vocabulary="union")
    model, info = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert model.config.text_config.vocab_size == len(UNION)
    source = tiny.tensors(tmp_path / "longer")["embeddings.token_embedding.weight"]
    got = model.text_model.embeddings.token_embedding.weight
    assert torch.equal(got[UNION.index("alpha")], source[LONGER.index("alpha")])


PATH = "base_model.model.model.embed_tokens.lora_embedding"


def _as_embedding(held: dict[str, Tensor]) -> None:
    """PEFT's names and orientation for a LoRA of an embedding: A (r, rows), B (columns, r)."""
    rows_of = held.pop("base_model.model.model.embed_tokens.lora_B.weight")
    columns_of = held.pop("base_model.model.model.embed_tokens.lora_A.weight")
    held[f"{PATH}_A"], held[f"{PATH}_B"] = rows_of.T.contiguous(), columns_of.T.contiguous()


def test_new_tokens_that_do_not_follow_are_refused(tmp_path: Path) -> None:
    """A tokenizer with more tokens than the embedding has rows: said before anything is merged."""
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", vocab_size=len(BASE)))
    tiny.tokenizer(tiny.save(base, tmp_path / "base"), [*BASE, "no", "rows"])
    tiny.tokenizer(tiny.save(resized(base, LONGER, 1), tmp_path / "longer"), LONGER)
    run = tiny.cli(
        "plan", tmp_path / "longer", "--base", tmp_path / "base", "--method", "linear", "--vocabulary", "union"
    )
    assert run.code == 1 and "9 rows for 11 tokens" in run.err and "rows from 11 to 12" in run.err
    assert "vocabulary: base" in run.err
    merged(tmp_path, tmp_path / "out", "longer", vocabulary="base")


def test_rows_without_tokens_keep_the_value_of_the_base(tmp_path: Path) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", vocab_size=16))
    tiny.tokenizer(tiny.save(base, tmp_path / "base"), BASE)
    tiny.tokenizer(tiny.save(tiny.fine_tune(base, 1), tmp_path / "longer"), LONGER)
    out = merged(tmp_path, tmp_path / "out", "longer", vocabulary="base")
    got, source = tiny.tensors(out), tiny.tensors(tmp_path / "longer")
    name = "model.embed_tokens.weight"
    assert torch.allclose(got[name][: len(BASE)], source[name][: len(BASE)], atol=1e-6)
    assert torch.equal(got[name][len(BASE) :], tiny.tensors(tmp_path / "base")[name][len(BASE) :])


def test_a_source_without_a_tokenizer_cannot_be_aligned(llama: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(llama / "base")
    tiny.save(resized(base, LONGER, 1), tmp_path / "bare")
    run = merge(llama, tmp_path / "out", str(tmp_path / "bare"), vocabulary="base")
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1
    assert f"{tmp_path / 'bare'}: no tokenizer files" in run.err and not (tmp_path / "out").exists()
