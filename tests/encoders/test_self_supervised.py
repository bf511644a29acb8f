"""Pretraining of the tiny trunk without labels."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from lexiseg import training
from lexiseg.checkpoint import checkpoints_in, load_checkpoint
from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders import self_supervised
from lexiseg.encoders.self_supervised import (
    SelfSupervised,
    _overlap,
    balanced,
    crop_places,
    pretrain_trunk,
    two_views,
)
from lexiseg.encoders.settings import SelfSupervisedSettings
from lexiseg.encoders.tiny_trunk import TinyTrunk
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


def test_balanced_shares_sum_to_1_and_serve_all_prototypes_alike():
    cosines = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    cosines[:, 0] += 0.5  # one that all prefer
    share = balanced(cosines, 0.1, iterations=50)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(share.sum(dim=0), torch.full((8,), 8.0), rtol=0.05, atol=0.05)
    assert bool(balanced(torch.full((4, 3), -1.0), 0.01).isfinite().all())


def exact_shares(cosines, temperature, iterations=3):
    """The same as the textbook has it, in exact enough numbers."""
    share = (cosines.double() / temperature - (cosines.double() / temperature).max()).exp()
    for _ in range(iterations):
        share = share / share.sum(dim=0, keepdim=True)
        share = share / share.sum(dim=1, keepdim=True)
    return share.float()


@pytest.mark.parametrize("temperature", [0.02, 0.06, 0.1, 1.0])
def test_balanced_shares_are_those_of_sinkhorn(temperature):
    cosines = F.normalize(torch.randn(200, 8), dim=1) @ F.normalize(torch.randn(32, 8), dim=1).T
    torch.testing.assert_close(balanced(cosines, temperature), exact_shares(cosines, temperature), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-8])
def test_tiny_temperatures_give_whole_rows(temperature):
    """e to the -2000 is 0 in any number format: rows of zeros, or 0 / 0."""
    cosines = torch.linspace(-1, 1, 60).view(6, 10)
    cosines[3] = -1.0  # far below all others
    share = balanced(cosines, temperature)
    assert bool(share.isfinite().all())
    torch.testing.assert_close(share.sum(dim=1), torch.ones(6))


# ---- crops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "cells"), [(1, 2), (3, 6), (13, 2), (20, 3), (23, 6)])
def test_crops_share_half_of_each_side(room, cells):
    places = [crop_places(room, cells=cells, rng=np.random.default_rng(seed)) for seed in range(500)]
    starts = np.array(places)
    assert starts.min() == 0
    assert starts.max() == room - 1
    apart = np.abs(starts[:, 0] - starts[:, 1])
    assert apart.max() == min(room - 1, cells // 2)
    for first, second in places[:50]:
        here, there = _overlap(first, second, cells)
        for side in (*here, *there):
            assert side.start >= 0
            assert side.stop <= cells
            assert side.stop - side.start >= cells / 2


def numbered(size=32):
    """Pictures whose pixels are all different: the number of the picture, and row and column."""
    rows, columns = np.mgrid[:size, :size]
    return np.stack([np.stack([rows, columns, np.full_like(rows, 10 * n)], axis=-1) for n in range(6)]).astype(np.uint8)


def test_shared_cells_are_the_same_patches_of_the_same_pictures():
    plain = settings(crop=16, gain=0.0, shift=0.0, noise=0.0)
    moved = False
    for step in range(20):
        batch = two_views(numbered(), plain, step, seed=0, patch=8)
        first, second = batch["crops"]
        here, there = _overlap(first, second, 2)
        moved = moved or here != there
        cut = []
        for view, (rows, columns) in zip(batch["views"], (here, there), strict=True):
            pixels = torch.round((view * 0.5 + 0.5) * 255)
            cut.append(pixels[:, :, 8 * rows.start : 8 * rows.stop, 8 * columns.start : 8 * columns.stop])
            row, column = batch["crops"][len(cut) - 1]
            assert pixels[0, 0, 0, 0] == 8 * row
            assert pixels[0, 1, 0, 0] == 8 * column
        assert torch.equal(cut[0], cut[1])
    assert moved


def test_views_differ_in_colour_and_masks_and_repeat_by_step():
    first, again = (two_views(numbered(), settings(crop=16), 3, seed=0, patch=8) for _ in range(2))
    other_step = two_views(numbered(), settings(crop=16), 4, seed=0, patch=8)
    other_seed = two_views(numbered(), settings(crop=16), 3, seed=1, patch=8)
    for other in (other_step, other_seed):
        assert not torch.equal(first["views"][0], other["views"][0])
    for key in ("views", "masks"):
        assert all(map(torch.equal, first[key], again[key]))
        assert not torch.equal(*first[key])
    assert first["crops"] == again["crops"]
    masks = torch.stack([two_views(numbered(), settings(crop=16), k, seed=0, patch=8)["masks"][0] for k in range(100)])
    assert 0.25 < float(masks.float().mean()) < 0.35


# ---- a step ------------------------------------------------------------------------------------------------------


def network(**changes):
    torch.manual_seed(0)
    return SelfSupervised(TinyTrunk(image_size=32, layers=1), settings(**changes))


class Recorded:
    """In the place of a branch: gives prepared cosines, and remembers how it was asked."""

    def __init__(self, patches, pictures):
        self.answers, self.asked = list(zip(patches, pictures, strict=True)), []

    def __call__(self, pixels, *, crop, masked=None):
        self.asked.append((crop, masked))
        patch, picture = self.answers[len(self.asked) - 1]
        return patch, picture, crop


def test_the_loss_is_the_cross_entropy_with_the_other_view_where_they_overlap():
    module: Any = network(picture_weight=0.7)
    patches, pictures = torch.rand(2, 2, 5, 3, 3, 16), torch.rand(2, 2, 5, 16)
    student, teacher = (Recorded(patches[number], pictures[number]) for number in range(2))
    module.__dict__["student"] = student
    module.__dict__["teacher"] = teacher
    module._modules.clear()
    module.log = lambda name, value: None
    crops, masks = [(0, 1), (1, 0)], [torch.zeros(5, 3, 3, dtype=torch.bool)] * 2
    loss = module.training_step({"views": [None, None], "crops": crops, "masks": masks}, 0)
    targets = exact_shares(patches[1].reshape(-1, 16), 0.06).view(2, 5, 3, 3, 16)
    wholes = exact_shares(pictures[1].reshape(-1, 16), 0.06).view(2, 5, 16)
    expected = 0.0
    for mine in range(2):
        terms = []
        for row in range(1, 3):  # of the picture's grid
            for column in range(1, 3):
                (top, left), (other_top, other_left) = crops[mine], crops[1 - mine]
                logits = patches[0][mine][:, row - top, column - left] / 0.1
                share = targets[1 - mine][:, row - other_top, column - other_left]
                terms.append(F.cross_entropy(logits, share))
        expected += torch.stack(terms).mean() + 0.7 * F.cross_entropy(pictures[0][mine] / 0.1, wholes[1 - mine])
    torch.testing.assert_close(loss, expected / 2)
    assert [crop for crop, _ in student.asked] == [crop for crop, _ in teacher.asked] == crops
    assert all(masked is masks[0] for _, masked in student.asked)
    assert all(masked is None for _, masked in teacher.asked)  # the teacher sees everything


def test_the_teacher_follows_the_student_and_learns_nothing_itself(monkeypatch):
    keep, seen = 0.9, []
    follow = SelfSupervised.follow

    def watched(module):
        before = {name: value.clone() for name, value in module.teacher.named_parameters()}
        follow(module)
        for name, value in module.student.named_parameters():
            now = dict(module.teacher.named_parameters())[name]
            torch.testing.assert_close(now, keep * before[name] + (1 - keep) * value)
            assert now.grad is None
        for one, other in zip(module.teacher.buffers(), module.student.buffers(), strict=True):
            assert torch.equal(one, other)
        seen.append(any(not torch.equal(before[name], value) for name, value in module.student.named_parameters()))

    monkeypatch.setattr(SelfSupervised, "follow", watched)
    pretrain_trunk(Pictures(), settings(momentum=keep, steps=4), seed=0)
    assert seen == [True] * 4  # once a step, after the student's


def test_what_comes_out_is_the_teacher_frozen(monkeypatch):
    made = []
    fit = self_supervised.fit
    monkeypatch.setattr(self_supervised, "fit", lambda module, **options: made.append(module) or fit(module, **options))
    trunk, _ = pretrain_trunk(Pictures(), settings(steps=3), seed=0)
    assert trunk is made[0].teacher.trunk
    assert not torch.equal(next(trunk.parameters()), next(made[0].student.trunk.parameters()))
    assert not any(module.training for module in trunk.modules())
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


# ---- interruption ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 7])
def test_an_interrupted_pretraining_ends_in_equal_weights(tmp_path, monkeypatch, step):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)

    def trained(folder):
        with checkpoints_in(tmp_path / folder):
            return pretrain_trunk(Pictures(), settings(steps=8), seed=0)

    whole, curve = trained("whole")

    def stopped(images, recipe, index, **options):
        if index == step:
            raise DataError(found="a", allowed="b", fix="c")
        return two_views(images, recipe, index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(self_supervised, "two_views", stopped)
        with pytest.raises(DataError):
            trained("parts")
    kept = load_checkpoint(tmp_path / "parts/pretrain-trunk.ckpt")
    assert kept is not None
    assert kept.step == step
    rest, rest_curve = trained("parts")
    assert rest_curve == curve
    found, expected = rest.state_dict(), whole.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- pictures ----------------------------------------------------------------------------------------------------


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
    flat = Pictures(0, odd=None)
    flat.pictures = [np.zeros((32, 48, 3), dtype=np.uint8)] * 2
    with pytest.raises(DataError) as error:
        pretrain_trunk(flat, settings(), seed=0)
    assert error.value.allowed == "square pictures of one size, at least 24 pixels"
    with pytest.raises(DataError, match="pictures of 0 sizes"):
        pretrain_trunk(Pictures(0), settings(), seed=0)


def test_only_the_first_pictures_are_read():
    pictures = Pictures(odd=(8, 8, 3))
    pictures.pictures[1], pictures.pictures[5] = pictures.pictures[5], pictures.pictures[1]
    pretrain_trunk(pictures, settings(pictures=5, steps=1), seed=0)
    with pytest.raises(DataError, match="2 sizes"):
        pretrain_trunk(pictures, settings(pictures=6, steps=1), seed=0)


def test_pictures_of_no_whole_patches_are_learned_from():
    trunk, _ = pretrain_trunk(Pictures(size=36), settings(steps=1), seed=0)
    assert trunk(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 128, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"crop": 20}, "multiple of 8"), ({"size": 16, "crop": 24}, "`crop` .24. is at most `size`")],
)
def test_crops_that_cannot_be_cut_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)
