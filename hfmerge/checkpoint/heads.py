"""Task heads: parameters that a source has and the base has no place for. They are kept per source, never averaged.

Each head goes to `heads/<org--name>/` as a small checkpoint of its own: `config.json` (architecture, label names) and
`model.safetensors`. `load_with_head` puts one back on a merged backbone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.headers import read_header
from hfmerge.checkpoint.layout.skeleton import bounded_by, find_class, one_line
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.reader import Reader
from hfmerge.checkpoint.schema import read_snapshot_json
from hfmerge.checkpoint.streaming.session import Streaming
from hfmerge.checkpoint.writer import SafetensorsWriter, Slot
from hfmerge.errors import NotFoundError, SourceError
from hfmerge.hub.download import fetch


if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS_FOLDER = "heads"
LABEL_KEYS = ("id2label", "label2id", "problem_type")
TASK_CLASSES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
"""PEFT's task types and transformers' tables of the class for each model type."""


@dataclass(frozen=True)
class Head:
    """One source's head.

    Attributes:
        slug: folder name under `heads/`.
        tensors: name in the model -> stored key of the source.
        config: config.json of the head: the base's, with the source's architecture and label names.
    """

    slug: str
    tensors: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the head's rows."""
        names = self.config.get("id2label") or {}
        return [str(names[key]) for key in sorted(names, key=int)]


def full_head(source: Model, keys: tuple[str, ...]) -> Head:
    """The head of a full checkpoint: its tensors `keys`, under its own configuration."""
    config = {key: value for key, value in source.config.items() if key != "_name_or_path"}
    return Head(source.slug, {key: key for key in keys}, config)


def adapter_head(source: Model, base: Model, keys: Mapping[str, str]) -> Head:
    """The head of an adapter (stored key -> name in the model), under the base's configuration.

    Label names come from a config.json beside the adapter; without one they are LABEL_0, LABEL_1, ... as transformers
    would name them.
    """
    config = {key: value for key, value in base.config.items() if key not in ("_name_or_path", *LABEL_KEYS)}
    architecture = (source.config.get("architectures") or [None])[0]
    config["architectures"] = [architecture or _task_class(source, base, {*keys.values()})]
    for key in LABEL_KEYS:
        if source.config.get(key):
            config[key] = source.config[key]
    if "id2label" not in config:
        rows = [source.tensors[key].shape[0] for key in keys if len(source.tensors[key].shape) == 2]
        if rows:
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows[-1])}
            config["label2id"] = {f"LABEL_{i}": i for i in range(rows[-1])}
    return Head(source.slug, {name: key for key, name in keys.items()}, config)


def _task_class(source: Model, base: Model, names: Set[str]) -> str:
    """The class that an adapter was trained in: that of its task, the one it names, or the base's, whose head it has.

    Args:
        names: of the head's parameters.
    """
    from transformers.models.auto import modeling_auto

    adapter, model_type = source.adapter or {}, str(base.config.get("model_type"))
    task = str(adapter.get("task_type"))
    table = getattr(modeling_auto, TASK_CLASSES.get(task, ""), {})
    # PEFT names the class where an adapter has no task type
    named = (adapter.get("auto_mapping") or {}).get("base_model_class")
    if name := table.get(model_type) or (named if named in _headed(model_type) else None):
        return str(name)
    own = next(iter(base.config.get("architectures") or ()), None)
    if own and names <= {*base.tensors}:
        return str(own)
    raise SourceError(
        f"{source.snapshot.label}: trains a head, but its task type {task} names no {model_type} class; put a "
        "config.json with `architectures` beside the adapter."
    )


def _headed(model_type: str) -> set[str]:
    """The classes of a model type that transformers knows, without its backbones."""
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for title in dir(modeling_auto):
        if title.startswith("MODEL_FOR_") and title.endswith("_MAPPING_NAMES"):
            classes = getattr(modeling_auto, title).get(model_type, ())
            found |= {classes} if isinstance(classes, str) else {*classes}
    backbones = modeling_auto.MODEL_MAPPING_NAMES.get(model_type, ())
    return found - ({backbones} if isinstance(backbones, str) else {*backbones})


def write_head(head: Head, source: Model, folder: Path, streaming: Streaming | None = None) -> list[str]:
    """Write one head below `folder`; returns the paths written, relative to `folder`.

    Tensors keep the source's bytes and dtypes. `streaming` holds the files that the source streams.
    """
    target = folder / HEADS_FOLDER / head.slug
    target.mkdir(parents=True)
    slots = {name: Slot(source.tensors[key].dtype, source.tensors[key].shape) for name, key in head.tensors.items()}
    writer = SafetensorsWriter(target / "model.safetensors", slots)
    try:
        with Reader(source, streaming) as reader:
            for name, key in head.tensors.items():
                writer.write(name, reader.stored(key))
        writer.close()
    finally:
        writer.close(complete=False)
    text = json.dumps(dict(head.config), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
    return [f"{HEADS_FOLDER}/{head.slug}/{name}" for name in ("config.json", "model.safetensors")]


def load_with_head(model: str | Path, source: str, **options: Any) -> PreTrainedModel:
    """A merged model with the task head of one of its sources, ready to run.

    Args:
        model: the merge: a folder, `org/name` or `org/name@revision`.
        source: whose head: `org/name` or the folder name, as the card lists it.
        options: passed to `from_pretrained`, such as `dtype` or `device_map`.

    Returns:
        An instance of the source's own class with the merged backbone, in evaluation mode.

    Raises:
        NotFoundError: the merge keeps no head of that source; the error names those it has.
        SourceError: the files cannot be read, or do not fit a class of transformers; code of their own is not run.
    """
    import torch
    import transformers
    from safetensors.torch import load_file

    backbone = describe(str(model), modules=False)
    snapshot = backbone.snapshot
    slug = source.partition("@")[0].rstrip("/").replace("/", "--")
    prefix = f"{HEADS_FOLDER}/{slug}/"
    file = f"{prefix}model.safetensors"
    if file not in snapshot.files:
        held = sorted(
            {name.split("/")[1].replace("--", "/") for name in snapshot.files if name.startswith(f"{HEADS_FOLDER}/")}
        )
        raise NotFoundError(f"{snapshot.label}: no head of {source}; it keeps heads of: {', '.join(held) or 'none'}.")
    config = read_snapshot_json(snapshot, f"{prefix}config.json")
    name = next(iter(config.get("architectures") or ()), None)
    known = getattr(transformers, str(name), None)
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise SourceError(f"{snapshot.label}: {prefix}config.json names {name}, which transformers does not have.")
    head_class = find_class(config, f"{snapshot.label}: {prefix}config.json", False)
    assert head_class is not None  # it is a class of transformers
    cls, settings = head_class
    rows = backbone.config.get("vocab_size")
    if rows is not None and hasattr(settings, "vocab_size"):
        settings.vocab_size = rows  # the backbone may have other rows, where vocabularies were aligned
    shapes = dict(backbone.shapes)
    shapes |= {key: entry.shape for key, entry in read_header(fetch(snapshot, file), file).entries.items()}
    state: dict[str, Any] = {}
    for one in (*sorted({entry.file for entry in backbone.tensors.values()}), file):
        state |= load_file(fetch(snapshot, one))
    try:
        with bounded_by(shapes):
            loaded, info = cls.from_pretrained(
                None, config=settings, state_dict=state, output_loading_info=True, **options
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a class may raise anything at a config it was not written for
        raise SourceError(f"{snapshot.label}: the head of {source} cannot be loaded: {one_line(error)}.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(f"{snapshot.label}: with the head of {source}, {name} lacks {', '.join(missing[:5])}.")
    result: PreTrainedModel = loaded.eval()
    return result
