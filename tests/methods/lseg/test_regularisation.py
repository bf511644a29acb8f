from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lexiseg.methods.lseg import regularisation
from lexiseg.methods.lseg.regularisation import SpatialRegularisation


def block(kind, depth, activation: Any = "lrelu") -> Any:
    torch.manual_seed(0)
    return SpatialRegularisation(kind, depth=depth, activation=activation)


def once(module, x):
    """One application without activation, label by label."""
    weight, bias = module.depthwise.weight, module.depthwise.bias
    result = torch.cat([F.conv2d(x[:, k : k + 1], weight, bias, padding=1) for k in range(x.shape[1])], dim=1)
    return result + x.max(dim=1, keepdim=True).values if module.block == "bottleneck" else result


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bottleneck", "depthwise"])
@pytest.mark.parametrize("values", [1, 200, 10**6])
def test_in_place_and_in_chunks_of_labels(kind, values, monkeypatch):
    monkeypatch.setattr(regularisation, "CHUNK_VALUES", values)
    module, x = block(kind, 3), torch.randn(2, 7, 5, 6)
    expected, copy = module(x), x.clone()
    assert module.apply_(copy) is copy
    torch.testing.assert_close(copy, expected)


KINDS = ["bottleneck", "depthwise"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_for_all_labels(kind):
    module = block(kind, 3)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "depthwise.weight": (1, 1, 3, 3),
        "depthwise.bias": (1,),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("activation", "function"), [("lrelu", lambda x: F.leaky_relu(x, 0.01)), ("tanh", torch.tanh), ("relu", torch.relu)]
)
def test_the_same_weights_again_and_again(kind, activation, function):
    module, x = block(kind, 3, activation), torch.randn(2, 4, 5, 6)
    expected = once(module, function(once(module, function(once(module, x)))))  # the last one without activation
    assert torch.allclose(module(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_depth_nought_is_depth_one(kind):
    x = torch.randn(1, 3, 4, 4)
    nought, one = block(kind, 0), block(kind, 1)
    assert torch.equal(nought(x), one(x))
    assert torch.allclose(one(x), once(one, x), atol=1e-6)
    assert not torch.allclose(block(kind, 2)(x), one(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_order_of_labels_is_free(kind, depth):
    module, x = block(kind, depth), torch.randn(2, 6, 5, 5)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.allclose(module(x)[:, order], module(x[:, order]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [1, 2, 40])
def test_any_number_of_labels(kind, labels):
    assert block(kind, 2)(torch.randn(1, labels, 7, 3)).shape == (1, labels, 7, 3)


def test_labels_do_not_touch_each_other_in_a_depthwise_block():
    module, x = block("depthwise", 2), torch.randn(1, 3, 4, 4)
    changed = x.clone()
    changed[:, 2] += 1
    assert torch.equal(module(x)[:, :2], module(changed)[:, :2])


def test_a_bottleneck_adds_the_maximum_over_the_labels():
    module, x = block("bottleneck", 1), torch.randn(1, 3, 4, 4)
    module.depthwise.weight.data.zero_()
    module.depthwise.bias.data.fill_(0.5)
    assert torch.allclose(module(x), (x.amax(dim=1, keepdim=True) + 0.5).expand_as(x))
