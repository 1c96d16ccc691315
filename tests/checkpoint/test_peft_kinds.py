"""Every kind of adapter that PEFT registers, on every architecture: merged as PEFT does, or refused with a reason.

The table in docs/formats/adapters.md is made here. A kind that a new release of PEFT brings has no settings below, so
this file fails until somebody has looked at it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor
from transformers import PreTrainedModel

from hfmerge import merge, plan
from hfmerge.checkpoint.peft_kinds import BIASED, PREFIXES, REASONS, SHARING
from hfmerge.errors import RecipeError
from hfmerge.recipe.recipe import Recipe, parse_recipe
from tests.fixtures import tiny


pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT warns of much that is meant here
]


def _resnet() -> PreTrainedModel:
    settings = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=4
    )
    return tiny.build("ResNetModel", settings)


BASES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "linear": lambda: tiny.build("BertForSequenceClassification", tiny.config("bert", num_labels=3)),
    "no bias": lambda: tiny.build("LlamaForCausalLM", tiny.config("llama")),
    "Conv1D": lambda: tiny.build("GPT2LMHeadModel", tiny.config("gpt2")),
    "convolution": _resnet,
    "embedding": lambda: tiny.build("LlamaForCausalLM", tiny.config("llama")),
}
TARGETS: Mapping[str, list[str]] = {
    "linear": ["query", "value", "output.dense"],
    "no bias": ["q_proj", "v_proj", "down_proj"],
    "Conv1D": ["c_attn", "c_proj"],
    "convolution": ["layer.0.convolution", "layer.1.convolution"],
    "embedding": ["embed_tokens"],
}
NORMS = {
    "linear": ["LayerNorm"], "no bias": ["input_layernorm"], "Conv1D": ["ln_1"], "convolution": ["normalization"],
    "embedding": ["norm"],
}  # fmt: skip
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "LORA": {"r": 2, "use_dora": True},
    "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2, "subspace_rank": 1},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 2},
    "DELORA": {"r": 2},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {},
    "GLORA": {"r": 2},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 2},
    "HRA": {"r": 2},
    "IA3": {"feedforward_modules": ["down_proj", "output.dense"]},
    "LILY": {"r": 2},
    "LN_TUNING": {},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "MISS": {"r": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "OSF": {},
    "PEANUT": {"r": 2},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 2, "randlora_alpha": 1},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 1},
    "SUPERTUNING": {},
    "TINYLORA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 3]},
    "UNILORA": {"r": 2, "theta_d_length": 64},
    "VBLORA": {"r": 2, "num_vectors": 10, "vector_length": 8},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
"""Kinds whose adapters have target modules -> the settings that the table is made with."""


def settings_of(kind: str, base: str, **more: Any) -> Any:
    """A configuration of this kind for this base."""
    values: dict[str, Any] = {**SETTINGS[kind], **more}
    targets = values.pop("target_modules", (NORMS if kind == "LN_TUNING" else TARGETS)[base])
    if kind == "IA3":
        values["feedforward_modules"] = [name for name in values["feedforward_modules"] if name in targets]
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=targets, **values)


def trained(base: str, folder: Path, settings: Any, seed: int = 1) -> Path:
    """An adapter on this base, made and saved by PEFT, every trainable parameter off its initial value."""
    torch.manual_seed(seed)
    model = get_peft_model(BASES[base](), settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: str, adapter: Path) -> dict[str, Tensor]:
    torch.manual_seed(77)
    model: Any = PeftModel.from_pretrained(BASES[base](), adapter)
    return dict(model.merge_and_unload(safe_merge=True).state_dict())


def recipe(base: Path, *adapters: Path | str, **keys: Any) -> Recipe:
    return parse_recipe(
        {"base": str(base), "models": [str(one) for one in adapters], "method": "linear", **keys}, "test"
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: tiny.save(make(), root / name.replace(" ", "_")) for name, make in BASES.items()}


EXACT = {"name": "linear", "grid": 48}
"""A step so fine that it is below the last place of every weight in these models."""


def compared(bases: dict[str, Path], base: str, adapter: Path, output: Path, tolerance: float = 0.0) -> list[str]:
    """The merge of one adapter equals PEFT's, each element within the tolerance; names of what was changed."""
    theirs, before = merged_by_peft(base, adapter), BASES[base]().state_dict()
    merge(recipe(bases[base], adapter, method=EXACT), output=output)
    ours = getattr(transformers, type(BASES[base]()).__name__).from_pretrained(output).state_dict()
    assert ours.keys() == theirs.keys() == before.keys()
    for name, value in theirs.items():
        if not value.is_floating_point():
            continue
        off = float((ours[name] - value).abs().max())
        assert off <= tolerance * float(value.abs().max()), f"{name} is off by {off:.2g}"
    return [name for name in before if not torch.equal(before[name], theirs[name])]


def outcome(bases: dict[str, Path], kind: str, base: str, folder: Path) -> str:
    """What the table says of one kind on one base, after it was tried."""
    try:
        adapter = trained(base, folder / "adapter", settings_of(kind, base))
        if kind not in REASONS:
            merged_by_peft(base, adapter)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError):
        return "not in PEFT"
    if not (adapter / "adapter_model.safetensors").stat().st_size > 100:
        return "not in PEFT"
    if kind in REASONS:
        with pytest.raises(RecipeError, match=f"a {kind} adapter {REASONS[kind]}"):
            plan(recipe(bases[base], adapter))
        return "refused"
    assert compared(bases, base, adapter, folder / "out", 1e-7 if kind == "LN_TUNING" else 0.0)
    return "exact"


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("base", BASES)
def test_kind(bases: dict[str, Path], tmp_path: Path, kind: str, base: str) -> None:
    print(kind, base, outcome(bases, kind, base, tmp_path))


def test_every_kind_of_peft_is_merged_or_has_a_reason() -> None:
    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known == {*PREFIXES, *REASONS} and not {*PREFIXES} & {*REASONS}
    shared = {
        kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if getattr(tuner, "uses_shared_state", False)
    }
    assert shared <= {*SHARING, "FROD"}
    assert {*BIASED} <= {*PREFIXES} and {*SETTINGS} == {*PREFIXES, "FROD", "LILY"}
