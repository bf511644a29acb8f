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
from tqdm import tqdm

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.settings import SelfSupervisedSettings
from lexiseg.encoders.tiny_trunk import TinyTrunk
from lexiseg.errors import DataError
from lexiseg.training import fit, shuffled_indices, step_seed, warmup_cosine


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

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        # Within the step: a checkpoint is written right after it, before the module's own hook at the end of a batch.
        super().optimizer_step(*arguments, **named)
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher's weights a little towards the student's; the statistics of its norms are the student's."""
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.settings.momentum)
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
        iterations: of the balancing, 1 or more.

    Returns:
        (N, prototypes); each row sums to 1.
    """
    # The first round in logarithms: at small temperatures nearly all shares are smaller than the smallest number. After
    # it every row sums to 1, so that what is still too small is nothing beside the rest of its row.
    share = (cosines / temperature).log_softmax(dim=0).softmax(dim=1)
    for _ in range(iterations - 1):
        share = share / share.sum(dim=0).clamp(min=torch.finfo(share.dtype).tiny)
        share = share / share.sum(dim=1, keepdim=True)
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
        The teacher's trunk, frozen, and the training curve.

    Raises:
        DataError: no pictures, of different sizes, not square, or smaller than a crop.
    """
    images = _pictures(split, settings)
    torch.manual_seed(seed)
    trunk = TinyTrunk(image_size=images.shape[1], layers=settings.layers)
    module = SelfSupervised(trunk, settings)
    curve = fit(
        module,
        batch=lambda step: two_views(images, settings, step, seed=seed, patch=trunk.multiple),
        steps=settings.steps,
        seed=seed,
        gradient_clip=1.0,
        title="pretrain trunk",
    )
    return module.teacher.trunk.eval().requires_grad_(False), curve


def two_views(
    images: np.ndarray, settings: SelfSupervisedSettings, step: int, *, seed: int, patch: int
) -> dict[str, list[Any]]:
    """The batch of a step: each of its pictures cut out and coloured twice.

    All pictures of a view are cut at the same place, a whole number of patches from the corner, so that cells of the
    two views are the same patches of the pictures.

    Args:
        images: uint8 (N, S, S, 3).
        settings: of the crops, the colours and the masks.
        step: 0-based.
        seed: of the training.
        patch: side of a patch in pixels.

    Returns:
        views: two of float (B, 3, crop, crop); crops: where these begin, (row, column) in patches; masks: two of bool
        (B, cells, cells).
    """
    rng = np.random.default_rng(step_seed(seed, step))
    chosen = torch.from_numpy(images[shuffled_indices(len(images), settings.batch, step, seed=seed)])
    chosen = chosen.permute(0, 3, 1, 2)
    cells = settings.crop // patch
    crops = crop_places((images.shape[1] - settings.crop) // patch + 1, cells=cells, rng=rng)
    views, masks = [], []
    for row, column in crops:
        top, left = row * patch, column * patch
        views.append(_jitter(chosen[:, :, top : top + settings.crop, left : left + settings.crop], settings, rng))
        masks.append(torch.from_numpy(rng.random((len(chosen), cells, cells)) < settings.masked))
    return {"views": views, "crops": list(crops), "masks": masks}


def crop_places(room: int, *, cells: int, rng: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where two crops begin, (row, column) in patches, at random, such that they share at least half of each side.

    Args:
        room: places along a side, 1 or more.
        cells: patches along a side of a crop.
        rng: of the places.
    """
    first = rng.integers(room, size=2)
    far = cells // 2
    second = rng.integers(np.maximum(first - far, 0), np.minimum(first + far, room - 1), endpoint=True)
    return (int(first[0]), int(first[1])), (int(second[0]), int(second[1]))


def _pictures(split: PreparedSplit, settings: SelfSupervisedSettings) -> np.ndarray:
    """The first pictures of a split, uint8 (N, S, S, 3)."""
    count, sizes = min(len(split), settings.pictures), set()
    pictures: np.ndarray | None = None
    for index in tqdm(range(count), desc="read pictures", unit="picture", mininterval=15.0, leave=False):
        picture = _square(split.image(index), settings.size)
        sizes.add(picture.shape[:2])
        if pictures is None:
            pictures = np.empty((count, *picture.shape), dtype=np.uint8)
        if len(sizes) == 1:
            pictures[index] = picture
    smallest = min((min(size) for size in sizes), default=0)
    if pictures is None or len(sizes) != 1 or any(h != w for h, w in sizes) or smallest < settings.crop:
        raise DataError(
            found=f"pictures of {len(sizes)} sizes, the shortest side {smallest} pixels",
            allowed=f"square pictures of one size, at least {settings.crop} pixels",
            fix="set `encode.self_supervised.size` to a side that they are resized to",
        )
    return pictures


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
