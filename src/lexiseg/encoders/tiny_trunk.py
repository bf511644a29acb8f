"""The small ViT that is pretrained here without labels, read out densely."""

from __future__ import annotations

from torch import Tensor

from lexiseg.encoders.tiny_clip import TinyClipConfig, TinyVision
from lexiseg.encoders.trunk import Trunk
from lexiseg.errors import ModelError


class TinyTrunk(Trunk):
    """The tiny CLIP's image tower with attention over the whole picture, read out as tokens after the last norm.

    Letters: B pictures of H x W pixels, h x w patches of 8 pixels, D channels.

    Args:
        image_size: side in pixels of the pictures that it has positions for; for others they are resized.
        width: D.
        layers: number of blocks.
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
        check_sides(images, self.multiple)
        height, width = (side // self.multiple for side in images.shape[-2:])
        tokens = self.tokens((images.float() / 255 - 0.5) / 0.5)[:, 1:]
        return tokens.transpose(1, 2).reshape(len(images), -1, height, width)

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


def check_sides(pixels: Tensor, multiple: int) -> None:
    """Refuse pictures (…, H, W) that cannot be cut into whole patches of `multiple` pixels.

    Raises:
        ModelError: they cannot.
    """
    height, width = pixels.shape[-2:]
    if height % multiple or width % multiple or not (height and width):
        raise ModelError(
            found=f"pictures of {height} x {width} pixels",
            allowed=f"sides that are multiples of {multiple}, the trunk's patch or stride",
            fix="resize or crop them first",
        )
