import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import tiny_clip

from lexiseg.encoders.tiny_clip import ConvStem, local_attention_mask


@pytest.fixture
def pair():
    return tiny_clip()


def pictures(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_sizes(pair):
    model, tokenizer = pair
    assert model.encode_image(pictures(2, 3, 16, 16)).shape == (2, 24)
    assert model.encode_text(tokenizer(["grass", "a ring"])).shape == (2, 24)
    assert float(model.logit_scale.detach().exp()) > 0


def test_stem_strides():
    levels = ConvStem(16).eval().levels(pictures(1, 3, 32, 24))
    assert [tuple(level.shape[1:]) for level in levels] == [(32, 16, 12), (64, 8, 6), (16, 4, 3)]


def test_a_patch_sees_its_neighbours_and_no_class_token():
    mask = local_attention_mask(3, 4)
    assert mask.shape == (13, 13)
    assert (mask[0] == 0).all()
    assert torch.isinf(mask[1:, 0]).all()
    # patch (1, 1) is token 6; its neighbours are rows 0..2 and columns 0..2
    seen = (mask[6] == 0).nonzero().flatten().tolist()
    assert seen == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert (mask[1] == 0).nonzero().flatten().tolist() == [1, 2, 5, 6]


def test_far_pixels_do_not_reach_a_patch(pair):
    visual = pair[0].visual
    images = pictures(1, 3, 64, 16)
    changed = images.clone()
    changed[:, :, 56:] += 1
    with torch.inference_mode():
        (tokens, mask), (others, _) = visual.tokens(visual.conv1(images)), visual.tokens(visual.conv1(changed))
        one, other = (visual.transformer(x, attn_mask=mask) for x in (tokens, others))
    assert torch.equal(one[:, 1:5], other[:, 1:5])
    assert not torch.equal(one[:, 0], other[:, 0])


def test_pooling_is_the_mean_of_the_patches(pair):
    visual = pair[0].visual
    with torch.inference_mode():
        tokens, mask = visual.tokens(visual.conv1(pictures(2, 3, 16, 16)))
        patches = visual.ln_post(visual.transformer(tokens, attn_mask=mask))[:, 1:]
        assert torch.allclose(visual(pictures(2, 3, 16, 16)), patches.mean(dim=1) @ visual.proj, atol=1e-5)


def test_positions_of_a_small_picture_are_a_crop(pair):
    visual = pair[0].visual
    positions = visual.positional_embedding
    grid = positions[1:].view(2, 2, -1)
    assert torch.equal(visual._positions(1, 1, (1, 0)), torch.stack([positions[0], grid[1, 0]]))


def test_positions_of_another_size_are_resized_bilinearly(pair):
    visual = pair[0].visual
    positions = visual.positional_embedding
    grid = positions[1:].T.view(1, -1, 2, 2)
    resized = F.interpolate(grid, size=(3, 5), mode="bilinear", align_corners=False)[0].flatten(1).T
    found = visual._positions(3, 5, None)
    assert torch.equal(found[0], positions[0])
    assert torch.allclose(found[1:], resized)
    assert torch.equal(visual._positions(2, 2, None), positions)


def test_any_size_of_picture(pair):
    for height, width in [(8, 8), (16, 40), (20, 12)]:
        assert pair[0].encode_image(pictures(1, 3, height, width)).shape == (1, 24)


def test_trimmed_texts_give_the_same_embedding(pair):
    model, tokenizer = pair
    texts = ["grass", "a small ring on grass"]
    with torch.inference_mode():
        full, trimmed = model.encode_text(tokenizer(texts)), model.encode_text(tokenizer(texts, trim=True))
    assert torch.allclose(full, trimmed, atol=1e-5)


def test_a_text_is_read_up_to_its_end(pair):
    """The embedding is the one at the end mark: it depends on every word, and not on what is behind the mark."""
    model, tokenizer = pair
    ids = tokenizer(["a small ring on grass"])
    end = int(ids[0].argmax())
    with torch.inference_mode():
        before = model.encode_text(ids)
        other_word, behind = ids.clone(), ids.clone()
        other_word[0, 1] = ids[0, 2]
        behind[0, end + 1 :] = 3
        assert not torch.allclose(model.encode_text(other_word), before, atol=1e-3)
        assert torch.allclose(model.encode_text(behind), before, atol=1e-6)
