"""Names of clusters by a CLIP."""

from typing import Any

import torch
import torch.nn.functional as F
from helpers.micro import picture
from helpers.tiny import tiny_clip

from lexiseg.encoders.clip import FrozenClip
from lexiseg.methods.stego import naming
from lexiseg.methods.stego.head import SegmentationHead
from lexiseg.methods.stego.model import Stego
from lexiseg.methods.stego.naming import name_clusters, names_of, region_embeddings

# ---- names -------------------------------------------------------------------------------------------------------


def test_clusters_and_labels_go_one_to_one():
    """Both clusters lie nearest to the first word, the first of them by far; each gets one of its own."""
    words = torch.eye(3)
    regions = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [0.8, 0.5, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    assert (regions @ words.T).argmax(dim=1).tolist() == [0, 0, 2]
    assert name_clusters(regions, words) == [0, 1, 2]
    assert names_of(regions, words, ["grass", "sky", "ring"]) == ["grass", "sky", "ring"]


def test_the_order_of_clusters_and_words_does_not_matter():
    rng = torch.Generator().manual_seed(0)
    regions, words = (F.normalize(torch.randn(5, 8, generator=rng), dim=1) for _ in range(2))
    found = name_clusters(regions, words)
    assert sorted(found) == list(range(5))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert name_clusters(regions[order], words) == [found[number] for number in order]
    assert [int(order[label]) for label in name_clusters(regions, words[order])] == found


def test_clusters_beyond_the_labels_get_the_nearest():
    words = torch.eye(2)
    regions = F.normalize(torch.tensor([[0.6, 0.2], [1.0, 0.0], [0.1, 0.9], [0.0, 1.0], [0.9, 0.1]]), dim=1)
    assert name_clusters(regions, words) == [0, 0, 1, 1, 0]


def test_fewer_clusters_than_labels_get_different_ones():
    words = torch.eye(4)
    assert name_clusters(words[[2, 0]], words) == [2, 0]


def test_a_word_near_all_regions_does_not_take_all_clusters():
    """The first word lies nearest to each cluster, most of all to the last; what is left says which are which."""
    words = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    regions = F.normalize(torch.tensor([[1.0, 0.4, 0.1], [1.0, 0.1, 0.4], [1.0, 0.05, 0.05], [1.0, 0.1, 0.3]]), dim=1)
    assert (regions @ words.T).argmax(dim=1).tolist() == [0] * 4
    assert name_clusters(regions, words) == [1, 2, 0, 2]


# ---- regions -----------------------------------------------------------------------------------------------------


class Pictures:
    """In place of pieces and of a store: two pictures, and maps of 2 x 2 cells, the left ones e0, the right ones e1."""

    def __init__(self, count=2, *, side=32):
        self._count, self._side = count, side

    def __len__(self):
        return self._count

    def image(self, number):
        return picture(number, height=self._side, width=self._side)

    def maps(self, numbers):
        left, right = torch.eye(3)[0], torch.eye(3)[1]
        return torch.stack([left, right], dim=1)[None, :, None].expand(len(numbers), 3, 2, 2)


def pictures_of(count=2, **size) -> Any:
    return Pictures(count, **size)


def clip():
    model, tokenizer = tiny_clip()
    half = (0.5, 0.5, 0.5)
    return FrozenClip(model=model, tokenize=tokenizer, mean=half, std=half, dim=24, kind="tiny", licence="MIT")


def model(centres):
    stego = Stego(SegmentationHead(3, kind="none"), dim=3, clusters=len(centres))
    stego.probe.centres.data = centres
    return stego


def dense(pictures, frozen):
    images = torch.stack([torch.from_numpy(pictures.image(number)) for number in range(len(pictures))])
    with torch.no_grad():
        return frozen.embed_patches(images.permute(0, 3, 1, 2))


def test_a_region_is_the_mean_over_the_cells_that_its_cluster_wins():
    pictures, frozen = pictures_of(), clip()
    found = region_embeddings(model(torch.eye(3)[[1, 2, 0]]), pictures, pictures, frozen)
    expected = dense(pictures, frozen)  # (2, C, 4, 4)
    assert found.shape == (3, 24)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], F.normalize(expected[..., 2:].mean(dim=(0, 2, 3)), dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], F.normalize(expected[..., :2].mean(dim=(0, 2, 3)), dim=0), rtol=0, atol=1e-5)
    assert torch.equal(found[1], torch.zeros(24))  # wins nothing
    assert sorted(name_clusters(found, F.normalize(torch.randn(3, 24), dim=1))) == [0, 1, 2]


def test_names_are_made_from_pictures_of_the_whole_split(monkeypatch):
    monkeypatch.setattr(naming, "_PIECES", 2)
    pictures, frozen = pictures_of(5), clip()
    seen, image = [], pictures.image
    monkeypatch.setattr(pictures, "image", lambda number: seen.append(number) or image(number))
    region_embeddings(model(torch.eye(3)), pictures, pictures, frozen)
    assert seen == [0, 4]


def test_pictures_are_resized_to_whole_patches_of_the_clip():
    pictures = pictures_of(1, side=35)
    found = region_embeddings(model(torch.eye(3)), pictures, pictures, clip())
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))


def test_pictures_smaller_than_a_patch_of_the_clip_are_enlarged():
    pictures = pictures_of(1, side=5)
    found = region_embeddings(model(torch.eye(3)), pictures, pictures, clip())
    assert bool(found.isfinite().all())
