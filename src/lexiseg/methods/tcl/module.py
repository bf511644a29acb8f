"""TCL's training: two phases, and the optimiser groups and schedule of the official code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lexiseg.errors import ModelError
from lexiseg.methods.tcl.build import FROZEN
from lexiseg.methods.tcl.loss import area, feature_level, gather, image_level, total_variation
from lexiseg.methods.tcl.model import TCL
from lexiseg.methods.tcl.settings import LossSettings, TrainSettings

START = 1e-4  # share of the learning rate that the warm-up begins with


def losses(
    model: TCL,
    images: Tensor,
    text: Tensor,
    *,
    noise: Tensor,
    rank: int,
    settings: LossSettings,
    also: Tensor | None = None,
) -> dict[str, Tensor]:
    """All losses of one batch, weighted; their sum is what is trained on.

    Letters: b images of this rank, B texts of all ranks, C channels, h x w the mask grid.

    Args:
        model: the network.
        images: normalised, (b, 3, H, W).
        text: CLIP's embeddings of all captions, not normalised, (B, C).
        noise: uniform in (0, 1), of the hard masks of each image's own text, (b, 1, h, w).
        rank: of this process: its images belong to the texts from rank * b on.
        settings: `tcl.loss`.
        also: bool (b, B), further texts that are known to be true of an image; see `lexiseg.methods.tcl.loss.contrast`.

    Returns:
        image (TCL_v), feature (TCL_f), area_positive, area_negative, smooth_masks, smooth_embedding. A loss of weight
        0 is not computed.
    """
    embedding = model.embed(images)
    logits = model.grounder.mask_logits(embedding, text)
    masks = logits.sigmoid()
    found: dict[str, Tensor] = {}
    if settings.image:
        own = torch.arange(len(images), device=images.device)
        own_logits = logits[own, rank * len(images) + own, None]
        masked = model.embed_masked(images, own_logits, noise, temperature=settings.mask_temperature)
        found["image"] = settings.image * image_level(masked, text, model.image_log_scale, also=also)
    if settings.feature:
        found["feature"] = settings.feature * feature_level(masks, embedding, text, model.feature_log_scale, also=also)
    if settings.area:
        priors = {"positive": settings.positive_prior, "negative": settings.negative_prior}
        positive, negative = area(masks, rank=rank, also=also, **priors)
        found |= {"area_positive": settings.area * positive, "area_negative": settings.area * negative}
    if settings.smooth:
        found["smooth_masks"] = settings.smooth * total_variation(masks)
        found["smooth_embedding"] = settings.smooth * total_variation(embedding)
    return found


class TCLTraining(L.LightningModule):
    """Trains the grounder and the two temperatures; CLIP stays as it is.

    Args:
        model: the network.
        text: token ids (b, L) -> embeddings (b, C), not normalised; frozen.
        train: `tcl.train`.
        loss: `tcl.loss`.
    """

    def __init__(self, model: TCL, *, text: torch.nn.Module, train: TrainSettings, loss: LossSettings) -> None:
        super().__init__()
        self.model, self.settings, self.loss = model, train, loss
        self.text = text.eval().requires_grad_(False)
        self.first_phase, self.step = True, 0
        # Kept with the checkpoints, so that an interrupted training counts on.
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        self.step = batch["step"]
        self.first_phase = self.step < self.settings.decoder_steps
        images = batch["image"]
        with torch.no_grad():
            text = gather(self.text(batch["tokens"]))
        cells = self.model.grid(images)
        rank, also = self.global_rank, None
        # Drawn for all ranks, so that a picture's noise does not depend on how many there are.
        noise = torch.rand(len(text), 1, *cells, device=images.device)[rank * len(images) : (rank + 1) * len(images)]
        if "noun" in batch:
            also = batch["mentioned"][:, gather(batch["noun"])]
            own = torch.arange(len(images), device=images.device)
            also[own, rank * len(images) + own] = False
        found = losses(self.model, images, text, noise=noise, rank=rank, settings=self.loss, also=also)
        self._require_finite(batch["step"], {name: value.detach() for name, value in found.items()})
        loss = torch.stack(list(found.values())).sum()
        self.log_dict({"loss": loss, **found}, sync_dist=True)
        if "skipped" in batch:
            self.skipped += gather(torch.tensor([batch["skipped"]], device=images.device)).sum()
            self.log("skipped", self.skipped.float())
        return loss

    def train(self, mode: bool = True) -> TCLTraining:
        """As usual; all that is frozen stays in evaluation mode."""
        super().train(mode)
        self.text.eval()
        self.model.train(mode)
        return self

    def _require_finite(self, step: int, values: Mapping[str, Tensor]) -> None:
        broken = [name for name, value in values.items() if not bool(value.isfinite().all())]
        if broken:
            raise ModelError(
                found=f"TCL diverged in step {step + 1}: not finite: {', '.join(broken)}",
                allowed="finite losses and gradients",
                fix="lower `tcl.train.lr`, or the weight of that loss in `tcl.loss`; set `tcl.train.clip_gradient`",
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients that are not finite stop the training. In the first phase the last block stays CLIP's own.

        It has gradients all the time, since DistributedDataParallel has to know what it will average. When the norm of
        all is clipped and the optimiser steps it has none, so that it is passed over, decay included.
        """
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self._require_finite(self.step, {f"the gradient of {name}": value for name, value in gradients.items()})
        if self.first_phase:
            for parameter in self.model.grounder.block.parameters():
                parameter.grad = None

    def configure_optimizers(self) -> Any:
        """AdamW; the block of the second phase is among its parameters from the start."""
        settings = self.settings
        trained = [p for name, p in self.model.named_parameters() if not name.startswith(FROZEN)]
        # As in the official code: vectors do not decay, single numbers (gates, scales, the mask's bias) do.
        groups = [
            {"params": [p for p in trained if p.ndim != 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=settings.lr * self.rate_factor, betas=(0.9, 0.999), eps=1e-6)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self.lr_factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def rate_factor(self) -> float:
        """What the rates of the settings are multiplied by: the global batch over `lr_batch`."""
        settings = self.settings
        return settings.batch / settings.lr_batch if settings.lr_batch else 1.0

    def lr_factor(self, step: int) -> float:
        """Factor on the rate at a step: linear warm-up, then a cosine down to `min_lr`."""
        settings = self.settings
        if step < settings.warmup:
            return START + (1 - START) * step / settings.warmup
        done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        floor = settings.min_lr / settings.lr
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
