"""LSeg (Li et al., ICLR 2022): pixel embeddings correlated with the embeddings of any set of labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexiseg.encoders.pyramid import CnnBackbone, TinyBackbone, VitBackbone
from lexiseg.errors import ModelError
from lexiseg.methods.lseg.correlation import correlate, correlate_through_head
from lexiseg.methods.lseg.decoder import FusionDecoder
from lexiseg.methods.lseg.regularisation import SpatialRegularisation


class LSeg(nn.Module):
    """Dense image encoder of LSeg; the text encoder stays outside and gives the label vectors.

    Letters: B images, H x W pixels, N labels, C text dimension, h = ceil(H/2), w = ceil(W/2).

    Args:
        backbone: four maps, fine to coarse.
        text_dim: C.
        features: width of the decoder.
        temperature: constant t of the softmax (0.07 in the paper); never trained.
        regularisation: spatial regularisation block on the logits, or None.
        clip_residual: add three times the dense embedding of the backbone, a CLIP image tower, to the output,
            and start the head at zero, so that training starts from the zero-shot result. Not in the paper.
        freeze_norm: batch norms of the backbone keep the statistics they came with, also in training.

    Example:
        >>> logits = model(images, text)         # (B, 3, H, W), (N, C) -> (B, N, H, W)
    """

    RESIDUAL_WEIGHT = 3.0

    def __init__(
        self,
        backbone: TinyBackbone | VitBackbone | CnnBackbone,
        *,
        text_dim: int,
        features: int,
        temperature: float,
        regularisation: SpatialRegularisation | None = None,
        clip_residual: bool = False,
        freeze_norm: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = FusionDecoder(backbone.channels, features=features)
        self.head = nn.Conv2d(features, text_dim, 1)
        self.scale = 1 / temperature
        self.regularisation = regularisation
        self.clip_residual, self.freeze_norm = clip_residual, freeze_norm
        if clip_residual:
            if not isinstance(backbone, TinyBackbone):
                raise ModelError(
                    found="`lseg.model.clip_residual: true` with a backbone that is not a CLIP image tower",
                    allowed="clip_residual only where `encode.backbone.source` is clip",
                    fix="set one of the two",
                )
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def embed(self, images: Tensor) -> Tensor:
        """Unit pixel embeddings (B, C, h, w) of normalised images (B, 3, H, W).

        H and W must be multiples of the ViT's patch size; for a CNN they are free.
        """
        size = (images.shape[-2], images.shape[-1])
        if self.clip_residual:
            maps, anchor = self.backbone.maps_and_embeddings(images)  # type: ignore[operator]
        else:
            maps, anchor = self.backbone(images), None
        embedded = self.head(self.decoder(maps, image_size=size))
        if anchor is not None:
            anchor = F.interpolate(anchor, size=embedded.shape[-2:], mode="bilinear", align_corners=False)
            embedded = embedded + self.RESIDUAL_WEIGHT * F.normalize(anchor, dim=1)
        return F.normalize(embedded, dim=1)

    def score(self, embedded: Tensor, text: Tensor) -> Tensor:
        """Logits (B, N, h, w) of unit pixel embeddings (B, C, h, w) and unit label vectors (N, C) or (B, N, C)."""
        return self._logits(correlate(embedded, text))

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits (B, N, H, W) at the size of the images (B, 3, H, W).

        Args:
            images: normalised.
            text: unit label vectors (N, C), or (B, N, C) where every picture has labels of its own.
        """
        size = (images.shape[-2], images.shape[-1])
        if self.clip_residual or text.shape[-2] >= text.shape[-1]:
            logits = self.score(self.embed(images), text)
        else:
            features = self.decoder(self.backbone(images), image_size=size)
            logits = self._logits(correlate_through_head(features, self.head, text))
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)

    def train(self, mode: bool = True) -> LSeg:
        """As usual, but frozen norms of the backbone stay as they are."""
        super().train(mode)
        if self.freeze_norm:
            for part in self.backbone.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        return self

    def _logits(self, cosines: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            logits = self.scale * cosines
            return logits if self.regularisation is None else self.regularisation(logits)
        # With thousands of labels, a second copy of the logits is what would not fit into memory.
        logits = cosines.mul_(self.scale)
        return logits if self.regularisation is None else self.regularisation.apply_(logits)
