"""object_detection/tools/predict.py."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from checkout import load_program
from mambavision import save_checkpoint
from mambavision.errors import CheckpointError, DataError, OutputError, UserError
from mambavision.openmmlab.prediction import detection

pytest.importorskip("mmdet")

CLASSES = ["cat", "dog", "traffic light"]
CONFIG = """
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
custom_imports = dict(imports=["mambavision.openmmlab"])
default_scope = "mmdet"
classes = ("cat", "dog", "traffic light")
norm = dict(type="SyncBN")
head = dict(in_channels=16, num_classes=3)
model = dict(
    backbone=dict(
        _delete_=True, type="MM_mamba_vision", dim=16, in_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4),
        window_size=(8, 8, 4, 2), pretrained="nowhere.pth",
    ),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16, norm_cfg=norm),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(**head, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(**head, conv_out_channels=16),
    ),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(max_per_img=4)),
)
test_dataloader = dict(
    dataset=dict(
        type="RepeatDataset",
        times=1,
        dataset=dict(
            type="CocoDataset",
            metainfo=dict(classes=classes),
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="Resize", scale=(128, 96), keep_ratio=True),
                dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
                dict(type="PackDetInputs", meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor")),
            ],
        ),
    )
)
"""


@pytest.fixture(scope="session")
def tool():
    return load_program("object_detection/tools/predict.py")


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """Config and checkpoint of a small detector with random weights."""
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    import mambavision.openmmlab  # noqa: F401

    folder = tmp_path_factory.mktemp("detector")
    config, checkpoint = folder / "tiny.py", folder / "tiny.pth"
    config.write_text(CONFIG)
    torch.manual_seed(0)
    init_default_scope("mmdet")
    model = MODELS.build(Config.fromfile(config).model)
    meta = {"dataset_meta": {"CLASSES": tuple(CLASSES)}, "epoch": 1}
    save_checkpoint({"state_dict": model.state_dict(), "meta": meta}, checkpoint)
    return config, checkpoint


@pytest.fixture
def photos(tmp_path):
    """A folder of images of every kind that is to be expected, and something that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels).save(folder / "more" / "a.jpg")
    Image.fromarray(pixels[..., 0]).save(folder / "a.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "deep.png")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(folder / "transparent.webp")
    Image.fromarray(pixels[:1, :1]).save(folder / "a.bmp")
    (folder / "notes.txt").write_text("hello")
    return folder


@pytest.fixture
def video(tmp_path):
    import cv2

    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV has no MPEG-4 encoder")
    for brightness in range(3):
        writer.write(np.full((48, 64, 3), 60 * brightness, np.uint8))
    writer.release()
    return path


@pytest.fixture
def detect(tool, detector, tmp_path):
    """Run the program in this process; return the content of predictions.json."""

    def run(*inputs, out=tmp_path / "out", config=detector[0], checkpoint=detector[1]):
        words = [*inputs, "--config", config, "--checkpoint", checkpoint, "--out", out, "--device", "cpu"]
        detection.detect(**vars(tool.options([str(word) for word in [*words, "--score-threshold", "0.1"]])))
        return json.loads((out / detection.RESULTS).read_text())

    return run


def test_folder_becomes_pictures_and_results_that_pycocotools_reads(detect, photos, tmp_path, capsys):
    from pycocotools.coco import COCO

    result = detect(photos, "--batch-size", "4")
    out = tmp_path / "out"
    pictures = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"predictions.json"}
    assert pictures == {"a.jpg", "a.png", "a_2.png", "deep.png", "transparent.png", "more/a.jpg"}
    assert len(result["images"]) == len(pictures)
    assert [each["name"] for each in result["categories"]] == CLASSES
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in result["images"]}
    assert sizes[str(photos / "more" / "a.jpg")] == (64, 48)
    assert sizes[str(photos / "a.bmp")] == (1, 1)
    assert Image.open(out / "more" / "a.jpg").size == (64, 48)

    coco = COCO(str(out / "predictions.json"))
    number = next(image["id"] for image in result["images"] if image["file_name"].endswith("a.jpg"))
    first = coco.imgToAnns[number][0]
    assert coco.annToMask(first).shape == (48, 64)
    assert 0.1 <= first["score"] <= 1
    x, y, width, height = first["bbox"]
    assert 0 <= x < x + width <= 64
    assert 0 <= y < y + height <= 48
    assert coco.loadRes(result["annotations"]).anns.keys() == coco.anns.keys()


def test_results_are_those_of_mmdetection(detect, detector, photos):
    from mmdet.apis import inference_detector, init_detector

    result = detect(photos / "a.jpg")
    model = init_detector(str(detector[0]), str(detector[1]), palette="coco", device="cpu")
    found = inference_detector(model, str(photos / "a.jpg")).pred_instances
    boxes = torch.tensor([each["bbox"] for each in result["annotations"]])
    boxes[:, 2:] += boxes[:, :2]
    assert len(boxes) == 4
    torch.testing.assert_close(boxes, found.bboxes, atol=0.02, rtol=0)
    assert [each["category_id"] - 1 for each in result["annotations"]] == found.labels.tolist()


def test_images_are_turned_upright(detect, photos):
    image = Image.open(photos / "a.jpg")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(photos / "turned.jpg", exif=exif)
    [entry] = detect(photos / "turned.jpg", "--no-pictures")["images"]
    assert (entry["width"], entry["height"]) == (48, 64)


def test_video(detect, video, tmp_path):
    import cv2

    result = detect(video)
    assert [image["frame"] for image in result["images"]] == [0, 1, 2]
    written = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert written.get(cv2.CAP_PROP_FPS) == 5


def test_results_inside_the_input_folder_are_no_input(detect, photos):
    first = detect(photos, out=photos / "found")
    assert detect(photos, out=photos / "found") == first


def test_same_file_counts_once_and_same_names_do_not_collide(detect, photos, tmp_path):
    result = detect(photos / "a.jpg", str(photos / "a.*g"), photos / "more" / "a.jpg")
    assert len(result["images"]) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.jpg", "a.png", "a_2.jpg", "predictions.json",
    ]  # fmt: skip


def test_no_pictures(detect, photos, tmp_path):
    detect(photos / "a.jpg", "--no-pictures")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]


def test_categories_of_coco_have_its_numbers(tool):
    from mmdet.datasets import CocoDataset

    categories = detection.Results(list(CocoDataset.METAINFO["classes"])).content["categories"]
    assert [categories[0]["id"], categories[-1]["id"], len(categories)] == [1, 90, 80]
    assert {"id": 13, "name": "stop sign"} in categories


# Errors


def broken(photos, name):
    path = photos / name
    if name == "text.jpg":
        path.write_text("hello")
    elif name == "cut.jpg":
        path.write_bytes((photos / "a.jpg").read_bytes()[:-500])
    elif name == "cut.png":
        path.write_bytes((photos / "a.png").read_bytes()[:-500])
    elif name == "text.mp4":
        path.write_text("hello")
    elif name == "float.tif":  # Pillow reads it, OpenCV does not
        Image.fromarray(np.zeros((48, 64), np.float32)).save(path)
    elif name == "empty":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jpeg", r"a\.jpeg: no such file or folder\. Did you mean 'a.jpg'\?"),
        ("empty", "empty: no image or video there"),
        ("text.jpg", r"text\.jpg: is not an image"),
        ("cut.jpg", r"cut\.jpg: cannot be decoded"),
        ("cut.png", r"cut\.png: cannot be decoded"),
        ("float.tif", r"float\.tif: cannot be decoded by OpenCV; convert it"),
        ("text.mp4", r"text\.mp4: cannot be read as a video"),
    ],
)
def test_broken_inputs_are_named_before_the_model_is_built(detect, photos, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr("mmengine.registry.Registry.build", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(DataError, match=message):
        detect(photos / "more", broken(photos, name))
    assert not (tmp_path / "out").exists()


def test_image_too_narrow_for_the_pipeline(tool, detect, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(detection.Detector, "detect", lambda *_: pytest.fail("was found too late"))
    Image.new("RGB", (1000, 1)).save(photos / "line.png")
    with pytest.raises(DataError, match=r"line\.png: 1000 x 1 pixels are too narrow"):
        detect(photos / "a.jpg", photos / "line.png")
    assert not (tmp_path / "out").exists()


def test_inputs_are_not_overwritten(detect, photos):
    before = (photos / "a.jpg").read_bytes()
    with pytest.raises(UserError, match=r"would overwrite the input .*a\.jpg; choose another folder"):
        detect(photos / "a.jpg", out=photos)
    assert (photos / "a.jpg").read_bytes() == before


def test_out_is_a_file(detect, photos):
    with pytest.raises(OutputError, match=r"notes\.txt.* cannot be written"):
        detect(photos, out=photos / "notes.txt")


def test_config_is_missing(detect, detector, photos):
    with pytest.raises(UserError, match=r"tinny\.py: no such config file.*'tiny\.py'"):
        detect(photos, config=detector[0].with_name("tinny.py"))


def test_config_without_a_model(detect, photos, tmp_path):
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(UserError, match=r"empty\.py: has no model"):
        detect(photos / "a.jpg", config=tmp_path / "empty.py")


def test_checkpoint_of_another_detector(detect, detector, photos, tmp_path):
    content = torch.load(detector[1])
    content["state_dict"] = {"backbone.conv1.weight": torch.ones(2), **content["state_dict"]}
    del content["state_dict"]["neck.fpn_convs.0.conv.weight"]
    save_checkpoint(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"neck.fpn_convs.0.conv.weight.*backbone.conv1") as caught:
        detect(photos, checkpoint=tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_checkpoint_of_other_classes(detect, detector, photos, tmp_path):
    content = torch.load(detector[1])
    content["meta"]["dataset_meta"] = {"classes": ("cat", "dog")}
    save_checkpoint(content, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"two\.pth: names 2 classes, but the heads of .*tiny\.py have 3"):
        detect(photos, checkpoint=tmp_path / "two.pth")


def test_classes_come_from_the_config_if_the_checkpoint_has_none(detect, detector, photos, tmp_path):
    content = torch.load(detector[1])
    save_checkpoint({"state_dict": content["state_dict"]}, tmp_path / "bare.pth")
    result = detect(photos / "a.jpg", "--no-pictures", checkpoint=tmp_path / "bare.pth")
    assert [each["name"] for each in result["categories"]] == CLASSES
    options = ["--cfg-options", "test_dataloader.dataset.dataset.metainfo.classes=('cat','dog')"]
    with pytest.raises(UserError, match=r"tiny\.py: names 2 classes"):
        detect(photos / "a.jpg", *options, checkpoint=tmp_path / "bare.pth")


def test_video_that_cannot_be_written(detect, video, tmp_path, monkeypatch):
    monkeypatch.setattr("cv2.VideoWriter.write", lambda *_: None)
    with pytest.raises(OutputError, match=r"clip\.mp4: the video cannot be written"):
        detect(video)
    assert not (tmp_path / "out").exists()


def test_program(run_program, detector, photos):
    run_program("object_detection/tools/predict.py", "--help")
    shutil.rmtree(photos / "more")
    words = [photos / "nothing", "--config", detector[0], "--checkpoint", detector[1], "--device", "cpu"]
    failed = run_program("object_detection/tools/predict.py", *words, check=False)
    assert failed.returncode == 65
    assert failed.stderr == f"error: {photos / 'nothing'}: no such file or folder.\n"
