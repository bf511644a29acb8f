"""LSeg's training: optimiser groups and schedule of the official code."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.distributed as distributed
from torch import Tensor

from lexiseg.methods.lseg.loss import pixel_cross_entropy
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.settings import TrainSettings
from lexiseg.segmentation import IGNORE_LABEL
from lexiseg.training import warmup_cosine


class LSegTraining(L.LightningModule):
    """Trains the image side; the label vectors are constants.

    Args:
        model: the network.
        text: unit vectors (N, C) of the training labels. A batch whose pictures are asked about labels of their own has
            `labels`, rows of `text`, int64 (B, n); in any other batch all N compete.
        settings: `lseg.train`.
        steps: optimiser steps of the whole training.
        steps_per_epoch: optimiser steps of one pass over the data.
    """

    def __init__(self, model: LSeg, *, text: Tensor, settings: TrainSettings, steps: int, steps_per_epoch: int) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self.register_buffer("text", text, persistent=False)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        text: Any = self.text
        text = text[batch["labels"]] if "labels" in batch else text
        loss = pixel_cross_entropy(self.model(batch["image"], text), batch["target"])
        if distributed.is_available() and distributed.is_initialized():
            loss = loss * _weight(batch["target"])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        settings = self.settings
        # The official code scales the rate by the batch of ONE device: same flag, other batch, other rate.
        lr = settings.lr * (settings.batch / settings.lr_batch if settings.lr_batch else 1.0)
        slow = [p for p in self.model.backbone.parameters() if p.requires_grad]
        known = {id(p) for p in self.model.backbone.parameters()}
        fast = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": slow, "lr": lr * settings.backbone_lr_factor}, {"params": fast, "lr": lr}]
        if settings.optimiser == "sgd":
            optimiser: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay
            )
        else:
            optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self.lr_factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """Factor on every group's rate at an optimiser step: poly (1 - done)^power, per epoch or step, or cosine."""
        if self.settings.schedule == "cosine":
            return warmup_cosine(step, steps=self.steps, warmup=self.settings.warmup)
        if self.settings.schedule_unit == "epoch":
            epochs = max(1, round(self.steps / self.steps_per_epoch))
            done = min(step // self.steps_per_epoch, epochs - 1) / epochs
        else:
            done = min(1.0, step / self.steps)
        return (1 - done) ** self.settings.poly_power


def _weight(target: Tensor) -> Tensor:
    """This rank's share of all labelled pixels, times the number of ranks: the mean over ranks that DDP takes of the
    losses is then the mean over pixels, as in one process."""
    own = (target != IGNORE_LABEL).sum().float()
    total = own.clone()
    distributed.all_reduce(total)
    return own * distributed.get_world_size() / total.clamp(min=1)
