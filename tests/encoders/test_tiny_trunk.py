"""The small ViT that is pretrained without labels."""

import pytest
import torch

from lexiseg.encoders.tiny_trunk import TinyTrunk
from lexiseg.errors import ModelError


def test_the_trunk_is_read_on_any_grid():
    trunk = TinyTrunk(image_size=32, layers=1).eval()
    assert trunk(torch.zeros(2, 3, 40, 24, dtype=torch.uint8)).shape == (2, 128, 5, 3)
    with pytest.raises(ModelError, match="pictures of 30 x 32 pixels"):
        trunk(torch.zeros(1, 3, 30, 32, dtype=torch.uint8))


def test_tokens_see_the_whole_picture():
    trunk = TinyTrunk(image_size=32, layers=2).eval()
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    changed = image.clone()
    changed[..., :8, :8] = 255
    with torch.no_grad():
        apart = (trunk(image) - trunk(changed)).abs().sum(dim=1)[0]
    assert float(apart[3, 3]) > 0  # the opposite corner, more than two steps away


def test_masked_patches_hide_their_content():
    """A pixel is seen by the patches within 11 pixels of it (the stem's field): where all are masked, by none."""
    trunk = TinyTrunk(image_size=64, layers=1).eval()
    with torch.no_grad():
        for norm in (module for module in trunk.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(norm.bias)
    masked = torch.zeros(1, 8, 8, dtype=torch.bool)
    masked[0, 2:6, 3:7] = True
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    changed = pixels.clone()
    changed[..., 30:36, 38:44] += 5
    with torch.no_grad():
        hidden = trunk.tokens(pixels, masked=masked)
        torch.testing.assert_close(trunk.tokens(changed, masked=masked), hidden)
        assert not torch.allclose(trunk.tokens(changed), trunk.tokens(pixels), atol=1e-2)
        # Patches beyond the mask are what they were before anything was mixed: their own content counts.
        changed = pixels.clone()
        changed[..., :8, :8] += 5
        assert not torch.allclose(trunk.tokens(changed, masked=masked), hidden, atol=1e-2)


def test_a_crop_reads_the_positions_of_its_place():
    trunk = TinyTrunk(image_size=64, layers=1).eval()
    piece = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        here, elsewhere = (trunk.tokens(piece, crop=crop) for crop in ((2, 1), (0, 0)))
        assert not torch.allclose(here, elsewhere, atol=1e-3)
        grid = trunk.vision.positional_embedding[1:].view(8, 8, -1)
        grid[:3, :3] = grid[2:5, 1:4].clone()
        torch.testing.assert_close(trunk.tokens(piece, crop=(0, 0)), here)
