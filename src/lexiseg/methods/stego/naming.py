"""Names of clusters without labels: what a CLIP sees in the regions that a cluster covers.

Letters: N clusters, C channels of the CLIP's embeddings, L labels, h x w cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from lexiseg.methods.stego.features import FeatureStore, Pieces, grid_size, to_grid
from lexiseg.methods.stego.model import Stego
from lexiseg.methods.stego.probes import cluster_cosines

if TYPE_CHECKING:
    from lexiseg.encoders.clip import FrozenClip

_PIECES = 512  # that names are made from


@torch.no_grad()
def region_embeddings(model: Stego, store: FeatureStore, pieces: Pieces, clip: FrozenClip) -> Tensor:
    """The mean dense embedding of the cells that each cluster wins, float32 (N, C); 0 where it wins none.

    Of at most 512 pieces, spread evenly over all of them.

    Args:
        model: codes and clusters.
        store, pieces: features of pictures, and the pictures.
        clip: with a ViT as image tower.
    """
    sums: Tensor | None = None
    chosen = torch.linspace(0, len(pieces) - 1, min(len(pieces), _PIECES)).round().long().tolist()
    for number in tqdm(chosen, desc="name clusters", unit="picture", mininterval=1, delay=2):
        image = torch.from_numpy(pieces.image(number)).permute(2, 0, 1)[None]
        height, width = image.shape[-2:]
        # A picture may be smaller than a patch of the CLIP.
        size = grid_size(max(height, clip.patch_size), max(width, clip.patch_size), clip.patch_size)
        dense = clip.embed_patches(to_grid(image, size))[0]
        cosines = cluster_cosines(model(store.maps([number])), model.probe.centres)
        finer = F.interpolate(cosines, size=dense.shape[-2:], mode="bilinear", align_corners=False)
        owner = finer[0].argmax(dim=0).flatten()
        if sums is None:
            sums = torch.zeros(len(model.probe.centres), len(dense))
        sums.index_add_(0, owner, dense.flatten(1).T.float())
    assert sums is not None  # a store has at least one picture
    return F.normalize(sums, dim=1)


def name_clusters(regions: Tensor, words: Tensor) -> list[int]:
    """The label of each cluster.

    First one to one, so that the sum of the cosines is the highest (words that lie near every picture do not take all
    clusters); clusters beyond the number of labels get the nearest one.

    Args:
        regions: (N, C), see `region_embeddings`.
        words: unit vectors (L, C).

    Returns:
        N numbers of labels.
    """
    cosines = regions @ words.T
    # What a word has in common with all regions says nothing about one of them.
    cosines = cosines - cosines.mean(dim=0)
    rows, columns = linear_sum_assignment(cosines.double().numpy(), maximize=True)
    found = cosines.argmax(dim=1).tolist()
    for row, column in zip(rows, columns, strict=True):
        found[row] = int(column)
    return found


def names_of(regions: Tensor, words: Tensor, labels: Sequence[str]) -> list[str]:
    """The same as names."""
    return [labels[number] for number in name_clusters(regions, words)]
