"""Loads a saved folder through the model's own `from_pretrained`, on the meta device, and reports faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.headers import read_header
from hfmerge.checkpoint.layout.cache import cached_answer, relevant
from hfmerge.checkpoint.layout.conversion import Renamer
from hfmerge.checkpoint.layout.skeleton import Shape, find_class, one_line, skeleton_of
from hfmerge.errors import CorruptFileError, NotFoundError, ShapeError, UnsupportedError
from hfmerge.validation.limits import INDEX_BYTES
from hfmerge.validation.strict_json import read_json_file
from hfmerge.validation.wording import parameter


def load_back(folder: Path, *, trust_remote_code: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys that transformers finds missing or unexpected when it loads `folder`; reads no weights.

    The model's own `from_pretrained` runs on the meta device with the shapes in the files' headers.

    Returns:
        In-memory names that are missing, and stored keys that are not expected, sorted.

    Raises:
        NotFoundError: no config.json, or no safetensors weights.
        CorruptFileError: an unreadable file, a shard the index names but that is not there, stored tensors that
            transformers cannot put together.
        ShapeError: tensors whose shapes are not those of the class.
        UnsupportedError: quantised weights, or no class for this config.
    """
    config = _json(folder / "config.json")
    if config.get("auto_map"):
        missing, unexpected = _load(folder, config, trust_remote_code)
    else:
        question = [relevant(config), [[key, list(shape)] for key, shape in sorted(_header_shapes(folder).items())]]
        missing, unexpected = cached_answer("loaded", question, lambda: _load(folder, config, trust_remote_code))
    return tuple(missing), tuple(unexpected)


def _load(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> tuple[list[str], list[str]]:
    import torch

    known_class = find_class(config, str(folder), trust_remote_code)
    if known_class is None:
        raise UnsupportedError(
            f"{folder}: the model has its own code, and only that code can load the result; pass "
            f"{parameter('trust_remote_code', True)} if you trust its author"
        )
    model_class, model_config = known_class
    shapes = _header_shapes(folder)
    stored = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with quiet():
        try:
            model, report = model_class.from_pretrained(
                None,
                config=model_config,
                state_dict=stored,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except RuntimeError as error:
            raise CorruptFileError(f"{folder}: transformers cannot load these weights: {one_line(error)}") from error
    if report["mismatched_keys"]:
        name, stored_shape, expected = sorted(report["mismatched_keys"])[0]
        raise ShapeError(
            f"{folder}: {len(report['mismatched_keys'])} tensors do not fit {model_class.__name__}, first {name}: "
            f"stored {tuple(stored_shape)}, expected {tuple(expected)}"
        )
    names = Renamer(skeleton_of(model)).names(shapes)  # the report gives names as renamed for the class
    unexpected = [key for key in sorted(shapes) if names[key][0] in report["unexpected_keys"]]
    return sorted(report["missing_keys"]), unexpected


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json_file(path, INDEX_BYTES, finite=False)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file; is {path.parent} a saved model?") from error
    except ValueError as error:
        raise CorruptFileError(f"{path}: not readable as JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: not a JSON object")
    return value


def _header_shapes(folder: Path) -> dict[str, Shape]:
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if not (folder / files[0]).is_file():  # transformers looks for the single file first
        if not index.is_file():
            raise NotFoundError(f"{folder}: no model.safetensors and no {index.name}")
        files = sorted(set(_json(index).get("weight_map", {}).values()))
    shapes: dict[str, Shape] = {}
    for name in files:
        if not (folder / name).is_file():
            raise CorruptFileError(f"{folder}: {index.name} names {name}, which is not there")
        header = read_header(folder / name, str(folder / name))
        shapes.update((key, entry.shape) for key, entry in header.entries.items())
    return shapes


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' own report and progress bar off the terminal: the caller gets both as values."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
