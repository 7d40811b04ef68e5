"""Decoding images: their kinds, rotation, and broken files."""

import numpy as np
import pytest
from PIL import Image

from engine import data
from mambavision.errors import DataError


def gradient(side=16):
    return np.linspace(0, 1, side * side).reshape(side, side)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", lambda: Image.fromarray((gradient() * 255).astype(np.uint8))),
        ("16 bit.png", lambda: Image.fromarray((gradient() * 65535).astype(np.uint16))),
        ("16 bit.tif", lambda: Image.fromarray((gradient() * 65535).astype(np.uint16))),
        ("32 bit.tif", lambda: Image.fromarray((gradient() * 65535).astype(np.int32))),
        ("cmyk.jpg", lambda: Image.fromarray((gradient() * 255).astype(np.uint8)).convert("RGB").convert("CMYK")),
        ("palette.png", lambda: Image.fromarray((gradient() * 255).astype(np.uint8)).convert("P")),
        ("alpha.png", lambda: Image.fromarray((gradient() * 255).astype(np.uint8)).convert("RGBA")),
    ],
)
def test_every_kind_of_image_keeps_its_brightness(tmp_path, name, image):
    image().save(tmp_path / name, quality=100) if name.endswith("jpg") else image().save(tmp_path / name)
    decoded = data.decode_image(tmp_path / name)
    assert decoded.mode == "RGB"
    np.testing.assert_allclose(np.asarray(decoded).mean(-1), gradient() * 255, atol=4)


@pytest.mark.parametrize(
    ("dtype", "largest", "white"),
    [
        (np.uint16, 200, 65535),  # dark, but of 16 bits all the same
        (np.uint16, 300, 65535),
        (np.int32, 300, 65535),
        (np.int32, 2e9, 2**31 - 1),
        (np.float32, 1, 1),
        (np.float32, 200, 255),
        (np.float32, 40_000, 65535),
    ],
)
def test_white_depends_on_the_kind_of_pixels(tmp_path, dtype, largest, white):
    pixels = (gradient() * largest).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "image.tif")
    decoded = np.asarray(data.decode_image(tmp_path / "image.tif", "L"))
    np.testing.assert_allclose(decoded, pixels * (255 / white), atol=1)


def test_exif_rotation_on_request(tmp_path):
    image = Image.fromarray((gradient() * 255).astype(np.uint8)[:, :8])
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert data.decode_image(tmp_path / "turned.jpg").size == (8, 16)
    upright = data.decode_image(tmp_path / "turned.jpg", exif_transpose=True)
    assert upright.size == (16, 8)
    np.testing.assert_allclose(np.asarray(upright)[..., 0], np.rot90(np.asarray(image), -1), atol=3)


# Broken files


def spoil(path, how):
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not an image"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_broken_files_are_named_or_counted(copied, how):
    broken = copied / "train" / "digit 1" / "03.png"
    spoil(broken, how)
    split = data.open_split(data_dir=str(copied), split="train", is_training=True)
    index = split.filenames(absolute=True).index(str(broken))
    with pytest.raises(DataError, match=r"digit 1/03\.png: cannot be decoded .*--skip-corrupt"):
        split[index]

    marked = data.open_split(data_dir=str(copied), split="train", skip_corrupt=True)
    assert marked[index][1] == data.SKIPPED
    replaced = data.open_split(data_dir=str(copied), split="train", is_training=True, skip_corrupt=True)
    assert replaced[index][1] == 1
    assert replaced.corrupt_files == ["digit 1/03.png"]
    messages = []
    assert data.log_skipped(replaced, messages.append) == 1
    assert "1 of 60 images could not be decoded" in messages[0]


def test_broken_files_of_torchvisions_folders_are_named(copied):
    split = data.open_split(data_dir=str(copied), split="train", dataset="torch/image_folder", is_training=True)
    assert split[0][0].size == (32, 32)
    spoil(copied / "train" / "digit 0" / "00.png", "text")
    with pytest.raises(DataError, match=r"digit 0/00\.png: cannot be decoded \(not an image\); repair or remove it"):
        split[0]


def test_any_number_of_broken_files_in_a_row_is_skipped(tmp_path):
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    for number in range(1200):
        (folder / f"{number:04d}.png").touch()
    split = data.open_split(data_dir=str(tmp_path), split="train", is_training=True, skip_corrupt=True)
    with pytest.raises(DataError, match="none of its 1200 images can be decoded"):
        split[0]
    Image.new("RGB", (8, 8)).save(folder / "1199.png")
    split = data.open_split(data_dir=str(tmp_path), split="train", is_training=True, skip_corrupt=True)
    assert split[0][0].size == (8, 8)
    assert len(split.corrupt_files) == 1199


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_images_that_vanish_are_named_or_counted(skip_corrupt, copied):
    split = data.open_split(data_dir=str(copied), split="train", is_training=True, skip_corrupt=skip_corrupt)
    victim = copied / "train" / "digit 0" / "00.png"
    victim.unlink()
    if skip_corrupt:
        assert split[0][1] == split[1][1]
        assert split.corrupt_files == ["digit 0/00.png"]
    else:
        with pytest.raises(DataError, match=rf"{victim}: cannot be decoded \(No such file or directory\)"):
            split[0]
