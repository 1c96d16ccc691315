"""An adapter that was trained on another adapter does not lose that one without a word."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.fixtures import tiny


def test_the_adapter_beneath_is_asked_for_where_the_base_lacks_it(tmp_path: Path) -> None:
    base = tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), tmp_path / "base")
    first = tiny.adapter(tmp_path / "first", tiny.attention(), 1, base_model_name_or_path=str(base))
    second = tiny.adapter(tmp_path / "second", tiny.attention(), 2, base_model_name_or_path=str(first))
    flags = ("--method", "task_arithmetic", "--output")
    alone = tiny.cli("merge", second, "--base", base, *flags, tmp_path / "alone")
    assert alone.code == 1 and 'on top of the adapter "first", whose change the base does not hold' in alone.err
    both = tiny.done("merge", first, second, "--base", base, *flags, tmp_path / "both")
    assert "on top of" not in both.err
    tiny.done("merge", first, "--base", base, *flags, tmp_path / "mid")
    onto = tiny.done("merge", second, "--base", tmp_path / "mid", *flags, tmp_path / "onto")
    assert "its change is taken to be in the base" in onto.err
    for key, value in tiny.tensors(tmp_path / "both").items():
        assert torch.allclose(value, tiny.tensors(tmp_path / "onto")[key], atol=1e-5)
