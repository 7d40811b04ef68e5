"""The data sets of digits on photographs: what is in them, and that they are written once."""

import json

import mmcv
import numpy as np
import pytest
from pycocotools.coco import COCO
from scenes import CLASSES, Options, scan_numbers, scenes, write_scenes

from mambavision.errors import OutputError

OPTIONS = Options(train=6, val=3)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The same pictures in both layouts."""
    folder = tmp_path_factory.mktemp("data")
    for layout in ("coco", "ade20k"):
        assert write_scenes(folder / layout, layout, OPTIONS)
    return folder


def annotations(root, split):
    return COCO(root / "coco" / "annotations" / f"instances_{split}.json")


def contents(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 3)])
def test_coco_describes_the_pictures(roots, split, count):
    coco = annotations(roots, split)
    assert len(coco.imgs) == count
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for number, (picture, digits) in enumerate(scenes(split, OPTIONS)):
        image = coco.imgs[number]
        written = mmcv.imread(str(roots / "coco" / split / image["file_name"]))
        assert written.shape == (image["height"], image["width"], 3) == picture.shape
        assert np.abs(written.astype(int) - picture).mean() < 10
        found = coco.imgToAnns[number]
        assert 1 <= len(found) == len(digits) <= OPTIONS.most
        for annotation, digit in zip(found, digits, strict=True):
            mask = coco.annToMask(annotation)
            assert (mask == digit.mask).all()
            rows, columns = mask.nonzero()
            size = [np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == [columns.min(), rows.min(), *size]
            assert annotation["area"] == mask.sum() > 0
            assert annotation["category_id"] == digit.label


def test_mmdet_reads_it(roots):
    from mmdet.datasets import CocoDataset  # needs the adapter
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    dataset = CocoDataset(
        ann_file="annotations/instances_train.json",
        data_root=str(roots / "coco"),
        data_prefix={"img": "train/"},
        metainfo={"classes": CLASSES},
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        ],
    )
    coco = annotations(roots, "train")
    for sample in dataset:
        expected = coco.imgToAnns[sample["img_id"]]
        assert sample["gt_bboxes_labels"].tolist() == [annotation["category_id"] for annotation in expected]
        assert (sample["gt_masks"].masks == [coco.annToMask(annotation) for annotation in expected]).all()


def test_digits_are_those_of_the_scans(roots):
    from sklearn.datasets import load_digits

    labels = load_digits().target
    numbers = {split: set(scan_numbers(split).tolist()) for split in ("train", "val")}
    assert not numbers["train"] & numbers["val"]
    assert len(numbers["train"] | numbers["val"]) == len(labels)
    for split in numbers:
        for annotation in annotations(roots, split).anns.values():
            assert annotation["scan"] in numbers[split]
            assert annotation["category_id"] == labels[annotation["scan"]]


def test_held_out_pictures_show_no_trained_part_of_a_photograph(monkeypatch):
    import scenes as module

    ramp = np.zeros((200, 640, 3), np.uint8)
    ramp[:, :192] = 255
    monkeypatch.setattr(module, "_photographs", lambda: [ramp])
    for split, level in (("train", 0), ("val", 255)):
        for picture, digits in scenes(split, Options(train=20, val=20)):
            nothing = ~np.any([digit.mask for digit in digits], 0)
            assert (np.median(picture[nothing], 0) == level).all()
            assert (picture[[0, -1]][:, [0, -1]] == level).any()


@pytest.mark.parametrize(("split", "folder"), [("train", "training"), ("val", "validation")])
def test_ade20k_has_the_same_masks(roots, split, folder):
    coco = annotations(roots, split)
    root = roots / "ade20k"
    files = sorted((root / "annotations" / folder).iterdir())
    assert [file.stem for file in files] == [file.stem for file in sorted((root / "images" / folder).iterdir())]
    assert len(files) == len(coco.imgs)
    for number, file in enumerate(files):
        image = root / "images" / folder / f"{file.stem}.jpg"
        assert image.read_bytes() == (roots / "coco" / split / f"{file.stem}.jpg").read_bytes()
        classes = mmcv.imread(str(file), flag="unchanged")
        assert classes.dtype == np.uint8
        expected = np.ones_like(classes)
        for annotation in coco.imgToAnns[number]:
            expected[coco.annToMask(annotation) > 0] = 2 + annotation["category_id"]
        assert (classes == expected).all()


def test_sizes_are_kept():
    options = Options(train=20, side=200, digit_sides=(100, 120), most=1, angle=0)
    for picture, (digit,) in scenes("train", options):
        assert picture.shape == (200, 200, 3)
        assert digit.mask.shape == (200, 200)
        assert 90 <= max(digit.box[2:]) <= 120


def test_same_options_give_the_same_files(roots, tmp_path):
    write_scenes(tmp_path / "again", "coco", OPTIONS)
    assert contents(tmp_path / "again") == contents(roots / "coco")
    write_scenes(tmp_path / "other", "coco", Options(train=6, val=3, seed=1))
    assert contents(tmp_path / "other") != contents(roots / "coco")


def test_is_written_once(tmp_path):
    small = Options(train=2, val=1)
    assert write_scenes(tmp_path / "set", "coco", small)
    complete = contents(tmp_path / "set")
    assert not write_scenes(tmp_path / "set", "coco", small)
    assert write_scenes(tmp_path / "set", "coco", Options(train=1, val=1))
    assert len(contents(tmp_path / "set")) == len(complete) - 1


def test_incomplete_set_is_written_again(tmp_path, monkeypatch):
    import scenes as module

    def interrupt(root, split, options):
        (root / split).mkdir()
        (root / split / "00009.jpg").touch()
        raise KeyboardInterrupt

    small = Options(train=2, val=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_coco", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_scenes(tmp_path, "coco", small)
    assert write_scenes(tmp_path, "coco", small)
    assert not (tmp_path / "train" / "00009.jpg").exists()
    assert json.loads((tmp_path / "scenes.json").read_text())["complete"]


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="choose a new folder"):
        write_scenes(tmp_path, "coco", OPTIONS)
    assert contents(tmp_path) == {"thesis.txt": b"all of it"}
