"""A trained STEGO: pictures -> codes -> scores of clusters, and labels of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lexiseg.data.crops import centre_square
from lexiseg.device import best_device
from lexiseg.encoders.trunk import Trunk
from lexiseg.errors import LabelError
from lexiseg.evaluation.cluster_scores import ALPHA, REGIONS, ClusterMaps, cluster_names, map_names, pack
from lexiseg.methods.stego.build import load_with_trunk
from lexiseg.methods.stego.features import grid_size, to_grid
from lexiseg.methods.stego.model import Stego
from lexiseg.methods.stego.naming import name_clusters
from lexiseg.methods.stego.settings import PredictSettings
from lexiseg.phases import phase
from lexiseg.segmentation import upsample_argmax
from lexiseg.settings import parse
from lexiseg.storage import load_tensors

if TYPE_CHECKING:
    from lexiseg.encoders.text import TextEncoder


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
        regions, text = None, None
        if (folder / REGIONS).is_file():
            from lexiseg.encoders.text import load_text

            regions, text = load_tensors(folder / REGIONS)["regions"], load_text(folder)
        return cls(
            trunk,
            model,
            options=parse(values, PredictSettings, source="stego.predict"),
            classes=config["classes"] or (),
            names=config.get("names"),
            regions=regions,
            text=text,
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
        return list(self._packed(codes).numpy())

    def _packed(self, codes: Tensor) -> Tensor:
        return pack(codes, self.model.probe.centres, self.model.linear_probe).float().cpu()

    @torch.inference_mode()
    def codes(self, images: np.ndarray) -> Tensor:
        """Codes (B, K, h, w) of uint8 RGB (B, H, W, 3), whole; with `flip` the mean of two.

        Where the evaluation crops, the shorter side is scaled down to that of the crop.
        """
        options = self.options
        size = grid_size(*self._size(*images.shape[1:3]), self.trunk.multiple)
        with phase("preprocess"):
            pixels = to_grid(torch.from_numpy(images).permute(0, 3, 1, 2), size).to(self.device)
        with phase("vision"):
            codes = self.model(self.trunk(pixels))
            if options.flip:
                codes = (codes + self.model(self.trunk(pixels.flip(-1))).flip(-1)) / 2
            return codes

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that a picture is looked at with."""
        options, shrink = self.options, 1.0
        if options.max_side is not None:
            shrink = min(1.0, options.max_side / max(height, width))
        elif options.crop is not None:
            shrink = min(1.0, options.crop / min(height, width))
        return round(height * shrink), round(width * shrink)

    @torch.inference_mode()
    def segment(
        self,
        image: np.ndarray,
        labels: Sequence[str],
        *,
        refine: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Divide a picture as the evaluation does: codes are upsampled, refined by cluster, and clusters named last.

        Args:
            image: uint8 RGB (H, W, 3).
            labels: names of clusters (`names`), or, where the model has a CLIP, any words.
            refine: (logits (N, h, w), picture) -> scores (N, H, W), of `lexiseg.methods.stego.refine`. Large pictures
                are refined at the size that the trunk sees.

        Returns:
            Label map int32 (H, W), index into `labels`; and logits float32 (L, h, w): twice the cosine with the nearest
            of each label's clusters, or with `refine` the logarithm of its share.

        Raises:
            LabelError: see `owners`.
        """
        with phase("text"):
            owners = torch.tensor(self.owners(labels))
        height, width = image.shape[:2]
        pixels = np.array(image)  # a copy: torch takes no array that cannot be written to
        maps = ClusterMaps.unpack(self.maps, self._packed(self.codes(pixels[None]))[0])
        if refine is None:
            logits = ALPHA * maps.clusters
            # The length of an upsampled code is the same beside all centres: which is the nearest, it does not change.
            compared = maps.clusters * maps.cells[0]
        else:
            size = self._size(height, width)
            picture = to_grid(torch.from_numpy(pixels).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0).numpy()
            found = refine((ALPHA * maps.cosines(height=size[0], width=size[1])).numpy(), picture)
            logits = compared = torch.from_numpy(found)
        asked = (owners >= 0).nonzero()[:, 0]
        nearest = upsample_argmax(compared[asked][None], height=height, width=width, align_corners=False)[0]
        # Labels without a cluster stay below all others.
        scores = torch.full((len(labels), *logits.shape[-2:]), -4 * ALPHA if refine is None else -100.0)
        for label in owners[asked].unique().tolist():
            scores[label] = logits[owners == label].amax(dim=0)
        return owners[asked][nearest.long()].int().numpy(), scores.numpy()

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
                allowed=f"one or more of {', '.join(dict.fromkeys(self.names))}, or none: this model does not know "
                "what a CLIP sees in its clusters, and so not what a word means",
                fix="leave the labels out; or let the graph name the clusters by a CLIP (`encode.clip`, an imported "
                "model by `lexiseg import stego … --text FOLDER --profile NAME`), and use outputs/stego/register",
            )
        return name_clusters(self._regions, self.text.embed(labels))
