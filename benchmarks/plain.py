"""What the papers and their code write down, computed as it stands there: the peers of the benchmarks.

LSeg, with the weights of a model folder: every pixel embedding is made, normalised and multiplied with the label
vectors, all logits are brought to the size of the picture, and the best label is taken from those. Letters in shapes as
in `lexiseg.methods.lseg.model`. PAMR: the neighbourhoods of all pixels are unfolded, in every iteration. STEGO: every
kind of pairs is sampled and correlated by itself. Dense CRF: the kernels of all pairs of pixels are whole matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.encoders.clip import load_clip
from lexiseg.layers.crf import SMALLEST_SHARE, CrfSettings
from lexiseg.methods.lseg.build import load_model
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.regularisation import SpatialRegularisation


def plain_logits(model: LSeg, images: Tensor, text: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Logits (B, N, *size) of normalised images (B, 3, H, W) and unit label vectors (N, C)."""
    features = model.decoder(model.backbone(images), image_size=(images.shape[-2], images.shape[-1]))
    embedded = model.head(features)
    batch, channels, height, width = embedded.shape
    pixels = embedded.permute(0, 2, 3, 1).reshape(-1, channels)
    pixels = pixels / pixels.norm(dim=-1, keepdim=True)
    logits = (model.scale * pixels) @ text.T
    logits = logits.reshape(batch, height, width, len(text)).permute(0, 3, 1, 2)
    if model.regularisation is not None:
        logits = plain_regularisation(model.regularisation, logits)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


def plain_regularisation(block: SpatialRegularisation, logits: Tensor) -> Tensor:
    """The spatial regularisation block on logits (B, N, h, w): every label's map is a picture of one channel."""
    for turn in range(block.depth):
        result = block.depthwise(logits.flatten(0, 1)[:, None]).reshape(logits.shape)
        if block.block == "bottleneck":
            result = result + logits.amax(dim=1, keepdim=True)
        logits = result if turn == block.depth - 1 else block.activation(result)
    return logits


class PlainSegmenter:
    """Segments pictures with a model folder, in float32.

    Args:
        folder: a model folder whose text side is a CLIP.
        device: where all of it is computed.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        model, config = load_model(folder)
        self.model, self.device = model.to(device), device
        self.mean, self.std = (torch.tensor(config[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.clip = load_clip(folder / "clip")
        self.clip.model.to(device)

    @torch.inference_mode()
    def encode(self, labels: Sequence[str]) -> Tensor:
        """Unit vectors (N, C) of the bare labels, all in one batch."""
        tokens = self.clip.tokenize(list(labels)).to(self.device)
        return F.normalize(self.clip.model.encode_text(tokens), dim=-1)  # type: ignore[operator]

    @torch.inference_mode()
    def segment(self, image: np.ndarray, text: Tensor) -> np.ndarray:
        """Index of the best label (H, W) of a uint8 RGB picture (H, W, 3)."""
        size = image.shape[:2]
        logits = plain_logits(self.model, self.prepare(image), text, size=(size[0], size[1]))
        return logits.argmax(dim=1)[0].cpu().numpy()

    def prepare(self, image: np.ndarray) -> Tensor:
        """The input of the network (1, 3, h', w'): sides as the ViT needs them, normalised."""
        pixels = torch.from_numpy(image).to(self.device).permute(2, 0, 1)[None].float() / 255
        patch = self.model.backbone.multiple
        size = [max(patch, round(side / patch) * patch) for side in pixels.shape[-2:]]
        if size != list(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=True)
        return (pixels - self.mean) / self.std


def plain_pamr(image: Tensor, masks: Tensor, *, iterations: int, dilations: Sequence[int]) -> Tensor:
    """PAMR of masks (B, N, H, W) by a picture (B, 3, H, W), with all neighbourhoods (B, N, P, H, W) in memory."""
    windows = _windows(image, dilations)
    spread = torch.cat(windows, dim=2).std(dim=2, keepdim=True)
    likeness = -((_neighbours(windows) - image[:, :, None]).abs() / (1e-8 + 0.1 * spread)).mean(dim=1)
    weights = likeness.softmax(dim=1)[:, None]
    for _ in range(iterations):
        masks = (_neighbours(_windows(masks, dilations)) * weights).sum(dim=2)
    return masks


def _windows(x: Tensor, dilations: Sequence[int]) -> list[Tensor]:
    """The 3 x 3 windows (B, C, 9, H, W) around each pixel, per dilation."""
    unfolded = (F.unfold(F.pad(x, (d,) * 4, mode="replicate"), 3, dilation=d) for d in dilations)
    return [part.view(*x.shape[:2], 9, *x.shape[2:]) for part in unfolded]


def _neighbours(windows: Sequence[Tensor]) -> Tensor:
    """The windows without their centres: (B, C, P, H, W)."""
    return torch.cat([torch.cat([part[:, :, :4], part[:, :, 5:]], dim=2) for part in windows], dim=2)


def plain_crf(image: Tensor, shares: Tensor, settings: CrfSettings) -> Tensor:
    """Shares (1, C, H, W) by mean field with every pair of pixels, in float64; for pictures of some 50 x 50 pixels.

    Args: those of `lexiseg.layers.crf.dense_crf`, of one picture (1, 3, H, W).
    """
    _, labels, height, width = shares.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns], dim=-1).reshape(-1, 2).double()
    colour = image[0].permute(1, 2, 0).reshape(-1, 3).double()

    def kernel(points: Tensor, weight: float) -> Tensor:
        matrix = torch.exp(-((points[:, None] - points) ** 2).sum(dim=-1) / 2)
        norm = matrix.sum(dim=1).rsqrt()
        return weight * norm[:, None] * matrix * norm

    pairs = kernel(place / settings.gaussian_width, settings.gaussian_weight)
    bilateral = [place / settings.bilateral_width, colour / settings.bilateral_colour]
    pairs = pairs + kernel(torch.cat(bilateral, dim=1), settings.bilateral_weight)
    energy = shares[0].reshape(labels, -1).T.double().clamp(min=SMALLEST_SHARE).log()
    current = energy.softmax(dim=1)
    for _ in range(settings.iterations):
        current = (energy + pairs @ current).softmax(dim=1)
    return current.T.reshape(1, labels, height, width)


def plain_correspondence_loss(
    features: Tensor,
    codes: Tensor,
    neighbour_features: Tensor,
    neighbour_codes: Tensor,
    *,
    points: Tensor,
    partner_points: Tensor,
    partners: Tensor,
    shifts: Sequence[float],
    weights: Sequence[float],
) -> Tensor:
    """STEGO's loss as its equations read: every kind of pairs sampled, correlated and centred by itself.

    Args: those of `lexiseg.methods.stego.loss.correspondence_terms`, and `weights` of self, neighbour and random pairs.
    """

    def sample(maps: Tensor, places: Tensor) -> Tensor:
        return F.grid_sample(maps, places[:, :, None], padding_mode="border", align_corners=True)

    def unit(maps: Tensor) -> Tensor:
        return F.normalize(maps, dim=1, eps=1e-10)

    def pairs(f: Tensor, g: Tensor, s: Tensor, t: Tensor, shift: float) -> Tensor:
        with torch.no_grad():
            alike = torch.einsum("nchw,ncij->nhwij", unit(f), unit(g))
            mean = alike.mean()
            alike = alike - alike.mean(dim=(3, 4), keepdim=True)
            alike = alike - alike.mean() + mean
        close = torch.einsum("nchw,ncij->nhwij", unit(s), unit(t))
        return -close.clamp(min=0.0) * (alike - shift)

    f, s = sample(features, points), sample(codes, points)
    g, t = sample(neighbour_features, partner_points), sample(neighbour_codes, partner_points)
    random = [
        pairs(f, sample(features[row], partner_points), s, sample(codes[row], partner_points), shifts[2])
        for row in partners
    ]
    return (
        weights[0] * pairs(f, f, s, s, shifts[0]).mean()
        + weights[1] * pairs(f, g, s, t, shifts[1]).mean()
        + weights[2] * torch.cat(random).mean()
    )
