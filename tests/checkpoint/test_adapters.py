"""LoRA adapters made, saved and merged by PEFT, against what hfmerge makes of the same folders; those it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hfmerge import merge, plan
from hfmerge.checkpoint.peft_kinds import FIELDS, INITS
from hfmerge.errors import RecipeError
from hfmerge.recipe.recipe import Recipe, parse_recipe
from tests.fixtures import tiny


pytestmark = [
    # peft 0.21 asks transformers 5 for it under its old name whenever it wraps or loads a model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
EMBEDDINGS = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
TIED = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter:UserWarning",
    "ignore:Model with `tie_word_embeddings=True` and the tied_target_modules:UserWarning",
    "ignore:Input and output embeddings are no longer tied after merging:UserWarning",
)

KINDS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: tiny.build("BertForSequenceClassification", tiny.config("bert", num_labels=3)),
    "llama": lambda: tiny.build("LlamaForCausalLM", tiny.config("llama", num_hidden_layers=3)),
    "qwen3": lambda: tiny.build("Qwen3ForCausalLM", tiny.config("qwen3")),
    "gpt2": lambda: tiny.build("GPT2LMHeadModel", tiny.config("gpt2")),
    "vit": lambda: tiny.build("ViTModel", tiny.config("vit")),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny.save(make(), root / kind) for kind, make in KINDS.items()}


def trained(kind: str, folder: Path, settings: LoraConfig, seed: int = 1, **saving: Any) -> Path:
    """An adapter on the base of this kind, made and saved by PEFT, every trainable parameter off its initial value."""
    model = get_peft_model(KINDS[kind](), settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, **saving)
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    title = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: PreTrainedModel = getattr(transformers, title).from_pretrained(folder)
    return model


def merged_by_peft(base: Path, *adapters: Path) -> dict[str, Tensor]:
    model: Any = loaded(base)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    return dict(model.state_dict())


def recipe(base: Path, *adapters: Path | str, **keys: Any) -> Recipe:
    given = {"base": str(base), "models": [str(adapter) for adapter in adapters], "method": "task_arithmetic", **keys}
    return parse_recipe(given, "test")


def merged_by_us(output: Path, base: Path, *adapters: Path | str, **keys: Any) -> dict[str, Tensor]:
    merge(recipe(base, *adapters, **keys), output=output)
    return dict(loaded(output).state_dict())


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], base: Path) -> list[str]:
    """Equal to 1e-6 of the weights' scale; gives the names of what was changed."""
    before = loaded(base).state_dict()
    assert ours.keys() == theirs.keys() == before.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        assert float((ours[name] - value).abs().max()) <= 1e-6 * float(value.abs().max()), name
    return [name for name, value in ours.items() if not torch.equal(value, before[name])]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **settings})


ATTENTION = ["q_proj", "v_proj"]
CASES: list[Any] = [
    pytest.param("bert", lora(), 4, id="plain"),
    pytest.param("bert", lora(r=1, lora_alpha=5), 4, id="rank one"),
    pytest.param("bert", lora(r=8), 4, id="larger rank"),
    pytest.param("bert", lora(r=24), 4, id="rank beyond the matrix"),
    pytest.param("bert", lora(use_rslora=True), 4, id="rank-stabilised"),
    pytest.param("llama", lora(target_modules="all-linear"), 21, id="all linear layers"),
    pytest.param("llama", lora(target_modules=ATTENTION, layers_to_transform=[1]), 2, id="one layer"),
    pytest.param(
        "llama", lora(target_modules=ATTENTION, layers_to_transform=2, layers_pattern="layers"), 2, id="last"
    ),
    pytest.param("llama", lora(target_modules=r".*\.2\.mlp\.(up|down)_proj"), 2, id="pattern of modules"),
    pytest.param("llama", lora(target_modules=["q_proj"], exclude_modules=r".*\.0\..*"), 2, id="excluded modules"),
    pytest.param(
        "bert",
        lora(
            target_modules=["query", "value", "dense"],
            rank_pattern={"query": 2, "^bert.encoder.layer.1.output.dense": 3},
        ),
        11,
        id="rank pattern",
    ),
    pytest.param(
        "bert",
        lora(target_modules=["query", "value"], alpha_pattern={r"layer\.0\.attention\.self\.query": 5, "value": 1}),
        4,
        id="alpha pattern",
    ),
    pytest.param(
        "llama",
        lora(
            target_modules=ATTENTION,
            rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 2, "v_proj": 3},
            alpha_pattern={r"layers\.[01]\.self_attn\.v_proj": 9},
            use_rslora=True,
        ),
        6,
        id="both patterns, rank-stabilised",
    ),
    pytest.param("bert", lora(modules_to_save=["LayerNorm"]), 14, id="saved norms"),
    pytest.param("bert", lora(modules_to_save=["pooler"]), 6, id="saved module of several parameters"),
    pytest.param(
        "llama", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]), 5, id="saved both"
    ),
    pytest.param("vit", lora(target_modules=ATTENTION), 4, id="names in memory unlike those in the file"),
    pytest.param("gpt2", lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), 8, id="Conv1D"),
    pytest.param("bert", lora(init_lora_weights="gaussian"), 4, id="gaussian"),
    pytest.param("bert", lora(init_lora_weights="orthogonal"), 4, id="orthogonal"),
    pytest.param("bert", lora(init_lora_weights="mica"), 4, id="mica"),
    pytest.param("bert", lora(lora_dropout=0.3), 4, id="dropout"),
    pytest.param("llama", lora(target_modules=["lm_head"]), 1, id="lm_head with its weight", marks=EMBEDDINGS),
    pytest.param("llama", lora(target_modules=["embed_tokens"]), 1, id="embedding with its weight", marks=EMBEDDINGS),
    pytest.param(
        "qwen3",
        lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        4,
        id="saved embedding that stays tied",
        marks=TIED,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings", "changed"), CASES)
def test_adapters_change_what_peft_changes(
    bases: dict[str, Path], tmp_path: Path, kind: str, settings: LoraConfig, changed: int
) -> None:
    adapter = trained(kind, tmp_path / "adapter", settings)
    theirs = merged_by_peft(bases[kind], adapter)
    assert len(compare(merged_by_us(tmp_path / "out", bases[kind], adapter), theirs, bases[kind])) == changed


@pytest.mark.parametrize(
    ("kind", "target"),
    [("bert", "word_embeddings"), ("llama", "embed_tokens")],
)
def test_adapters_of_embeddings(bases: dict[str, Path], tmp_path: Path, kind: str, target: str) -> None:
    adapter = trained(kind, tmp_path / "adapter", lora(target_modules=[target]), save_embedding_layers=False)
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2
    compare(merged_by_us(tmp_path / "out", bases[kind], adapter), merged_by_peft(bases[kind], adapter), bases[kind])
    params = {param.key: param for param in plan(recipe(bases[kind], adapter)).params if param.touched}
    assert [param.ranks for param in params.values()] == [(4,)]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
def test_an_adapter_whose_orientation_peft_corrects(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = trained("gpt2", tmp_path / "adapter", lora(target_modules=["c_attn"]))
    assert (
        len(
            compare(
                merged_by_us(tmp_path / "out", bases["gpt2"], adapter),
                merged_by_peft(bases["gpt2"], adapter),
                bases["gpt2"],
            )
        )
        == 2
    )


@EMBEDDINGS
def test_a_changed_embedding_beneath_an_adapter_counts(bases: dict[str, Path], tmp_path: Path) -> None:
    """What PEFT saves beneath an embedding's factors is loaded in place of the base's embedding."""
    adapter = trained("llama", tmp_path / "adapter", lora(target_modules=["embed_tokens"]))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tiny.edit(adapter, lambda held: held[key].add_(0.25), "adapter_model.safetensors")
    ours = merged_by_us(tmp_path / "out", bases["llama"], adapter)
    compare(ours, merged_by_peft(bases["llama"], adapter), bases["llama"])


def test_half_precision_adapters_are_computed_in_float(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = trained("bert", tmp_path / "adapter", lora())
    held = load_file(adapter / "adapter_model.safetensors")
    save_file({key: value.bfloat16() for key, value in held.items()}, adapter / "adapter_model.safetensors")
    compare(
        merged_by_us(tmp_path / "out", bases["bert"], adapter), merged_by_peft(bases["bert"], adapter), bases["bert"]
    )


@pytest.mark.slow
def test_several_adapters_add_up(bases: dict[str, Path], tmp_path: Path) -> None:
    adapters = [trained("bert", tmp_path / f"a{seed}", lora(r=seed), seed) for seed in (1, 2, 3)]
    ours = merged_by_us(tmp_path / "out", bases["bert"], *adapters)
    theirs = merged_by_peft(bases["bert"], *adapters)
    assert len(compare(ours, theirs, bases["bert"])) == 4
    params = plan(recipe(bases["bert"], *adapters)).params
    assert {param.ranks for param in params if param.touched} == {(1, 2, 3)}
    assert not any(param.touched for param in params if param.key.endswith("key.weight"))


@pytest.mark.slow
def test_an_adapter_on_another_model_beneath_it(bases: dict[str, Path], tmp_path: Path) -> None:
    """`model+adapter` is the change from the base to the model with its adapter."""
    model = tiny.save(tiny.fine_tune(KINDS["bert"](), 5), tmp_path / "model")
    adapter = trained("bert", tmp_path / "adapter", lora(modules_to_save=["pooler"]))
    ours = merged_by_us(tmp_path / "out", bases["bert"], f"{model}+{adapter}")
    compare(ours, merged_by_peft(model, adapter), bases["bert"])
    same = merged_by_us(tmp_path / "same", bases["bert"], f"{bases['bert']}+{adapter}")
    compare(same, merged_by_peft(bases["bert"], adapter), bases["bert"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["opcm", "linear", "ties"])
def test_an_adapter_is_the_full_model_that_peft_makes_of_it(
    bases: dict[str, Path], tmp_path: Path, method: str
) -> None:
    adapters = [trained("llama", tmp_path / f"a{seed}", lora(target_modules=ATTENTION, r=2), seed) for seed in (1, 2)]
    full = []
    for i, adapter in enumerate(adapters):
        model: Any = PeftModel.from_pretrained(loaded(bases["llama"]), adapter).merge_and_unload(safe_merge=True)
        full.append(tiny.save(model, tmp_path / f"full{i}"))
    small = merged_by_us(tmp_path / "small", bases["llama"], *adapters, method=method)
    large = merged_by_us(tmp_path / "large", bases["llama"], *full, method=method)
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=1e-5, atol=2e-6)


def test_saved_parameters_outside_any_leaf_module(bases: dict[str, Path], tmp_path: Path) -> None:
    before = tiny.tensors(bases["vit"])
    names = ("embeddings.cls_token", "embeddings.position_embeddings", "pooler.dense.bias")
    saved = {name: before[name] + 0.5 for name in names}
    adapter = tiny.adapter(tmp_path / "adapter", {"layers.0.attention.q_proj": (16, 16)}, 1, saved=saved)
    merge(recipe(bases["vit"], adapter), output=tmp_path / "out")
    out = tiny.tensors(tmp_path / "out")
    changed = [name for name in before if not torch.equal(out[name], before[name])]
    assert changed == sorted([*names, "encoder.layer.0.attention.attention.query.weight"])
    for name in names:
        torch.testing.assert_close(out[name], saved[name])


# Heads


@pytest.mark.slow
def test_a_copy_of_the_head_joins_the_merge_only_for_the_same_labels(bases: dict[str, Path], tmp_path: Path) -> None:
    """Without a config.json that names its labels, an adapter's classifier is a head of its own."""
    adapter = trained("bert", tmp_path / "adapter", lora(modules_to_save=["classifier"], task_type="SEQ_CLS"))
    theirs = merged_by_peft(bases["bert"], adapter)
    merge(recipe(bases["bert"], adapter), output=tmp_path / "apart")
    out, before = tiny.tensors(tmp_path / "apart"), tiny.tensors(bases["bert"])
    head = tiny.tensors(tmp_path / "apart" / "heads" / "adapter")
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(out[name], before[name]) and torch.equal(head[name], theirs[name])
    (adapter / "config.json").write_bytes((bases["bert"] / "config.json").read_bytes())
    ours = merged_by_us(tmp_path / "together", bases["bert"], adapter)
    assert len(compare(ours, theirs, bases["bert"])) == 6
    assert not (tmp_path / "together" / "heads").exists()


@pytest.mark.slow
@pytest.mark.parametrize("labels", [3, 5])
def test_a_head_the_base_lacks_is_kept_apart(bases: dict[str, Path], tmp_path: Path, labels: int) -> None:
    backbone = tiny.save(KINDS["bert"]().bert, tmp_path / "backbone")
    model = transformers.BertForSequenceClassification.from_pretrained(backbone, num_labels=labels)
    wrapped = get_peft_model(model, lora(task_type="SEQ_CLS"))
    wrapped.save_pretrained(tmp_path / "adapter")
    merge(recipe(backbone, tmp_path / "adapter"), output=tmp_path / "out")
    head = tmp_path / "out" / "heads" / "adapter"
    assert {name: tuple(value.shape) for name, value in tiny.tensors(head).items()} == {
        "classifier.weight": (labels, 16),
        "classifier.bias": (labels,),
    }
    settings = json.loads((head / "config.json").read_text())
    assert settings["architectures"] == ["BertForSequenceClassification"] and len(settings["id2label"]) == labels


def test_a_head_of_another_shape_is_kept_apart(bases: dict[str, Path], tmp_path: Path) -> None:
    """A classifier for other labels than the base's is no copy of the base's."""
    model = transformers.BertForSequenceClassification.from_pretrained(
        bases["bert"], num_labels=5, ignore_mismatched_sizes=True
    )
    get_peft_model(model, lora(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    merge(recipe(bases["bert"], tmp_path / "adapter"), output=tmp_path / "out")
    out, before = tiny.tensors(tmp_path / "out"), tiny.tensors(bases["bert"])
    assert torch.equal(out["classifier.weight"], before["classifier.weight"])
    assert tuple(tiny.tensors(tmp_path / "out" / "heads" / "adapter")["classifier.weight"].shape) == (5, 16)


# Refused


def refused(base: Path, adapter: Path | str, words: str) -> None:
    """Refused by the plan, before anything is downloaded or written, in one line that names the adapter."""
    with pytest.raises(RecipeError, match=words) as caught:
        plan(recipe(base, adapter))
    assert str(adapter) in str(caught.value) and "\n" not in str(caught.value)


VALUES: Mapping[str, Any] = {
    "use_qalora": True,
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [5, 6],
    "arrow_config": {"top_k": 2},
    "loftq_config": {"loftq_bits": 4},
}


@pytest.mark.parametrize("field", VALUES)
def test_each_field_that_no_merge_can_follow_is_refused_by_name(
    bases: dict[str, Path], tmp_path: Path, field: str
) -> None:
    assert set(VALUES) == set(FIELDS)
    adapter = tiny.adapter(tmp_path / "adapter", {"bert.encoder.layer.0.output.dense": (16, 32)}, 1)
    plan(recipe(bases["bert"], adapter))
    tiny.edit_config(adapter, "adapter_config.json", **{field: VALUES[field]})
    refused(bases["bert"], adapter, f"LoRA with `{field}: .* so it cannot be merged; leave it out")


@pytest.mark.parametrize("init", [*INITS, "CorDA", "pissa_niter_4"])
def test_initialisations_that_cannot_be_repeated(bases: dict[str, Path], tmp_path: Path, init: str) -> None:
    adapter = tiny.adapter(
        tmp_path / "adapter", {"bert.encoder.layer.0.output.dense": (16, 32)}, 1, init_lora_weights=init
    )
    refused(bases["bert"], adapter, f'`init_lora_weights: "{init.lower()}"`: .*; convert it to plain LoRA')


DENSE = "bert.encoder.layer.0.output.dense"
PREFIX = f"base_model.model.{DENSE}"


def broken(folder: Path, change: Callable[[dict[str, Tensor]], None], **settings: Any) -> Path:
    adapter = tiny.adapter(folder, {DENSE: (16, 32), "bert.pooler.dense": (16, 16)}, 1, **settings)
    tiny.edit(adapter, change, "adapter_model.safetensors")
    return adapter


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda held: held.pop(f"{PREFIX}.lora_B.weight"),
            rf"{PREFIX}.lora_A.weight has no lora_B beside it; .* incomplete",
        ),
        (
            lambda held: held.pop(f"{PREFIX}.lora_A.weight"),
            rf"{PREFIX}.lora_B.weight has no lora_A beside it; .* incomplete",
        ),
        (
            lambda held: held.update({f"{PREFIX}.lora_B.weight": torch.zeros(16, 3)}),
            f"{DENSE}: A has rank 2, B has rank 3",
        ),
        (
            lambda held: held.update(
                {f"{PREFIX}.lora_A.weight": torch.zeros(3, 32), f"{PREFIX}.lora_B.weight": torch.zeros(16, 3)}
            ),
            f"{DENSE}: the configuration says r = 2, the file holds 3",
        ),
        (
            lambda held: held.update({f"{PREFIX}.lora_A.weight": torch.zeros(2, 20)}),
            r"the adapter changes \(16, 20\), the base has \(16, 32\); it was trained on another base",
        ),
        (
            lambda held: held.update({f"{PREFIX}.lora_magnitude_vector": torch.zeros(16)}),
            f"{PREFIX}.lora_magnitude_vector is no part of a LORA adapter",
        ),
        (
            lambda held: held.update({f"{PREFIX}.base_layer.bias": torch.zeros(7)}),
            rf"its copy of {DENSE}.bias is \(7,\), the base has \(16,\)",
        ),
        (
            lambda held: held.update(
                {
                    f"{PREFIX}.lora_A.weight": torch.zeros(2, 32, 1, 1),
                    f"{PREFIX}.lora_B.weight": torch.zeros(16, 2, 1, 1),
                }
            ),
            "only matrices are merged",
        ),
        (
            lambda held: held.update({"base_model.model.bert.pooler.dense.bias": torch.zeros(7)}),
            r"its copy of bert.pooler.dense.bias is \(7,\), the base has \(16,\)",
        ),
        (
            lambda held: held.update({"base_model.model.bert.embeddings.word_embeddings.weight": torch.zeros(50, 16)}),
            r"its vocabulary has 50 rows, the base 48; set `vocabulary: base`.*and put the files of the tokenizer",
        ),
    ],
    ids=[
        "no B",
        "no A",
        "ranks differ",
        "other rank",
        "other width",
        "magnitude",
        "bias",
        "convolution",
        "copy",
        "tokens",
    ],
)
def test_broken_adapters_are_named(
    bases: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    refused(bases["bert"], broken(tmp_path / "adapter", change), words)


def test_an_adapter_of_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tiny.adapter(tmp_path / "layers", {f"bert.encoder.layer.{i}.output.dense": (16, 32) for i in (1, 2)}, 1)
    refused(bases["bert"], adapter, "changes bert.encoder.layer.2.output.dense, which the base .* does not have")
    adapter = tiny.adapter(tmp_path / "wider", {DENSE: (24, 32)}, 1)
    refused(bases["bert"], adapter, r"the adapter changes \(24, 32\), the base has \(16, 32\)")
    refused(bases["bert"], tiny.adapter(tmp_path / "llama", tiny.attention(), 1), "which the base .* does not have")


def test_an_adapter_that_changes_nothing_here(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tiny.adapter(
        tmp_path / "adapter", {}, 1, saved={"score.weight": torch.zeros(2, 16)}, task_type="SEQ_CLS"
    )
    refused(bases["bert"], adapter, "changes no parameter of the base BertForSequenceClassification")


def test_a_recipe_whose_base_is_an_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", {DENSE: (16, 32)}, 1)
    with pytest.raises(RecipeError, match="is an adapter; name the full model it was trained on"):
        plan(recipe(adapter, bases["bert"]))
    refused(bases["bert"], f"{adapter}+{adapter}", "is itself an adapter; write `model\\+adapter`")
