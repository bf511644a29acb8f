import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import encoded, open_clip_model, settings, text_table
from safetensors.torch import save_file

from lexiseg.encoders.clip import load_clip, save_open_clip
from lexiseg.encoders.text import load_text
from lexiseg.errors import ModelError
from lexiseg.methods.baselines.maskclip import MaskClip, predictor


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return predictor(settings(), {"encode": encoded(tmp_path_factory.mktemp("encode"))})


def picture(height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


LABELS = ["grass", "red ring", "unheard of"]


def test_scaled_cosines_of_dense_embeddings(scorer):
    (scores,) = scorer.scores([picture()], LABELS)
    dense = scorer.clip.embed_patches(torch.from_numpy(picture()).permute(2, 0, 1)[None])[0]
    expected = 100 * torch.einsum("nc,chw->nhw", scorer.text.embed(LABELS), dense)
    assert scores.shape == (3, 2, 3)
    assert scores.dtype == np.float32
    assert np.allclose(scores, expected.numpy(), atol=1e-4)
    assert np.abs(scores).max() <= 100 + 1e-3


def test_order_and_number_of_labels(scorer):
    (scores,), (moved,), (alone,) = (scorer.scores([picture()], x) for x in (LABELS, LABELS[::-1], LABELS[1:2]))
    assert np.allclose(scores[::-1], moved, atol=1e-4)
    assert np.allclose(scores[1], alone[0], atol=1e-4)


def test_pictures_of_different_sizes(scorer):
    images = [picture(16, 24), picture(24, 16), picture(16, 24, seed=1)]
    together = scorer.scores(images, LABELS)
    assert [scores.shape[1:] for scores in together] == [(2, 3), (3, 2), (2, 3)]
    for image, scores in zip(images, together, strict=True):
        assert np.allclose(scorer.scores([image], LABELS)[0], scores, atol=1e-4)


@pytest.mark.parametrize(("height", "width", "cells"), [(17, 23, (2, 3)), (3, 5, (1, 1)), (30, 9, (4, 1))])
def test_sides_that_are_no_whole_patches(scorer, height, width, cells):
    assert scorer.scores([picture(height, width)], LABELS)[0].shape[1:] == cells


def test_a_label_map_does_not_depend_on_the_scale(scorer):
    (scores,) = scorer.scores([picture()], LABELS)
    dense = scorer.clip.embed_patches(torch.from_numpy(picture()).permute(2, 0, 1)[None])[0]
    cosine = torch.einsum("nc,chw->nhw", F.normalize(scorer.text.embed(LABELS), dim=1), dense)
    assert (scores.argmax(0) == cosine.numpy().argmax(0)).all()


def test_all_is_on_the_device_of_the_tower(tmp_path):
    model, text = load_clip(encoded(tmp_path) / "clip"), load_text(tmp_path)
    moved = MaskClip(model, text=text, device=torch.device("meta"))  # type: ignore[arg-type]
    with torch.inference_mode():
        logits = moved._logits(np.stack([picture(17, 23)]), torch.zeros(5, 24))
    assert (logits.device.type, tuple(logits.shape)) == ("meta", (1, 5, 2, 3))


def test_words_of_another_encoder_are_refused(tmp_path):
    encode = encoded(tmp_path / "encode", changes=text_table(tmp_path, ["grass", "sky", "ring"]))
    with pytest.raises(ModelError) as caught:
        predictor(settings(), {"encode": encode})
    assert "`encode.text.source` is not clip" in caught.value.found
    assert "same CLIP" in caught.value.allowed
    assert "`baselines`" in caught.value.fix


def test_a_tower_that_is_no_vit_is_refused(tmp_path):
    resnet = open_clip_model(tmp_path / "configs", name="lexiseg-test-resnet", layers=[1, 1, 1, 1], width=16)
    save_file(resnet.state_dict(), tmp_path / "weights.safetensors")
    encode = encoded(tmp_path / "encode")
    weights = str(tmp_path / "weights.safetensors")
    save_open_clip(encode / "clip", name="lexiseg-test-resnet", pretrained=weights, sha256=None, licence="MIT")
    scorer = predictor(settings(), {"encode": encode})
    with pytest.raises(ModelError) as caught:
        scorer.scores([picture()], LABELS)
    assert "ModifiedResNet" in caught.value.found
    assert "ViT of open_clip" in caught.value.allowed
    assert "`maskclip`" in caught.value.fix
