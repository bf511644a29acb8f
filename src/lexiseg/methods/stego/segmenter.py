"""A trained STEGO: pictures -> codes -> scores of clusters, and labels of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexiseg.data.crops import centre_square
from lexiseg.device import best_device
from lexiseg.encoders.text import TextEncoder, load_text
from lexiseg.encoders.trunk import Trunk
from lexiseg.errors import LabelError
from lexiseg.evaluation.cluster_scores import ALPHA, cluster_names, map_names, pack
from lexiseg.methods.stego.build import load_with_trunk
from lexiseg.methods.stego.features import grid_size, to_grid
from lexiseg.methods.stego.model import Stego
from lexiseg.methods.stego.naming import name_clusters
from lexiseg.methods.stego.probes import cluster_cosines
from lexiseg.methods.stego.settings import PredictSettings
from lexiseg.settings import parse
from lexiseg.storage import load_tensors

REGIONS = "regions.safetensors"  # of a model folder: what a CLIP sees in each cluster


class StegoSegmenter:
    """Scores pictures by clusters, or by labels of clusters.

    Letters: B pictures, K channels of a code, N clusters, C classes of the linear probe, L labels, h x w cells.

    Args:
        trunk: frozen.
        model: head and probes.
        options: `stego.predict`.
        classes: names of the linear probe's classes.
        names: a class for each cluster, None where it has none; from matching with labels, or from a CLIP.
        regions: what the CLIP sees in each cluster, (N, channels), or None.
        text: text side of that CLIP, or None.
        device: where the networks compute; None: `best_device`.
    """

    def __init__(
        self,
        trunk: Trunk,
        model: Stego,
        *,
        options: PredictSettings,
        classes: Sequence[str] = (),
        names: Sequence[str | None] | None = None,
        regions: Tensor | None = None,
        text: TextEncoder | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or best_device()
        self.trunk, self.model = trunk.to(self.device), model.eval().to(self.device)
        self.classes, self.options = tuple(classes), options
        count = len(model.probe.centres)
        self.clusters = cluster_names(count)
        self.names = tuple(name or own for name, own in zip(names or (None,) * count, self.clusters, strict=True))
        self._regions, self.text = regions, text

    @classmethod
    def load(
        cls, folder: Path, *, encode: Path | None = None, predict: Mapping[str, Any] | None = None
    ) -> StegoSegmenter:
        """From a model folder; `encode` is the folder of the trunk where the model folder has none of its own."""
        trunk, model, config = load_with_trunk(folder, trunk=encode or folder / "trunk")
        values = config.get("predict", {}) if predict is None else dict(predict)
        regions = folder / REGIONS
        return cls(
            trunk,
            model,
            options=parse(values, PredictSettings, source="stego.predict"),
            classes=config["classes"] or (),
            names=config.get("names"),
            regions=load_tensors(regions)["regions"] if regions.is_file() else None,
            text=load_text(folder) if regions.is_file() else None,
        )

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of what `score_maps` gives."""
        return map_names(len(self.clusters), self.classes)

    @torch.inference_mode()
    def score_maps(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Maps (N + 5 + C, h, w) float32 of each uint8 RGB picture (H, W, 3), see `cluster_scores.pack`.

        With `crop` in the options, of the centre square alone.
        """
        if len({image.shape for image in images}) > 1:
            return [self.score_maps([image])[0] for image in images]
        own = self.options
        if own.crop is not None:
            images = [centre_square(image, own.crop, nearest=own.filter == "nearest") for image in images]
        codes = self.codes(np.stack(images))
        return list(pack(codes, self.model.probe.centres, self.model.linear_probe).float().cpu().numpy())

    @torch.inference_mode()
    def codes(self, images: np.ndarray) -> Tensor:
        """Codes (B, K, h, w) of uint8 RGB (B, H, W, 3), whole; with `flip` the mean of two.

        Where the evaluation crops, the shorter side is scaled down to that of the crop.
        """
        options = self.options
        height, width = images.shape[1:3]
        shrink = 1.0
        if options.max_side is not None:
            shrink = min(1.0, options.max_side / max(height, width))
        elif options.crop is not None:
            shrink = min(1.0, options.crop / min(height, width))
        size = grid_size(round(height * shrink), round(width * shrink), self.trunk.multiple)
        pixels = to_grid(torch.from_numpy(images).permute(0, 3, 1, 2), size).to(self.device)
        codes = self.model(self.trunk(pixels))
        if options.flip:
            codes = (codes + self.model(self.trunk(pixels.flip(-1))).flip(-1)) / 2
        return codes

    @torch.inference_mode()
    def scores(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> list[np.ndarray]:
        """Logits (L, h, w) float32 per picture: twice the cosine with the nearest of each label's clusters.

        Args:
            images: uint8 RGB (H, W, 3); pictures of one size are computed together.
            labels: names of clusters (`names`), or, where the model has a CLIP, any words.

        Raises:
            LabelError: see `owners`.
        """
        if len({image.shape for image in images}) > 1:
            return [self.scores([image], labels)[0] for image in images]
        owners = torch.tensor(self.owners(labels))
        cosines = ALPHA * cluster_cosines(self.codes(np.stack(images)), self.model.probe.centres).float().cpu()
        # Labels without a cluster stay below all others.
        found = torch.full((len(cosines), len(labels), *cosines.shape[-2:]), -4 * ALPHA)
        for label in owners[owners >= 0].unique().tolist():
            found[:, label] = cosines[:, owners == label].amax(dim=1)
        return list(found.numpy())

    def owners(self, labels: Sequence[str]) -> list[int]:
        """The number of each cluster's label, -1 for clusters that none of the labels means.

        Raises:
            LabelError: words that name no cluster, of a model without a CLIP.
        """
        known = {name: number for number, name in enumerate(labels)}
        strange = [label for label in labels if label not in self.names]
        if not strange:
            return [known.get(name, -1) for name in self.names]
        if self._regions is None or self.text is None:
            raise LabelError(
                found=f"the labels {', '.join(strange[:5])}, which name no cluster",
                allowed=f"one or more of {', '.join(dict.fromkeys(self.names))}, or none: this model has no CLIP that "
                "could tell what a word means",
                fix="leave the labels out, or register the model with a CLIP in `encode.clip`",
            )
        return name_clusters(self._regions, self.text.embed(labels))
