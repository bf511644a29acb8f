import pytest
import torch
import torch.nn.functional as F

from lexiseg.methods.tcl.decoder import ChannelNorm, GatedDecoder, GatedUnit


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_with_gates_at_zero_it_is_upsampling(stages):
    x, decoder = noise(2, 8, 3, 5), GatedDecoder(8, stages=stages)
    torch.testing.assert_close(decoder(x), F.interpolate(x, scale_factor=2**stages, mode="nearest"))


def test_a_unit_adds_what_its_gate_lets_through():
    x, unit = noise(2, 8, 6, 5), GatedUnit(8, gate=0.7)
    normed = F.layer_norm(x.movedim(1, -1), (8,), eps=1e-5).movedim(-1, 1)
    inner = F.conv2d(0.5 * normed * (1 + torch.erf(normed / 2**0.5)), unit.conv.weight, unit.conv.bias, padding=1)
    torch.testing.assert_close(unit(x), x + torch.tanh(torch.tensor(0.7)) * inner)


def test_the_size_of_the_published_decoder():
    # Dossier: 21,242,884 parameters at width 768, in four units.
    decoder = GatedDecoder(768)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 21_242_884


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_kernels_keep_the_size(kernel):
    assert GatedUnit(4, kernel=kernel)(noise(1, 4, 7, 6)).shape == (1, 4, 7, 6)


def test_each_pixel_is_normalised_by_itself():
    x = noise(2, 16, 3, 4)
    found = ChannelNorm(16)(x)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(ChannelNorm(16)(x[:, :, :1, :1]), found[:, :, :1, :1])


def test_a_gate_at_zero_learns():
    decoder = GatedDecoder(8, stages=1)
    decoder(noise(1, 8, 3, 3)).pow(2).sum().backward()
    gates = [parameter.grad for name, parameter in decoder.named_parameters() if name.endswith("gate")]
    assert len(gates) == 2
    assert all(gates)
