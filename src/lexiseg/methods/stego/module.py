"""STEGO's trainings: the head on the correspondence loss, and the probes on its codes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lexiseg.methods.stego.diagnostics import collapsed
from lexiseg.methods.stego.head import SegmentationHead
from lexiseg.methods.stego.loss import correspondence_terms, random_points, super_permutation
from lexiseg.methods.stego.probes import ClusterProbe, linear_loss
from lexiseg.methods.stego.settings import LossSettings, ProbeSettings, TrainSettings
from lexiseg.methods.stego.shifts import Shifts


class StegoTraining(L.LightningModule):
    """Head and correspondence loss (paper section 3.2); features are frozen and come with the batch.

    Args:
        head: what learns.
        loss: `stego.loss`.
        train: `stego.train`.
        shifts: b of the three terms.
    """

    def __init__(self, head: SegmentationHead, *, loss: LossSettings, train: TrainSettings, shifts: Shifts) -> None:
        super().__init__()
        self.head, self._loss, self._train = head, loss, train
        self._shifts = (shifts.self_, shifts.knn, shifts.random)

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        settings, features, near = self._loss, batch["features"], batch["neighbours"]
        codes, near_codes = self.head(features), self.head(near)
        if settings.drop_features:
            # As in the authors' code: a third draw of the dropout, on what the codes are compared with.
            features, near = self.head.drop(features), self.head.drop(near)
        size, count = len(features), settings.points**2
        partners = [super_permutation(torch.randperm(size)) for _ in range(settings.negatives)]
        terms = correspondence_terms(
            features,
            codes,
            near,
            near_codes,
            points=random_points(size, count).to(features),
            partner_points=random_points(size, count).to(features),
            partners=torch.stack(partners).to(features.device),
            shifts=self._shifts,
            centring=settings.centring,
            clamp=settings.clamp,
            stabilise=settings.stabilise,
        )
        loss = settings.self * terms.self_ + settings.knn * terms.knn + settings.random * terms.random
        values = {"loss": loss, "self": terms.self_, "knn": terms.knn, "random": terms.random}
        codes_ = {"self_code": terms.self_code, "knn_code": terms.knn_code, "random_code": terms.random_code}
        self.log_dict(values | codes_)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.head.parameters(), lr=self._train.lr)


class CollapseAlarm(L.Callback):
    """Warns, once, where all codes of a picture, or of all pictures, become alike.

    Then no cluster can be told from another one, although the loss may still fall. No label is needed to see it.

    Args:
        limit: mean cosine of codes that is too high, 0..1.
        after: steps that are not looked at: codes of an untrained head are alike too.
    """

    def __init__(self, limit: float, *, after: int) -> None:
        self.limit, self.after, self._said = limit, after, False

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if self._said or batch_index < self.after:
            return
        found = collapsed({name: float(value) for name, value in trainer.callback_metrics.items()}, limit=self.limit)
        if found:
            self._said = True
            print(f"\nwarning: {found}", file=sys.stderr, flush=True)


class ProbeTraining(L.LightningModule):
    """Cluster centres by gradient, and the linear probe where there are labels; codes get no gradient.

    Args:
        clusters: the cluster probe that learns, or None where k-means finds the centres.
        linear: the linear probe that learns, or None.
        head: features -> codes.
        settings: `stego.probe`.
    """

    def __init__(
        self,
        *,
        clusters: ClusterProbe | None,
        linear: nn.Conv2d | None,
        head: nn.Module,
        settings: ProbeSettings,
    ) -> None:
        super().__init__()
        self.clusters, self.linear, self._settings = clusters, linear, settings
        self._head = [head.eval().requires_grad_(False)]  # in a list: no part of this module, nor of its checkpoints

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        head = self._head[0].to(batch["features"].device)
        with torch.no_grad():
            codes = head(batch["features"])
        loss = codes.new_zeros(())
        if self.clusters is not None:
            part = self.clusters.loss(codes, alpha=self._settings.alpha)
            self.log("cluster", part)
            loss = loss + part
        if self.linear is not None:
            part = linear_loss(self.linear, codes, batch["labels"], classes=self.linear.out_channels)
            self.log("linear", part)
            loss = loss + part
        return loss

    def configure_optimizers(self) -> Any:
        # One optimiser: Adam treats every weight by itself, so it is the same as one for each probe.
        return torch.optim.Adam(self.parameters(), lr=self._settings.lr)
