"""A chat template that the user of a recipe gives as a file; the recipe and the ledger hold its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfmerge.errors import SourceError
from hfmerge.hashing import sha256_bytes
from hfmerge.validation.folders import file_in
from hfmerge.validation.limits import TEMPLATE_BYTES
from hfmerge.validation.strict_json import read_limited
from hfmerge.validation.values import Section, record, sha256, show, text
from hfmerge.validation.wording import parameter


SUFFIX = ".jinja"
"""How the name of a file with a template ends, which tells it from the name of a model."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template by its text."""

    text: str

    def to_dict(self) -> dict[str, str]:
        """JSON-able, as a recipe and a ledger write it, in the order in which the ledger's file gives it back."""
        return {"sha256": sha256_bytes(self.text.encode("utf-8")), "text": self.text}


def chat_template(value: object) -> str | ChatTemplate:
    """A name, or a template by its text, whose digest is checked if it is given. Raises ValueError."""
    if not isinstance(value, Mapping):
        return text(value)
    record({"text": _template}, {"sha256": sha256})(value)
    found = ChatTemplate(value["text"])
    if value.get("sha256", found.to_dict()["sha256"]) != found.to_dict()["sha256"]:
        raise ValueError("text: is not the text that sha256 is the digest of; remove sha256 if the text is right")
    return found


def _template(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be the text of a template, not {show(value)}")
    try:
        TEMPLATE_BYTES.check(len(value.encode("utf-8")))
    except UnicodeEncodeError as error:
        raise ValueError("must be text that UTF-8 can hold") from error
    return value


def with_template(values: dict[str, Any], top: Section, folder: Path | None) -> None:
    """Put the text of a file in the place of its name; what is wrong with it goes to the problems of the recipe.

    Args:
        values: of all keys of a recipe.
        folder: of the recipe's file, which its paths do not leave; None: the name was not given by a file.
    """
    name = values["chat_template"]
    if not isinstance(name, str) or not name.endswith(SUFFIX):
        return
    try:
        values["chat_template"] = _read(name, folder)
    except (ValueError, OSError, SourceError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        top.report("chat_template", f"{show(name)} cannot be used: {reason}")


def _read(name: str, folder: Path | None) -> ChatTemplate:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    if folder is not None and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise ValueError(f"it is not in the folder of the recipe; put it there, or give {parameter('chat_template')}")
    path = Path(name) if folder is None else file_in(folder, name)
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    found = _template(read_limited(path, TEMPLATE_BYTES).decode("utf-8"))
    try:
        render_jinja_template(conversations=[], chat_template=found)  # no conversation: it is compiled alone
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} is no Jinja: {error.message}") from error
    except Exception as error:  # its compiler may raise anything at a text that no person wrote
        raise ValueError(f"it cannot be compiled as Jinja: {type(error).__name__}") from error
    return ChatTemplate(found)
