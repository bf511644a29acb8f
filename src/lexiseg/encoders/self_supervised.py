"""A small ViT, pretrained here without labels or captions: patches of two crops have to agree on prototypes.

Ingredients of DINO (Caron et al. 2021: a student follows the moving average of itself), iBOT (Zhou et al. 2022: patches
are predicted where they were masked) and SwAV (Caron et al. 2020: balanced assignments to prototypes); it is none of
them.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.settings import SelfSupervisedSettings
from lexiseg.encoders.tiny_clip import TinyClipConfig, TinyVision
from lexiseg.errors import DataError
from lexiseg.training import fit, shuffled_indices, step_seed, warmup_cosine


class TinyTrunk(nn.Module):
    """The tiny CLIP's image tower with attention over the whole picture, read out as tokens after the last norm.

    Letters: B pictures of H x W pixels, h x w patches of 8 pixels, D channels.
    """

    def __init__(self, *, image_size: int = 64, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.config = {"image_size": image_size, "width": width, "layers": layers}
        sizes = TinyClipConfig(vocab_size=1, image_size=image_size, width=width, vision_layers=layers, embed_dim=1)
        self.vision = TinyVision(sizes)
        self.vision.proj = None  # features, not embeddings
        self.multiple, self.channels = sizes.patch_size, width

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, H, W), sides multiples of 8 -> (B, D, h, w)."""
        height, width = images.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"sides must be multiples of {self.multiple}, got {height} x {width}")
        tokens = self.tokens((images.float() / 255 - 0.5) / 0.5)[:, 1:]
        return tokens.transpose(1, 2).reshape(len(images), -1, height // self.multiple, width // self.multiple)

    def tokens(self, pixels: Tensor, *, crop: tuple[int, int] | None = None, masked: Tensor | None = None) -> Tensor:
        """Class and patch tokens (B, 1 + h w, D) of floats (B, 3, H, W) in -1..1.

        Args:
            pixels: the pictures.
            crop: row and column of the grid at which positions are read, for pieces of pictures.
            masked: bool (B, h, w), patches whose content is hidden.
        """
        grid = self.vision.conv1(pixels)
        if masked is not None:
            grid = grid.masked_fill(masked[:, None], 0.0)
        tokens, _ = self.vision.tokens(grid, crop=crop)
        return self.vision.ln_post(self.vision.transformer(tokens))


class _Prototypes(nn.Module):
    """Cosines of projected tokens with prototypes: (..., D) -> (..., prototypes)."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width // 2))
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, width // 2), dim=-1))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.project(tokens), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


class _Branch(nn.Module):
    def __init__(self, trunk: TinyTrunk, prototypes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.patch = _Prototypes(trunk.channels, prototypes)
        self.picture = _Prototypes(trunk.channels, prototypes)

    def forward(
        self, pixels: Tensor, *, crop: tuple[int, int], masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        tokens = self.trunk.tokens(pixels, crop=crop, masked=masked)
        side = pixels.shape[-1] // self.trunk.multiple
        return self.patch(tokens[:, 1:]).unflatten(1, (side, side)), self.picture(tokens[:, 0]), crop


class SelfSupervised(L.LightningModule):
    """Student and teacher."""

    def __init__(self, trunk: TinyTrunk, settings: SelfSupervisedSettings) -> None:
        super().__init__()
        self.settings = settings
        self.student = _Branch(trunk, settings.prototypes)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        settings = self.settings
        views = list(zip(batch["views"], batch["crops"], strict=True))
        with torch.no_grad():
            targets = [self.teacher(view, crop=crop) for view, crop in views]
            patches = balanced(torch.cat([t[0].flatten(0, 2) for t in targets]), settings.teacher_temperature)
            pictures = balanced(torch.cat([t[1] for t in targets]), settings.teacher_temperature)
        by_view = [part.view_as(t[0]) for part, t in zip(patches.chunk(2), targets, strict=True)]
        found = [self.student(v, crop=c, masked=m) for (v, c), m in zip(views, batch["masks"], strict=True)]
        patch_loss, picture_loss = found[0][0].new_zeros(()), found[0][0].new_zeros(())
        for mine, (guess, whole, crop) in enumerate(found):
            other = 1 - mine
            here, there = _overlap(crop, views[other][1], guess.shape[1])
            logits = guess[:, here[0], here[1]] / settings.student_temperature
            patch_loss = patch_loss - (by_view[other][:, there[0], there[1]] * logits.log_softmax(-1)).sum(-1).mean()
            log_share = (whole / settings.student_temperature).log_softmax(-1)
            picture_loss = picture_loss - (pictures.chunk(2)[other] * log_share).sum(-1).mean()
        loss = (patch_loss + settings.picture_weight * picture_loss) / 2
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        keep = self.settings.momentum
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.lerp_(fast, 1 - keep)
            for slow, fast in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
                slow.copy_(fast)

    def configure_optimizers(self) -> Any:
        settings = self.settings
        matrices = [p for p in self.student.parameters() if p.ndim >= 2]
        others = [p for p in self.student.parameters() if p.ndim < 2]
        optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.lr,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: warmup_cosine(step, steps=settings.steps, warmup=settings.warmup, floor=0.05)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def balanced(cosines: Tensor, temperature: float, *, iterations: int = 3) -> Tensor:
    """Shares of prototypes such that each prototype gets the same in total (Sinkhorn-Knopp, as in SwAV).

    Args:
        cosines: (N, prototypes).
        temperature: of the softmax that is balanced.
        iterations: of the balancing.

    Returns:
        (N, prototypes); each row sums to 1.
    """
    share = ((cosines - cosines.max()) / temperature).exp()
    for _ in range(iterations):
        share = share / share.sum(dim=0, keepdim=True).clamp(min=1e-12)
        share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return share


def _overlap(
    mine: tuple[int, int], other: tuple[int, int], side: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The cells that two crops of `side` cells share, in the coordinates of each."""
    here, there = [], []
    for a, b in zip(mine, other, strict=True):
        first, last = max(a, b), min(a, b) + side
        here.append(slice(first - a, last - a))
        there.append(slice(first - b, last - b))
    return (here[0], here[1]), (there[0], there[1])


def pretrain_trunk(
    split: PreparedSplit, settings: SelfSupervisedSettings, *, seed: int
) -> tuple[TinyTrunk, list[dict[str, float]]]:
    """Train a tiny ViT on the pictures of a split; captions and labels are not read.

    Returns:
        The teacher's trunk, and the training curve.

    Raises:
        DataError: pictures of different sizes, or smaller than a crop.
    """
    count = min(len(split), settings.pictures)
    pictures = [_square(split.image(index), settings.size) for index in range(count)]
    sizes = sorted({picture.shape for picture in pictures})
    smallest = min((min(shape[:2]) for shape in sizes), default=0)
    if len(sizes) != 1 or sizes[0][0] != sizes[0][1] or smallest < settings.crop:
        raise DataError(
            found=f"pictures of {len(sizes)} sizes, the shortest side {smallest} pixels",
            allowed=f"square pictures of one size, at least {settings.crop} pixels",
            fix="set `encode.self_supervised.size` to a side that they are resized to",
        )
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    torch.manual_seed(seed)
    trunk = TinyTrunk(image_size=images.shape[-1], layers=settings.layers)
    room = (images.shape[-1] - settings.crop) // trunk.multiple + 1
    cells = settings.crop // trunk.multiple

    def batch(step: int) -> dict[str, Any]:
        rng = np.random.default_rng(step_seed(seed, step))
        chosen = images[torch.from_numpy(shuffled_indices(len(images), settings.batch, step, seed=seed))]
        views, crops, masks = [], [], []
        for _ in range(2):
            row, column = (int(number) for number in rng.integers(room, size=2))
            top, left = row * trunk.multiple, column * trunk.multiple
            piece = chosen[:, :, top : top + settings.crop, left : left + settings.crop]
            views.append(_jitter(piece, settings, rng))
            crops.append((row, column))
            masks.append(torch.from_numpy(rng.random((len(piece), cells, cells)) < settings.masked))
        return {"views": views, "crops": crops, "masks": masks}

    module = SelfSupervised(trunk, settings)
    curve = fit(module, batch=batch, steps=settings.steps, seed=seed, gradient_clip=1.0, title="pretrain trunk")
    return module.teacher.trunk, curve


def _jitter(pieces: Tensor, settings: SelfSupervisedSettings, rng: np.random.Generator) -> Tensor:
    """Colours of each picture changed by a gain and a shift per channel, and noise; floats in about -1..1."""
    batch = len(pieces)

    def between(limit: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(-limit, limit, size=shape).astype(np.float32))

    pixels = pieces.float() / 255
    pixels = pixels * (1 + between(settings.gain, batch, 1, 1, 1)) + between(settings.shift, batch, 3, 1, 1)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    return (pixels + settings.noise * noise - 0.5) / 0.5


def _square(image: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or image.shape[:2] == (size, size):
        return image
    from PIL import Image

    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
