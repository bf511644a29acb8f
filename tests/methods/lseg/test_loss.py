import pytest
import torch

from lexiseg.methods.lseg.loss import pixel_cross_entropy


def test_the_mean_over_labelled_pixels():
    logits = torch.randn(2, 3, 4, 5)
    target = torch.randint(0, 3, (2, 4, 5))
    target[0, :2] = -100
    chances = logits.log_softmax(dim=1)
    expected = [
        -chances[b, target[b, i, j], i, j] for b in range(2) for i in range(4) for j in range(5) if target[b, i, j] >= 0
    ]
    assert pixel_cross_entropy(logits, target) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-6)


def test_pixels_without_a_label_have_no_gradient():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    target = torch.tensor([[[0, -100], [2, -100]]])
    pixel_cross_entropy(logits, target).backward()
    assert logits.grad is not None
    assert (logits.grad[..., 1] == 0).all()
    assert (logits.grad[..., 0] != 0).all()


def test_a_batch_without_labels():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((1, 2, 2), -100))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_one_label_leaves_nothing_to_learn():
    assert pixel_cross_entropy(torch.randn(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)) == 0


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(1, 3, 4, 4).bfloat16()
    loss = pixel_cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.int64))
    assert loss.dtype == torch.float32


def test_the_order_of_labels_is_free():
    logits, target = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    order = torch.tensor([2, 0, 1])  # label k moves to the place of k in `order`
    moved = pixel_cross_entropy(logits[:, order], order.argsort()[target])
    assert moved == pytest.approx(float(pixel_cross_entropy(logits, target)), abs=1e-6)
