"""Image folders, decoding and batches of the classification programs."""

import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import FastCollateMixup, IterableImageDataset

from engine import build, data, loaders
from engine.options import train_options
from mambavision.errors import DataError, UserError
from mambavision.running.process import Process

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


def test_folders_of_the_working_directory_are_not_taken_for_missing_splits(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(digits)
    for split in ("train", "val"):
        for root in (str(tmp_path), None):
            with pytest.raises(DataError):
                data.open_split(data_dir=root, split=split, is_training=True)
    for path in ("./train", "val/", str(digits / "val")):
        assert data.find_split(str(tmp_path), path, may_be_root=False).samefile(path)
    with pytest.raises(DataError, match="has no folder for the split 'holdout'"):
        data.find_split(str(digits / "val"), "holdout", may_be_root=True)


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
    path.write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"train: no images of the classes 'cat', 'dog' in the class map"):
        data.open_split(data_dir=str(digits), split="train", class_map=str(path))


# timm's data sets


def test_options_that_timms_data_sets_do_not_know_are_refused():
    for words in (["--skip-corrupt"], ["--exif-transpose"]):
        data.check_options(train_options(words))
        with pytest.raises(UserError, match=f"{words[0]} works with image folders only: drop it, or --dataset torch/x"):
            build.check_options(train_options(["--dataset", "torch/x", *words]), torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "hfids/x", "--aug-repeats", "2"], "--aug-repeats and --aug-splits need single images"),
        (["--dataset", "TFDS/x", "--aug-splits", "2", "--mixup=0", "--cutmix=0"], "need single images"),
        (["--dataset", "wds/x", "--epoch-repeats", "2"], "--epoch-repeats does not reach wds/ streams"),
        (["--log-wandb"], "pip install wandb"),
    ],
)
def test_impossible_options_are_refused_before_any_work(words, message, monkeypatch):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        build.check_options(train_options(words), torch.device("cpu"))
    build.check_options(train_options(["--aug-repeats", "2", "--epoch-repeats", "2"]), torch.device("cpu"))


@pytest.mark.parametrize(("rank", "local_rank", "turn"), [(0, 0, 0), (1, 1, 2), (2, 0, 1)])
def test_the_first_process_downloads_first(monkeypatch, rank, local_rank, turn):
    """Then one process of every other machine, and then those that find the files."""
    events = []
    monkeypatch.setattr(data, "this_process", lambda: Process(rank, local_rank, world_size=4))
    monkeypatch.setattr(data, "create_dataset", lambda *args, **kwargs: events.append("download") or "data set")
    monkeypatch.setattr("torch.distributed.new_group", lambda **kwargs: "group")
    monkeypatch.setattr("torch.distributed.barrier", lambda group: events.append("barrier"))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda group: None)
    assert data.open_split(data_dir="x", split="train", dataset="torch/mnist", download=True) == "data set"
    assert events.index("download") == turn
    assert events.count("barrier") == 3


class Reader:
    """What timm's streams read from."""

    workers = None

    def __iter__(self):
        for number in range(40):
            yield Image.fromarray(np.full((32, 32), 6 * number, np.uint8)).convert("RGB"), number % 3

    def __len__(self):
        return 40

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers


def stream_batches(workers=0, prefetch=True, **kwargs):
    stream = IterableImageDataset("", reader=Reader())
    loader = loaders.train_loader(
        stream, CONFIG, {"no_aug": True}, batch_size=8, seed=5, prefetch=prefetch, workers=workers,
        device=torch.device("cpu"), share=loaders.Share(), **kwargs,
    )  # fmt: skip
    return loader, stream.reader


def test_streams_are_mixed_while_collating():
    loader, _ = stream_batches(collate_mixup=FastCollateMixup(num_classes=3))
    for images, targets in loader.epoch(0):
        assert images.shape == (8, 3, 32, 32)
        assert targets.shape == (8, 3)


def test_streams_can_be_taken_up_in_the_middle():
    loader, _ = stream_batches(prefetch=False)
    assert equal(list(loader.epoch(0))[3:], list(loader.epoch(0, first_batch=3)))


@pytest.mark.parametrize("workers", [0, 1, None])
def test_streams_are_told_the_number_of_workers(workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    loader, reader = stream_batches(workers)
    assert reader.workers == loader.loader.loader.num_workers == (2 if workers is None else workers)
    stream = IterableImageDataset("", reader=Reader())
    loader = loaders.eval_loader(
        stream, CONFIG, batch_size=8, workers=workers, device=torch.device("cpu"), prefetch=False
    )
    assert stream.reader.workers == loader.num_workers == (2 if workers is None else workers)


def test_streams_smaller_than_a_batch_are_refused():
    with pytest.raises(UserError, match="--batch-size 64 is more than the 40 training images"):
        loaders.train_loader(
            IterableImageDataset("", reader=Reader()), CONFIG, {}, batch_size=64, seed=5, prefetch=False, workers=0,
            device=torch.device("cpu"), share=loaders.Share(),
        )  # fmt: skip


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


def test_broken_files_of_torchvisions_folders_are_named(folder):
    split = data.open_split(data_dir=str(folder), split="train", dataset="torch/image_folder", is_training=True)
    assert split[0][0].size == (32, 32)
    spoil(folder / "train" / "digit 0" / "00.png", "text")
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


@pytest.mark.parametrize(
    ("options", "images"), [({"epoch_repeats": 3}, 180), ({"aug_repeats": 3}, 60), ({"aug_repeats": 1.5}, 60)]
)
def test_repeated_images_are_augmented_differently(digits, options, images):
    batches = train_batches(digits, batch_size=6, **options)
    assert len({image.numpy().tobytes() for batch, _ in batches for image in batch}) == images
    middle = len(batches) // 2
    assert equal(batches[middle:], train_batches(digits, batch_size=6, first_batch=middle, workers=1, **options))


def test_repeated_images_follow_the_seed(digits):
    def order(seed):
        return [targets.tolist() for _, targets in train_batches(digits, aug_repeats=2, seed=seed)]

    assert order(1) == order(1) != order(2)


def test_batches_larger_than_the_data_are_refused(digits):
    with pytest.raises(UserError, match="--batch-size 64 is more than the 60 training images"):
        train_batches(digits, batch_size=64)


@pytest.mark.parametrize("words", [["--input-size", "1", "32", "32"], ["--model-kwargs", "in_chans=1"]], ids=" ".join)
@pytest.mark.parametrize("aug_splits", ["0", "2"], ids=["batches", "prefetched"])
def test_grey_images_need_one_option_only(digits, words, aug_splits):
    words = [*words, "--model", "test_resnet", "--aug-splits", aug_splits, "--mixup=0", "--cutmix=0", "--workers=0"]
    args = train_options(["--data-dir", str(digits), "--batch-size=8", *words])
    train, validation, classes = build.open_data(args)
    model = build.build_model(args, build.model_arguments(args, classes))
    batches = build.build_batches(args, model, train, validation, torch.device("cpu"), loaders.Share())
    assert batches.config["input_size"][0] == len(batches.config["mean"]) == len(batches.config["std"]) == 1
    assert batches.config["mean"][0] == pytest.approx(np.mean(model.pretrained_cfg["mean"]))
    for loader in (batches.train.epoch(0), batches.validation):
        assert model(next(iter(loader))[0]).isfinite().all()


def test_means_of_other_channels_are_refused(digits):
    model = build.create_any("test_resnet", False, {"in_chans": 1})
    assert build.data_config(model, {"mean": [0.5]})["mean"] == (0.5,)
    assert build.data_config(build.create_any("test_resnet", False, {}), {"std": [0.5]})["std"] == (0.5,) * 3
    with pytest.raises(UserError, match="--mean has 3 values, and the images have 1 channels"):
        build.data_config(model, {"mean": [0.1, 0.2, 0.3]})
    with pytest.raises(UserError, match="image files give 1"):
        data.open_split(data_dir=str(digits), split="train", channels=4)


def test_batch_statistics_over_all_gpus_keep_the_activations(monkeypatch):
    monkeypatch.setattr(build, "_can_synchronise", lambda: True)
    arguments = {"num_classes": 3}
    plain, synchronised = (
        build.build_model(train_options(["--model", "test_efficientnet", "--seed=1", *words]), arguments).eval()
        for words in ([], ["--sync-bn"])
    )
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synchronised.modules())
    synchronised.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(synchronised(x), plain(x))


def test_wrong_model_arguments_are_one_sentence():
    with pytest.raises(UserError, match="mamba_vision_T: dt_init must be"):
        build.create_any("mamba_vision_T", False, {"dt_init": "other"})


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


# Folders that could hang a run, or count images twice


@pytest.fixture
def copied(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    return tmp_path / "digits"


def _pipe(folder):
    os.mkfifo(folder / "pipe.png")
    return "pipe.png"


def _device(folder):
    (folder / "device.png").symlink_to("/dev/zero")
    return "device.png"


def _broken_link(folder):
    (folder / "broken.png").symlink_to("nowhere.png")
    return "broken.png"


def _link_to_itself(folder):
    (folder / "loop.png").symlink_to("loop.png")
    return "loop.png"


def _loop(folder):
    (folder / "again").symlink_to(folder)
    return "again"


def _loop_through_the_parent(folder):
    (folder / "up").symlink_to(folder.parent)
    return "up"


def _class_twice(folder):
    (folder / "other").symlink_to(next(each for each in folder.parent.iterdir() if each != folder))
    return "other"


def _image_twice(folder):
    (folder / "twin.png").symlink_to(folder / "01.png")
    return "twin.png"


def _image_from_outside_twice(folder):
    outside = folder.parent.parent.parent / "outside.png"
    shutil.copy(folder / "01.png", outside)
    for name in ("one.png", "two.png"):
        (folder / name).symlink_to(outside)
    return "outside|one|two"


TRAPS = [
    _pipe, _device, _broken_link, _link_to_itself, _loop, _loop_through_the_parent, _class_twice, _image_twice,
    _image_from_outside_twice,
]  # fmt: skip


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__.strip("_"))
def test_folders_that_hang_or_count_twice_are_refused(trap, dataset, copied):
    name = trap(copied / "train" / "digit 0")
    with pytest.raises(DataError, match=name) as refused:
        data.open_split(data_dir=str(copied), split="train", dataset=dataset)
    assert refused.value.exit_status == 65
    assert str(copied) in str(refused.value)


def test_links_to_folders_and_files_elsewhere_are_followed(copied, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (copied / "train" / "digit 0").rename(elsewhere)
    (copied / "train" / "digit 0").symlink_to(elsewhere)
    (copied / "train" / "digit 1" / "linked.png").symlink_to(copied / "val" / "digit 1" / "20.png")
    assert len(data.open_split(data_dir=str(copied), split="train")) == 61


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


def test_class_maps_are_never_unpickled(digits, tmp_path):
    (tmp_path / "classes.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(UserError, match=r"a class map is a text file \(\.txt\)"):
        data.open_split(data_dir=str(digits), split="train", class_map=str(tmp_path / "classes.pkl"))
