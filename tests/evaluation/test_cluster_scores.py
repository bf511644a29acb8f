"""Maps of clusters upsample as the codes they were made of."""

import pytest
import torch
import torch.nn.functional as F

from lexiseg.evaluation.cluster_scores import ClusterMaps, cluster_names, map_names, pack, read_names

CLASSES = ("sky", "grass", "ring")
SIZES = [
    ((8, 8), (64, 64)),
    ((5, 7), (33, 21)),
    ((6, 4), (6, 4)),
    ((9, 11), (4, 5)),  # downsampling
    ((7, 3), (5, 20)),  # one side up, the other down
    ((1, 1), (6, 9)),
    ((1, 5), (8, 13)),
    ((4, 1), (3, 1)),
    ((3, 2), (1, 1)),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def upsampled(maps: torch.Tensor, size: tuple[int, int], *, align_corners: bool) -> torch.Tensor:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=align_corners)[0]


def expected_cosines(
    codes: torch.Tensor, centres: torch.Tensor, size: tuple[int, int], *, align_corners: bool
) -> torch.Tensor:
    finer = F.normalize(upsampled(codes, size, align_corners=align_corners), dim=0)
    return torch.einsum("khw,nk->nhw", finer, F.normalize(centres, dim=1))


def packed(codes: torch.Tensor, centres: torch.Tensor, *, half: bool = False, **linear) -> ClusterMaps:
    maps = pack(codes[None], centres, **linear)[0]
    classes = CLASSES if linear else ()
    return ClusterMaps.unpack(map_names(len(centres), classes), maps.half() if half else maps)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("cells", "size"), SIZES)
def test_cosines_are_those_of_upsampled_codes(cells, size, align_corners):
    codes, centres = 30 * random(12, *cells), 5 * random(6, 12, seed=1)
    expected = expected_cosines(codes, centres, size, align_corners=align_corners)
    assert expected.std() > 0.1
    for half, tolerance in ((False, 1e-5), (True, 2e-3)):
        found = packed(codes, centres, half=half).cosines(height=size[0], width=size[1], align_corners=align_corners)
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_half_precision_keeps_short_codes_beside_long_ones():
    """Products of such codes would be among the numbers of half precision that have few digits, or none."""
    codes, centres = random(12, 6, 6), random(4, 12, seed=1)
    codes[:, :, :3] *= 1e-3
    expected = expected_cosines(codes, centres, (24, 24), align_corners=False)
    found = packed(codes, centres, half=True).cosines(height=24, width=24)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_cosines_stay_in_their_range():
    codes = random(1, 8, 8)  # in one dimension every cosine is 1 or -1, and opposite codes cancel each other
    found = packed(codes, torch.ones(1, 1), half=True).cosines(height=61, width=61)
    assert found.abs().max() == 1
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("zeros", [(slice(None), slice(None)), (slice(2, 5), slice(1, 4))])
def test_codes_of_length_zero_give_zero(zeros):
    codes, centres = random(7, 6, 6), random(3, 7, seed=1)
    codes[:, zeros[0], zeros[1]] = 0
    found = packed(codes, centres, half=True).cosines(height=6, width=6)
    assert torch.isfinite(found).all()
    assert (found[:, zeros[0], zeros[1]] == 0).all()
    expected = expected_cosines(codes, centres, (6, 6), align_corners=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("align_corners", [False, True])
def test_logits_are_those_of_the_linear_probe_on_upsampled_codes(align_corners):
    codes, weight, bias = random(12, 5, 7), random(3, 12, seed=1), random(3, seed=2)
    maps = packed(codes, random(4, 12, seed=3), linear=(weight, bias))
    finer = upsampled(codes, (20, 9), align_corners=align_corners)
    expected = torch.einsum("khw,ck->chw", finer, weight) + bias[:, None, None]
    torch.testing.assert_close(maps.logits(height=20, width=9, align_corners=align_corners), expected)


def test_pictures_of_a_batch_do_not_see_each_other():
    codes, centres = random(2, 6, 4, 4) * torch.tensor([1.0, 1000.0])[:, None, None, None], random(3, 6, seed=1)
    together = pack(codes, centres)
    torch.testing.assert_close(together[1:], pack(codes[1:], centres))
    assert together[:, 3].amax(dim=(1, 2)).tolist() == pytest.approx([1, 1])  # the longest code of each


def test_names():
    names = map_names(2, ("sky", "linear thing"))
    assert names[:3] == (*cluster_names(2), "length")
    assert names[-2:] == ("linear sky", "linear linear thing")
    assert len(names) == 2 + 5 + 2
    assert read_names(names) == (2, ("sky", "linear thing"))


@pytest.mark.parametrize("names", [("sky", "grass"), (), map_names(2)[:-1], map_names(2)[::-1], map_names(0, ("sky",))])
def test_other_names_are_refused(names):
    with pytest.raises(ValueError, match="expected the maps of clusters"):
        ClusterMaps.unpack(names, torch.zeros(len(names), 2, 2))
