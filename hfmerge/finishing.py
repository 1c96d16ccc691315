"""What a merged folder needs beside its weights to be loaded, and the digests of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.heads import write_head
from hfmerge.checkpoint.side_files import copy_side_files
from hfmerge.checkpoint.vocabulary import write_tokenizer
from hfmerge.checkpoint.writer import write_index
from hfmerge.hashing import sha256_file
from hfmerge.planned import DTYPE_NAMES, Plan
from hfmerge.runfiles import STATE_FOLDER


def finish_folder(plan: Plan, folder: Path, hashed: Mapping[str, str]) -> dict[str, str]:
    """Write heads, side files and the index; then give every file's digest, carried states left out.

    Args:
        plan, folder: of the run.
        hashed: digests of weight files that are known already.
    """
    for model, head in plan.heads:
        write_head(head, plan.deltas[model].source, folder)
    floats = {p.slot.dtype for p in plan.params if plan.base.tensors[p.key].floating}
    changes: dict[str, Any] = {}
    if len(floats) == 1:
        changes = {"torch_dtype": None, "dtype": DTYPE_NAMES[floats.pop()]}
    if plan.vocabulary is not None and plan.vocabulary.added:
        text = plan.base.config.get("text_config")
        if "vocab_size" not in plan.base.config and isinstance(text, dict):
            changes["text_config"] = {**text, "vocab_size": plan.vocabulary.size}
        else:
            changes["vocab_size"] = plan.vocabulary.size
    code = plan.recipe.trust_remote_code
    copy_side_files(plan.base.pinned, list(plan.side_files), folder, changes, remote_code=code)
    if plan.vocabulary is not None and plan.vocabulary.added:
        write_tokenizer(plan.vocabulary, plan.base.pinned, folder)
    if len(plan.slots()) > 1:
        total = sum(param.slot.nbytes for param in plan.params)
        write_index(folder, {param.key: param.file for param in plan.params}, total)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    products = [name for name in files if not name.startswith(f"{STATE_FOLDER}/")]
    return {name: hashed.get(name) or sha256_file(folder / name) for name in products}
