"""The segmentation head."""

import pytest
import torch

from lexiseg.methods.stego.head import SegmentationHead


def test_the_papers_head_has_as_many_parameters_as_the_authors_state():
    head = SegmentationHead(384, dim=70)
    assert sum(parameter.numel() for parameter in head.parameters()) == 201_740


@pytest.mark.parametrize(("kind", "dim"), [("nonlinear", 5), ("linear", 5), ("none", 8)])
def test_codes_have_the_grid_of_the_features(kind, dim):
    head = SegmentationHead(8, dim=5, kind=kind).eval()
    assert head.dim == dim
    assert head(torch.rand(2, 8, 3, 4)).shape == (2, dim, 3, 4)


def test_nonlinear_is_linear_plus_a_hidden_layer():
    head = SegmentationHead(8, dim=5).eval()
    features = torch.randn(2, 8, 3, 4)
    assert head.linear is not None
    assert head.nonlinear is not None
    torch.testing.assert_close(head(features), head.linear(features) + head.nonlinear(features))


def test_dropout_takes_whole_channels_in_training_alone():
    torch.manual_seed(0)
    head = SegmentationHead(200, dim=5, dropout=0.5)
    features = torch.ones(1, 200, 3, 4)
    dropped = head.drop(features)
    assert bool(((dropped == 0).all(dim=(2, 3)) | (dropped == 2).all(dim=(2, 3))).all())
    assert 0.3 < float((dropped == 0).float().mean()) < 0.7
    assert torch.equal(head.eval().drop(features), features)
