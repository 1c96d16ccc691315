"""Classification of texts, pairs of texts and images: with task heads, and zero-shot from class names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfmerge.evaluation.batches import Runner, padded
from hfmerge.evaluation.processors import decode_image


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def classify_texts(
    model: PreTrainedModel, ids: Sequence[Any], types: Sequence[Any] | None, runner: Runner, *, pad: int, number: bool
) -> list[Any]:
    """The head's row with the highest value for each text, or the value itself of a regression.

    Args:
        ids, types: see `processors.encode`.
        pad: token to pad with.
        number: the head gives one number.
    """
    if getattr(model.config, "pad_token_id", None) is None:
        # decoders look for the last token that is not padding
        model.config.pad_token_id = pad

    def work(batch: Sequence[int]) -> list[Any]:
        tokens, mask = padded([ids[i] for i in batch], pad, runner.device)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if types is not None:
            inputs["token_type_ids"] = padded([types[i] for i in batch], 0, runner.device)[0]
        logits = model(**inputs).logits.float()
        found: list[Any] = (logits[:, 0] if number else logits.argmax(-1)).tolist()
        return found

    return runner.run([len(row) for row in ids], work)


def classify_images(
    model: PreTrainedModel, rows: Any, column: str, processor: Any, runner: Runner, where: str
) -> list[int]:
    """The head's row with the highest value for each image."""

    def work(batch: Sequence[int]) -> list[int]:
        seen = pixels(rows, column, processor, batch, runner.device, where)
        found: list[int] = model(pixel_values=seen.to(model.dtype)).logits.float().argmax(-1).tolist()
        return found

    return runner.run([1] * len(rows), work)


def match_images(
    model: PreTrainedModel, classes: Tensor, rows: Any, column: str, processor: Any, runner: Runner, where: str
) -> list[int]:
    """The class whose text is nearest to each image.

    Args:
        model: of images and texts.
        classes: see `class_features`.
    """

    def work(batch: Sequence[int]) -> list[int]:
        seen = pixels(rows, column, processor, batch, runner.device, where)
        features = _unit(model.get_image_features(pixel_values=seen.to(model.dtype)))
        found: list[int] = (features @ classes.T).argmax(-1).tolist()
        return found

    return runner.run([1] * len(rows), work)


def class_features(
    model: PreTrainedModel, tokenizer: Any, classes: Sequence[str], templates: Sequence[str], device: str
) -> Tensor:
    """Unit vectors of classes: of each the mean over its prompts, as CLIP's authors do it (arXiv 2103.00020, 3.1.4).

    Returns:
        float32 (classes, width).
    """
    import torch

    most = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    vectors = []
    with torch.inference_mode():
        for name in classes:
            prompts = [template.replace("{}", name) for template in templates]
            found = tokenizer(prompts, padding=True, truncation=True, max_length=most, return_tensors="pt")
            names = ("input_ids", "attention_mask")
            inputs = {key: found[key].to(device) for key in names if key in found}
            vectors.append(_unit(_unit(model.get_text_features(**inputs)).mean(0)))
    return torch.stack(vectors)


def _unit(features: Any) -> Tensor:
    """Rows scaled to length one; some versions of transformers wrap them in an output object."""
    values: Tensor = getattr(features, "pooler_output", features)
    values = values.float()
    return values / values.norm(dim=-1, keepdim=True)


def pixels(rows: Any, column: str, processor: Any, batch: Sequence[int], device: str, where: str) -> Tensor:
    """Some images as a model takes them, float32 (rows, channels, height, width)."""
    images = [
        decode_image(value, f"{where}: row {row}") for row, value in zip(batch, rows[list(batch)][column], strict=True)
    ]
    found: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    return found.to(device)
