"""Models under evaluation: opened once, weights read once, and one task head after another put on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.heads import HEADS_FOLDER
from hfmerge.checkpoint.layout.load_check import quiet
from hfmerge.checkpoint.layout.skeleton import bounded_by, find_class
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.schema import read_snapshot_json
from hfmerge.errors import HeadError, SourceError
from hfmerge.evaluation import loading
from hfmerge.evaluation.results import ModelInfo
from hfmerge.hashing import sha256_bytes
from hfmerge.hub.download import fetch
from hfmerge.hub.reference import Snapshot, parse_ref
from hfmerge.validation.wording import parameter


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TABLES = {
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}
"""transformers' tables of the classes that have a head for a kind of task."""


@dataclass(frozen=True)
class TaskHead:
    """A classification head.

    Attributes:
        owner: whose it is.
        config: config.json of the model it belongs to.
        tensors: by name in that model.
    """

    owner: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the head's rows; those transformers makes up where the config has none."""
        names = self.config.get("id2label")
        if names:
            return [str(names[key]) for key in sorted(names, key=int)]
        return [f"LABEL_{i}" for i in range(int(self.config.get("num_labels", 2)))]

    @property
    def title(self) -> str:
        """Name of the model's class."""
        return str((self.config.get("architectures") or [None])[0])


@dataclass(eq=False)
class Subject:
    """A model under evaluation.

    Attributes:
        info: the row of a matrix it fills.
        config: config.json.
        snapshots: where tokenizer and image processor are looked for, in order.
        device, dtype: where and as what its weights are kept; dtype None: as stored.
    """

    info: ModelInfo
    config: Mapping[str, Any]
    snapshots: tuple[Snapshot, ...]
    device: str = "cpu"
    dtype: str | None = None
    source: Model | None = field(default=None, repr=False)
    loaded: PreTrainedModel | None = field(default=None, repr=False)
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every stored tensor, read once, cast and on the device; an adapter's are merged into its base by peft."""
        found: dict[str, Tensor] = self.keep("weights", self._read)
        return found

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of the weights, without reading the others where that is possible; those that there are."""
        if "weights" not in self._kept and self.source is not None:
            if (found := loading.picked(self.source, names)) is not None:
                return found
        return {name: self.weights[name] for name in names if name in self.weights}

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """Something made of this model, kept until `forget`."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def forget(self) -> None:
        """Give the memory of the weights back."""
        self._kept.clear()

    def _read(self) -> dict[str, Tensor]:
        import torch

        if self.loaded is not None:
            state = self.loaded.state_dict()
        elif self.source is not None and self.source.kind == "adapter":
            state = loading.adapter_weights(self.source, self.config)
        else:
            assert self.source is not None
            state = loading.stored_tensors(self.source)
        dtype = getattr(torch, self.dtype) if self.dtype else None
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None) for name, value in state.items()
        }

    @cached_property
    def head_names(self) -> frozenset[str]:
        """Names of this model's own head: what its class has and the bare encoder has not."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.loaded is not None:
            shapes = {name: tuple(value.shape) for name, value in self.loaded.state_dict().items()}
        for source in (self.source, self.source and self.source.beneath):
            shapes |= {} if source is None else source.shapes
        return _head_names(self.config, shapes, self.info.label)

    @property
    def reads_texts(self) -> bool:
        """Whether this is a model of images and texts."""
        return "text_config" in self.config

    @property
    def held(self) -> list[str]:
        """Whose heads a merge keeps."""
        files = self.snapshots[0].files if self.snapshots else {}
        folders = sorted({name.split("/")[1] for name in files if name.startswith(f"{HEADS_FOLDER}/")})
        return [slug.replace("--", "/") for slug in folders]

    def holds(self, owner: str) -> bool:
        """Whether a merge keeps the head of this model, named as in a recipe."""
        return _plain_name(owner) in self.held

    def head_of(self, owner: str) -> TaskHead:
        """A head that a merge keeps."""
        from safetensors.torch import load_file

        folder = f"{HEADS_FOLDER}/{_plain_name(owner).replace('/', '--')}"
        config = read_snapshot_json(self.snapshots[0], f"{folder}/config.json")
        return TaskHead(owner, config, load_file(fetch(self.snapshots[0], f"{folder}/model.safetensors")))

    def own_head(self) -> TaskHead | None:
        """This model's own classification head, None if its class has none."""
        title = str((self.config.get("architectures") or [None])[0])
        if not any(title in _titles(kind) for kind in ("text-classification", "image-classification")):
            return None
        return TaskHead(self.info.label, self.config, self.tensors(sorted(self.head_names)))

    def with_head(self, head: TaskHead, kind: str, spare: Subject | None = None) -> PreTrainedModel:
        """The encoder with a head, in evaluation mode; its weights are shared, not copied.

        Args:
            kind: "text-classification" or "image-classification".
            spare: the head's own model, for what neither the encoder nor the head has, such as a pooler.

        Raises:
            HeadError: no head for this kind of task. SourceError: encoder and head do not fit together.
        """
        if head.title not in _titles(kind):
            raise HeadError(
                f"{self.info.label}: {head.title} of {head.owner} has no head for {kind}; name a model that has one: "
                f"`head` in the suite, or {parameter('heads', {'TASK': 'MODEL'})}."
            )
        encoder = {name: value for name, value in self.weights.items() if name not in self.head_names}
        placed = {name: value.to(self.device, self._cast(value)) for name, value in head.tensors.items()}
        config = dict(head.config)
        if "vocab_size" in self.config and "vocab_size" in config:
            config["vocab_size"] = self.config["vocab_size"]
        return self._build(config, {**encoder, **placed}, f"with the head of {head.owner}", spare)

    def whole(self, kind: str) -> PreTrainedModel:
        """The model as it is, in evaluation mode, if its class does this kind of task ("causal" or "masked").

        Raises:
            HeadError: it does not.
        """
        title = str((self.config.get("architectures") or [None])[0])
        if title not in _titles(kind):
            task = "continues a text" if kind == "causal" else "fills gaps in a text"
            raise HeadError(f"{self.info.label}: {title} is not a language model that {task}.")
        return self._build(self.config, self.weights, "", None)

    def two_towers(self, text: Subject | None) -> PreTrainedModel:
        """A model of images and texts: this one, or this one's images with the texts of another.

        Raises:
            HeadError: only images here, and no other model given.
        """
        if self.reads_texts:
            return self._build(self.config, self.weights, "", None)
        if text is None:
            raise HeadError(
                f"{self.info.label}: sees images only; name the model whose text tower is used: `head` in the suite, "
                f"or {parameter('heads', {'TASK': 'MODEL'})}."
            )
        rest = {name: value for name, value in text.weights.items() if not name.startswith("vision_model.")}
        tower = {
            name if name.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{name}": value
            for name, value in self.weights.items()
            if name not in self.head_names
        }
        return self._build(text.config, {**rest, **tower}, f"with the text tower of {text.info.label}", None)

    def _cast(self, value: Tensor) -> Any:
        import torch

        if not value.is_floating_point():
            return None
        if self.dtype:
            return getattr(torch, self.dtype)
        return next((weight.dtype for weight in self.weights.values() if weight.is_floating_point()), None)

    def _build(
        self, config: Mapping[str, Any], state: Mapping[str, Tensor], how: str, spare: Subject | None
    ) -> PreTrainedModel:
        """An instance of the config's class over the given tensors, complete or an error."""
        import torch

        model_class = find_class(dict(config), self.info.label, False)
        if model_class is None:
            raise SourceError(f"{self.info.label}: has code of its own, which is not run.")
        cls, settings = model_class
        dtypes = [value.dtype for value in state.values() if value.is_floating_point()]
        options = {"device_map": {"": self.device}} if self.device != "cpu" else {}
        missing: list[str] = []
        for _ in range(2):
            if spare is not None and missing:
                extra = spare.tensors(missing)
                state = {**state, **{name: v.to(self.device, self._cast(v)) for name, v in extra.items()}}
            with quiet(), bounded_by({name: tuple(value.shape) for name, value in state.items()}):
                try:
                    model, told = cls.from_pretrained(
                        None, config=settings, state_dict=dict(state), output_loading_info=True,
                        dtype=dtypes[0] if dtypes else None, **options,
                    )  # fmt: skip
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError) as error:
                    raise SourceError(
                        f"{self.info.label} {how}: does not fit: {' '.join(str(error).split())[:200]}"
                    ) from error
            missing = sorted(told["missing_keys"])
            if not missing or spare is None:
                break
        if missing:
            raise SourceError(f"{self.info.label} {how}: {cls.__name__} lacks {', '.join(missing[:5])}.")
        result: PreTrainedModel = model.eval()
        return result


def open_subject(
    ref: str, *, device: str = "cpu", dtype: str | None = None, copies: Mapping[str, Path] | None = None
) -> Subject:
    """A model by reference, as merging takes it; nothing but small files and headers is read yet.

    Args:
        ref: `org/name[@revision]`, a folder, or `base+adapter`.
        copies: see `hub.download.pin`.

    Raises:
        SourceError: it cannot be named, found, reached or read.
    """
    source = describe(ref, copies=copies, modules=False)
    config: Mapping[str, Any] = source.config
    snapshots: tuple[Snapshot, ...] = (source.snapshot,)
    digest = loading.digest_of(source)
    kind = "merge" if any(name.startswith("merge_history/") for name in source.snapshot.files) else source.kind
    if source.kind == "adapter":
        source = source if source.beneath is not None else loading.with_base(source)
        assert source.beneath is not None
        digest = sha256_bytes(f"{digest}+{loading.digest_of(source.beneath)}".encode())
        config, snapshots = loading.adapter_config(source), (source.snapshot, source.beneath.snapshot)
    name = source.snapshot.name
    return Subject(ModelInfo(name, kind, source.snapshot.commit, digest), config, snapshots, device, dtype, source)


def subject_in_memory(model: PreTrainedModel, label: str, tokenizer_of: Subject, *, device: str = "cpu") -> Subject:
    """A loaded model; its results are not cached, because nothing says cheaply what its weights are.

    Args:
        label: what results call it.
        tokenizer_of: whose tokenizer, image processor and kept heads are used.
    """
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    return Subject(ModelInfo(label, "full", None, ""), config, tokenizer_of.snapshots, device, None, None, model)


def kind_of(subject: Subject) -> str:
    """Which kind of `TABLES` a model's class does.

    Raises:
        HeadError: none.
    """
    title = str((subject.config.get("architectures") or [None])[0])
    for kind in TABLES:
        if title in _titles(kind):
            return kind
    raise HeadError(
        f"{subject.info.label}: {title} has no head, so that nothing tells what it does (one of {', '.join(TABLES)}); "
        "name a model that was saved with its head."
    )


def _plain_name(ref: str) -> str:
    """What a ledger calls a model: repository ID, or a folder's own name."""
    last = parse_ref(ref)[-1]
    return last.folder.resolve().name if last.folder is not None else str(last.repo_id)


def _head_names(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], label: str) -> frozenset[str]:
    import torch
    from transformers import AutoModel

    found = find_class(dict(config), label, False)
    if found is None:
        return frozenset()
    cls, settings = found
    try:
        with torch.device("meta"), quiet(), bounded_by(shapes):
            names = list(cls(settings).state_dict())
            bare = set(AutoModel.from_config(settings, trust_remote_code=False).state_dict())
    except ValueError as error:
        raise SourceError(f"{label}: transformers cannot build {cls.__name__} from config.json: {error}.") from error
    prefix = f"{cls.base_model_prefix}."
    return frozenset(name for name in names if name not in bare and name.removeprefix(prefix) not in bare)


def _titles(kind: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    titles: list[str] = []
    for value in getattr(modeling_auto, TABLES[kind]).values():
        titles += [value] if isinstance(value, str) else list(value)
    return titles
