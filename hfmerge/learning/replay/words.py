"""Draws rows of text from a tokenizer's vocabulary, weighted by how common its tokens are."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfmerge.errors import SourceError
from hfmerge.evaluation.processors import padding


if TYPE_CHECKING:
    from torch import Generator, Tensor

SHIFT = 2.7
"""Mandelbrot's: a token's share is proportional to 1 / (its rank from 0 + SHIFT)."""
NO_TEXT = re.compile(r"[<\[].*[>\]]", re.DOTALL)
"""Tokens that stand for no text: [unused7], <extra_id_3>, <0x0A>, <|reserved|>."""
MARKS = re.compile(r"^(##|▁|Ġ)|(</w>|@@)$")
"""What tokenizers add to a token to say where in a word it stands."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens that rows are drawn from.

    Attributes:
        weights: float64, how common each token is, 0 for those that are never drawn; as long as the model's embedding.
        before, after: tokens that the tokenizer puts around a text.
        pad: token for padding.
        mask: token for a gap; None: there is none.
        start: token with which texts begin, if the tokenizer has one.
    """

    weights: Tensor = field(repr=False)
    before: tuple[int, ...]
    after: tuple[int, ...]
    pad: int
    mask: int | None
    start: int | None

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Tokens, each by itself: int64 (count,)."""
        import torch

        return torch.multinomial(self.weights, count, replacement=True, generator=generator)

    def spans(self, count: int, fewest: int, length: int, generator: Generator) -> list[Any]:
        """Rows of random tokens, of different lengths.

        Args:
            count: rows.
            fewest: tokens of text in a row at least.
            length: of a row at most, with the tokens around it.

        Returns:
            int32 arrays.
        """
        import numpy as np
        import torch

        room = length - len(self.before) - len(self.after)
        sizes = torch.randint(max(fewest, room // 4), room + 1, (count,), generator=generator).tolist()
        drawn = self.draw(sum(sizes), generator).split(sizes)
        return [np.array([*self.before, *part.tolist(), *self.after], dtype=np.int32) for part in drawn]


def read_vocabulary(tokenizer: Any, rows: int, label: str) -> Vocabulary:
    """The vocabulary of a tokenizer.

    A Unigram tokenizer's own scores say how common a token is. Other vocabularies (BPE, WordPiece) are in the order of
    their frequency, and shares follow Zipf's law over that order. Their alphabet stands where it was put and not where
    its frequency would, so that tokens of one character come last; a vocabulary that is mostly of such tokens is in
    the order of their code points and is taken as evenly spread.

    Args:
        rows: of the model's embedding; tokens beyond it are not drawn.
        label: of the model, for errors.

    Raises:
        SourceError: no token stands for text, or the tokenizer does not leave a text whole.
    """
    import torch

    size = min(rows, len(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(list(range(size)))
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    usable = [
        i for i, token in enumerate(tokens) if token and i not in special and not NO_TEXT.fullmatch(token)
    ]  # fmt: skip
    if not usable:
        raise SourceError(f"{label}: no token of its tokenizer is text.")
    weights = torch.zeros(rows, dtype=torch.float64)
    shares = _scores(tokenizer, usable)
    if shares is None:
        longer = [i for i in usable if len(MARKS.sub("", tokens[i])) > 1]
        if 2 * len(longer) < len(usable):
            weights[usable] = 1.0
        else:
            held = set(longer)
            order = [*longer, *(i for i in usable if i not in held)]
            weights[order] = 1.0 / (torch.arange(len(order), dtype=torch.float64) + SHIFT)
    else:
        weights[usable] = shares
    before, after = _around(tokenizer, label)
    return Vocabulary(
        weights / weights.sum(), before, after, padding(tokenizer), tokenizer.mask_token_id, tokenizer.bos_token_id
    )


def _scores(tokenizer: Any, usable: Sequence[int]) -> Tensor | None:
    """How common a Unigram tokenizer says its tokens are; None of another kind of tokenizer."""
    import torch

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "Unigram":
        return None
    listed = json.loads(backend.to_str())["model"]["vocab"]
    # pieces that somebody added have a score of 0, which would be a share of 1
    logs = [listed[i][1] if i < len(listed) and listed[i][1] < 0 else float("-inf") for i in usable]
    shares = torch.tensor(logs, dtype=torch.float64).exp()
    return shares if shares.sum() > 0 else None


def _around(tokenizer: Any, label: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a tokenizer puts before and after a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return tuple(whole[:at]), tuple(whole[at + len(bare) :])
    raise SourceError(f"{label}: its tokenizer changes a text when it puts special tokens around it.")
