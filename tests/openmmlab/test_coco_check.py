"""Checks of data sets in COCO's layout: before training, and by object_detection/tools/check_data.py."""

import copy
import importlib.util
import json
import logging
import time

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from mambavision.errors import DataError

pytest.importorskip("mmdet")

from mmengine.config import Config

from mambavision.openmmlab.coco import Findings, check_datasets, examine_annotations, missing_files

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
    spec = importlib.util.spec_from_file_location("check_data", ROOT / "object_detection/tools/check_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        (set_text('{"images": ['), r"train\.json: is no JSON, perhaps cut short"),
        (set_text("[]"), r"train\.json: has no list of images; it must be in COCO's format"),
        (remove("images"), r"train\.json: has no images"),
        (remove("annotations"), r"train\.json: has no annotations"),
        (rename, r"has no category 'kite', .* Did you mean 'kit'\? It has cat, dog, kit: name these"),
        (no_classes, r"has no category 'person'.* \(nor 7\d others\)"),
        (one_class_without_comma, r"classes is the text 'cat': write \('cat',\)"),
        (swap, r"in another order or twice.* write them in this order: 'kite', 'dog', 'cat'\.$"),
        (take_area, r"entry 1 of annotations has no area\.$"),
        (take_segmentation, r"annotations without segmentation: 2; a model with masks"),
        (repeat_id, r"annotations have the same id: 1; ids must be unique"),
        (more_classes, r"the config trains 3 classes, but num_classes of the model's heads is 3 and 80"),
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
    with pytest.raises(DataError, match=r"pictures: has not all images that .*train\.json names: sub/1\.jpg\.$"):
        data.check()


def test_remarks_do_not_stop_training(data, caplog):
    boxes = [[5, 5, 0, 4], [35, 5, 20, 4], [5, 5, 4, -1]]
    for entry, box in zip(data.ann["annotations"], boxes, strict=False):
        entry["bbox"] = box
    with caplog.at_level(logging.WARNING):
        data.check()
    assert "box without area: annotation 1, 3" in caplog.text
    assert "box outside the image: annotation 2" in caplog.text


def test_only_the_first_process_of_a_machine_checks(data, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    no_root(data)
    data.check()


def test_large_data_are_fast(tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 640, "height": 480} for n in range(5_000)]
    for image in images:
        (tmp_path / image["file_name"]).touch()
    entry = {"category_id": 1, "bbox": [1, 1, 9, 9], "area": 1, "segmentation": [[1, 1, 2, 2, 3, 3]]}
    objects = [{"id": n, "image_id": n // 28, **entry} for n in range(140_000)]
    findings = Findings({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]})
    started = time.process_time()
    examine_annotations(findings)
    assert missing_files(images, tmp_path) == []
    assert time.process_time() - started < 2  # COCO is six times as large
    assert not findings.problems + findings.remarks


# The program


def run(tool, data, *words):
    if data.ann is not None:
        data.path.write_text(json.dumps(data.ann))
    tool.check(tool.options(["--root", str(data.root), *words]))


OWN = ("--ann", "ann/train.json", "--images", "pictures")


def test_table_of_good_data(tool, data, capsys):
    run(tool, data, *OWN, "--full")
    shown = capsys.readouterr().out
    assert "ann/train.json" in shown
    assert "images without objects: 1" in shown


def test_unknown_references(tool, data, capsys):
    data.ann["annotations"][0]["image_id"] = 99
    data.ann["annotations"][1]["category_id"] = 98
    data.ann["annotations"][2]["bbox"] = [1, 2]
    with pytest.raises(DataError, match=r"3 problem\(s\), .*json: image_id of no image: annotation 1"):
        run(tool, data, *OWN)
    assert "train.json: bbox is not [x, y, width, height]: annotation 3\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["other size", "text", "turned"])
def test_sizes(tool, data, content):
    path = data.images / "sub" / "2.jpg"
    if content == "text":
        path.write_text("hello")
    else:
        image = Image.new("RGB", (40, 30) if content == "turned" else (41, 30))
        image.getexif()[0x0112] = 6 if content == "turned" else 1
        image.save(path, exif=image.getexif())
    expected = {"other size": "41 x 30, stated: 40 x 30", "text": "no image", "turned": "30 x 40, stated"}[content]
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
    started = time.monotonic()
    run_program(program, "--help")
    assert time.monotonic() - started < 3
    failed = run_program(program, check=False, COCO_ROOT="nowhere")
    assert failed.returncode == 65
    assert failed.stderr.startswith("error: nowhere: 2 problem(s), the first: nowhere/annotations/instances_train2017")
    assert "annotations_trainval2017.zip (241 MB) in nowhere." in failed.stderr
    assert failed.stderr.count("\n") == 1
    unequal = run_program(program, "--ann", "a.json", check=False)
    assert "as many --images as --ann" in unequal.stderr
