"""An adapter whose configuration names fewer modules than its file has factors for: PEFT's result, and a warning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists

from hfmerge.checkpoint.lora_targets import Targets
from hfmerge.checkpoint.patterns import Patterns
from tests.fixtures import tiny


pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found unexpected keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default':peft.utils.warning.PeftWarning"),
]
NARROWER: dict[str, dict[str, Any]] = {
    "a module dropped": {"target_modules": ["q_proj"]},
    "layers": {"layers_to_transform": [1]},
    "a layer of a pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "a pattern": {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    "a whole name": {"target_modules": ["model.layers.1.self_attn.v_proj"], "layers_to_transform": [0]},
}


@pytest.mark.parametrize("case", NARROWER)
def test_the_configuration_decides_as_for_peft(tmp_path: Path, case: str) -> None:
    model = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    base = tiny.save(model, tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    tiny.edit_config(adapter, "adapter_config.json", **NARROWER[case])
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    run = tiny.done("merge", adapter, "--base", base, "--method", "task_arithmetic", "--output", tmp_path / "out")
    assert "adapter_config.json does not name model.layers." in run.err and "as PEFT does" in run.err
    ours = tiny.tensors(tmp_path / "out")
    assert all(torch.allclose(ours[key], value, atol=1e-6) for key, value in theirs.items())
    changed = [key for key, value in tiny.tensors(base).items() if not torch.equal(value, ours[key])]
    assert 0 < len(changed) < 4


@pytest.mark.parametrize("case", NARROWER)
def test_every_module_is_asked_like_by_peft(case: str) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **NARROWER[case]})
    data = {name: list(value) if isinstance(value, set) else value for name, value in vars(config).items()}
    targets = Targets(data, Patterns())
    for layer in range(3):
        for name in ("q_proj", "v_proj", "o_proj"):
            module = f"model.layers.{layer}.self_attn.{name}"
            theirs = bool(check_target_module_exists(config, module))
            assert targets.has(module) == (theirs and "Excluded" not in type(theirs).__name__), module


def test_a_pattern_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    base = tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), tmp_path / "base")
    adapter = tiny.adapter(tmp_path / "adapter", tiny.attention(), 1)
    data = json.loads((adapter / "adapter_config.json").read_text())
    pattern = r"(?!.*vision).*(q|o)_proj"
    assert all(re.fullmatch(pattern, name) for name in tiny.attention())
    (adapter / "adapter_config.json").write_text(json.dumps({**data, "target_modules": pattern}))
    run = tiny.done("merge", adapter, "--base", base, "--method", "linear", "--output", tmp_path / "out")
    assert "which modules adapter_config.json names cannot be told here" in run.err
