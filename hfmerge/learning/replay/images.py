"""Rows of pixels: smooth noise with edges, and images moved until a classifier is sure of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfmerge.learning.replay.search import Schedule


if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from transformers import PreTrainedModel

RATE = 0.02
"""Step of an image's values, as a share of the range that the processor gives them."""
SMOOTH = 2.0
"""Weight of the mean difference between neighbouring pixels, in shares of the range, against nats of the class."""
STATISTICS = 1.0
"""Weight of the distance to the statistics of batch normalisation."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """What an image processor makes of images.

    Attributes:
        height, width: of the model's input.
        low, high: float32 (channels, 1, 1): what becomes of black and of white.
    """

    height: int
    width: int
    low: Tensor = field(repr=False)
    high: Tensor = field(repr=False)


def probe(processor: Any) -> Pixels:
    """What a processor makes of a black and a white image."""
    from PIL import Image

    plain = [Image.new("RGB", (64, 64), (value,) * 3) for value in (0, 255)]
    low, high = processor(images=plain, return_tensors="pt")["pixel_values"].float()
    return Pixels(low.shape[-2], low.shape[-1], low.amin((-2, -1), True), high.amax((-2, -1), True))


def noise(processor: Any, pixels: Pixels, rows: int, generator: Generator) -> Tensor:
    """Images without any meaning that share with photographs what networks look at first: smooth areas (noise whose
    strength falls with its frequency), edges (two such areas meet along a random outline), and their own colours,
    brightness and contrast.

    Returns:
        float32 (rows, channels, height, width), as the processor gives them.
    """
    import torch
    from PIL import Image

    found = []
    for _ in range(rows):
        one, other, outline = (_cloud(pixels, generator) for _ in range(3))
        image = torch.where(outline.mean(0, keepdim=True) > 0, one, other)
        gain = torch.rand(1, generator=generator) * 1.5 + 0.5
        colour = torch.rand(3, 1, 1, generator=generator)
        values = ((colour + 0.25 * gain * image).clamp(0, 1) * 255).round().to(torch.uint8)
        picture = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
        found.append(processor(images=picture, return_tensors="pt")["pixel_values"][0].float())
    return torch.stack(found)


def _cloud(pixels: Pixels, generator: Generator) -> Tensor:
    """Noise of all sizes, the finer the fainter: float32 (3, height, width), of variance one."""
    import torch
    from torch.nn.functional import interpolate

    total = torch.zeros(3, pixels.height, pixels.width)
    for octave in range(1 + int(math.log2(max(2, min(pixels.height, pixels.width))))):
        size = 2**octave
        field_of = torch.randn(1, 3, size + 1, size + 1, generator=generator)
        grown = interpolate(field_of, size=(pixels.height, pixels.width), mode="bilinear", align_corners=True)
        total += grown[0] / size
    return (total - total.mean()) / total.std().clamp_min(1e-6)


def convinced(
    model: PreTrainedModel,
    start: Tensor,
    wanted: Tensor,
    pixels: Pixels,
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    *,
    statistics: bool,
) -> Tensor:
    """Images moved by gradient, each towards a class.

    Each step sees the images shifted by a few pixels and mirrored or not, so that what it finds does not hang on
    single pixels, and pays for differences between neighbouring pixels.

    Args:
        start: float32 (rows, channels, height, width).
        wanted: int64 (rows,), the class of each.
        loss: logits and wanted classes -> nats of each row, 0 where the model is sure enough.
        statistics: also move the mean and variance of what enters each batch normalisation towards those that it keeps
            of its training (arXiv 1912.08795).

    Returns:
        float32, as `start`.
    """
    import torch

    device = model.device
    model.requires_grad_(False)
    low, high = pixels.low.to(device), pixels.high.to(device)
    batches = []
    batch_size = schedule.batch_size
    for at in range(0, len(start), batch_size):
        # in shares of the range from black to white
        values = ((start[at : at + batch_size].to(device) - low) / (high - low)).requires_grad_()
        kinds = wanted[at : at + batch_size].to(device)
        optimiser = torch.optim.Adam([values], lr=RATE)
        for _ in range(schedule.steps):
            seen = _jittered(values, schedule.generator)
            with _entering(model if statistics else None) as distances:
                logits = model(pixel_values=(low + (high - low) * seen).to(model.dtype)).logits.float()
            rough = (values.diff(dim=-1).abs().mean() + values.diff(dim=-2).abs().mean()) * len(values)
            total = loss(logits, kinds).sum() + SMOOTH * rough
            if distances:
                total = total + STATISTICS * len(values) * torch.stack(distances).mean()
            (values.grad,) = torch.autograd.grad(total, values)
            optimiser.step()
            with torch.no_grad():
                values.clamp_(0, 1)
            schedule.tick(len(values))
        batches.append((low + (high - low) * values.detach()).cpu())
    return torch.cat(batches)


def normalisations(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that keep statistics of what they were trained on; layer normalisation keeps none."""
    from torch.nn.modules.batchnorm import _BatchNorm

    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


@contextlib.contextmanager
def _entering(model: PreTrainedModel | None) -> Iterator[list[Tensor]]:
    """While a model runs: of each batch normalisation, how far what enters it is from what it was trained on."""
    import torch

    distances: list[Tensor] = []

    def look(layer: Any, inputs: Sequence[Tensor]) -> None:
        values = inputs[0].float().transpose(0, 1).flatten(1)
        spread = layer.running_var.float() + layer.eps
        mean, variance = values.mean(1) - layer.running_mean.float(), values.var(1, unbiased=False) + layer.eps
        # that of normal distributions, which does not depend on a channel's scale
        ratio = variance / spread
        distances.append((mean.square() / spread + ratio - torch.log(ratio) - 1).mean() / 2)

    hooks = [layer.register_forward_pre_hook(look) for layer in (normalisations(model) if model is not None else ())]
    try:
        yield distances
    finally:
        for hook in hooks:
            hook.remove()


def _jittered(values: Tensor, generator: Generator) -> Tensor:
    """All images shifted alike by up to a sixteenth of their size, and mirrored or not."""
    import torch

    height, width = values.shape[-2:]
    shifts = [int(torch.randint(-(n // 16), n // 16 + 1, (1,), generator=generator)) for n in (height, width)]
    moved = values.roll(shifts, (-2, -1))
    return moved.flip(-1) if int(torch.randint(2, (1,), generator=generator)) else moved
