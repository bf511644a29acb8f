"""TCL's losses against plain loops, and over two processes against one."""

import math

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from lexiseg.methods.tcl.loss import area, contrast, feature_level, image_level, pooled, total_variation
from lexiseg.methods.tcl.masks import pixel_text_cosines

BATCH, CHANNELS, SIDE = 4, 6, 5


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_contrast_of_pairs():
    similarities, scale = noise(3, 3), torch.tensor(2.0)
    rows = -sum(F.log_softmax(similarities[i] * scale.exp(), dim=0)[i] for i in range(3)) / 3
    columns = -sum(F.log_softmax(similarities[:, i] * scale.exp(), dim=0)[i] for i in range(3)) / 3
    torch.testing.assert_close(contrast(similarities, scale), (rows + columns) / 2)


def test_the_scale_has_a_limit():
    similarities = noise(3, 3)
    assert contrast(similarities, torch.tensor(20.0)) == contrast(similarities, torch.tensor(math.log(100)))


def test_one_pair_has_nothing_to_contrast():
    scale = torch.tensor(1.0)
    assert image_level(noise(1, 4), noise(1, 4), scale) == 0
    loss, rest = area(torch.full((1, 1, 3, 3), 0.5))
    assert loss == pytest.approx(0.1)
    assert rest == 0


def test_each_pair_has_an_embedding_of_its_own():
    masks, embedding, text = noise(3, 3, 4, 5).sigmoid(), noise(3, CHANNELS, 4, 5, seed=1), noise(3, CHANNELS, seed=2)
    found = pooled(masks, embedding)
    similarities = torch.empty(3, 3)
    for i in range(3):
        for j in range(3):
            mean = (masks[i, j] * embedding[i]).sum(dim=(1, 2)) / (masks[i, j].sum() + 1e-6)
            torch.testing.assert_close(found[i, j], mean)
            similarities[i, j] = F.cosine_similarity(mean, text[j], dim=0)
    scale = torch.tensor(1.5)
    torch.testing.assert_close(feature_level(masks, embedding, text, scale), contrast(similarities, scale))


def test_an_empty_mask_pools_to_nothing():
    masks = torch.zeros(2, 2, 3, 3, requires_grad=True)
    loss = feature_level(masks, noise(2, CHANNELS, 3, 3), noise(2, CHANNELS), torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(loss, masks)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_areas_are_means_over_batch_and_pixels():
    masks = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    positive = torch.stack([masks[i, i] for i in range(3)])
    others = torch.stack([masks[i, j] for i in range(3) for j in range(3) if i != j])
    found = area(masks, positive=0.4, negative=0.1)
    torch.testing.assert_close(found[0], (positive.mean() - 0.4).abs())
    torch.testing.assert_close(found[1], (others.mean() - 0.1).abs())


def test_texts_that_are_true_of_the_picture_are_no_negatives():
    similarities, scale = noise(3, 3), torch.tensor(1.5)
    also = torch.zeros(3, 3, dtype=torch.bool)
    also[0, 2] = True
    logits = similarities * scale.exp()
    rows = [F.cross_entropy(logits[:1, [0, 1]], torch.tensor([0]))]
    rows += [F.cross_entropy(logits[[i]], torch.tensor([i])) for i in (1, 2)]
    columns = [F.cross_entropy(logits[:, [j]].T, torch.tensor([j])) for j in (0, 1)]
    columns += [F.cross_entropy(logits[[1, 2], 2][None], torch.tensor([1]))]
    expected = (sum(rows) / 3 + sum(columns) / 3) / 2
    torch.testing.assert_close(contrast(similarities, scale, also=also), expected)
    masks = noise(3, 3, 4, 4).sigmoid()
    others = torch.stack([masks[i, j] for i in range(3) for j in range(3) if i != j and (i, j) != (0, 2)])
    torch.testing.assert_close(area(masks, negative=0.1, also=also)[1], (others.mean() - 0.1).abs())
    # All of them true: nothing is left to push away.
    every = ~torch.eye(3, dtype=torch.bool)
    assert area(masks, also=every)[1] == 0
    assert contrast(similarities, scale, also=every) == 0


def test_total_variation_is_a_mean_of_both_axes():
    x = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
    assert total_variation(x) == pytest.approx((1 + 2 + 0 + 0) / 4 + (0 + 1 + 3) / 3)
    assert total_variation(torch.full((2, 3, 4, 4), 0.3)) == 0
    assert total_variation(torch.ones(2, 1, 1)) == 0  # one pixel has no neighbours


class Toy(torch.nn.Module):
    """A linear grounder: all losses of one batch from pictures (b, 3, SIDE, SIDE) and texts (B, CHANNELS)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Conv2d(3, CHANNELS, 1)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, images, text, rank, also=None):
        embedding = self.embed(images)
        masks = (10 * pixel_text_cosines(embedding, text) - 2.5).sigmoid()
        own = range(len(images))
        whole = (masks[own, [rank * len(images) + i for i in own], None] * embedding).mean(dim=(2, 3))
        return (
            image_level(whole, text, self.scale, also=also)
            + feature_level(masks, embedding, text, self.scale, also=also)
            + sum(area(masks, rank=rank, also=also))
            + total_variation(masks)
        )


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def more_true_pairs(some):
    """Pairs beside the matching ones whose text is true of the picture; more of them in one half than in the other."""
    also = torch.zeros(BATCH, BATCH, dtype=torch.bool)
    if some:
        also[0, 1] = also[0, BATCH - 1] = also[BATCH - 1, 0] = True
    return also


def work(rank, store, results, some):
    """One of two processes, with its half of the batch."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(Toy().double())
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    images, text = noise(BATCH, 3, SIDE, SIDE).double(), noise(BATCH, CHANNELS, seed=1).double()
    loss = model(images[half], text, rank, more_true_pairs(some)[half] if some else None)
    loss.backward()
    total = loss.detach().clone()
    distributed.all_reduce(total)
    results[rank] = (float(total) / 2, {k: v.numpy() for k, v in gradients(model.module).items()})
    distributed.destroy_process_group()


@pytest.mark.parametrize("some", [False, True])
def test_two_processes_with_half_a_batch_each_are_one_with_all_of_it(tmp_path, some):
    model = Toy().double()
    images, text = noise(BATCH, 3, SIDE, SIDE).double(), noise(BATCH, CHANNELS, seed=1).double()
    loss = model(images, text, 0, more_true_pairs(some) if some else None)
    loss.backward()
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(work, args=(tmp_path / "store", results, some), nprocs=2)
        for rank in range(2):
            found, shares = results[rank]
            assert found == pytest.approx(loss.item(), rel=1e-10)
            for name, gradient in gradients(model).items():
                torch.testing.assert_close(torch.from_numpy(shares[name]), gradient, rtol=1e-8, atol=1e-10, msg=name)
