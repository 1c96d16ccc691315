"""Loads tokenizers and image processors of models, and prepares texts and images with them."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

from hfmerge.checkpoint.layout.load_check import quiet
from hfmerge.errors import HfMergeError, SourceError
from hfmerge.hashing import canonical_json, sha256_bytes, sha256_file
from hfmerge.hub.download import fetch
from hfmerge.hub.reference import Snapshot


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def find_snapshot(snapshots: Sequence[Snapshot], files: Sequence[str], what: str, label: str) -> Snapshot:
    """The first place that holds one of the files.

    Raises:
        SourceError: none does.
    """
    for snapshot in snapshots:
        if any(name in snapshot.files for name in files):
            return snapshot
    raise SourceError(f"{label}: has no {what}; put {files[0]} beside the weights, or name a `head` that has one.")


def files_digest(snapshot: Snapshot, files: Sequence[str]) -> str:
    """Identifies a tokenizer or image processor by its files, wherever they lie."""
    held = {name: sha256_file(fetch(snapshot, name)) for name in files if name in snapshot.files}
    return sha256_bytes(canonical_json(held))


def load_tokenizer(snapshot: Snapshot) -> Any:
    """The tokenizer of a snapshot.

    Raises:
        SourceError: transformers cannot make one of its files.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, snapshot, "tokenizer")


def load_images(snapshot: Snapshot) -> Any:
    """The image processor of a snapshot.

    Raises:
        SourceError: transformers cannot make one of its files, or Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise HfMergeError("images need `pip install hfmerge[evaluate]` (Pillow is missing).")
    from transformers import AutoImageProcessor

    return _load(AutoImageProcessor, snapshot, "image processor")


def _load(auto: Any, snapshot: Snapshot, what: str) -> Any:
    name, inside = (
        (str(snapshot.folder), "") if snapshot.folder is not None else (snapshot.repo_id, snapshot.subfolder)
    )
    try:
        with quiet():
            return auto.from_pretrained(
                name, revision=snapshot.commit or "main", subfolder=inside or "", trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise SourceError(f"{snapshot.label}: its {what} has code of its own, which is not run.") from error
        raise SourceError(
            f"{snapshot.label}: its {what} cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from error


def longest(tokenizer: Any, config: Mapping[str, Any], wanted: int | None) -> int:
    """Tokens in a row at most: what the suite says, else what model and tokenizer take."""
    inner = config.get("text_config") or config
    known = [inner.get(name) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    limits = [int(value) for value in (*known, tokenizer.model_max_length) if value and value < 10**9]
    if inner.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        # these count positions from the padding token's
        limits = [value - 2 if value == inner.get("max_position_embeddings") else value for value in limits]
    return min([*limits, wanted]) if wanted is not None else min(limits, default=512)


def padding(tokenizer: Any) -> int:
    """What rows are padded with; the mask hides it, so that any token does where the tokenizer has none for it."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if value is not None:
            return int(value)
    return 0


def encode(tokenizer: Any, columns: Sequence[Sequence[str]], most: int) -> tuple[list[Any], list[Any] | None]:
    """Token numbers of single texts or pairs, as int32 arrays; for pairs also which of the two each token is of.

    Args:
        columns: one or two columns of texts.
        most: tokens in a row.
    """
    import numpy as np

    pair = len(columns) == 2
    found = tokenizer(
        *(list(column) for column in columns), truncation=True, max_length=most, return_attention_mask=False,
        return_token_type_ids=pair,
    )  # fmt: skip
    ids = [np.asarray(row, dtype=np.int32) for row in found["input_ids"]]
    types = found.get("token_type_ids") if pair and "token_type_ids" in tokenizer.model_input_names else None
    return ids, None if types is None else [np.asarray(row, dtype=np.int32) for row in types]


def texts_of(rows: Any, column: str, where: str) -> list[str]:
    """A column of texts.

    Raises:
        HfMergeError: a row without text.
    """
    values = list(rows[column])
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise HfMergeError(f"{where}: row {i}: {column} is {value!r}, not text.")
    return values


def decode_image(value: Any, where: str) -> Any:
    """An image in RGB, whatever its mode: grey, palette, transparent, CMYK, 16 bits.

    Args:
        value: of an undecoded image column (`bytes`, `path`), or a path.

    Raises:
        HfMergeError: not an image.
    """
    from PIL import Image, UnidentifiedImageError

    data = value.get("bytes") if isinstance(value, Mapping) else None
    path = value.get("path") if isinstance(value, Mapping) else value
    try:
        with Image.open(io.BytesIO(data) if data is not None else str(path)) as image:
            if image.mode.startswith("I") or image.mode == "F":
                image = _eight_bits(image)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise HfMergeError(f"{where}: not a readable image ({error}).") from error


def _eight_bits(image: Any) -> Any:
    """A grey image of 16 bits or more, scaled to 8 bits; conversion by Pillow alone would cut all above 255 off."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    if values.max() > 255:
        values = values * (255 / 65535)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
