import contextlib
import struct
import zlib

import numpy as np
import pytest
from helpers.micro import mask, picture, save
from PIL import Image

from lexiseg.data.adapters.files import inside, pixel_limit, read_lines, read_mask, read_picture, relabel
from lexiseg.errors import DataError


def test_plain_rgb_keeps_its_bytes(tmp_path):
    path = save(tmp_path / "a.png", picture(1))
    content = read_picture(path, file="a.png")
    assert content.image is not None
    assert (content.image == picture(1)).all()
    assert content.image_bytes == path.read_bytes()
    assert content.mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    Image.fromarray(picture(1)).convert(mode).save(tmp_path / "a.png")
    content = read_picture(tmp_path / "a.png", file="a.png")
    assert content.image is not None
    assert content.image.shape == (20, 24, 3)
    assert content.image.dtype == np.uint8
    assert (content.image_bytes, content.mode) == (None, mode)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.fromarray(picture(1)).convert("CMYK").save(tmp_path / "a.jpg")
    content = read_picture(tmp_path / "a.jpg", file="a.jpg")
    assert content.image is not None
    assert content.image.shape == (20, 24, 3)
    assert content.image_bytes is None


def test_sixteen_bits_keep_the_upper_byte(tmp_path):
    save(tmp_path / "a.png", np.array([[0, 255, 256, 65535]], np.uint16))
    content = read_picture(tmp_path / "a.png", file="a.png")
    assert content.image is not None
    assert content.image[0, :, 0].tolist() == [0, 0, 1, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(picture(1)).save(tmp_path / "a.png", exif=exif)
    content = read_picture(tmp_path / "a.png", file="a.png")
    assert content.image is not None
    assert content.image.shape == (24, 20, 3)
    assert (content.image == np.rot90(picture(1), k=-1)).all()
    assert content.image_bytes is None


def test_empty_file(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError) as error:
        read_picture(tmp_path / "a.png", file="train/a.png")
    assert error.value.found == "train/a.png is empty (0 bytes)"
    assert error.value.allowed == "a complete picture"
    assert "again" in error.value.fix


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"train/a.png cannot be opened \(No such file"):
        read_picture(tmp_path / "a.png", file="train/a.png")


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "tif"])
def test_cut_off_file(tmp_path, ending):
    path = save(tmp_path / f"a.{ending}", picture(1))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError) as error:
        read_picture(path, file=f"a.{ending}")
    assert f"a.{ending} is damaged (" in error.value.found or "not a picture in a known format" in error.value.found
    assert str(tmp_path) not in str(error.value)


def test_something_else(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>")
    with pytest.raises(DataError) as error:
        read_picture(tmp_path / "a.jpg", file="a.jpg")
    assert error.value.found == "a.jpg is not a picture in a known format"


@pytest.mark.parametrize("kind", ["png", "tiff", "bmp", "gif", "webp"])
def test_every_single_damaged_byte_is_a_clear_error_or_a_picture(tmp_path, kind):
    name = f"a.{kind}"
    Image.fromarray(picture(1, height=3, width=3)).save(tmp_path / name)
    original = bytearray((tmp_path / name).read_bytes())
    for place in range(len(original)):
        damaged = original.copy()
        damaged[place] ^= 0xFF
        (tmp_path / name).write_bytes(damaged)
        # Where the damage does not matter there is a picture; any other exception fails the test.
        with contextlib.suppress(DataError):
            read_picture(tmp_path / name, file=name)


def test_whatever_a_decoder_raises_is_a_clear_error(tmp_path, monkeypatch):
    """Pillow has been seen to raise a TypeError for a damaged TIFF."""
    save(tmp_path / "a.png", picture(1))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: 1 / 0)
    with pytest.raises(DataError, match=r"a\.png is damaged"):
        read_picture(tmp_path / "a.png", file="a.png")


def bomb(path, *, width, height):
    """A PNG of a few bytes that says it has width x height pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.mark.parametrize("read", [read_picture, read_mask])
def test_decompression_bomb_is_not_decoded(tmp_path, read):
    path = bomb(tmp_path / "a.png", width=60_000, height=50_000)
    with pixel_limit(1_000_000), pytest.raises(DataError) as error:
        read(path, file="a.png")
    assert error.value.found == "a.png has 60000 x 50000 pixels"
    assert "at most 1000000;" in error.value.allowed
    assert "data.max_pixels" in error.value.fix


def test_limit_counts_pixels_exactly_and_is_lifted_after(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    path = save(tmp_path / "a.png", picture(1, height=10, width=10))
    with pixel_limit(100):
        read_picture(path, file="a.png")
    with pixel_limit(99), pytest.raises(DataError, match="10 x 10 pixels"):
        read_picture(path, file="a.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_masks_of_every_kind_give_ids(tmp_path):
    ids = mask(1, classes=12)
    save(tmp_path / "l.png", ids)
    save(tmp_path / "i16.png", ids.astype(np.uint16) + 300)
    palette = Image.fromarray(ids, mode="P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "p.png")
    Image.fromarray(ids > 5).save(tmp_path / "1.png")
    assert (read_mask(tmp_path / "l.png", file="l.png") == ids).all()
    assert (read_mask(tmp_path / "i16.png", file="i16.png") == ids.astype(int) + 300).all()
    assert (read_mask(tmp_path / "p.png", file="p.png") == ids).all()
    assert (read_mask(tmp_path / "1.png", file="1.png") == (ids > 5)).all()
    assert read_mask(tmp_path / "1.png", file="1.png").dtype == np.uint16


def test_colour_mask(tmp_path):
    save(tmp_path / "a.png", picture(1))
    with pytest.raises(DataError) as error:
        read_mask(tmp_path / "a.png", file="masks/a.png")
    assert error.value.found == "masks/a.png has the mode RGB"
    assert "one channel" in error.value.allowed
    assert "convert" in error.value.fix


def test_relabel():
    ids = np.array([[0, 7], [11, 65535], [3, 3]], np.uint16)
    result, unknown = relabel(ids, classes={0: 0, 7: 1}, ignored={11})
    assert result.tolist() == [[0, 1], [65535, 65535], [65535, 65535]]
    assert result.dtype == np.uint16
    assert unknown == (3,)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../b.png", "..\\b.png", "C:\\b.png", ""])
def test_paths_out_of_the_folder(tmp_path, path):
    with pytest.raises(DataError) as error:
        inside(tmp_path, path, listed_in="train.txt line 3")
    assert error.value.found == f"the path `{path}` in train.txt line 3"
    assert "stay inside" in error.value.allowed
    assert "correct that line" in error.value.fix


def test_lines_without_comments(tmp_path):
    (tmp_path / "a.txt").write_text("# comment\n\n one \ntwo\n")
    assert read_lines(tmp_path / "a.txt", file="a.txt", purpose="words") == [(3, "one"), (4, "two")]


def test_list_that_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError) as error:
        read_lines(tmp_path / "a.txt", file="a.txt", purpose="words")
    assert "a.txt cannot be read" in error.value.found
    assert error.value.allowed == "a UTF-8 text file: words"
