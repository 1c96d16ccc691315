"""Every kind of adapter that PEFT registers, on every architecture: merged as PEFT does, or refused with a reason.

The table in docs/how-to/adapters.md has to say what is found here. A kind that a new release of PEFT brings has no
settings below, so this file fails until somebody has looked at it.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor
from transformers import PreTrainedModel

from hfmerge import add, merge, plan, unmerge
from hfmerge.checkpoint.peft_kinds import BIASED, LORA_FIELDS, PREFIXES, REASONS, SHARING
from hfmerge.checkpoint.schema import ADAPTER
from hfmerge.engine.plan_json import plan_from_json, plan_to_json
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


def _table() -> dict[str, dict[str, str]]:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "adapters.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


TABLE = _table()
"""What the page says: kind -> base -> outcome."""


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
    ranks = {param.ranks for param in plan(recipe(bases[base], adapter)).params if param.touched}
    factored = (None,) not in ranks
    assert compared(bases, base, adapter, folder / "out", 5e-7 if factored or kind == "LN_TUNING" else 0.0)
    return "factored" if factored else "exact"


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("base", BASES)
def test_kind(bases: dict[str, Path], tmp_path: Path, kind: str, base: str) -> None:
    assert TABLE[kind][base] == outcome(bases, kind, base, tmp_path)


@pytest.mark.parametrize("kind", SETTINGS)
def test_experts_in_one_parameter_are_of_lora_alone(kind: str) -> None:
    fields = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    assert TABLE[kind]["experts"] == ("factored" if kind == "LORA" else "not in PEFT")
    assert ("target_parameters" in fields) == (kind in ("LORA", "ADALORA"))


def test_every_kind_of_peft_is_merged_or_has_a_reason() -> None:
    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known == {*PREFIXES, *REASONS} and not {*PREFIXES} & {*REASONS}
    shared = {
        kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if getattr(tuner, "uses_shared_state", False)
    }
    assert shared <= {*SHARING, "FROD"}
    assert {*BIASED} <= {*PREFIXES} and {*SETTINGS} == {*PREFIXES, "FROD", "LILY"} == {*TABLE}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **settings})


VARIANTS: list[Any] = [
    pytest.param("linear", lora(use_dora=True, use_rslora=True, rank_pattern={"query": 2}), 4, id="dora, patterns"),
    pytest.param("Conv1D", lora(bias="all", target_modules=["c_attn"]), 15, id="all biases"),
    pytest.param("linear", lora(bias="lora_only"), 8, id="some biases"),
    pytest.param("linear", lora(bias="lora_only", use_dora=True), 8, id="dora, some biases"),
    pytest.param("linear", lora(lora_bias=True), 8, id="bias of B"),
    pytest.param("linear", lora(init_lora_weights="pissa"), 4, id="pissa"),
    pytest.param("linear", lora(init_lora_weights="olora"), 4, id="olora"),
    pytest.param("linear", lora(kasa_config=peft.KasaConfig()), 4, id="kasa"),
    pytest.param("linear", lora(trainable_token_indices={"word_embeddings": [1, 5]}), 5, id="rows of tokens"),
    pytest.param("no bias", lora(target_modules=["q_proj"], trainable_token_indices=[1, 5]), 3, id="rows, as a list"),
    pytest.param("Conv1D", lora(target_modules=["c_attn"], use_dora=True), 2, id="Conv1D, dora"),
    pytest.param("convolution", lora(target_modules=TARGETS["convolution"]), 4, id="convolution"),
    pytest.param("convolution", lora(target_modules=TARGETS["convolution"], use_rslora=True), 4, id="convolution, rs"),
    pytest.param("embedding", lora(target_modules=["embed_tokens"], use_dora=True), 1, id="embedding, dora"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "settings", "changed"), VARIANTS)
def test_variants_of_lora(
    bases: dict[str, Path], tmp_path: Path, base: str, settings: LoraConfig, changed: int
) -> None:
    adapter = trained(base, tmp_path / "adapter", settings)
    assert len(compared(bases, base, adapter, tmp_path / "out", 5e-7)) == changed


MIXTURES: Mapping[str, tuple[str, list[str]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]),
    "mixtral": ("MixtralForCausalLM", ["experts.down_proj"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_in_one_parameter(tmp_path: Path, kind: str) -> None:
    """The files hold each expert for itself, and the change of each stays factored."""
    title, parameters = MIXTURES[kind]
    base = tiny.save(tiny.build(title, tiny.config(kind)), tmp_path / "base")
    settings = lora(
        target_modules=["q_proj"],
        target_parameters=parameters,
        rank_pattern={"experts.gate_up_proj": 2},
        alpha_pattern={"experts.down_proj": 3},
    )
    wrapped = get_peft_model(tiny.build(title, tiny.config(kind)), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded: Any = getattr(transformers, title).from_pretrained(base)
    theirs = PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload(safe_merge=True).state_dict()
    merge(recipe(base, tmp_path / "adapter"), output=tmp_path / "out")
    ours = getattr(transformers, title).from_pretrained(tmp_path / "out").state_dict()
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) <= 5e-7 * float(value.abs().max()), name
    params = [param for param in plan(recipe(base, tmp_path / "adapter")).params if param.touched]
    assert {param.ranks for param in params if "down_proj" in param.key or ".w2." in param.key} == {(4,)}
    assert len(params) > 2 * 3 and all(None not in param.ranks for param in params)


def edited(bases: dict[str, Path], folder: Path, kind: str, **fields: Any) -> tuple[Path, Path]:
    adapter = trained("linear", folder / "adapter", settings_of(kind, "linear"))
    tiny.edit_config(adapter, "adapter_config.json", **fields)
    return bases["linear"], adapter


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("LOHA", {"alpha": "6"}, 'alpha: must be a number, not the text "6"; remove the quotes'),
        ("LORA", {"r": 0}, "r: must be a positive whole number, not 0"),
        ("LOHA", {"r": 0}, "PEFT cannot merge this LOHA adapter into .*: `r` should be a positive"),
        ("LOHA", {"r": 3}, r"hada_w1_a is \(16, 2\), and .* make it \(16, 3\); it was trained on another base"),
        ("LOKR", {"r": "two"}, "PEFT cannot merge this LOKR adapter"),
        ("LOHA", {"rank_pattern": {"(a+)+(?=b)": 3}}, "the pattern .* uses assert"),
        ("PEANUT", {"depth": 10**9}, "depth: .*the limit is 10,000"),
        ("LOHA", {"peft_type": "NEW_KIND"}, '`peft_type: "NEW_KIND"` is not known here'),
        ("LORA", {"arrow_config": {"top_k": 2}}, "LoRA with `arrow_config: a mapping` chooses its factors by each"),
    ],
)
def test_a_refusal_names_kind_field_and_way_on(
    bases: dict[str, Path], tmp_path: Path, kind: str, fields: dict[str, Any], words: str
) -> None:
    base, adapter = edited(bases, tmp_path, kind, **fields)
    with pytest.raises(RecipeError, match=words) as caught:
        plan(recipe(base, adapter))
    assert "\n" not in str(caught.value)


def test_a_catastrophic_pattern_takes_no_time(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = edited(bases, tmp_path, "LOHA", rank_pattern={"((((a|.)+)+)+)+#": 3})
    assert any(param.touched for param in plan(recipe(base, adapter)).params)


def test_fields_that_peft_does_not_know_are_told(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = edited(bases, tmp_path, "LORA", fresh_idea=3)
    assert any('"fresh_idea"' in warning for warning in plan(recipe(base, adapter)).warnings)
    assert {*LoraConfig().to_dict()} <= LORA_FIELDS


def test_an_adapter_that_lacks_a_tensor(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = edited(bases, tmp_path, "LOHA")
    lost = "base_model.model.bert.encoder.layer.0.attention.self.query.hada_w2_b"
    tiny.edit(adapter, lambda held: held.pop(lost), "adapter_model.safetensors")
    with pytest.raises(RecipeError, match=f"{lost} is missing; the adapter is incomplete"):
        plan(recipe(base, adapter))


MIXED = ("LORA", "ADALORA", "IA3", "LOHA", "OFT", "VERA", "BEFT")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_additions_and_removals_of_mixed_kinds_give_the_same_bytes(
    mixed: dict[str, Path], bases: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    """After a random sequence the merge is, byte for byte, that of the models it holds then."""
    draw = random.Random(seed)
    first, *_ = order = draw.sample(MIXED, len(MIXED))
    held = [first]
    merge(recipe(bases["linear"], mixed[first], method="task_arithmetic"), output=tmp_path / "0")
    for step in range(4):
        free = [kind for kind in order if kind not in held]
        here, there = tmp_path / str(step), tmp_path / str(step + 1)
        if len(held) > 1 and draw.random() < 0.4:
            gone = held.pop(draw.randrange(len(held)))
            unmerge(here, mixed[gone].name, output=there)
        else:
            held.append(free[0])
            add(here, [str(mixed[free[0]])], output=there)
    again = recipe(bases["linear"], *(mixed[kind] for kind in held), method="task_arithmetic")
    merge(again, output=tmp_path / "x")
    assert (tmp_path / "4" / "model.safetensors").read_bytes() == (tmp_path / "x" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixed")
    return {kind: trained("linear", root / kind.lower(), settings_of(kind, "linear")) for kind in MIXED}


@pytest.mark.slow
def test_a_layer_on_one_end_of_a_tie_changes_that_end_alone(tmp_path: Path) -> None:
    """PEFT merges it into both ends; the adapter itself has only ever changed one."""
    make = lambda: tiny.build("Qwen3ForCausalLM", tiny.config("qwen3"))  # noqa: E731
    base = tiny.save(make(), tmp_path / "base")
    wrapped: Any = get_peft_model(make(), peft.LoHaConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    wrapped.save_pretrained(tmp_path / "adapter")
    change = wrapped.base_model.model.lm_head.get_delta_weight("default")
    merge(recipe(base, tmp_path / "adapter"), output=tmp_path / "out")
    out, before = tiny.tensors(tmp_path / "out"), tiny.tensors(base)["model.embed_tokens.weight"]
    assert torch.equal(out["model.embed_tokens.weight"], before)
    assert torch.equal(out["lm_head.weight"], before + change)


@pytest.mark.slow
def test_an_adapter_of_another_kind_on_another_model(bases: dict[str, Path], tmp_path: Path) -> None:
    """`model+adapter`: PEFT's layer lies around that model's weights, and the change counts from the base."""
    model = tiny.save(tiny.fine_tune(BASES["linear"](), 5), tmp_path / "model")
    adapter = trained("linear", tmp_path / "adapter", settings_of("OFT", "linear"))
    under: Any = transformers.BertForSequenceClassification.from_pretrained(model)
    theirs = PeftModel.from_pretrained(under, adapter).merge_and_unload(safe_merge=True).state_dict()
    merge(recipe(bases["linear"], f"{model}+{adapter}", method=EXACT), output=tmp_path / "out")
    ours = tiny.tensors(tmp_path / "out")
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) <= 1e-6 * float(value.abs().max()), name


def test_a_plan_with_layers_is_written_and_read(bases: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("OFT", "VERA"):
        made = plan(recipe(bases["linear"], trained("linear", tmp_path / kind, settings_of(kind, "linear"))))
        assert plan_from_json(plan_to_json(made).encode()) == made


@pytest.mark.slow
def test_plain_lora_does_not_import_peft(tmp_path: Path) -> None:
    """Importing it takes longer than most merges."""
    base = tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), tmp_path / "base")
    adapter = tiny.adapter(tmp_path / "adapter", tiny.attention(), 1)
    code = f"""
import sys
from hfmerge import merge
merge(base={str(base)!r}, models=[{str(adapter)!r}], method="linear", output={str(tmp_path / "out")!r})
assert "peft" not in sys.modules, "imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


PATTERNS: list[Any] = [
    pytest.param("OSF", {"rank_pattern": {"layer.0.*query": 3, "value": 5}}, id="anywhere"),
    pytest.param("FOURIERFT", {"n_frequency_pattern": {"query": 7, "0.output.dense": 9}}, id="ends"),
    pytest.param("C3A", {"block_size_pattern": {"self.query": 4}}, id="sizes"),
    pytest.param("LOHA", {"rank_pattern": {"query": 3}, "alpha_pattern": {r"layer\.[01]\..*value": 3}}, id="both"),
    pytest.param("DELORA", {"rank_pattern": {"query": 3}, "lambda_pattern": {"value": 3}}, id="other names"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "patterns"), PATTERNS)
def test_patterns_mean_what_each_kind_takes_them_for(
    bases: dict[str, Path], tmp_path: Path, kind: str, patterns: dict[str, Any]
) -> None:
    adapter = trained("linear", tmp_path / "adapter", settings_of(kind, "linear", **patterns))
    assert compared(bases, "linear", adapter, tmp_path / "out")


@pytest.mark.slow
def test_an_adalora_whose_ranks_were_cut(bases: dict[str, Path], tmp_path: Path) -> None:
    model: Any = get_peft_model(BASES["linear"](), settings_of("ADALORA", "linear"))
    left = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    model.peft_config["default"].rank_pattern = {name: [True, i % 2 == 0, False] for i, name in enumerate(left)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path / "adapter")
    assert compared(bases, "linear", tmp_path / "adapter", tmp_path / "out", 5e-7)


@pytest.mark.parametrize(
    ("kind", "field", "limit"),
    [("ADALORA", "init_r", 1 << 14), ("UNILORA", "r", 1 << 8), ("UNILORA", "theta_d_length", 1 << 24)],
)
def test_memory_that_a_configuration_asks_for_has_a_limit(kind: str, field: str, limit: int) -> None:
    assert ADAPTER({"peft_type": kind, field: limit})
    with pytest.raises(ValueError, match=f"{field}: is {limit + 1}; the limit is {limit}"):
        ADAPTER({"peft_type": kind, field: limit + 1})
