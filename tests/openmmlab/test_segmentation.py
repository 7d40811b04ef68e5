"""Training, resuming, scoring and predicting with a small segmentation model, and everything that can be wrong."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkout import ROOT, load_program
from mambavision.checkpoint import read_checkpoint, save_checkpoint
from mambavision.errors import CheckpointError, DataError, UserError
from mambavision.openmmlab.config import load_config
from mambavision.openmmlab.data.segmentation import check
from mambavision.openmmlab.prediction.segmentation import segment
from mambavision.openmmlab.training.options import TestOptions, TrainOptions
from mambavision.openmmlab.training.segmentation import SEGMENTATION
from mambavision.openmmlab.training.test import test as run_test
from mambavision.openmmlab.training.train import train as run_train
from small_runs import identical

TOOLS = ROOT / "semantic_segmentation" / "tools"
CONFIG = ROOT / "tests" / "openmmlab" / "small_segmenter.py"
SEGMAN = ROOT / "tests" / "openmmlab" / "small_segman.py"
SLIDE = ("model.test_cfg.mode=slide", "model.test_cfg.crop_size=(48,48)", "model.test_cfg.stride=(32,32)")


def forget_visualizer():
    """mmengine keeps the first run's for the process."""
    from mmseg.visualization import SegLocalVisualizer

    SegLocalVisualizer._instance_dict.clear()


def train_in(work_dir, monkeypatch, *words, config=CONFIG):
    forget_visualizer()
    args = TrainOptions.parse([str(config), "--work-dir", str(work_dir), *map(str, words)])
    run_train(args, SEGMENTATION)
    return work_dir


@pytest.fixture(scope="session")
def ade_scenes(tmp_path_factory):
    """Six pictures of digits to train on and two held out, in ADE20K's format."""
    from scenes import Options, write_scenes

    root = tmp_path_factory.mktemp("scenes") / "ade20k"
    write_scenes(root, "ade20k", Options(train=6, val=2, side=64, digit_sides=(28, 36), most=2))
    return root


@pytest.fixture(autouse=True)
def _data(ade_scenes, monkeypatch):
    monkeypatch.setenv("ADE20K_ROOT", str(ade_scenes))


@pytest.fixture(scope="module")
def trained(ade_scenes, tmp_path_factory):
    """The folder of a finished training."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ADE20K_ROOT", str(ade_scenes))
        return train_in(tmp_path_factory.mktemp("trained"), monkeypatch)


@pytest.fixture
def train(monkeypatch, tmp_path):
    return lambda *words, work_dir=tmp_path / "run", config=CONFIG: train_in(
        work_dir, monkeypatch, *words, config=config
    )


@pytest.fixture
def score(monkeypatch, tmp_path):

    def start(checkpoint, *words, config=CONFIG):
        forget_visualizer()
        work_dir = tmp_path / "scores"
        args = TestOptions.parse([str(config), str(checkpoint), "--work-dir", str(work_dir), *map(str, words)])
        run_test(args, SEGMENTATION)
        (metrics,) = work_dir.glob("*/*.json")
        content = json.loads(metrics.read_text())
        metrics.unlink()
        return content

    return start


@pytest.fixture
def predict(monkeypatch, trained, tmp_path):
    tool = load_program("semantic_segmentation/tools/predict.py")
    weights = ["--config", str(CONFIG), "--checkpoint", str(trained / "iter_4.pth"), "--device", "cpu"]

    def start(*words):
        segment(**vars(tool.options([*map(str, words), "--out", str(tmp_path / "out"), *weights])))
        return tmp_path / "out"

    return start


@pytest.fixture
def scenes(ade_scenes, tmp_path, monkeypatch):
    """A copy of the data set that a test may spoil."""
    shutil.copytree(ade_scenes, tmp_path / "spoiled")
    monkeypatch.setenv("ADE20K_ROOT", str(tmp_path / "spoiled"))
    return tmp_path / "spoiled"


def losses(work_dir):
    (log,) = sorted(work_dir.glob("*/vis_data/scalars.json"))[-1:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(line["iter"], line["loss"]) for line in lines if "loss" in line]


# Training and scoring


def test_training_writes_checkpoints_and_metrics(trained):
    assert {"iter_2.pth", "iter_4.pth", "last_checkpoint"} <= {path.name for path in trained.iterdir()}
    assert [iteration for iteration, _ in losses(trained)] == [1, 2, 3, 4]
    assert len(read_checkpoint(trained / "iter_4.pth")["meta"]["dataset_meta"]["classes"]) == 11
    (log,) = trained.glob("*/*.log")
    assert "training in float32 instead of mixed precision" in log.read_text()
    assert "mIoU" in log.read_text()


@pytest.mark.parametrize(("config", "workers"), [(CONFIG, 2), (SEGMAN, 0)])
def test_resumed_training_goes_on_as_if_uninterrupted(trained, train, tmp_path, config, workers):
    """With random crops, dropout and stochastic depth."""
    options = ["--cfg-options", f"train_dataloader.num_workers={workers}"]
    is_trained = (config, workers) == (CONFIG, 0)
    whole = trained if is_trained else train(*options, work_dir=tmp_path / "whole", config=config)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(whole / "iter_2.pth", resumed)
    train("--resume", *options, "randomness.seed=8", work_dir=resumed, config=config)
    assert losses(resumed) == losses(whole)[2:]
    ours, theirs = (read_checkpoint(folder / "iter_4.pth") for folder in (resumed, whole))
    assert identical(ours["state_dict"], theirs["state_dict"])


def test_resumed_training_loads_nothing_twice(train, tmp_path, monkeypatch):
    from mmseg.datasets.transforms import PackSegInputs

    loaded = []
    transform = PackSegInputs.transform
    monkeypatch.setattr(PackSegInputs, "transform", lambda *a: (loaded.append(a[1]["img_path"]), transform(*a))[1])
    words = ("train_cfg.max_iters=9", "val_cfg=None", "val_dataloader=None", "val_evaluator=None")
    whole = train("--cfg-options", *words, work_dir=tmp_path / "whole")
    order, loaded[:] = loaded[:], []
    # Every sample once before any comes again, over all checkpoints.
    assert all(len(set(order[start : start + 6])) == 6 for start in (0, 6, 12))
    work_dir = tmp_path / "resumed"
    work_dir.mkdir()
    shutil.copy(whole / "iter_8.pth", work_dir)
    train("--resume", "--cfg-options", *words, work_dir=work_dir)
    assert loaded == order[16:]


def test_resuming_with_other_batches_is_told(train, trained, tmp_path):
    """With finite passes over the data, too, and mmengine's other way to say what is counted."""
    checkpoint = read_checkpoint(trained / "iter_2.pth")
    position = checkpoint["message_hub"]["runtime_info"]["position"]
    assert position == {"batch": 2, "validates": False, "images": 2, "processes": 1}
    position |= {"images": 16, "processes": 8}
    (tmp_path / "run").mkdir()
    save_checkpoint(checkpoint, tmp_path / "run" / "iter_2.pth")
    words = ("train_dataloader.sampler.type=DefaultSampler", "train_cfg._delete_=True", "train_cfg.by_epoch=False")
    work_dir = train("--resume", "--cfg-options", *words, "train_cfg.max_iters=4", "train_cfg.val_interval=9")
    (log,) = work_dir.glob("*/*.log")
    assert "belongs to a run with 8 processes instead of 1, 16 images instead of 2 per step" in log.read_text()
    assert [iteration for iteration, _ in losses(work_dir)] == [3, 4]
    content = read_checkpoint(work_dir / "iter_4.pth")
    assert content["message_hub"]["runtime_info"]["position"] == {**position, "batch": 18, "images": 2, "processes": 1}


@pytest.mark.parametrize("config", [CONFIG, SEGMAN])
def test_single_images_become_pairs_in_one_process(train, score, config):
    work_dir = train("--cfg-options", "train_dataloader.batch_size=1", "train_cfg.max_iters=1", config=config)
    assert len(losses(work_dir)) == 1
    (log,) = work_dir.glob("*/*.log")
    assert "the global batch has 2 images, but the learning rate is for 16: set train_data" in log.read_text()
    assert 0 <= score(work_dir / "iter_1.pth", config=config)["mIoU"] <= 100


def test_scores(score, trained, tmp_path):
    checkpoint = trained / "iter_4.pth"
    metrics = score(checkpoint)
    assert metrics.keys() == {"aAcc", "mIoU", "mAcc", "data_time", "time"}
    options = ("--eval", "mIoU", "mDice", "--out", tmp_path / "masks", "--show-dir", tmp_path / "shown")
    slid = score(checkpoint, *options, "--cfg-options", *SLIDE)
    assert slid.keys() == metrics.keys() | {"mDice"}
    for number in range(2):
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{number:05d}.png"))
        assert mask.shape == (64, 64)
        assert 1 <= mask.min() <= mask.max() <= 11  # as in ADE20K's files
    assert len([*(tmp_path / "shown").rglob("*.png")]) == 2


def test_training_with_vssm(train, score, monkeypatch):
    monkeypatch.setenv("BACKBONE", "vssm")
    work_dir = train(
        "--cfg-options", "train_cfg.max_iters=2", "val_cfg=None", "val_dataloader=None", "val_evaluator=None"
    )
    assert torch.tensor(losses(work_dir)).isfinite().all()
    checkpoint = work_dir / "iter_2.pth"
    assert "backbone.layers.0.blocks.0.op.A_logs" in read_checkpoint(checkpoint)["state_dict"]
    assert "mIoU" in score(checkpoint)


def test_multi_scale_scores(score, trained, scenes):
    """Of small and odd images too."""
    for number, size in enumerate([(33, 47), (8, 8)]):
        name = f"{number:05d}"
        for folder, suffix in (("images", "jpg"), ("annotations", "png")):
            path = scenes / folder / "validation" / f"{name}.{suffix}"
            with Image.open(path) as image:
                image.resize(size, Image.Resampling.NEAREST).save(path)
    metrics = score(trained / "iter_4.pth", "--tta")
    assert 0 <= metrics["mIoU"] <= 100
    assert score(trained / "iter_4.pth", "--tta", "--cfg-options", *SLIDE).keys() == metrics.keys()


# Predicting


def test_pictures_and_masks(predict, ade_scenes, tmp_path):
    image = Image.open(ade_scenes / "images" / "validation" / "00000.jpg")
    (tmp_path / "in" / "below").mkdir(parents=True)
    sizes = {"a.jpg": (64, 64), "below/b.png": (33, 47), "c.png": (8, 8)}
    for name, size in sizes.items():
        image.resize(size).save(tmp_path / "in" / name)
    out = predict(tmp_path / "in")
    for name, size in sizes.items():
        mask = Image.open(out / "masks" / name.replace(".jpg", ".jpg.png"))
        assert (mask.size, mask.mode) == (size, "L")
        assert np.asarray(mask).max() <= 10
        picture = Image.open(out / name)
        assert picture.width >= size[0] + 100  # with a legend
        assert picture.height >= size[1]


def test_video(predict, ade_scenes, tmp_path):
    import cv2

    frame = cv2.imread(str(ade_scenes / "images" / "validation" / "00000.jpg"))
    writer = cv2.VideoWriter(str(tmp_path / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (64, 64))
    for _ in range(3):
        writer.write(frame)
    writer.release()
    out = predict(tmp_path / "film.mp4")
    assert (out / "film.mp4").is_file()
    assert len([*(out / "masks" / "film").glob("*.png")]) == 3


def test_legend_names_the_classes_that_are_there(monkeypatch):
    from mambavision.openmmlab.prediction.overlay import Overlay

    palette = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    overlay = Overlay(["left", "absent", "a name that is much too long for one line of a legend"], palette, 1.0)
    mask = np.zeros((200, 50), np.uint8)
    mask[:, 40:] = 2
    picture = overlay.draw(np.zeros((200, 50, 3), np.uint8), mask)
    assert (picture[:, :40] == [0, 0, 255]).all()  # blue, green, red
    assert (picture[:, 40:50] == [255, 0, 0]).all()
    legend = picture[:, 50:].reshape(-1, 3).tolist()
    assert [0, 0, 255] in legend
    assert [255, 0, 0] in legend
    assert [0, 255, 0] not in legend
    many = Overlay([str(number) for number in range(100)], np.zeros((100, 3)))
    assert many.draw(np.zeros((10, 10, 3), np.uint8), np.arange(100, dtype=np.uint8).reshape(10, 10)).shape[0] == 160


def test_wrong_inputs(predict, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"none")
    with pytest.raises(DataError, match=r"broken\.jpg: is not an image"):
        predict(tmp_path / "broken.jpg")
    with pytest.raises(DataError, match="no such file or folder"):
        predict(tmp_path / "nowhere.jpg")


# What can be wrong with the data


def spoil(path, change):
    labels = np.array(Image.open(path))
    Image.fromarray(change(labels)).save(path)


def with_label(value):
    def change(labels):
        labels[3, 4] = value
        return labels

    return change


WRONG_MASKS = {
    "unknown label": (with_label(12), r"has pixels with the label 12, but the labels are 1 to 11, and 0 and 255"),
    "size": (lambda labels: labels[:, :60], r"has 60 x 64 pixels, but its image 64 x 64"),
    "colours": (lambda labels: np.stack([labels] * 3, -1), r"is an image of mode RGB"),
}


@pytest.mark.parametrize("case", WRONG_MASKS)
def test_wrong_mask_is_found_before_training(train, scenes, case):
    change, sentence = WRONG_MASKS[case]
    spoil(scenes / "annotations" / "training" / "00001.png", change)
    with pytest.raises(DataError, match=rf"training/00001\.png: {sentence}"):
        train()


@pytest.mark.parametrize("case", ["unknown label", "size"])
def test_wrong_mask_is_named_when_it_is_loaded(scenes, case):
    """Only a sample is examined before."""
    change, sentence = WRONG_MASKS[case]
    for path in (scenes / "annotations" / "training").iterdir():
        spoil(path, change)
    args = TrainOptions.parse([str(CONFIG), "--work-dir", str(scenes / "run")])
    task = dataclasses.replace(SEGMENTATION, check_training_data=lambda config: None)
    with pytest.raises(DataError, match=rf"\.png: {sentence}"):
        run_train(args, task)


def test_missing_mask_and_missing_data(train, scenes):
    (scenes / "annotations" / "training" / "00001.png").unlink()
    with pytest.raises(DataError, match=r"training/00001\.png: no such mask"):
        train()
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        train("--cfg-options", "train_dataloader.dataset.data_root=nowhere")
    ade = ("train_dataloader.dataset.type=ADE20KDataset", "train_dataloader.dataset.data_root=nowhere")
    with pytest.raises(DataError, match=r"nowhere: .*images/\{training,validation\}.*sceneparsing.*ADE20K_ROOT"):
        train("--cfg-options", *ade)


def test_other_number_of_classes(train, score, trained, tmp_path):
    with pytest.raises(DataError, match=r"the data have 11 classes, but the model has 5 \(num_classes\)"):
        train("--cfg-options", "model.decode_head.num_classes=5")
    checkpoint = read_checkpoint(trained / "iter_2.pth")
    checkpoint["meta"]["dataset_meta"]["classes"] = tuple("0123456789")
    save_checkpoint(checkpoint, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"was trained for 10 classes, but the data have 11; .*'0' there"):
        score(tmp_path / "other.pth")
    del checkpoint["meta"]
    checkpoint["state_dict"]["decode_head.conv_seg.bias"] = torch.zeros(10)
    save_checkpoint(checkpoint, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"1 of another shape \(decode_head\.conv_seg\.bias\)"):
        score(tmp_path / "weights.pth")


def test_wrong_options(score, trained):
    with pytest.raises(UserError, match=r"--eval mIou: unknown; .* Did you mean 'mIoU'"):
        score(trained / "iter_4.pth", "--eval", "mIou")


def test_command_that_checks_data(scenes, monkeypatch, capsys):
    tool = load_program("semantic_segmentation/tools/check_data.py")
    check(**vars(tool.options([str(CONFIG)])))
    assert capsys.readouterr().out.count("good") == 2
    spoil(scenes / "annotations" / "validation" / "00001.png", with_label(99))
    with pytest.raises(DataError, match=r"1 problem\(s\) with the data, the first: .*00001\.png: .* label 99"):
        check(**vars(tool.options([str(CONFIG), "--full"])))


LAYOUTS = {
    "cityscapes-512x1024": (
        "CITYSCAPES_ROOT",
        ("leftImg8bit/{}/bonn/a_leftImg8bit.png", "gtFine/{}/bonn/a_gtFine_labelTrainIds.png"),
        ("train", "val"),
    ),
    "coco-stuff164k-512x512": (
        "COCO_STUFF_ROOT",
        ("images/{}/a.jpg", "annotations/{}/a_labelTrainIds.png"),
        ("train2017", "val2017"),
    ),
    "own-data-512x512": ("DATA_ROOT", ("images/{}/a.jpg", "annotations/{}/a.png"), ("training", "validation")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_other_data_sets(name, tmp_path, monkeypatch):
    variable, files, splits = LAYOUTS[name]
    for split in splits:
        for mode, file in zip(("RGB", "L"), files, strict=True):
            path = tmp_path / file.format(split)
            path.parent.mkdir(parents=True)
            Image.new(mode, (6, 4), 0).save(path)
    monkeypatch.setenv(variable, str(tmp_path))
    tool = load_program("semantic_segmentation/tools/check_data.py")
    config = ROOT / "semantic_segmentation" / "configs" / "mamba_vision" / f"mamba_vision_160k_{name}_tiny.py"
    check(**vars(tool.options([str(config)])))
    shutil.rmtree((tmp_path / files[1].format(splits[0])).parent)
    with pytest.raises(DataError, match=r"no such (mask|folder)") as raised:
        check(**vars(tool.options([str(config)])))
    for converter in re.findall(r"python (\S+)", str(raised.value)):
        assert Path(converter).is_file()
    assert ("dataset_converters" in str(raised.value)) == (name != "own-data-512x512")


def test_masks_without_any_class(monkeypatch):
    """The losses of both heads are 0, and finite with their gradients."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    init_default_scope("mmseg")
    model = revert_sync_batchnorm(MODELS.build(load_config(CONFIG).model)).train()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.full((1, 33, 47), 255))) for _ in range(2)]
    found = model.loss(torch.randn(2, 3, 33, 47), samples)
    assert found["decode.loss_ce"] == found["aux.loss_ce"] == 0
    (found["decode.loss_ce"] + found["aux.loss_ce"]).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
