"""Different vocabularies: rows of embeddings are matched by token string, never by position.

`base` keeps the base's tokens: tokens only a source knows are dropped, tokens a source lacks are unchanged by it.
`union` appends the sources' own tokens in order of arrival. The base's row of such a token is the mean of the rows of
the sources that have it, so that a token known to one source keeps exactly that source's row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfmerge.checkpoint.layout.skeleton import one_line
from hfmerge.checkpoint.model import Model
from hfmerge.errors import UnsupportedError
from hfmerge.hub.download import fetch
from hfmerge.hub.reference import Snapshot
from hfmerge.task_vector import LowRank
from hfmerge.validation.limits import TOKENIZER_BYTES


if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


@dataclass(frozen=True)
class MergedVocabulary:
    """The rows of one merge's vocabulary.

    Attributes:
        size: rows of the output.
        base_size: rows of the base.
        added: tokens beyond the base's, in output order from row `base_size`.
        rows: per model, (output rows, source rows) matched by token; None where the source has the base's own rows.
    """

    size: int
    base_size: int
    added: tuple[str, ...]
    rows: tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, ...]


def read_tokens(snapshot: Snapshot) -> dict[str, int]:
    """Token string -> row, from a repository's tokenizer.

    Raises:
        UnsupportedError: the repository holds no tokenizer that transformers can build.
    """
    from transformers import AutoTokenizer

    names = [name for name in VOCABULARY_FILES if name in snapshot.files]
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for name in names):
        raise UnsupportedError(f"{snapshot.label}: no tokenizer files, so its rows cannot be matched by token.")
    files = [fetch(snapshot, name) for name in names]
    try:
        TOKENIZER_BYTES.check(sum(file.stat().st_size for file in files))
        return dict(AutoTokenizer.from_pretrained(str(files[0].parent), trust_remote_code=False).get_vocab())
    except Exception as error:  # a tokenizer's class may raise anything at files it was not written for
        if "trust_remote_code" in str(error):
            raise UnsupportedError(
                f"{snapshot.label}: its tokenizer has code of its own, which is not run."
            ) from error
        raise UnsupportedError(f"{snapshot.label}: its tokenizer cannot be read: {one_line(error)}") from error


def same_tokens(base: Snapshot, other: Snapshot) -> bool | None:
    """True or False when both hold a tokenizer, by files' digests or by tokens; None when the other holds none."""
    names = [name for name in ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model") if name in base.files]
    shared = [name for name in names if name in other.files]
    if not shared:
        return None
    known = [(base.files[name].blob_id, other.files[name].blob_id) for name in shared]
    if any(a is not None and a == b for a, b in known):
        return True
    return read_tokens(base) == read_tokens(other)


def align(
    mode: str, base: Model, base_size: int, models: Sequence[Model], sizes: Sequence[int | None]
) -> MergedVocabulary:
    """Match every model's rows with the output's.

    Args:
        mode: "base" or "union".
        base_size: rows of the base's embedding.
        sizes: per model, rows of its embedding; None for a model that changes none, or has the base's very tokens.

    Raises:
        UnsupportedError: a tokenizer is missing, or tokens are added to an embedding that has rows without a token.
    """
    ours = read_tokens(base.snapshot)
    output = {token: row for token, row in ours.items() if row < base_size}
    added: list[str] = []
    theirs: list[Mapping[str, int] | None] = []
    for source, size in zip(models, sizes, strict=True):
        if size is None:
            theirs.append(None)
            continue
        tokens = {token: row for token, row in read_tokens(source.snapshot).items() if row < size}
        theirs.append(tokens)
        if mode == "union":
            for token, _ in sorted(tokens.items(), key=lambda item: item[1]):
                if token not in output:
                    output[token] = base_size + len(added)
                    added.append(token)
    if added and len(ours) != base_size:
        raise UnsupportedError(
            f"{base.snapshot.label}: its embedding has {base_size} rows for {len(ours)} tokens, so added tokens "
            "cannot follow the last one; use `vocabulary: base`."
        )
    rows: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = []
    for tokens_of in theirs:
        if tokens_of is None:
            rows.append(None)
            continue
        pairs = sorted((output[token], row) for token, row in tokens_of.items() if token in output)
        rows.append((tuple(out for out, _ in pairs), tuple(row for _, row in pairs)))
    return MergedVocabulary(base_size + len(added), base_size, tuple(added), tuple(rows))


def extended_base(vocabulary: MergedVocabulary, base: Tensor, values: Sequence[Tensor | None], axis: int) -> Tensor:
    """The base's tensor with rows for the added tokens: the mean over the sources that have them (float32).

    Args:
        values: per model, its tensor, or None for a model without rows of its own.
    """
    import torch

    if not vocabulary.added:
        return base
    base = base.movedim(axis, 0)
    total = torch.zeros(vocabulary.size, *base.shape[1:])
    count = torch.zeros(vocabulary.size)
    for pairs, value in zip(vocabulary.rows, values, strict=True):
        if pairs is None or value is None:
            continue
        out, rows = torch.tensor(pairs[0]), torch.tensor(pairs[1])
        total[out] += value.movedim(axis, 0)[rows]
        count[out] += 1
    mean = total / count.clamp_min(1.0).view(-1, *[1] * (base.dim() - 1))
    return torch.cat([base, mean[vocabulary.base_size :]]).movedim(0, axis).contiguous()


def aligned_change(vocabulary: MergedVocabulary, model: int, base: Tensor, value: Tensor, axis: int) -> Tensor:
    """A model's change in the output's rows: zero for tokens it lacks.

    Args:
        base: the base's tensor in the output's rows (see `extended_base`).
        value: the model's tensor in its own rows.
    """
    import torch

    pairs = vocabulary.rows[model]
    if pairs is None:
        change = torch.zeros_like(base)
        rows = min(value.shape[axis], vocabulary.base_size)
        change.narrow(axis, 0, rows).copy_(value.narrow(axis, 0, rows) - base.narrow(axis, 0, rows))
        return change
    out, rows_of = torch.tensor(pairs[0]), torch.tensor(pairs[1])
    change = torch.zeros_like(base)
    target = change.movedim(axis, 0)
    target[out] = value.movedim(axis, 0)[rows_of] - base.movedim(axis, 0)[out]
    return change


def extended_factors(vocabulary: MergedVocabulary, change: LowRank, axis: int) -> LowRank:
    """An adapter's change of the base's rows in the output's rows: zero for the added tokens."""
    import torch

    added = len(vocabulary.added)
    if axis == 0:
        return LowRank(torch.nn.functional.pad(change.up, (0, 0, 0, added)), change.down)
    return LowRank(change.up, torch.nn.functional.pad(change.down, (0, added)))


def write_tokenizer(vocabulary: MergedVocabulary, base: Snapshot, folder: Path) -> list[str]:
    """Save the base's tokenizer with the added tokens into `folder`; returns the files written.

    Raises:
        UnsupportedError: the tokenizer does not give the added tokens the rows they have.
    """
    from transformers import AutoTokenizer

    names = [name for name in VOCABULARY_FILES if name in base.files]
    source = {fetch(base, name).parent for name in names}.pop()
    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    tokenizer.add_tokens(list(vocabulary.added))
    rows = tokenizer.convert_tokens_to_ids(list(vocabulary.added))
    if rows != list(range(vocabulary.base_size, vocabulary.size)):
        raise UnsupportedError(
            f"{base.label}: its embedding has {vocabulary.base_size} rows for "
            f"{len(tokenizer) - len(vocabulary.added)} "
            "tokens, so added tokens cannot follow; use `vocabulary: base`."
        )
    return [Path(name).name for name in tokenizer.save_pretrained(folder) if Path(name).is_file()]
