"""Forms in which weights are not merged: how each is known by its files, names or settings, and the way on."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping
from typing import Any

from hfmerge.validation.values import show


SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.(safetensors|bin)$")
"""Name of one of several weight files, as `save_pretrained` gives it."""
GATHER = (
    "gather the training's checkpoint (of DeepSpeed with `python zero_to_fp32.py CHECKPOINT OUTPUT`, of FSDP with "
    "`accelerate merge-weights CHECKPOINT OUTPUT`)"
)
_FILES = (
    (("*.gguf",), "GGUF", "load it with `from_pretrained(..., gguf_file={first!r})`, and save it with "
     "`save_pretrained`; or merge the model that it was made from, and convert the result"),
    (("*.distcp", "*/*.distcp", "*_model_states.pt", "*/*_model_states.pt", "zero_to_fp32.py"),
     "shards of a training by several processes", GATHER),
    (("consolidated*.pth", "consolidated*.safetensors", "*/consolidated*.pth"), "weights in the form of their authors",
     "take the repository in transformers' form, or convert it with the script that transformers has for it"),
    (("*.h5", "*.msgpack"), "weights of TensorFlow or Flax",
     "load them with transformers 4 (`from_tf=True` or `from_flax=True`), and save them with `save_pretrained`"),
    (("*.onnx", "*/*.onnx", "*.tflite", "*.mlmodel", "openvino_model.*"), "a graph exported to run",
     "merge the model that it was made from"),
    (("model_index.json",), "a pipeline of diffusers", "name the folder of one model in it"),
)  # fmt: skip
"""Patterns of files -> what they are, and what to do with it."""
_WRAPPED = {
    "_orig_mod.": "saved from a compiled model; save the model inside it (`model._orig_mod`)",
    "_fsdp_wrapped_module.": f"saved from one process of FSDP; {GATHER}",
    "_flat_param": f"flat shards of FSDP; {GATHER}",
}
"""Part of a tensor's name -> what that name says of the file."""
_SAVE = "and save it with `save_pretrained(..., save_original_format=False)`"
_QUANTISED = {
    "bitsandbytes": f"load it with the package bitsandbytes, call `model.dequantize()`, {_SAVE}",
    "fp8": f"load it with `quantization_config=FineGrainedFP8Config(dequantize=True)`, {_SAVE}",
    "mxfp4": f"load it with `quantization_config=Mxfp4Config(dequantize=True)`, {_SAVE}",
    "compressed-tensors": "load it with the package compressed-tensors and "
    f"`quantization_config=CompressedTensorsConfig(dequantize=True)`, {_SAVE}",
    "higgs": f"load it on a GPU, call `model.dequantize()`, {_SAVE}",
}
"""`quant_method` -> how transformers dequantises; it cannot for others."""


def of_files(names: Collection[str], stem: str) -> str | None:
    """What a repository without the weights that loaders look for holds, and the way on; None: nothing known.

    Args:
        names: all files.
        stem: of the weight files that loaders look for, "model".
    """
    shards: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        if (match := SHARD.match(name)) and "/" not in name:
            shards.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
    for (start, of, ending), held in sorted(shards.items()):
        index = f"{start}.{ending}.index.json"
        lost = sorted({*range(1, int(of) + 1)} - held)
        what = f"{len(held)} of {int(of)} shards ({start}-{min(held):05d}-of-{of}.{ending}) without {index}"
        also = f" and {start}-{lost[0]:05d}-of-{of}.{ending}" if lost else ""
        return f"{what}, which says what is in which of them; get {index}{also} from where the shards come from"
    for patterns, what, remedy in _FILES:
        found = sorted(name for name in names if any(fnmatch.fnmatchcase(name, one) for one in patterns))
        if found:
            return f"only {found[0]}: {what}; {remedy.format(first=found[0])}"
    weights = re.compile(rf".*/{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)")
    folders = {name.rpartition("/")[0] for name in names if weights.fullmatch(name)}
    inside = sorted(
        folders, key=lambda folder: [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", folder)]
    )
    if inside:
        return f"no weights but in the folders {', '.join(inside[-3:])}; name one of them, on this machine"
    return None


def of_names(names: Collection[str]) -> str | None:
    """What the names of tensors say of a checkpoint that no class has in this form; None: nothing known."""
    for part, what in _WRAPPED.items():
        found = [name for name in names if part in name]
        if 2 * len(found) > len(names):
            return f"{found[0]}: {what}"
    return None


def of_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """What a shape says that does not fit: a tensor that one of several processes of a training held."""
    if found == (0,) or (len(found) == 1 and len(wanted) > 1):
        what = "empty" if found == (0,) else "flat"
        return f"it is {what}, as one process of ZeRO stage 3 or FSDP holds it; {GATHER}"
    return None


def of_quantisation(quantised: object) -> str:
    """How weights are quantised, by `quantization_config`, and the way on."""
    said: Mapping[str, Any] = quantised if isinstance(quantised, Mapping) else {}
    method = str(said.get("quant_method") or "")
    if not method:
        method = "bitsandbytes" if said.get("load_in_4bit") or said.get("load_in_8bit") else "an unnamed method"
    bits = next((said[key] for key in ("bits", "w_bit", "nbits", "weight_bits") if type(said.get(key)) is int), None)
    if method.startswith("bitsandbytes"):
        bits = 4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else bits
    remedy = _QUANTISED.get("bitsandbytes" if method.startswith("bitsandbytes") else method)
    named = method if re.fullmatch(r"[\w -]{1,40}", method, re.ASCII) else show(method)
    what = f"quantised with {named}{f' in {bits} bits' if bits else ''}"
    if remedy is None:
        return f"{what}, which transformers cannot undo; merge the original weights, and quantise the result"
    return f"{what}; merge the original weights, or dequantise these: {remedy}"
