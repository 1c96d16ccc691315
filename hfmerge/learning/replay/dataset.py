"""Replay rows of one model, and the one file they are kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.errors import CorruptFileError, NotFoundError, OutputError
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.validation.strict_json import read_json
from hfmerge.validation.values import amount, line, nullable, one_of, record


if TYPE_CHECKING:
    from torch import Tensor

_SCHEMA = 1
"""Of the file; raised when an older reader would misunderstand it."""
HEADER = "hfmerge.replay"
"""The only key of the file's metadata: several would come in no fixed order."""
NOTICE = (
    "Synthetic rows made from the weights of the source model; they may reflect the data it was trained on. Delete "
    "them together with the model."
)

_ABOUT = record(
    {
        **dict.fromkeys(("source", "kind", "generator"), line),
        **dict.fromkeys(("seed", "held_out", "passes"), amount),
        "scores": one_of(("classes", "labels", "values", "tokens")),
        "pad": nullable(amount),
    }
)
"""What the metadata says, beside its schema and notice."""


@dataclass(frozen=True, eq=False)
class Replay:
    """Rows that a model made, and its outputs on them.

    Attributes:
        source: the model, `name@commit` or `name@sha256:digest`.
        kind: of model: one of `recipe.replay.GENERATORS`.
        generator: generator that made the rows.
        seed: seed of the rows.
        scores: kind of the model's outputs on a
            row: "classes" (logits of which one class holds), "labels" (logits that hold
            each by itself), "values" (numbers of a regression) or "tokens" (see `targets`).
        pad: token with which rows are padded; None for images.
        held_out: how many of the last rows are kept for early stopping.
        inputs: (rows, ...) by the name of the model's argument: int32 `input_ids` padded on the right and uint8
            `attention_mask` (of labelled pairs of texts uint8 `token_type_ids` too), or float16 `pixel_values`.
        targets: (rows, ...): float32 `logits`, or what `targets.token_targets` gives.
        passes: rows that went through the model to make this, forwards and backwards counted as one.
        seconds: time of the generation in seconds. It is not in the file, whose bytes depend on model and seed alone.
    """

    source: str
    kind: str
    generator: str
    seed: int
    scores: str
    pad: int | None
    held_out: int
    inputs: Mapping[str, Tensor] = field(repr=False)
    targets: Mapping[str, Tensor] = field(repr=False)
    passes: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def learned(self) -> range:
        """Numbers of the rows to learn from; the others are held out."""
        return range(len(self) - self.held_out)

    def batch(self, rows: Sequence[int], device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Some rows as a model takes them, and their targets.

        Returns:
            int64 tokens and mask, cut to the longest of these rows, or float32 pixels; targets as stored. All on the
            device.
        """
        import torch

        picked = torch.as_tensor(list(rows), dtype=torch.int64)
        inputs = {name: value[picked] for name, value in self.inputs.items()}
        if "attention_mask" in inputs:
            longest = int(inputs["attention_mask"].sum(1).max())
            inputs = {name: value[:, :longest].to(device, torch.int64) for name, value in inputs.items()}
        else:
            inputs = {name: value.to(device, torch.float32) for name, value in inputs.items()}
        return inputs, {name: value[picked].to(device) for name, value in self.targets.items()}

    @cached_property
    def data(self) -> bytes:
        """The file's bytes; equal rows have equal bytes."""
        from safetensors.torch import save

        about = {
            "schema": _SCHEMA, "source": self.source, "kind": self.kind, "generator": self.generator,
            "seed": self.seed, "scores": self.scores, "pad": self.pad, "held_out": self.held_out,
            "passes": self.passes, "notice": NOTICE,
        }  # fmt: skip
        parts = {"inputs": self.inputs, "targets": self.targets}
        tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        return save(
            {name: tensors[name].contiguous() for name in sorted(tensors)}, {HEADER: canonical_json(about).decode()}
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256_bytes(self.data)

    def to_dict(self) -> dict[str, Any]:
        """What is worth recording, JSON-able; equal rows have equal records. For classifiers `classes` says how many
        of the model's own classes are the likeliest of some row, of how many, and the mean probability of the
        likeliest.
        """
        found: dict[str, Any] = {
            "source": self.source, "kind": self.kind, "generator": self.generator, "seed": self.seed,
            "rows": len(self), "held_out": self.held_out, "passes": self.passes, "bytes": len(self.data),
            "sha256": self.digest,
        }  # fmt: skip
        if self.scores == "classes":
            likeliest = self.targets["logits"].softmax(-1).max(-1)
            found["classes"] = {
                "covered": len(likeliest.indices.unique()), "of": self.targets["logits"].shape[1],
                "confidence": round(float(likeliest.values.mean()), 4),
            }  # fmt: skip
        return found


def save_replay(replay: Replay, path: str | Path) -> Path:
    """Write the rows as one safetensors file; the same rows give the same bytes.

    Raises:
        OutputError: it cannot be written.
    """
    place = Path(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(replay.data)
    except OSError as error:
        raise OutputError(f"{place}: the replay rows cannot be written: {error.strerror or error}") from error
    return place


def load_replay(path: str | Path) -> Replay:
    """Read what `save_replay` wrote.

    Raises:
        NotFoundError: no such file. CorruptFileError: not such a file, cut short, or of a newer hfmerge.
    """
    from safetensors import SafetensorError, safe_open

    place = Path(path)
    if not place.is_file():
        raise NotFoundError(f"{place}: no such file of replay rows; make them again.")
    try:
        with safe_open(place, framework="pt") as file:
            about = read_json((file.metadata() or {}).get(HEADER, "null").encode())
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise CorruptFileError(f"{place}: not a readable file of replay rows ({error}); make them again.") from error
    if not isinstance(about, dict) or about.get("schema") != _SCHEMA:
        what = f"is of schema {about.get('schema')}" if isinstance(about, dict) else "holds no replay rows"
        raise CorruptFileError(f"{place}: {what}; this hfmerge reads schema {_SCHEMA}; make the rows again.")
    inputs, targets = (
        {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
        for part in ("inputs.", "targets.")
    )
    if not inputs or not targets or len({len(value) for value in tensors.values()}) != 1:
        raise CorruptFileError(f"{place}: inputs and targets are not of the same rows; make them again.")
    names = ("source", "kind", "generator", "seed", "scores", "pad", "held_out", "passes")
    try:
        known = {name: about[name] for name in names}
    except KeyError as error:
        raise CorruptFileError(f"{place}: does not say its {error.args[0]}; make the rows again.") from error
    try:
        _ABOUT(known)
    except ValueError as error:
        raise CorruptFileError(f"{place}: {error}; make the rows again.") from error
    return Replay(**known, inputs=inputs, targets=targets)
