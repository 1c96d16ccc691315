"""Makes replay rows from a fine-tuned model: opens it, runs a generator, keeps the model's outputs on the rows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hfmerge.engine.ranks import Ranks
from hfmerge.errors import HeadError, HfMergeError, NonFiniteError
from hfmerge.evaluation.batches import Runner, padded
from hfmerge.evaluation.language import LOGITS
from hfmerge.evaluation.models import Subject
from hfmerge.evaluation.processors import (
    IMAGE_FILES,
    TOKENIZER_FILES,
    find_snapshot,
    load_images,
    load_tokenizer,
    longest,
)
from hfmerge.hub.progress_bar import progress_bar
from hfmerge.learning.replay import images, sampling
from hfmerge.learning.replay.dataset import Replay
from hfmerge.learning.replay.search import Schedule, search, shared_out
from hfmerge.learning.replay.targets import token_targets
from hfmerge.learning.replay.words import Vocabulary, read_vocabulary
from hfmerge.recipe.replay import ReplaySettings


if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel

SCORES = {"multi_label_classification": "labels", "regression": "values"}
"""What a classification head's numbers are by its config's problem type, where they are not "classes"."""


def generate(
    subject: Subject,
    kind: str,
    settings: ReplaySettings | None = None,
    *,
    spare: Subject | None = None,
    progress: bool = False,
    notify: Callable[[str], object] | None = None,
) -> Replay:
    """Rows made by a model without any data of its task, with the model's soft outputs.

    On one machine the same model, seed and number of threads give the same bytes. One process makes the rows; others
    read its file.

    Rows of text are single texts for every model: a model does not tell whether it was tuned on pairs. A model of
    pairs reads such a row as a first text without a second. Labelled rows have both texts (see `labelled_rows`).

    Args:
        subject: the fine-tuned model, with its tokenizer or image processor. Its weights are kept as it was opened.
        kind: "text-classification", "image-classification", "causal" or "masked".
        settings: how many rows, and how they are made.
        spare: the masked language model for the generator `masked` of a classifier (its base, as a rule), and the
            model whose tokenizer or image processor is taken where the subject has none.
        progress: show a bar with the time left.
        notify: told in one line how many rows are made, and in how many passes; and if the search found few.

    Raises:
        HeadError: the model has no head for this kind. SourceError: it cannot be read, or has no tokenizer or image
            processor. HfMergeError: the generator does not fit the model. NonFiniteError: its outputs are not finite.
    """
    import torch

    settings = settings or ReplaySettings()
    settings.chosen(kind)
    begun = time.monotonic()
    model, scores = _opened(subject, kind)
    name = _generator(settings, kind, model, scores, subject.info.label)
    settings = dataclasses.replace(settings, generator=name)
    steps = settings.chosen(kind)[1]
    title = f"Replay of {subject.info.label}"
    if notify is not None:
        passes = f", in at most {steps} passes over them" if steps else ""
        notify(f"{subject.info.label}: {settings.rows} rows by {name}{passes}")
    with progress_bar(settings.rows * (1 + steps), title, "row", shown=progress) as bar:
        maker = _Maker(subject, spare, model, kind, scores, settings, steps, bar.update)
        inputs, targets, pad = maker.pixels() if kind == "image-classification" else maker.texts()
        bar.total = bar.n
        bar.refresh()
    if maker.fault is not None and notify is not None:
        notify(maker.fault)
    for key, value in targets.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{subject.info.label}: its {key} on replay rows are not finite; open it in float32.")
    info = subject.info
    mark = info.commit or (f"sha256:{info.digest}" if info.digest else "")
    return Replay(
        f"{info.label}@{mark}" if mark else info.label, kind, name, settings.seed, scores, pad, settings.kept_back,
        inputs, targets, maker.passes, time.monotonic() - begun,
    )  # fmt: skip


class _Maker:
    """One run of a generator."""

    def __init__(
        self,
        subject: Subject,
        spare: Subject | None,
        model: PreTrainedModel,
        kind: str,
        scores: str,
        settings: ReplaySettings,
        steps: int,
        update: Callable[[int], object],
    ):
        import torch

        self.passes = 0
        self.fault: str | None = None
        self._subject, self._spare, self._model, self._kind = subject, spare, model, kind
        self._scores, self._asked, self._steps, self._update = scores, settings, steps, update
        self._snapshots = (*subject.snapshots, *(spare.snapshots if spare is not None else ()))
        self._random: Generator = torch.Generator().manual_seed(settings.seed)
        self._log_chances = torch.nn.functional.logsigmoid if scores == "labels" else _log_softmax

    @property
    def _runner(self) -> Runner:
        # made when it is needed: kept here it would refer back to its owner, and the model would stay in memory
        return Runner(self._asked.batch_size, self._subject.device, Ranks(), self._tick)

    def texts(self) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """Inputs and targets of rows of text, and the token they are padded with."""
        import torch

        label, settings = self._subject.info.label, self._asked
        tokenizer = load_tokenizer(find_snapshot(self._snapshots, TOKENIZER_FILES, "tokenizer", label))
        writer = self._writer(tokenizer)
        models = [model for model in (self._model, writer) if model is not None]
        known = min(model.get_input_embeddings().weight.shape[0] for model in models)
        words = read_vocabulary(tokenizer, known, label)
        # without a padding token a decoder cannot tell where its row ends
        if getattr(self._model.config, "pad_token_id", None) is None:
            self._model.config.pad_token_id = words.pad
        length = longest(tokenizer, self._subject.config, settings.length)
        # of a row of one token a causal model has nothing to predict
        fewest = 2 if self._kind == "causal" else 1
        least = len(words.before) + len(words.after) + fewest
        if length < least:
            raise HfMergeError(f"{label}: replay rows of {length} tokens leave no room for text; {least} at least.")
        if settings.generator == "sampled":
            rows = sampling.continued(
                self._model, words, self._runner, rows=settings.rows, length=length, temperature=settings.temperature,
                generator=self._random,
            )  # fmt: skip
        else:
            rows = words.spans(settings.rows, fewest, length, self._random)
        if settings.generator == "contrast":
            rows, reached = search(
                self._model, rows, self._logits(rows, words.pad), words, self._log_chances, self._schedule(),
                confidence=settings.confidence,
            )  # fmt: skip
            self._count(reached)
        if writer is not None:
            rows = sampling.filled(
                writer, rows, words, self._runner, steps=self._steps, temperature=settings.temperature,
                budget=_budget(writer), generator=self._random,
            )  # fmt: skip
        if self._kind == "text-classification":
            targets = {"logits": self._logits(rows, words.pad)}
        else:
            rows, targets = self._tokens(rows, words)
        ids, mask = padded(rows, words.pad, "cpu")
        return {"input_ids": ids.to(torch.int32), "attention_mask": mask.to(torch.uint8)}, targets, words.pad

    def pixels(self) -> tuple[dict[str, Tensor], dict[str, Tensor], None]:
        """Inputs and targets of images."""
        import torch

        settings = self._asked
        processor = load_images(
            find_snapshot(self._snapshots, IMAGE_FILES, "image processor", self._subject.info.label)
        )
        size = images.probe(processor)
        values = images.noise(processor, size, settings.rows, self._random)
        goal = math.log(settings.confidence) if settings.confidence > 0 else float("-inf")

        def loss(logits: Tensor, wanted: Tensor) -> Tensor:
            return (goal - self._log_chances(logits).gather(1, wanted[:, None])[:, 0]).clamp_min(0)

        def seen(pixels: Tensor) -> Tensor:
            def work(batch: Sequence[int]) -> list[Any]:
                inputs = pixels[list(batch)].to(self._subject.device, self._model.dtype)
                return list(self._model(pixel_values=inputs).logits.float().cpu())

            return torch.stack(self._runner.run([1] * len(pixels), work))

        if settings.generator != "noise" and self._steps:
            values = images.convinced(
                self._model, values, shared_out(self._log_chances(seen(values))), size, loss, self._schedule(),
                statistics=settings.generator == "statistics",
            )  # fmt: skip
        stored = values.to(torch.float16)
        return {"pixel_values": stored}, {"logits": seen(stored)}, None

    def _count(self, reached: int) -> None:
        """Note if fewer rows than half are what their class looks like."""
        settings = self._asked
        if reached < settings.rows / 2:
            self.fault = (
                f"{self._subject.info.label}: only {reached} of {settings.rows} replay rows reached a confidence of "
                f"{settings.confidence:g} in {self._steps} passes; the others are used as they are. Where the merge "
                "loses the model's skill, raise `learn.replay.steps`, or take labelled rows (`learn.loss: mixed`)."
            )

    def _schedule(self) -> Schedule:
        return Schedule(self._steps, self._asked.batch_size, self._random, self._tick)

    def _writer(self, tokenizer: Any) -> PreTrainedModel | None:
        """The masked language model that writes the rows, if one does."""
        if self._asked.generator != "masked":
            return None
        if self._kind == "masked":
            return self._model
        if self._spare is None:
            raise HfMergeError(
                f"{self._subject.info.label}: replay by the generator masked needs a model with a masked language "
                "head; name its base, or take contrast or unigram."
            )
        name = self._spare.info.label
        if load_tokenizer(find_snapshot(self._spare.snapshots, TOKENIZER_FILES, "tokenizer", name)).get_vocab() != (
            tokenizer.get_vocab()
        ):
            raise HfMergeError(f"{name}: its tokenizer has other tokens than {self._subject.info.label}'s.")
        return self._spare.whole("masked")

    def _logits(self, rows: Sequence[Any], pad: int) -> Tensor:
        """float32 (rows, classes) of a classifier of texts."""
        import torch

        def work(batch: Sequence[int]) -> list[Any]:
            tokens, mask = padded([rows[i] for i in batch], pad, self._runner.device)
            return list(self._model(input_ids=tokens, attention_mask=mask).logits.float().cpu())

        return torch.stack(self._runner.run([len(row) for row in rows], work))

    def _tokens(self, rows: list[Any], words: Vocabulary) -> tuple[list[Any], dict[str, Tensor]]:
        """Rows as a language model is asked about them, and what it says: of each next token, or of hidden ones."""
        import torch

        if self._kind == "masked":
            places = [sampling.gaps(row, words, sampling.GAPS, self._random) for row in rows]
            rows = [sampling.hide(row, at, words) for row, at in zip(rows, places, strict=True)]
        else:
            places = [list(range(len(row) - 1)) for row in rows]
        positions = sampling.as_rectangle(places)

        def work(batch: Sequence[int]) -> list[dict[str, Tensor]]:
            tokens, mask = padded([rows[i] for i in batch], words.pad, self._runner.device)
            logits = self._model(input_ids=tokens, attention_mask=mask).logits
            found = token_targets(logits, positions[list(batch)].to(logits.device), self._asked.top)
            return [{name: value[k].cpu() for name, value in found.items()} for k in range(len(batch))]

        found = self._runner.run([len(row) for row in rows], work, budget=_budget(self._model))
        return rows, {name: torch.stack([row[name] for row in found]) for name in found[0]}

    def _tick(self, count: int) -> None:
        self.passes += count
        self._update(count)


def _opened(subject: Subject, kind: str) -> tuple[PreTrainedModel, str]:
    """The model with its own head, and what its outputs are."""
    if kind in ("causal", "masked"):
        return subject.whole(kind), "tokens"
    head = subject.own_head()
    if head is None:
        raise HeadError(f"{subject.info.label}: has no classification head of its own; replay for {kind} needs one.")
    model = subject.with_head(head, kind)
    default = "values" if len(head.labels) == 1 else "classes"
    return model, SCORES.get(str(head.config.get("problem_type")), default)


def _generator(settings: ReplaySettings, kind: str, model: PreTrainedModel, scores: str, label: str) -> str:
    """The generator that is asked for, or the one that fits the model."""
    name = settings.chosen(kind)[0]
    image = kind == "image-classification"
    normalised = image and bool(images.normalisations(model))
    if settings.generator == "auto" and scores == "values":
        return "noise" if image else "unigram"
    if settings.generator == "auto" and normalised:
        return "statistics"
    if scores == "values" and name in ("contrast", "statistics"):
        raise HfMergeError(f"{label}: its head gives numbers and no classes; take {'noise' if image else 'unigram'}.")
    if name == "statistics" and not normalised:
        raise HfMergeError(
            f"{label}: has no batch normalisation, and so keeps no statistics of its training; take contrast or noise."
        )
    return name


def _budget(model: PreTrainedModel) -> int:
    """Padded tokens of a batch of a language model; of its logits three copies are held at a time."""
    return max(1, LOGITS // 4 // int(model.config.get_text_config().vocab_size))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)
