"""Different vocabularies: rows of embeddings are matched by token string, never by position.

`base` keeps the base's tokens: tokens only a source knows are dropped, tokens a source lacks are unchanged by it.
`union` adds the sources' own tokens in order of arrival, to the rows that the base's tokenizer gives them: first rows
of the base that have no token (its padding), then new ones. The base's row of such a token is the mean of the rows of
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
    from transformers import PreTrainedTokenizerBase

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


TOKEN_MARKS = ("special", "normalized", "lstrip", "rstrip", "single_word")
"""How a tokenizer treats a token that was added to it."""


@dataclass(frozen=True)
class NewToken:
    """A token that a merge has beyond those of the base.

    Attributes:
        row: of the output.
        marks: values of `TOKEN_MARKS`; empty: those of any word that is added.
    """

    text: str
    row: int
    marks: tuple[bool, ...] = ()


@dataclass(frozen=True)
class MergedVocabulary:
    """The rows of one merge's vocabulary.

    Attributes:
        size: rows of the output.
        base_size: rows of the base.
        added: tokens beyond the base's, in order of arrival.
        rows: per model, (output rows, source rows) matched by token; None where the source has the base's own rows.
    """

    size: int
    base_size: int
    added: tuple[NewToken, ...]
    rows: tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, ...]


def has_tokenizer(snapshot: Snapshot) -> bool:
    """Whether a repository has files of a tokenizer."""
    begins = ("tokenizer", "vocab", "spiece", "sentencepiece")
    return any(name in snapshot.files and name.startswith(begins) for name in VOCABULARY_FILES)


def read_tokens(snapshot: Snapshot) -> dict[str, int]:
    """Token string -> row, from a repository's tokenizer.

    Raises:
        UnsupportedError: the repository holds no tokenizer that transformers can build.
    """
    return dict(_tokenizer(snapshot).get_vocab())


def _tokenizer(snapshot: Snapshot) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not has_tokenizer(snapshot):
        raise UnsupportedError(
            f"{snapshot.label}: no tokenizer files, so its rows cannot be matched by token; put the files of the "
            "tokenizer that it was trained with beside it."
        )
    files = [fetch(snapshot, name) for name in VOCABULARY_FILES if name in snapshot.files]
    try:
        TOKENIZER_BYTES.check(sum(file.stat().st_size for file in files))
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(files[0].parent), trust_remote_code=False)
        found.get_vocab()
    except Exception as error:  # a tokenizer's class may raise anything at files it was not written for
        if "trust_remote_code" in str(error):
            raise UnsupportedError(
                f"{snapshot.label}: its tokenizer has code of its own, which is not run."
            ) from error
        raise UnsupportedError(f"{snapshot.label}: its tokenizer cannot be read: {one_line(error)}") from error
    return found


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


def in_padding(base: Snapshot, other: Snapshot, rows: int) -> list[str]:
    """Tokens of a model in rows of the embedding that have no token in the base, which else has the same tokens.

    Returns:
        The tokens by row; none where the two tokenizers give a token, or a row, another meaning.
    """
    ours, theirs = read_tokens(base), read_tokens(other)
    same = all(theirs.get(token) == row for token, row in ours.items())
    free = {*range(rows)} - {*ours.values()}
    more = {token: row for token, row in theirs.items() if token not in ours}
    return sorted(more, key=lambda token: more[token]) if same and {*more.values()} <= free else []


def align(
    mode: str,
    base: Model,
    base_size: int,
    models: Sequence[Model],
    sizes: Sequence[int | None],
    *,
    marked: bool = True,
) -> MergedVocabulary:
    """Match every model's rows with the output's.

    Args:
        mode: "base" or "union".
        base_size: rows of the base's embedding.
        sizes: per model, rows of its embedding; None for a model that changes none, or has the base's very tokens.
        marked: added tokens keep their marks, such as that of a special token.

    Raises:
        UnsupportedError: a tokenizer is missing, or the base's tokenizer gives added tokens no rows that can be used.
    """
    words = _tokenizer(base.snapshot)
    ours = dict(words.get_vocab())
    output = {token: row for token, row in ours.items() if row < base_size}
    arrived: dict[str, tuple[bool, ...]] = {}
    theirs: list[Mapping[str, int] | None] = []
    for source, size in zip(models, sizes, strict=True):
        if size is None:
            theirs.append(None)
            continue
        tokenizer = _tokenizer(source.snapshot)
        tokens = {token: row for token, row in tokenizer.get_vocab().items() if row < size}
        theirs.append(tokens)
        if mode == "union":
            marks = {
                one.content: tuple(bool(getattr(one, mark)) for mark in TOKEN_MARKS)
                for one in tokenizer.added_tokens_decoder.values()
            }
            for token, _ in sorted(tokens.items(), key=lambda item: item[1]):
                if token not in output:
                    arrived.setdefault(token, marks.get(token, ()) if marked else ())
    given = _add(words, [NewToken(token, -1, marks) for token, marks in arrived.items()])
    added = tuple(NewToken(token, row, marks) for (token, marks), row in zip(arrived.items(), given, strict=True))
    size = max(base_size, *(row + 1 for row in given)) if given else base_size
    free = {*range(size)} - {row for token, row in ours.items() if token not in arrived}
    if {*range(base_size, size)} - {*given} or len({*given}) < len(given) or not {*given} <= free:
        raise UnsupportedError(
            f"{base.snapshot.label}: its embedding has {base_size} rows for {len(ours)} tokens, and its tokenizer "
            f"gives added tokens rows from {min(given)} to {max(given)}, which do not follow; use `vocabulary: base`."
        )
    output |= {token.text: token.row for token in added}
    rows: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = []
    for tokens_of in theirs:
        if tokens_of is None:
            rows.append(None)
            continue
        pairs = sorted((output[token], row) for token, row in tokens_of.items() if token in output)
        rows.append((tuple(out for out, _ in pairs), tuple(row for _, row in pairs)))
    return MergedVocabulary(size, base_size, added, tuple(rows))


def _add(words: PreTrainedTokenizerBase, tokens: Sequence[NewToken]) -> list[int]:
    """Add tokens to a tokenizer; returns the rows that it gives them."""
    from transformers import AddedToken

    words.add_tokens(
        [AddedToken(t.text, **dict(zip(TOKEN_MARKS, t.marks, strict=True))) if t.marks else t.text for t in tokens]
    )
    rows = words.convert_tokens_to_ids([token.text for token in tokens])
    assert isinstance(rows, list)
    return rows


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
    result = torch.cat([base, mean[vocabulary.base_size :]])
    fresh = _rows_added(vocabulary)
    result[fresh] = mean[fresh]
    return result.movedim(0, axis).contiguous()


def _rows_added(vocabulary: MergedVocabulary) -> Tensor:
    import torch

    return torch.tensor([token.row for token in vocabulary.added], dtype=torch.long)


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
        change.movedim(axis, 0)[_rows_added(vocabulary)] = 0.0  # what is padding here is a token of another model
        return change
    out, rows_of = torch.tensor(pairs[0]), torch.tensor(pairs[1])
    change = torch.zeros_like(base)
    target = change.movedim(axis, 0)
    target[out] = value.movedim(axis, 0)[rows_of] - base.movedim(axis, 0)[out]
    return change


def extended_factors(vocabulary: MergedVocabulary, change: LowRank, axis: int) -> LowRank:
    """An adapter's change of the base's rows in the output's rows: zero for the added tokens."""
    import torch

    along = change.up if axis == 0 else change.down.T
    longer = torch.nn.functional.pad(along, (0, 0, 0, vocabulary.size - vocabulary.base_size))
    longer[_rows_added(vocabulary)] = 0.0
    return LowRank(longer, change.down) if axis == 0 else LowRank(change.up, longer.T.contiguous())


def write_tokenizer(vocabulary: MergedVocabulary, base: Snapshot, folder: Path) -> list[str]:
    """Save the base's tokenizer with the added tokens into `folder`; returns the files written.

    Raises:
        UnsupportedError: the tokenizer does not give the added tokens the rows they have.
    """
    tokenizer = _tokenizer(base)
    if _add(tokenizer, vocabulary.added) != [token.row for token in vocabulary.added]:
        raise UnsupportedError(f"{base.label}: its tokenizer changed while the merge was made; merge again.")
    return [Path(name).name for name in tokenizer.save_pretrained(folder) if Path(name).is_file()]
