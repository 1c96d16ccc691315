"""Merges of tiny models of many architectures, compared with the same merge done by hand on state dicts in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.fixtures import tiny


pytestmark = pytest.mark.slow
State = dict[str, Tensor]
View = Callable[[Tensor], Tensor]


def same(name: str) -> str:
    """The source calls its parameters like the base."""
    return name


def under(prefix: str) -> Callable[[str], str]:
    """The source holds the base as its part `prefix`."""
    return lambda name: f"{prefix}.{name}"


def part(prefix: str) -> Callable[[str], str]:
    """The source is the base's part `prefix`."""
    return lambda name: name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else ""


@dataclass(frozen=True)
class Tuned:
    """One source: its class (None: the base's), how the base's names read there, and how it is saved.

    `labels` makes a model with a classification head; `inside` is the part of the base it is made from.
    """

    title: str | None = None
    name: Callable[[str], str] = same
    labels: int = 0
    inside: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A base and its sources."""

    title: str
    kind: str
    sources: tuple[Tuned, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


PLAIN = (Tuned(), Tuned(), Tuned())
FUSED = {"save_original_format": False}
CASES = {
    "bert": Case(
        "BertModel",
        "bert",
        (
            Tuned("BertForSequenceClassification", under("bert"), labels=2),
            Tuned("BertForSequenceClassification", under("bert"), labels=5),
            Tuned("BertForTokenClassification", under("bert"), labels=3),
        ),
    ),
    "vit": Case(
        "ViTModel",
        "vit",
        (
            Tuned("ViTForImageClassification", under("vit"), labels=2),
            Tuned("ViTForImageClassification", under("vit"), labels=4),
            Tuned(),
        ),
    ),
    "dinov2": Case(
        "Dinov2Model",
        "dinov2",
        (
            Tuned("Dinov2ForImageClassification", under("dinov2"), labels=2),
            Tuned("Dinov2ForImageClassification", under("dinov2"), labels=7),
        ),
    ),
    "clip": Case("CLIPModel", "clip", PLAIN[:2]),
    "clip-vision-towers": Case(
        "CLIPModel",
        "clip",
        (
            Tuned("CLIPVisionModel", part("vision_model"), inside="vision_model"),
            Tuned("CLIPVisionModel", part("vision_model"), inside="vision_model"),
            Tuned(),
        ),
    ),
    "clip-text-and-vision": Case(
        "CLIPModel",
        "clip",
        (
            Tuned("CLIPTextModel", part("text_model"), inside="text_model"),
            Tuned("CLIPVisionModel", part("vision_model"), inside="vision_model"),
            Tuned("CLIPTextModel", part("text_model"), inside="text_model"),
        ),
    ),
    "clip-vision-base": Case("CLIPVisionModel", "clip_vision", PLAIN),
    "t5": Case("T5ForConditionalGeneration", "t5", PLAIN),
    "whisper": Case("WhisperForConditionalGeneration", "whisper", PLAIN),
    "llama": Case("LlamaForCausalLM", "llama", PLAIN),
    "llama-tied": Case("LlamaForCausalLM", "llama", PLAIN, {"tie_word_embeddings": True}),
    "llama-sharded-base": Case(
        "LlamaForCausalLM",
        "llama",
        (Tuned(), Tuned(options={"max_shard_size": "3KB"}), Tuned()),
        options={"max_shard_size": "8KB"},
    ),
    "llama-sharded-sources": Case("LlamaForCausalLM", "llama", (Tuned(options={"max_shard_size": "8KB"}), Tuned())),
    "llama-encoder-base": Case("LlamaModel", "llama", (Tuned("LlamaForCausalLM", under("model")), Tuned())),
    "qwen3": Case("Qwen3ForCausalLM", "qwen3", PLAIN),
    "mixtral": Case("MixtralForCausalLM", "mixtral", PLAIN),
    "mixtral-fused-sources": Case("MixtralForCausalLM", "mixtral", (Tuned(options=FUSED), Tuned(), Tuned())),
    "mixtral-fused-base": Case("MixtralForCausalLM", "mixtral", (Tuned(), Tuned(options=FUSED)), options=FUSED),
    "qwen3-moe": Case("Qwen3MoeForCausalLM", "qwen3_moe", PLAIN),
    "qwen3-moe-fused-sources": Case("Qwen3MoeForCausalLM", "qwen3_moe", (Tuned(), Tuned(options=FUSED))),
    "qwen3-moe-fused-base": Case("Qwen3MoeForCausalLM", "qwen3_moe", PLAIN, options=FUSED),
    "gpt2": Case("GPT2LMHeadModel", "gpt2", PLAIN),
    "gpt2-encoder-base": Case("GPT2Model", "gpt2", (Tuned("GPT2LMHeadModel", under("transformer")), Tuned())),
}


def make_source(base: PreTrainedModel, tuned: Tuned, seed: int) -> PreTrainedModel:
    """A fine-tune of the base, or of a part of it, as the class the source says."""
    if tuned.title is None:
        return tiny.fine_tune(base, seed)
    if tuned.labels:
        return tiny.with_head(tuned.title, base, seed, [f"class {i}" for i in range(tuned.labels)])
    settings = getattr(base.config, tuned.inside.replace("model", "config")) if tuned.inside else base.config
    model = tiny.build(tuned.title, settings, seed)
    state = model.state_dict()
    held = {tuned.name(name): value for name, value in base.state_dict().items()}
    model.load_state_dict({**state, **{name: value for name, value in held.items() if name in state}})
    tiny.disturb(model, seed, 0.05)
    return model


def matrices(model: PreTrainedModel) -> dict[str, list[View]]:
    """The real matrices (out, in) in each parameter, written down by hand for the classes tested here."""
    found: dict[str, list[View]] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("TopKRouter") or isinstance(module, nn.Linear):
            found[f"{path}.weight"] = [lambda t: t]
        elif isinstance(module, Conv1D) and path.endswith("attn.c_attn"):
            width = module.weight.shape[1] // 3
            found[f"{path}.weight"] = [lambda t, i=i, w=width: t[:, i * w : (i + 1) * w].T for i in range(3)]
        elif isinstance(module, Conv1D):
            found[f"{path}.weight"] = [lambda t: t.T]
        elif kind.endswith("Experts"):
            experts, both, _ = module.gate_up_proj.shape
            found[f"{path}.gate_up_proj"] = [
                lambda t, e=e, rows=rows: t[e, rows]
                for e in range(experts)
                for rows in (slice(0, both // 2), slice(both // 2, both))
            ]
            found[f"{path}.down_proj"] = [lambda t, e=e: t[e] for e in range(experts)]
    shared = [tensor.data_ptr() for name, tensor in model.state_dict().items() if name not in found]
    return {name: views for name, views in found.items() if model.state_dict()[name].data_ptr() not in shared}


def project(total: Tensor, tau: Tensor, alpha: float = 0.5) -> Tensor:
    """OPCM's projection as published code has it, from the full bases of a singular value decomposition."""
    u, s, vh = torch.linalg.svd(total, full_matrices=True)
    inside = u.T @ tau @ vh.T
    rank = int((s > s[0] * 2.0**-23 * max(total.shape)).sum())
    r = next(i for i in range(len(s)) if s[: i + 1].sum() > alpha * s.sum())
    inside[:r, :r] = 0.0
    for i in range(rank):
        inside[i, i] = 0.0
    return u @ inside @ vh


def by_hand(method: str, model: PreTrainedModel, taus: Sequence[State]) -> State:
    """The merged state dict, from the base in memory and the sources' differences (float64); tied copies follow."""
    base = {name: tensor.double() for name, tensor in model.state_dict().items()}
    views = matrices(model)
    total: State = {}
    for name in taus[0]:
        if method == "linear":
            total[name] = sum((tau[name] for tau in taus), torch.zeros_like(base[name])) / len(taus)
            continue
        total[name] = taus[0][name].clone()
        for tau in taus[1:]:
            for view in views.get(name, []):
                done, new = view(total[name]), view(tau[name])
                if not new.any():
                    continue
                done += project(done, new) if done.any() else new
            if name not in views:
                total[name] += tau[name]
    scale = 1.0
    if method == "opcm":
        norms = [sum(float((t**2).sum()) for t in tau.values()) ** 0.5 for tau in taus]
        scale = sum(norms) / len(norms) / sum(float((t**2).sum()) for t in total.values()) ** 0.5
    return {name: base[name] + scale * total[name] for name in total}


def owned(model: PreTrainedModel) -> list[str]:
    """Names of a state dict, of tied ones only the first."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        first.setdefault(tensor.data_ptr(), name)
    return list(first.values())


def differences(base: PreTrainedModel, source: PreTrainedModel, name: Callable[[str], str]) -> State:
    """Source minus base for every parameter of the base; zero where the source has no such parameter."""
    theirs = source.state_dict()
    return {
        mine: theirs[name(mine)].double() - base.state_dict()[mine].double()
        if name(mine) in theirs
        else torch.zeros_like(base.state_dict()[mine], dtype=torch.float64)
        for mine in owned(base)
    }


def load(title: str, folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, with no key missing, unexpected or of another shape."""
    model, info = getattr(transformers, title).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    loaded: PreTrainedModel = model
    return loaded


def assert_equal(model: PreTrainedModel, expected: State, tolerance: float) -> None:
    state = model.state_dict()
    worst = max((float((state[name].double() - value).abs().max()), name) for name, value in expected.items())
    assert worst[0] <= tolerance, worst


@pytest.mark.parametrize("name", CASES)
def test_merges_equal_the_same_merge_in_memory(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = tiny.build(case.title, tiny.config(case.kind, **case.changes))
    tiny.save(base, tmp_path / "base", **case.options)
    taus, folders = [], []
    for i, tuned in enumerate(case.sources):
        source = make_source(base, tuned, i + 1)
        folders.append(tiny.save(source, tmp_path / f"tuned-{i}", **tuned.options))
        taus.append(differences(base, source, tuned.name))
    stored = tiny.tensors(tmp_path / "base")
    for method, tolerance in (("linear", 1e-6), ("opcm", 2e-6)):
        out = tmp_path / method
        tiny.done("merge", *folders, "--base", tmp_path / "base", "--method", method, "--output", out)
        merged = tiny.tensors(out)
        assert list(merged) == list(stored)
        assert {k: (t.dtype, t.shape) for k, t in merged.items()} == {k: (t.dtype, t.shape) for k, t in stored.items()}
        assert sorted(p.name for p in out.glob("*.safetensors*")) == sorted(
            p.name for p in (tmp_path / "base").glob("*.safetensors*")
        )
        assert_equal(load(case.title, out), by_hand(method, base, taus), tolerance)


def test_bfloat16_models_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama")).bfloat16()
    sources = [tiny.fine_tune(base, seed, 0.02) for seed in (1, 2, 3)]
    tiny.save(base, tmp_path / "base")
    folders = [tiny.save(source, tmp_path / f"m{i}") for i, source in enumerate(sources)]
    tiny.done("merge", *folders, "--base", tmp_path / "base", "--method", "linear", "--output", tmp_path / "out")
    tiny.done(
        "merge", *folders, "--base", tmp_path / "base", "--method", "linear", "--dtype", "float32", "--output",
        tmp_path / "wide",
    )  # fmt: skip
    expected = by_hand("linear", base, [differences(base, source, same) for source in sources])
    narrow, wide = load("LlamaForCausalLM", tmp_path / "out"), load("LlamaForCausalLM", tmp_path / "wide")
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert_equal(wide, expected, 1e-6)
    for name, value in wide.state_dict().items():
        assert torch.equal(value.bfloat16(), narrow.state_dict()[name])


def test_float16_sources_on_a_float32_base_keep_the_dtype_of_the_base(tmp_path: Path) -> None:
    base = tiny.build("Qwen3ForCausalLM", tiny.config("qwen3"))
    sources = [tiny.fine_tune(base, seed).half() for seed in (1, 2)]
    tiny.save(base, tmp_path / "base")
    folders = [tiny.save(source, tmp_path / f"m{i}") for i, source in enumerate(sources)]
    tiny.done("merge", *folders, "--base", tmp_path / "base", "--method", "linear", "--output", tmp_path / "out")
    expected = by_hand("linear", base, [differences(base, source, same) for source in sources])
    assert_equal(load("Qwen3ForCausalLM", tmp_path / "out"), expected, 1e-6)


LORA = {
    "llama": ("LlamaForCausalLM", {"target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "gpt2": ("GPT2LMHeadModel", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "t5": ("T5ForConditionalGeneration", {"target_modules": ["q", "v", "wo"], "use_rslora": True}),
    "bert": ("BertModel", {"target_modules": ["query", "dense"], "rank_pattern": {"query": 3}}),
    "qwen3": ("Qwen3ForCausalLM", {"target_modules": ["embed_tokens", "k_proj"]}),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", LORA)
def test_adapters_change_what_peft_says_they_change(kind: str, tmp_path: Path) -> None:
    """PEFT itself trains (here: draws) the adapters, saves them, and merges them for comparison."""
    import peft

    title, options = LORA[kind]
    base = tiny.build(title, tiny.config(kind))
    tiny.save(base, tmp_path / "base")
    taus, folders = [], []
    for seed in (1, 2, 3):
        wrapped = peft.get_peft_model(tiny.fine_tune(base, 0, 0.0), peft.LoraConfig(r=2, lora_alpha=6, **options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(tmp_path / f"adapter-{seed}", save_embedding_layers=False)
        folders.append(tmp_path / f"adapter-{seed}")
        taus.append(differences(base, wrapped.merge_and_unload(safe_merge=True), same))
    for method in ("linear", "opcm"):
        out = tmp_path / method
        tiny.done("merge", *folders, "--base", tmp_path / "base", "--method", method, "--output", out)
        # changes are read once from factors here and once from merged float32 weights there
        assert_equal(load(title, out), by_hand(method, base, taus), 5e-6)


def test_tensors_visited_in_slices_of_rows_give_the_same_values(tmp_path: Path) -> None:
    """An embedding of more than 16 MiB is read and written some rows at a time where every element is for itself."""
    settings = tiny.config("qwen3", vocab_size=66_000, num_hidden_layers=1, hidden_size=64)
    base = tiny.build("Qwen3ForCausalLM", settings)
    sources = [tiny.fine_tune(base, seed) for seed in (1, 2)]
    tiny.save(base, tmp_path / "base")
    folders = [tiny.save(source, tmp_path / f"m{i}") for i, source in enumerate(sources)]
    expected = by_hand("linear", base, [differences(base, source, same) for source in sources])
    common = ("--base", tmp_path / "base", "--method", "linear")
    tiny.done("merge", *folders, *common, "--output", tmp_path / "out", "--state", "all")
    assert_equal(load("Qwen3ForCausalLM", tmp_path / "out"), expected, 1e-6)
    tiny.done("merge", *folders, *common, "--output", tmp_path / "mean", "--norm", "mean", "--state", "none")
    scale = json.loads((tmp_path / "mean" / "merge_history" / "0001.json").read_text())["byproducts"]["scalars"][
        "scale"
    ]
    values = base.state_dict()
    rescaled = {name: values[name].double() * (1.0 - scale) + value * scale for name, value in expected.items()}
    assert scale > 1.2
    assert_equal(load("Qwen3ForCausalLM", tmp_path / "mean"), rescaled, 1e-6)
    tiny.done("unmerge", tmp_path / "out", "--remove", "m1")
    tiny.done("merge", folders[0], *common, "--output", tmp_path / "never", "--state", "all")
    assert tiny.files(tmp_path / "out") == tiny.files(tmp_path / "never")
