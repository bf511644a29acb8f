import numpy as np
import pytest
import torch
from helpers.tiny import encoded, settings, small_vit

from lexiseg.data.transforms import normalise
from lexiseg.encoders.pyramid import VitBackbone
from lexiseg.encoders.text import load_text
from lexiseg.errors import ModelError, SettingsError
from lexiseg.methods.lseg.build import new_model, save_model
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.segmenter import LSegSegmenter
from lexiseg.methods.lseg.settings import PredictSettings
from lexiseg.storage import read_json, write_json


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An encode folder and the model folder of an untrained LSeg that uses all its weights."""
    root = tmp_path_factory.mktemp("lseg")
    encode = encoded(root / "encode")
    torch.manual_seed(0)
    model, config = new_model(encode, settings({"lseg.model.clip_residual": False}).lseg.model, text_dim=24)
    save_model(root / "model", model, config)
    return root / "model", encode


@pytest.fixture
def segmenter(folders):
    model, encode = folders
    return LSegSegmenter.load(model, encode=encode)


def picture(height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


LABELS = ["grass", "red ring", "sky", "unheard of"]


def test_scores_at_half_the_pictures_size(segmenter):
    (scores,) = segmenter.scores([picture()], LABELS)
    assert scores.shape == (4, 8, 12)
    assert scores.dtype == np.float32
    assert np.abs(scores).max() <= 1 / 0.07 + 1e-3


def test_the_same_as_the_network(segmenter):
    images = normalise(picture(), mean=(0.5,) * 3, std=(0.5,) * 3)[None]
    with torch.inference_mode():
        expected = segmenter.model.score(segmenter.model.embed(images), segmenter.text.embed(LABELS))
    assert np.allclose(segmenter.scores([picture()], LABELS)[0], expected[0].numpy(), atol=1e-4)


def test_the_order_of_labels(segmenter):
    (scores,), (moved,) = (segmenter.scores([picture()], labels) for labels in (LABELS, LABELS[::-1]))
    assert np.allclose(scores[::-1], moved, atol=1e-5)


def test_one_label(segmenter):
    (scores,), (alone,) = segmenter.scores([picture()], LABELS), segmenter.scores([picture()], LABELS[1:2])
    assert np.allclose(alone[0], scores[1], atol=1e-5)


def test_pictures_of_different_sizes(segmenter):
    images = [picture(16, 24), picture(24, 16), picture(16, 24, seed=1)]
    together = segmenter.scores(images, LABELS)
    assert [scores.shape[1:] for scores in together] == [(8, 12), (12, 8), (8, 12)]
    for image, scores in zip(images, together, strict=True):
        assert np.allclose(segmenter.scores([image], LABELS)[0], scores, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(17, 23, (8, 12)), (3, 5, (4, 4)), (20, 11, (8, 4)), (21, 12, (12, 8))]
)
def test_sides_that_are_no_whole_patches(segmenter, height, width, expected):
    # To the nearest whole number of patches of 8, at least one (a half goes to the even neighbour).
    assert segmenter.scores([picture(height, width)], LABELS)[0].shape[1:] == expected


def test_the_input_is_resized_with_aligned_corners():
    # As the authors resize: the corner pixels stay where they are.
    model = LSeg(VitBackbone(small_vit(), readout="project"), text_dim=6, features=8, temperature=0.07)
    options = PredictSettings(resize=(32, 48))
    segmenter = LSegSegmenter(model, text=None, mean=(0,) * 3, std=(1,) * 3, options=options)  # type: ignore[arg-type]
    image = picture(20, 30)
    prepared = segmenter._sized(torch.from_numpy(image[None]).permute(0, 3, 1, 2).float() / 255)
    assert prepared.shape == (1, 3, 32, 48)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert np.allclose(prepared[0, :, row, column] * 255, image[row, column], atol=1e-3)


# ---- resize is a setting of inference ----------------------------------------------------------------------------


def test_a_size_of_the_settings(folders):
    model, encode = folders
    resized = LSegSegmenter.load(model, encode=encode, predict={"resize": (32, 8)})
    assert resized.scores([picture()], LABELS)[0].shape == (4, 16, 4)


@pytest.mark.parametrize(
    ("max_side", "size"), [(None, (16, 48)), (96, (16, 48)), (200, (16, 48)), (48, (8, 24)), (40, (8, 20)), (1, (4, 4))]
)
def test_a_long_side_is_limited(folders, max_side, size):
    model, encode = folders
    segmenter = LSegSegmenter.load(model, encode=encode, predict={"resize": None, "max_side": max_side})
    assert segmenter.scores([picture(32, 96)], LABELS)[0].shape[1:] == size


# ---- several scales, mirrored copies, windows ---------------------------------------------------------------------


def scored(folders, image, **options):
    model, encode = folders
    return LSegSegmenter.load(model, encode=encode, predict=options).scores([image], LABELS)[0]


def test_one_scale_of_the_whole_picture_is_the_plain_pass(folders):
    image = picture(32, 48)
    twice = scored(folders, image, scales=(1.0, 1.0))
    plain = torch.from_numpy(scored(folders, image))[None]
    # Both end at half the picture's size; the sum goes over the full size on its way.
    full = torch.nn.functional.interpolate(plain, size=(32, 48), mode="bilinear", align_corners=True)
    half = torch.nn.functional.interpolate(full, size=(16, 24), mode="bilinear", align_corners=True)[0]
    assert np.allclose(twice, 2 * half.numpy(), atol=1e-4)


def test_mirrored_copies_make_the_scores_of_mirrored_pictures_mirrored(folders):
    image = picture(32, 48)
    one = scored(folders, image, flip=True)
    other = scored(folders, np.ascontiguousarray(image[:, ::-1]), flip=True)
    assert np.allclose(one, other[..., ::-1], atol=1e-4)
    assert not np.allclose(scored(folders, image), scored(folders, image[:, ::-1].copy())[..., ::-1], atol=1e-4)


def test_windows_and_scales_keep_the_size_of_the_result(folders):
    for image in (picture(50, 70), picture(20, 24)):
        expected = (4, -(-image.shape[0] // 2), -(-image.shape[1] // 2))
        scores = scored(folders, image, scales=(0.5, 1.25), base_size=64, window=40, flip=True)
        assert scores.shape == expected
        assert scores.dtype == np.float32
        assert scored(folders, image, scales=(0.5, 1.5)).shape == expected


def test_more_labels_than_channels_are_summed_as_embeddings(folders):
    model, encode = folders
    image, words = picture(40, 48), [f"grass {number}" for number in range(30)]
    assert len(words) > LSegSegmenter.load(model, encode=encode).text.dim
    options = {"scales": (0.5, 1.25), "flip": True, "window": 40, "base_size": 56}
    segmenter = LSegSegmenter.load(model, encode=encode, predict=options)
    vectors = torch.nn.functional.normalize(torch.randn(30, segmenter.text.dim), dim=1)
    normal = (torch.from_numpy(image[None]).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        together = segmenter._summed(normal, vectors)
        apart = torch.cat([segmenter._summed(normal, part) for part in vectors.split(10)], dim=1)
    assert together.shape == (1, 30, 20, 24)
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=1e-3)


def test_a_window_is_of_whole_patches(folders):
    with pytest.raises(ModelError, match=r"lseg\.predict\.window: 42"):
        scored(folders, picture(), window=42)


def test_a_limit_of_the_side_is_what_scale_one_means(folders):
    image = picture(32, 96)
    limited = scored(folders, image, flip=True, max_side=48)
    assert np.allclose(limited, scored(folders, image, flip=True, base_size=48))
    assert np.allclose(scored(folders, image, flip=True, max_side=200), scored(folders, image, flip=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": True, "resize": (32, 32)}, "`resize` is for one pass"),
        ({"base_size": 64, "max_side": 64}, "the other is null"),
        ({"scales": ()}, "scales"),
        ({"scales": (0.0,)}, "above 0"),
        ({"window": 4}, "window"),
    ],
)
def test_options_that_do_not_go_together(folders, options, message):
    with pytest.raises(SettingsError, match=message):
        scored(folders, picture(), **options)


def test_a_registered_model_remembers_its_size(folders, tmp_path):
    model, encode = folders
    config = read_json(model / "model.json")
    save_model(tmp_path, LSegSegmenter.load(model, encode=encode).model, {**config, "predict": {"resize": [32, 8]}})
    assert LSegSegmenter.load(tmp_path, encode=encode).scores([picture()], LABELS)[0].shape == (4, 16, 4)
    free = LSegSegmenter.load(tmp_path, encode=encode, predict={"resize": None})
    assert free.scores([picture()], LABELS)[0].shape == (4, 8, 12)


def test_the_text_side_may_be_in_the_model_folder(folders, tmp_path):
    import shutil

    model, encode = folders
    shutil.copytree(model, tmp_path / "whole")
    for name in ("clip", "text"):
        shutil.copytree(encode / name, tmp_path / "whole" / name)
    whole = LSegSegmenter.load(tmp_path / "whole")
    expected = LSegSegmenter.load(model, encode=encode).scores([picture()], LABELS)[0]
    assert (whole.scores([picture()], LABELS)[0] == expected).all()
    assert whole.text.embed(LABELS).equal(load_text(encode).embed(LABELS))


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, 3),
        ({"resize": (32, 32)}, 30),
        # More labels than channels: with fewer, autocast is switched off for a part, and there is none for "meta".
        ({"scales": (0.5, 1.0), "flip": True, "window": 32}, 30),
    ],
)
def test_all_is_on_the_device_of_the_network(segmenter, options, labels):
    # Tensors of the device "meta" have no values; one that was left on the CPU cannot be computed with them.
    parts = {"mean": [0.5] * 3, "std": [0.5] * 3, "options": PredictSettings(**options)}
    moved = LSegSegmenter(segmenter.model, text=segmenter.text, device=torch.device("meta"), **parts)
    with torch.inference_mode():
        logits = moved._logits(np.stack([picture()] * 2), torch.zeros(labels, 24))
    assert logits.device.type == "meta"
    assert logits.shape[:2] == (2, labels)


def test_the_pictures_are_not_changed(segmenter):
    image = picture()
    image.flags.writeable = False
    segmenter.scores([image], LABELS)
    assert (image == picture()).all()


def test_broken_json(folders, tmp_path):
    model, encode = folders
    config = read_json(model / "model.json")
    write_json(tmp_path / "model.json", config)
    from lexiseg.errors import ModelError

    with pytest.raises(ModelError, match="no weight file"):
        LSegSegmenter.load(tmp_path, encode=encode)
