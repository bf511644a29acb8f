import numpy as np
import pytest

from lexiseg.data.adapters.base import RawContent, RawSample
from lexiseg.data.rows import decode_ids, decode_rgb, examine, png
from lexiseg.errors import DataError

IMAGE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def examined(content=None, *, error=None, class_count=5):
    def load():
        if error:
            raise error
        assert content
        return content

    return examine(RawSample(id="a", file="x/a.png", load=load), split="train", class_count=class_count)


def test_facts_of_a_full_sample():
    result = examined(
        RawContent(
            image=IMAGE,
            semantic=np.array([[0, 3, 65535], [0, 9, 65535]], np.uint16),
            panoptic=np.array([[1, 2, 0], [1, 2, 0]], np.uint16),
            segments=[{"id": 1, "class_id": 0, "thing": False}, {"id": 2, "class_id": 3, "thing": True}],
            captions=["a b c", "a"],
            phrases=[{"text": "b", "segment_ids": [2]}],
            mode="L",
        )
    )
    facts = result.facts
    assert facts["readable"]
    assert (facts["width"], facts["height"], facts["mode"]) == (3, 2, "L")
    assert (facts["mask_width"], facts["mask_height"]) == (3, 2)
    assert facts["label_values"] == [0, 3, 9]
    assert facts["unknown_labels"] == [9]
    assert facts["ignored_share"] == pytest.approx(1 / 3)
    assert facts["segments_agree"]
    assert (facts["caption_count"], facts["caption_words_min"], facts["caption_words_max"]) == (2, 1, 3)
    assert (facts["phrase_count"], facts["question_count"]) == (1, 0)
    assert result.row is not None
    assert (decode_rgb(result.row["image"]) == IMAGE).all()
    assert decode_ids(result.row["semantic"]).tolist() == [[0, 3, 65535], [0, 9, 65535]]


def test_picture_bytes_are_kept():
    content = png(IMAGE)
    result = examined(RawContent(image=None, image_bytes=content))
    assert result.row is not None
    assert result.row["image"] == content
    assert result.facts["image_sha256"] == examined(RawContent(image=IMAGE)).facts["image_sha256"]


def test_hash_is_of_pixels_and_size():
    turned = examined(RawContent(image=IMAGE.reshape(3, 2, 3)))
    assert turned.facts["image_sha256"] != examined(RawContent(image=IMAGE)).facts["image_sha256"]


def test_digest_depends_on_every_column():
    plain = examined(RawContent(image=IMAGE)).digest
    assert plain == examined(RawContent(image=IMAGE)).digest
    assert plain != examined(RawContent(image=IMAGE, captions=["a"])).digest
    assert plain != examined(RawContent(image=IMAGE, semantic=np.zeros((2, 3), np.uint16))).digest


def test_segments_that_differ_from_their_table():
    content = RawContent(
        image=IMAGE, panoptic=np.ones((2, 3), np.uint16), segments=[{"id": 2, "class_id": 0, "thing": False}]
    )
    assert examined(content).facts["segments_agree"] is False


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError(found="a.png is empty", allowed="a picture", fix="copy it"), "found: a.png is empty; allowed: a"),
        (OSError("broken data stream"), "x/a.png: broken data stream"),
        (ValueError(), "x/a.png: ValueError"),
    ],
)
def test_unreadable_sample_has_a_reason_and_no_row(error, reason):
    result = examined(error=error)
    assert result.row is None
    assert result.facts["readable"] is False
    assert result.facts["reason"].startswith(reason)
    assert (result.facts["split"], result.facts["id"], result.facts["file"]) == ("train", "a", "x/a.png")


def test_fault_of_a_program_is_not_hidden():
    with pytest.raises(AttributeError):
        examined(error=AttributeError("bug"))


@pytest.mark.parametrize(
    "content",
    [
        RawContent(image=None),
        RawContent(image=IMAGE.astype(np.float32)),
        RawContent(image=IMAGE[..., 0]),
        RawContent(image=IMAGE, semantic=np.zeros((2, 3), np.int64)),
        RawContent(image=np.zeros((0, 3, 3), np.uint8)),
    ],
)
def test_adapter_that_gives_something_else(content):
    result = examined(content)
    assert result.row is None
    assert "mend the adapter" in result.facts["reason"]


def test_masks_keep_sixteen_bits():
    values = np.array([[0, 255, 256, 65534, 65535]], np.uint16)
    assert decode_ids(png(values)).tolist() == values.tolist()
