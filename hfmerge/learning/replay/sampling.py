"""Rows of text that a language model writes: continuations of a causal one, filled gaps of a masked one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfmerge.errors import HfMergeError
from hfmerge.evaluation.batches import Runner, padded
from hfmerge.learning.replay.words import Vocabulary


if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel

GAPS = 0.15
"""Share of a row's tokens that stand hidden before a masked model, as in its training."""


def continued(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    runner: Runner,
    *,
    rows: int,
    length: int,
    temperature: float,
    generator: Generator,
) -> list[Any]:
    """Texts that a causal model writes by itself, by transformers' `generate`.

    Every other row begins with a random token, so that rows differ where the model would always begin alike; the rest
    have only the token with which its texts begin, if there is one.

    Args:
        length: of a row at most; a text may end earlier, with the model's own token for the end.

    Returns:
        int32 arrays of two tokens or more.
    """
    import numpy as np
    import torch
    from transformers import GenerationConfig

    start = list(vocabulary.before) or [vocabulary.start][: vocabulary.start is not None]
    first = vocabulary.draw(rows, generator).tolist()
    prompts = [[*start, first[i]] if i % 2 or not start else start for i in range(rows)]
    ends = model.config.get_text_config().eos_token_id
    ends = ends if isinstance(ends, list) else [ends][: ends is not None]
    # `generate` draws from torch's own generator, which is put back afterwards
    seed = int(torch.randint(2**62, (1,), generator=generator))
    found: dict[int, Any] = {}
    with torch.random.fork_rng(devices=[] if runner.device == "cpu" else [runner.device]), torch.inference_mode():
        torch.manual_seed(seed)
        for size in sorted({len(prompt) for prompt in prompts}):
            settings = GenerationConfig(
                do_sample=True, temperature=temperature, top_k=0, max_new_tokens=length - size,
                pad_token_id=vocabulary.pad, eos_token_id=ends or None, bos_token_id=vocabulary.start,
            )  # fmt: skip
            alike = [i for i, prompt in enumerate(prompts) if len(prompt) == size]
            for at in range(0, len(alike), runner.batch_size):
                batch = alike[at : at + runner.batch_size]
                inputs = torch.tensor([prompts[i] for i in batch], device=runner.device)
                written = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
                for i, row in zip(batch, written.tolist(), strict=True):
                    end = next((k + 1 for k in range(size, len(row)) if row[k] in ends), len(row))
                    found[i] = np.array(row[:end], dtype=np.int32)
                runner.tick(len(batch))
    return [found[i] for i in range(rows)]


def filled(
    model: PreTrainedModel,
    rows: Sequence[Any],
    vocabulary: Vocabulary,
    runner: Runner,
    *,
    steps: int,
    temperature: float,
    budget: int,
    generator: Generator,
) -> list[Any]:
    """Rows of which a masked model fills in again and again some tokens that are hidden from it (Gibbs sampling in
    blocks): from random words towards texts that it holds for likely.

    Args:
        rows: int32 arrays, with the tokens around a text.
        steps: how often; each hides `GAPS` of a row's tokens, all of them at the first.
        budget: padded tokens of a batch at most.

    Returns:
        int32 arrays of the same lengths.
    """
    import torch

    result = [row.copy() for row in rows]
    drawable = (vocabulary.weights > 0).to(runner.device)
    for step in range(steps):
        places = [gaps(row, vocabulary, 1.0 if step == 0 else GAPS, generator) for row in result]
        hidden = [hide(row, at, vocabulary) for row, at in zip(result, places, strict=True)]

        def work(batch: Sequence[int], hidden: list[Any] = hidden, places: list[Any] = places) -> list[Any]:
            tokens, mask = padded([hidden[i] for i in batch], vocabulary.pad, runner.device)
            logits = model(input_ids=tokens, attention_mask=mask).logits
            drawn = []
            for k, i in enumerate(batch):
                scores = logits[k, places[i]].float()[:, : len(drawable)] / temperature
                chances = scores.masked_fill(~drawable, float("-inf")).softmax(-1).cpu()
                drawn.append(torch.multinomial(chances, 1, generator=generator)[:, 0].numpy())
            return drawn

        drawn_anew = runner.run([len(row) for row in result], work, budget=budget)
        for row, at, tokens in zip(result, places, drawn_anew, strict=True):
            row[at] = tokens
    return result


def gaps(row: Any, vocabulary: Vocabulary, share: float, generator: Generator) -> list[int]:
    """Some places of a row's text in rising order, at least one."""
    import torch

    first, room = len(vocabulary.before), len(row) - len(vocabulary.before) - len(vocabulary.after)
    places: list[int] = torch.randperm(room, generator=generator)[: max(1, math.ceil(share * room))].tolist()
    return sorted(first + place for place in places)


def hide(row: Any, places: Sequence[int], vocabulary: Vocabulary) -> Any:
    """A copy of a row with gaps.

    Raises:
        HfMergeError: the tokenizer has no token for a gap.
    """
    if vocabulary.mask is None:
        raise HfMergeError("replay: the tokenizer has no mask token, which a masked language model needs; add one.")
    hidden = row.copy()
    hidden[list(places)] = vocabulary.mask
    return hidden


def as_rectangle(places: Sequence[Sequence[int]]) -> Tensor:
    """Places of all rows as one int32 tensor, -1 where a row has fewer."""
    import torch

    result = torch.full((len(places), max(len(row) for row in places)), -1, dtype=torch.int32)
    for i, row in enumerate(places):
        result[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return result
