import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import encoded, settings

from lexiseg.errors import SettingsError
from lexiseg.methods.tcl.build import new_model, save_model
from lexiseg.methods.tcl.segmenter import TCLSegmenter, starts
from lexiseg.methods.tcl.settings import PredictSettings
from lexiseg.settings import parse

LABELS = ["grass", "red ring", "ring", "unheard of"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tcl")
    encode = encoded(root / "encode")
    torch.manual_seed(0)
    model, _, config = new_model(encode, settings({"tcl.model.gate": 0.5}).tcl.model)
    save_model(root / "model", model, config)
    return root / "model", encode


def segmenter(folders, **options):
    model, encode = folders
    return TCLSegmenter.load(model, encode=encode, predict=options)


def picture(height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_grounders_masks_and_those_of_the_untrained_clip(folders):
    made = segmenter(folders)
    (scores,) = made.scores([picture()], LABELS)
    assert scores.shape == (2, 4, 4, 6)  # patches of 8, a grid twice as fine
    assert scores.dtype == np.float32
    assert scores.min() > 0
    assert scores.max() < 1
    pixels = (torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    vectors = made.text.embed(LABELS)
    with torch.inference_mode():
        tokens, grid = made.model.tokens(pixels)
        logits = made.model.grounder.mask_logits(made.model.embed(pixels), vectors)
        knowledge = made.model.knowledge(tokens, grid, vectors)
        knowledge = F.interpolate(knowledge, size=(4, 6), mode="bilinear")
    assert np.allclose(scores[0], logits.sigmoid()[0].numpy(), atol=1e-5)
    assert np.allclose(scores[1], knowledge[0].numpy(), atol=1e-5)


def test_masks_of_a_phrase_do_not_depend_on_the_others(folders):
    made = segmenter(folders)
    (scores,), (alone,) = made.scores([picture()], LABELS), made.scores([picture()], ["ring"])
    assert np.allclose(alone[:, 0], scores[:, 2], atol=1e-6)


def test_pictures_of_different_sizes(folders):
    made, images = segmenter(folders), [picture(16, 24), picture(24, 16), picture(16, 24, seed=1)]
    together = made.scores(images, LABELS)
    assert [scores.shape[2:] for scores in together] == [(4, 6), (6, 4), (4, 6)]
    for image, scores in zip(images, together, strict=True):
        assert np.allclose(made.scores([image], LABELS)[0], scores, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({}, (17, 23), (4, 6)),  # whole patches
        ({}, (3, 5), (2, 2)),
        ({"short_side": 32}, (16, 24), (8, 12)),
        ({"short_side": 32, "max_side": 40}, (16, 24), (6, 10)),
        ({"max_side": 16}, (16, 32), (2, 4)),
    ],
)
def test_sizes(folders, options, size, expected):
    assert segmenter(folders, **options).scores([picture(*size)], LABELS)[0].shape[2:] == expected


def test_windows_see_nothing_but_themselves(folders):
    made = segmenter(folders, window=16, stride=8)
    image = picture(16, 24)
    (scores,) = made.scores([image], LABELS)
    parts = [segmenter(folders).scores([image[:, left : left + 16]], LABELS)[0] for left in (0, 8)]
    assert np.allclose(scores[..., :2], parts[0][..., :2], atol=1e-6)
    assert np.allclose(scores[..., 4:], parts[1][..., 2:], atol=1e-6)
    assert np.allclose(scores[..., 2:4], (parts[0][..., 2:] + parts[1][..., :2]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("side", "window", "stride", "expected"),
    [(448, 448, 224, [0]), (449, 448, 224, [0, 1]), (672, 448, 224, [0, 224]), (900, 448, 224, [0, 224, 448, 452])],
)
def test_where_windows_begin(side, window, stride, expected):
    # As in mmsegmentation: the last one is moved back inside.
    assert starts(side, window, stride) == expected
    assert starts(side, window, stride)[-1] + window == side


def test_what_a_card_says_of_it():
    assert PredictSettings(window=None).card() == {"sliding_window": None, "window_stride": None, "short_side": None}
    paper = PredictSettings(short_side=448, window=448, stride=224)
    assert paper.card() == {"sliding_window": 448, "window_stride": 224, "short_side": 448}


@pytest.mark.parametrize("options", [{"window": 16}, {"stride": 8}, {"window": 16, "stride": 24}])
def test_windows_that_leave_gaps(options):
    with pytest.raises(SettingsError, match=r"`window`"):
        parse(options, PredictSettings)


@pytest.mark.parametrize("options", [{"window": 20, "stride": 8}, {"window": 16, "stride": 5}])
def test_windows_that_are_no_whole_patches(folders, options):
    with pytest.raises(SettingsError, match="with patches of 8") as caught:
        segmenter(folders, **options)
    assert caught.value.allowed == "multiples of 8"
