"""Keeps transformers' answers on a checkpoint's names on disk, since importing it takes longer than a small merge.

An answer depends on the configuration, the shapes in the headers, the version of transformers and this package's own
code, and on nothing else; its file is named by a digest of them all, so that it can never be out of date.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from hfmerge import hashing
from hfmerge.hashing import sha256_bytes
from hfmerge.user_files import keep_note
from hfmerge.validation.limits import HEADER_BYTES, HEADER_VALUES
from hfmerge.validation.strict_json import read_json_file


CACHED_FILES = 256
"""How many answers are kept; the oldest go first."""

IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of config.json that say nothing about names and shapes."""


def cached_answer(kind: str, question: Any, ask: Callable[[], Any], *, most: int = CACHED_FILES) -> Any:
    """The answer to a question, from the disk or from `ask`, whose answer is then kept; errors are not.

    Args:
        kind: the folder, one for each form of answer.
        question: everything the answer depends on, as JSON values.
        ask: gives the answer as JSON values, or None for one that cannot be kept.
        most: answers of this kind that are kept.
    """
    path = _folder() / kind / f"{sha256_bytes(json.dumps([_makers(), question], sort_keys=True).encode())}.json"
    try:
        return read_json_file(path, HEADER_BYTES, values=HEADER_VALUES)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).warning("%s: cannot be read (%s); worked out again.", path, error)
    answer = ask()
    if answer is not None:
        keep_note(path, answer, most)
    return answer


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """What names and shapes can depend on in config.json."""
    return {key: value for key, value in config.items() if key not in IGNORED}


def _folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hfmerge"


@lru_cache(maxsize=1)
def _makers() -> list[str]:
    """The version of transformers, and a digest of the code that reads its answers."""
    package = Path(hashing.__file__).parent
    files = [package / "task_vector.py", *sorted((package / "checkpoint").rglob("*.py"))]
    code = sha256_bytes(b"".join(file.read_bytes() for file in files))
    return [importlib.metadata.version("transformers"), code]
