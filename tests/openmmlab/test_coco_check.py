"""Checks of data sets in COCO's layout: before training, and by object_detection/tools/check_data.py."""

import copy
import json
import logging

import numpy as np
import pytest
from PIL import Image

from checkout import load_program
from mambavision.errors import DataError
from mambavision.openmmlab.data.coco_check import check

pytest.importorskip("mmdet")

from mmengine.config import Config

from mambavision.openmmlab.data.coco import check_datasets

CLASSES = ("cat", "dog", "kite")


def annotations(names=CLASSES):
    """Two images with two objects each, and one without."""
    triangle = [[1, 1, 10, 1, 10, 10]]
    return {
        "images": [{"id": 10 + n, "file_name": f"sub/{n}.jpg", "width": 40, "height": 30} for n in range(3)],
        "categories": [{"id": 2 * n + 1, "name": name} for n, name in enumerate(names)],
        "annotations": [
            {
                "id": n + 1,
                "image_id": 10 + n // 2,
                "category_id": 2 * (n % 3) + 1,
                "bbox": [1, 1, 9, 9],
                "area": 40.5,
                "iscrowd": 0,
                "segmentation": triangle,
            }
            for n in range(4)
        ],
    }


class Data:
    """A data set on disk; `ann` is written anew before each check."""

    def __init__(self, root):
        self.root, self.images, self.path = root, root / "pictures", root / "ann" / "train.json"
        (self.images / "sub").mkdir(parents=True)
        self.path.parent.mkdir()
        self.ann = annotations()
        for image in self.ann["images"]:
            Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(self.images / image["file_name"])
        part = {
            "type": "CocoDataset",
            "data_root": str(root),
            "ann_file": "ann/train.json",
            "data_prefix": {"img": "pictures/"},
            "metainfo": {"classes": CLASSES},
            "pipeline": [{"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}],
        }
        head = {"num_classes": 3}
        self.cfg = Config(
            {
                "model": {"rpn_head": {"num_classes": 1}, "roi_head": {"bbox_head": [head, head], "mask_head": head}},
                "train_dataloader": {
                    "dataset": {"type": "RepeatDataset", "dataset": {"type": "ConcatDataset", "datasets": [part]}}
                },
                "val_dataloader": {"dataset": copy.deepcopy(part)},
                "val_evaluator": {"type": "CocoMetric", "ann_file": str(self.path)},
            }
        )  # fmt: skip

    @property
    def train(self):
        return self.cfg.train_dataloader.dataset.dataset.datasets[0]

    def check(self):
        if self.ann is not None:
            self.path.write_text(json.dumps(self.ann))
        check_datasets(self.cfg)


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path / "own")


@pytest.fixture(scope="module")
def tool():
    return load_program("object_detection/tools/check_data.py")


# Before training


def test_good_data_pass(data, caplog):
    with caplog.at_level(logging.WARNING):
        data.check()
    assert caplog.text.count("images without objects: 1") == 2  # as training and validation data


def test_mmdetection_reads_what_passes(data):
    from mmdet.registry import DATASETS

    data.check()
    dataset = DATASETS.build({**data.train, "pipeline": []})
    assert [len(each["instances"]) for each in dataset] == [2, 2, 0]


def test_other_data_sets_are_left_to_mmdetection(data):
    data.cfg.train_dataloader.dataset = {"type": "VOCDataset", "data_root": "nowhere"}
    data.check()


def set_text(text):
    def change(data):
        data.ann = None
        data.path.write_text(text)

    return change


def remove(key):
    return lambda data: data.ann.update({key: []})


def rename(data):
    data.ann["categories"][2]["name"] = "kit"


def swap(data):
    data.ann["categories"].reverse()


def take_area(data):
    del data.ann["annotations"][1]["area"]


def take_segmentation(data):
    data.ann["annotations"][1]["segmentation"] = []


def repeat_id(data):
    data.ann["annotations"][1]["id"] = 1


def more_classes(data):
    data.cfg.model.roi_head.mask_head.num_classes = 80


def no_classes(data):
    del data.train["metainfo"]


def one_class_without_comma(data):
    data.train.metainfo.classes = "cat"


def no_root(data):
    data.train.data_root = str(data.root.with_name("coco"))


def set_value(key, name, value):
    return lambda data: data.ann[key][1].update({name: value})


def only_other_categories(data):
    for entry in data.ann["annotations"]:
        entry["category_id"] = 77


def only_small_images(data):
    data.train.filter_cfg = {"filter_empty_gt": True, "min_size": 31}


def only_boxes_without_area(data):
    for entry in data.ann["annotations"]:
        entry["area"] = 0


def no_annotations(data):
    data.train.ann_file = "ann/trian.json"


def other_ground_truth(data):
    data.cfg.val_evaluator.ann_file = "coco/val.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_root, r"coco: no such folder; .*coco/ann/train\.json and images in .*coco/pictures: .*COCO_ROOT\.$"),
        (no_annotations, r"ann/trian\.json: no such file\. Did you mean 'train\.json'\?$"),
        (set_text(""), r"train\.json: the file is empty"),
        (set_text('{"images": ['), r"train\.json: is not valid JSON, perhaps truncated"),
        (set_text("[]"), r"train\.json: has no list of images; it must be in COCO's format"),
        (remove("images"), r"train\.json: has no images"),
        (remove("annotations"), r"train\.json: has no annotations"),
        (rename, r"has no category 'kite', .* Did you mean 'kit'\? It has cat, dog, kit; set these"),
        (no_classes, r"has no category 'person'.* \(nor 7\d others\)"),
        (one_class_without_comma, r"classes is the string 'cat': write \('cat',\)"),
        (swap, r"in another order or twice.* list them in this order: 'kite', 'dog', 'cat'\.$"),
        (take_area, r"entry 1 of annotations has no area\.$"),
        (take_segmentation, r"annotations without segmentation: 2; a model with masks"),
        (repeat_id, r"annotations have the same id: 1; ids must be unique"),
        (more_classes, r"the config trains 3 classes, but num_classes of the model's heads is 3 and 80"),
        (only_other_categories, r"train\.json: has no object of the config's classes: nothing to train on\.$"),
        (only_boxes_without_area, r"has no object of the config's classes: nothing to train on\.$"),
        (only_small_images, r"classes in images of at least 31 pixels \(filter_cfg\.min_size\): nothing to train on"),
        (other_ground_truth, r"val_evaluator\.ann_file is coco/val\.json, but val_dataloader reads .*train\.json"),
    ],
)  # fmt: skip
def test_bad_data_are_one_sentence(data, change, message):
    change(data)
    with pytest.raises(DataError, match=message) as caught:
        data.check()
    assert "\n" not in str(caught.value)


def test_missing_image(data):
    (data.images / "sub" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"pictures: lacks images of .*train\.json: sub/1\.jpg\.$"):
        data.check()


def test_empty_image(data):
    (data.images / "sub" / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"pictures: has empty files: sub/1\.jpg; download or copy them again\.$"):
        data.check()


def test_images_behind_links(data):
    (data.images / "sub").rename(data.root / "elsewhere")
    (data.images / "sub").symlink_to("../elsewhere")
    data.check()
    (data.root / "elsewhere" / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"has empty files: sub/1\.jpg;"):
        data.check()


def test_validation_data_need_no_object_of_the_classes(data, tmp_path):
    other = Data(tmp_path / "other")
    only_other_categories(other)
    other.path.write_text(json.dumps(other.ann))
    data.cfg.val_dataloader.dataset.data_root = str(other.root)
    data.cfg.val_evaluator.ann_file = str(other.path)
    data.check()


WRONG_VALUES = [
    ("annotations", "area", None, "null; it must be a finite number"),
    ("annotations", "area", 10**400, r"10{39}\.\.\.; it must be a finite number"),
    ("annotations", "id", [1], r"\[1\]; it must be an integer or a string"),
    ("annotations", "category_id", True, "true; it must be an integer"),
    ("annotations", "bbox", [1, 2], r"\[1, 2\]; it must be \[x, y, width, height\] in finite numbers"),
    ("annotations", "bbox", [1, float("nan"), 9, 9], r"\[1, NaN, 9, 9\]; it must be \[x, y, width, height\]"),
    ("images", "width", None, "null; it must be a finite number"),
    ("images", "height", "30", '"30"; it must be a finite number'),
    ("images", "file_name", 7, "7; it must be a string"),
    ("categories", "name", 3, "3; it must be a string"),
]


@pytest.mark.parametrize(("key", "name", "value", "message"), WRONG_VALUES)
def test_wrong_types_are_one_sentence_for_both_programs(tool, data, key, name, value, message):
    set_value(key, name, value)(data)
    message = rf"train\.json: entry 1 of {key} has the {name} {message}[^;]*\.$"
    with pytest.raises(DataError, match=message) as caught:
        data.check()
    with pytest.raises(DataError, match="1 problem") as reported:
        run(tool, data, *OWN)
    assert str(caught.value) in str(reported.value)


def test_remarks_do_not_stop_training(data, caplog):
    boxes = [[5, 5, 0, 4], [35, 5, 20, 4], [5, 5, 4, -1]]
    for entry, box in zip(data.ann["annotations"], boxes, strict=False):
        entry["bbox"] = box
    with caplog.at_level(logging.WARNING):
        data.check()
    assert "box without area: annotation 1, 3" in caplog.text
    assert "box outside the image: annotation 2" in caplog.text


def test_every_process_checks_and_the_first_one_tells(data, monkeypatch, caplog):
    for name, value in {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        data.check()
    assert not caplog.records
    no_root(data)
    with pytest.raises(DataError, match="no such folder"):
        data.check()


# The program


def run(tool, data, *words):
    if data.ann is not None:
        data.path.write_text(json.dumps(data.ann))
    check(**vars(tool.options(["--root", str(data.root), *words])))


OWN = ("--ann", "ann/train.json", "--images", "pictures")


def test_table_of_good_data(tool, data, capsys):
    run(tool, data, *OWN, "--full")
    shown = capsys.readouterr().out
    assert "ann/train.json" in shown
    assert "images without objects: 1" in shown


def test_unknown_references(tool, data, capsys):
    data.ann["annotations"][0]["image_id"] = 99
    data.ann["annotations"][1]["category_id"] = 98
    data.ann["categories"].append({"id": 6, "name": "cat"})
    with pytest.raises(DataError, match=r"3 problem\(s\), .*json: image_id of no image: annotation 1"):
        run(tool, data, *OWN)
    shown = capsys.readouterr().out
    assert "train.json: category_id of no category: annotation 2\n" in shown
    assert "train.json: 2 categories have the name cat\n" in shown


@pytest.mark.parametrize("change", [only_other_categories, only_boxes_without_area])
def test_data_without_objects_are_not_good(tool, data, capsys, change):
    change(data)
    with pytest.raises(DataError, match="problem"):
        run(tool, data, *OWN)
    assert "train.json: no object that MMDetection would use\n" in capsys.readouterr().out


def test_segmentation_is_left_to_the_config(tool, data, capsys):
    take_segmentation(data)
    run(tool, data, *OWN)
    assert "no segmentation: annotation 2" in capsys.readouterr().out


def test_damaged_images(tool, data, capsys):
    cut = data.images / "sub" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:-50])
    (data.images / "sub" / "2.jpg").write_text("hello")
    (data.images / "sub" / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 problem\(s\), the first: .*pictures: empty files: sub/0\.jpg"):
        run(tool, data, *OWN)
    assert "pictures: cannot be decoded as an image: sub/1.jpg, sub/2.jpg\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["other size", "turned"])
def test_sizes(tool, data, content):
    path = data.images / "sub" / "2.jpg"
    image = Image.new("RGB", (40, 30) if content == "turned" else (41, 30))
    image.getexif()[0x0112] = 6 if content == "turned" else 1
    image.save(path, exif=image.getexif())
    expected = {"other size": "41 x 30, stated: 40 x 30", "turned": "30 x 40, stated"}[content]
    with pytest.raises(DataError, match=rf"other sizes than stated: sub/2\.jpg \({expected}"):
        run(tool, data, *OWN, "--full")


def test_coco_must_be_complete(tool, tmp_path, capsys):
    data = Data(tmp_path / "coco")
    for part in ("train", "val"):
        (data.root / f"{part}2017").symlink_to("pictures")
        (data.root / "annotations").mkdir(exist_ok=True)
        (data.root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(data.ann))
    with pytest.raises(DataError, match=r"4 problem\(s\), .*: 3 images instead of 118287.* train2017\.zip"):
        run(tool, data)
    assert "3 of 5000" in " ".join(capsys.readouterr().out.split())


def test_program(run_program, tmp_path):
    program = "object_detection/tools/check_data.py"
    run_program(program, "--help")
    failed = run_program(program, check=False, COCO_ROOT="nowhere")
    assert failed.returncode == 65
    assert failed.stderr.startswith("error: nowhere: 2 problem(s), the first: nowhere/annotations/instances_train2017")
    assert "annotations_trainval2017.zip (241 MB) in nowhere." in failed.stderr
    assert failed.stderr.count("\n") == 1
    unequal = run_program(program, "--ann", "a.json", check=False)
    assert "as many --images as --ann" in unequal.stderr
