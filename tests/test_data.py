"""Image folders, decoding and batches of the classification programs."""

import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from engine import data, loaders
from mambavision.errors import DataError, UserError

CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
AUGMENTATION = {
    "scale": (0.5, 1.0),
    "ratio": (0.75, 1.33),
    "hflip": 0.5,
    "color_jitter": 0.4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.5,
    "re_mode": "pixel",
}


@pytest.fixture
def folder(digits, tmp_path):
    """A copy of the digits that a test may spoil."""
    return shutil.copytree(digits, tmp_path / "digits")


# Splits and classes


def test_splits_are_found_under_their_usual_names(digits):
    train = data.open_split(data_dir=str(digits), split="train", is_training=True)
    validation = data.open_split(data_dir=str(digits), split="validation")
    assert (len(train), len(validation)) == (60, 15)
    assert data.class_names(train) == data.class_names(validation) == ["digit 0", "digit 1", "digit 2"]
    assert len(data.open_split(data_dir=str(digits / "val"), split="validation")) == 15
    assert len(data.open_split(data_dir=None, split=str(digits / "train"), is_training=True)) == 60


@pytest.mark.parametrize(
    ("spoil", "split", "message"),
    [
        (lambda root: shutil.rmtree(root), "train", r"digits: no such folder; --data-dir needs train/ and val/"),
        (lambda root: shutil.rmtree(root / "train"), "train", r"no folder for the split 'train' \(looked for train/"),
        (lambda root: shutil.rmtree(root / "val"), "validation", r"looked for validation/, val/, valid/"),
        (lambda root: [path.unlink() for path in root.glob("train/*/*")], "train", "no images in its 3 class folders"),
        (lambda root: [path.unlink() for path in root.glob("train/digit 1/*")], "train", r"no images in .*'digit 1';"),
        (lambda root: [shutil.rmtree(path) for path in root.glob("train/*")], "train", "no class folders inside"),
    ],
)
def test_missing_and_empty_folders_are_named(folder, spoil, split, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        data.open_split(data_dir=str(folder), split=split, is_training=split == "train")


def test_no_folder_at_all_is_an_error():
    with pytest.raises(DataError, match="--data-dir"):
        data.open_split(data_dir=None, split="train")


def test_differing_classes_are_listed():
    names = ["cat", "dog", "owl"]
    data.check_same_classes(names, ["cat", "dog", "owl"], "a", "b")
    data.check_same_classes(None, names, "a", "b")
    with pytest.raises(DataError, match="classes of b differ from those of a: b lacks 'dog' and has the unknown 'fox'"):
        data.check_same_classes(names, ["cat", "fox", "owl"], "a", "b")
    with pytest.raises(DataError, match="another order, first at index 1: 'owl' instead of 'dog'"):
        data.check_same_classes(names, ["cat", "owl", "dog"], "a", "b")
    with pytest.raises(DataError, match="'0', '1', '10', '11', '12' and 15 more"):
        data.check_same_classes([str(index) for index in range(20)], [], "a", "b")


def test_class_maps_choose_and_order_classes(digits, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("digit 2\ndigit 0\n")
    split = data.open_split(data_dir=str(digits), split="train", class_map=str(path))
    assert data.class_names(split) == ["digit 2", "digit 0"]
    assert len(split) == 40
    with pytest.raises(DataError, match="no such class map"):
        data.open_split(data_dir=str(digits), split="train", class_map="nothing.txt")
    with pytest.raises(UserError, match="a class map is a text file"):
        data.open_split(data_dir=str(digits), split="train", class_map=__file__)


# Decoding


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


def test_exif_rotation_on_request(tmp_path):
    image = Image.fromarray((gradient() * 255).astype(np.uint8)[:, :8])
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert data.decode_image(tmp_path / "turned.jpg").size == (8, 16)
    upright = data.decode_image(tmp_path / "turned.jpg", exif_transpose=True)
    assert upright.size == (16, 8)
    np.testing.assert_allclose(np.asarray(upright)[..., 0], np.rot90(np.asarray(image), -1), atol=3)


def spoil(path, how):
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not an image"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_broken_files_are_named_or_counted(folder, how):
    broken = folder / "train" / "digit 1" / "03.png"
    spoil(broken, how)
    split = data.open_split(data_dir=str(folder), split="train", is_training=True)
    index = split.filenames(absolute=True).index(str(broken))
    with pytest.raises(DataError, match=r"digit 1/03\.png: cannot be decoded .*--skip-corrupt"):
        split[index]

    marked = data.open_split(data_dir=str(folder), split="train", skip_corrupt=True)
    assert marked[index][1] == data.SKIPPED
    replaced = data.open_split(data_dir=str(folder), split="train", is_training=True, skip_corrupt=True)
    assert replaced[index][1] == 1
    assert replaced.corrupt_files == ["digit 1/03.png"]
    messages = []
    assert data.log_skipped(replaced, messages.append) == 1
    assert "1 of 60 images could not be decoded" in messages[0]


# Batches


def test_strongest_published_augmentation_works():
    """Some pairs of timm and Pillow versions fail on extreme levels, that is, once in thousands of images."""
    from timm.data.auto_augment import AugmentOp

    image = Image.fromarray((gradient() * 255).astype(np.uint8)).convert("RGB")
    for level in (0, 10):
        assert AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=level)(image).size == image.size


def train_batches(digits, workers=0, rank=0, world_size=1, epoch=0, first_batch=0, **kwargs):
    split = data.open_split(data_dir=str(digits), split="train", is_training=True)
    options = {"batch_size": 8, "seed": 5, "prefetch": False, **kwargs}
    device, share = torch.device("cpu"), loaders.Share(rank, world_size)
    loader = loaders.train_loader(
        split, CONFIG, dict(AUGMENTATION), workers=workers, device=device, share=share, **options
    )
    return list(loader.epoch(epoch, first_batch))


def equal(batches, others):
    assert len(batches) == len(others)
    return all(torch.equal(a, b) for pair in zip(batches, others, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(digits, workers):
    assert equal(train_batches(digits), train_batches(digits, workers))


def test_batches_depend_on_epoch_seed_and_process(digits):
    first = train_batches(digits)
    assert equal(first, train_batches(digits))
    assert not equal(first, train_batches(digits, epoch=1))
    assert not equal(first, train_batches(digits, seed=6))


def test_workers_notice_the_epoch(digits):
    split = data.open_split(data_dir=str(digits), split="train", is_training=True)
    loader = loaders.train_loader(
        split, CONFIG, dict(AUGMENTATION), batch_size=8, seed=5, prefetch=False, workers=1,
        device=torch.device("cpu"), share=loaders.Share(),
    )  # fmt: skip
    for epoch in (0, 1):
        assert equal(list(loader.epoch(epoch)), train_batches(digits, epoch=epoch))


def test_an_epoch_can_be_taken_up_in_its_middle(digits):
    assert equal(train_batches(digits, epoch=3)[4:], train_batches(digits, epoch=3, first_batch=4, workers=2))


def test_loading_leaves_the_random_state_of_the_process_alone(digits):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    train_batches(digits)
    drawn = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    assert drawn == (torch.rand(1).item(), np.random.rand(), random.random())


def test_processes_share_the_images_of_an_epoch(digits):
    def shown(batches):
        return torch.cat([targets for _, targets in batches])

    shares = [train_batches(digits, rank=rank, world_size=2, batch_size=10) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    assert shown(shares[0] + shares[1]).bincount().tolist() == [20, 20, 20]


def test_repeats(digits):
    assert len(train_batches(digits, epoch_repeats=2)) == 2 * len(train_batches(digits, batch_size=8)) + 1
    assert len(train_batches(digits, aug_repeats=2)) == 7


def test_batches_larger_than_the_data_are_refused(digits):
    with pytest.raises(UserError, match="--batch-size 64 is more than the 60 training images"):
        train_batches(digits, batch_size=64)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_counts_every_image_once(digits, world_size):
    from engine.evaluate import evaluate

    def model(images):
        return torch.eye(3)[torch.zeros(len(images), dtype=torch.long)]  # always class 0

    totals = torch.zeros(2)
    for rank in range(world_size):
        split = data.open_split(data_dir=str(digits), split="validation")
        loader = loaders.eval_loader(
            split, CONFIG, batch_size=4, workers=0, device=torch.device("cpu"),
            share=loaders.Share(rank, world_size), prefetch=False,
        )  # fmt: skip
        scores = evaluate(model, loader, torch.device("cpu"))
        images = len(range(rank, 15, world_size))
        totals += torch.tensor([images, images * scores["top1"] / 100])
    assert totals.tolist() == pytest.approx([15, 5])


def test_evaluation_leaves_skipped_images_out(folder):
    from engine.evaluate import evaluate

    spoil(folder / "val" / "digit 0" / "20.png", "empty")
    split = data.open_split(data_dir=str(folder), split="validation", skip_corrupt=True)
    for prefetch in (False, True):
        loader = loaders.eval_loader(
            split, CONFIG, batch_size=4, workers=1, device=torch.device("cpu"), prefetch=prefetch
        )
        scores = evaluate(lambda images: torch.eye(3)[[0] * len(images)], loader, torch.device("cpu"))
        assert scores["top1"] == pytest.approx(100 * 4 / 14)
    assert split.corrupt_files == ["digit 0/20.png"]


def test_evaluation_on_chosen_columns(digits):
    from engine.evaluate import evaluate

    split = data.open_split(data_dir=str(digits), split="validation")
    loader = loaders.eval_loader(split, CONFIG, batch_size=4, workers=0, device=torch.device("cpu"), prefetch=False)
    logits = torch.tensor([9.0, 0.0, 5.0, 1.0, 2.0])
    scores = evaluate(lambda images: logits.repeat(len(images), 1), loader, torch.device("cpu"), classes=[1, 3, 4])
    assert scores["top1"] == pytest.approx(100 / 3)  # column 4 is the best of these: the class with index 2
