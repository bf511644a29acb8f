"""Pretraining of the tiny trunk without labels."""

import numpy as np
import pytest
import torch

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.self_supervised import TinyTrunk, _overlap, balanced, pretrain_trunk
from lexiseg.encoders.settings import SelfSupervisedSettings
from lexiseg.errors import DataError


class Pictures(PreparedSplit):
    """What pretraining needs of a split: stripes or dots in two colours."""

    def __init__(self, count: int = 24, *, size: int = 32, odd: tuple[int, int, int] | None = None) -> None:
        rng = np.random.default_rng(0)
        self.pictures = []
        for number in range(count):
            picture = np.full((size, size, 3), 40 + 20 * (number % 2), dtype=np.uint8)
            picture[:: 2 + 2 * (number % 2)] = rng.integers(120, 250, size=3)
            self.pictures.append(picture)
        if odd is not None:
            self.pictures[1] = np.zeros(odd, dtype=np.uint8)

    def __len__(self):
        return len(self.pictures)

    def image(self, index):
        return self.pictures[index]


def settings(**changes):
    values = {
        "split": "train",
        "pictures": 100,
        "size": None,
        "crop": 24,
        "steps": 12,
        "batch": 8,
        "lr": 1e-3,
        "warmup": 2,
        "weight_decay": 0.05,
        "layers": 1,
        "prototypes": 16,
        "picture_weight": 1.0,
        "student_temperature": 0.1,
        "teacher_temperature": 0.06,
        "momentum": 0.9,
        "masked": 0.3,
        "gain": 0.25,
        "shift": 0.04,
        "noise": 0.02,
    }
    return SelfSupervisedSettings(**{**values, **changes})


def test_pretraining_lowers_its_loss_and_repeats_bit_by_bit():
    torch.manual_seed(0)
    trunk, curve = pretrain_trunk(Pictures(), settings(steps=30), seed=0)
    assert np.mean([row["loss"] for row in curve[-5:]]) < np.mean([row["loss"] for row in curve[:5]])
    again, _ = pretrain_trunk(Pictures(), settings(steps=30), seed=0)
    assert all(torch.equal(one, other) for one, other in zip(trunk.parameters(), again.parameters(), strict=True))
    other, _ = pretrain_trunk(Pictures(), settings(steps=30), seed=1)
    assert not torch.equal(next(trunk.parameters()), next(other.parameters()))


def test_the_trunk_is_read_on_any_grid():
    trunk = TinyTrunk(image_size=32, layers=1).eval()
    assert trunk(torch.zeros(2, 3, 40, 24, dtype=torch.uint8)).shape == (2, 128, 5, 3)
    with pytest.raises(ValueError, match="multiples of 8, got 30 x 32"):
        trunk(torch.zeros(1, 3, 30, 32, dtype=torch.uint8))


def test_tokens_see_the_whole_picture():
    trunk = TinyTrunk(image_size=32, layers=2).eval()
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    changed = image.clone()
    changed[..., :8, :8] = 255
    apart = (trunk(image) - trunk(changed)).abs().sum(dim=1)[0]
    assert float(apart[3, 3]) > 0  # the opposite corner, more than two steps away


def test_masked_patches_hide_their_content():
    trunk = TinyTrunk(image_size=32, layers=1).eval()
    masked = torch.zeros(1, 4, 4, dtype=torch.bool)
    masked[0, 1, 2] = True
    pixels = torch.randn(1, 3, 32, 32)
    hidden = trunk.tokens(pixels, masked=masked)
    assert not torch.equal(hidden, trunk.tokens(pixels))


def test_balanced_shares_sum_to_1_and_serve_all_prototypes_alike():
    cosines = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    cosines[:, 0] += 0.5  # one that all prefer
    share = balanced(cosines, 0.1, iterations=50)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(share.sum(dim=0), torch.full((8,), 8.0), rtol=0.05, atol=0.05)
    assert bool(balanced(torch.full((4, 3), -1.0), 0.01).isfinite().all())


@pytest.mark.parametrize("crops", [((0, 0), (0, 0)), ((0, 2), (1, 0)), ((2, 2), (0, 0))])
def test_the_cells_that_two_crops_share(crops: tuple[tuple[int, int], tuple[int, int]]):
    grid = torch.arange(36).view(6, 6)
    mine, other = (grid[row : row + 4, column : column + 4] for row, column in crops)
    here, there = _overlap(crops[0], crops[1], 4)
    assert torch.equal(mine[here], other[there])
    assert mine[here].numel() == (4 - abs(crops[0][0] - crops[1][0])) * (4 - abs(crops[0][1] - crops[1][1]))


def test_pictures_of_several_sizes_are_resized_or_refused():
    with pytest.raises(DataError) as error:
        pretrain_trunk(Pictures(odd=(32, 48, 3)), settings(), seed=0)
    assert "2 sizes" in error.value.found
    assert "encode.self_supervised.size" in error.value.fix
    pretrain_trunk(Pictures(odd=(32, 48, 3)), settings(size=32, steps=1), seed=0)
    with pytest.raises(DataError, match="the shortest side 16 pixels"):
        pretrain_trunk(Pictures(size=16), settings(), seed=0)
