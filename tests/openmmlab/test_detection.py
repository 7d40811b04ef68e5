"""Training, resuming and scoring a small detector, and everything that can be wrong before."""

import json
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch

from checkout import ROOT
from mambavision.checkpoint import read_checkpoint, save_checkpoint
from mambavision.errors import CheckpointError, OutputError, UserError
from mambavision.openmmlab.config import load_config
from mambavision.openmmlab.training.detection import DETECTION
from mambavision.openmmlab.training.options import TestOptions, TrainOptions
from mambavision.openmmlab.training.test import test as run_test
from mambavision.openmmlab.training.train import train as run_train
from small_runs import identical

TOOLS = ROOT / "object_detection" / "tools"
CONFIG = ROOT / "tests" / "openmmlab" / "small_detector.py"


def forget_last_run():
    """mmengine keeps the first run's visualizer for the whole process."""
    from mmdet.visualization import DetLocalVisualizer

    DetLocalVisualizer._instance_dict.clear()


@pytest.fixture
def train(detector_config, monkeypatch, tmp_path):

    def start(*words, config=detector_config, work_dir=tmp_path / "run"):
        args = TrainOptions.parse([str(config), "--work-dir", str(work_dir), *map(str, words)])
        forget_last_run()
        run_train(args, DETECTION)
        return work_dir

    return start


@pytest.fixture
def score(detector_config, monkeypatch, tmp_path):

    def start(checkpoint, *words, config=detector_config):
        work_dir = tmp_path / "scores"
        args = TestOptions.parse([str(config), str(checkpoint), "--work-dir", str(work_dir), *map(str, words)])
        forget_last_run()
        run_test(args, DETECTION)
        (metrics,) = work_dir.glob("*/*.json")
        shutil.move(metrics, tmp_path / "metrics.json")
        shutil.rmtree(work_dir)
        return json.loads((tmp_path / "metrics.json").read_text())

    return start


@pytest.fixture(scope="module")
def trained(coco_scenes, tmp_path_factory):
    """The folder of a finished training of two epochs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SCENES_ROOT", str(coco_scenes))
        work_dir = tmp_path_factory.mktemp("trained")
        words = [str(CONFIG), "--work-dir", str(work_dir), "--cfg-options", "model.backbone.depth=50"]
        forget_last_run()
        run_train(TrainOptions.parse(words), DETECTION)
    return work_dir


def losses(work_dir):
    (log,) = sorted(work_dir.glob("*/vis_data/scalars.json"))[-1:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(line["iter"], line["loss"]) for line in lines if "loss" in line]


def test_training_writes_checkpoints_and_metrics(trained):
    assert {"epoch_1.pth", "epoch_2.pth", "last_checkpoint", "small_detector.py"} <= {
        path.name for path in trained.iterdir()
    }
    assert [iteration for iteration, _ in losses(trained)] == [1, 2, 3, 4]
    checkpoint = read_checkpoint(trained / "epoch_2.pth")
    assert {"state_dict", "optimizer", "param_schedulers", "message_hub", "meta"} <= checkpoint.keys()
    assert len(checkpoint["meta"]["dataset_meta"]["classes"]) == 10
    (log,) = trained.glob("*/*.log")
    text = log.read_text()
    assert "training in float32 instead of mixed precision" in text
    assert "the config inherits a ResNet" in text  # the warning comes before the log file is there
    kept = load_config(trained / "small_detector.py")  # as it was given, for a machine with a GPU too
    assert kept.optim_wrapper.type == "AmpOptimWrapper"
    assert "coco/bbox_mAP" in text


def test_resumed_training_goes_on_as_if_uninterrupted(trained, train, tmp_path):
    work_dir = tmp_path / "run"
    work_dir.mkdir()
    shutil.copy(trained / "epoch_1.pth", work_dir)
    (work_dir / "epoch_3.pth").write_bytes(b"PK cut short")  # is passed over
    # The seed is the checkpoint's, and the pretrained weights are not needed any more.
    train("--resume", work_dir, "--cfg-options", "randomness.seed=8", "model.backbone.pretrained=nowhere.pth")
    assert losses(work_dir) == losses(trained)[2:]
    ours, theirs = (read_checkpoint(folder / "epoch_2.pth") for folder in (work_dir, trained))
    assert identical(ours["state_dict"], theirs["state_dict"])


def test_resuming_with_nothing_there_starts_anew(train, trained):
    work_dir = train("--resume", "--cfg-options", "train_cfg.max_epochs=1")
    assert not load_config(work_dir / "small_detector.py").resume
    assert losses(work_dir) == losses(trained)[:2]


def test_scores(score, trained, tmp_path):
    checkpoint = trained / "epoch_2.pth"
    metrics = score(checkpoint)
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= metrics.keys()
    boxes = score(checkpoint, "--eval", "bbox", "--out", tmp_path / "predictions.pkl")
    assert "coco/segm_mAP" not in boxes
    assert boxes["coco/bbox_mAP"] == metrics["coco/bbox_mAP"]
    predictions = pickle.loads((tmp_path / "predictions.pkl").read_bytes())
    assert [prediction["img_id"] for prediction in predictions] == [0, 1]
    assert all("bboxes" in prediction["pred_instances"] for prediction in predictions)


def test_training_with_vssm(train, score, monkeypatch):
    monkeypatch.setenv("BACKBONE", "vssm")
    work_dir = train("--cfg-options", "train_cfg.max_epochs=1")
    assert torch.tensor(losses(work_dir)).isfinite().all()
    checkpoint = work_dir / "epoch_1.pth"
    assert "backbone.layers.0.blocks.0.op.A_logs" in read_checkpoint(checkpoint)["state_dict"]
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= score(checkpoint).keys()


def test_scores_of_weights_in_safetensors(score, trained, tmp_path):
    weights = read_checkpoint(trained / "epoch_2.pth")["state_dict"]
    save_checkpoint(weights, tmp_path / "weights.safetensors")
    assert score(tmp_path / "weights.safetensors")["coco/bbox_mAP"] == score(trained / "epoch_2.pth")["coco/bbox_mAP"]


def test_pictures_of_predictions(score, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    score(trained / "epoch_2.pth", "--show-dir", "shown")
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == ["00000.jpg", "00001.jpg"]


def test_augmented_scores_have_boxes_and_masks(score, trained):
    metrics = score(trained / "epoch_2.pth", "--tta")
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= metrics.keys()


def test_augmentation_merges_views(monkeypatch):
    from mmdet.structures import DetDataSample
    from mmengine.config import ConfigDict
    from mmengine.structures import InstanceData

    from mambavision.openmmlab.prediction.instance_tta import InstanceTTAModel

    left = torch.zeros(1, 4, 6, dtype=torch.bool)
    left[:, 1:3, 0:2] = True

    def view(score, label, box, mask, flip):
        instances = InstanceData(
            bboxes=torch.tensor([box]), scores=torch.tensor([score]), labels=torch.tensor([label]), masks=mask
        )
        info = {"ori_shape": (4, 6), "flip": flip, "flip_direction": "horizontal" if flip else None}
        return DetDataSample(pred_instances=instances, metainfo=info)

    model = object.__new__(InstanceTTAModel)
    torch.nn.Module.__init__(model)
    model.tta_cfg = ConfigDict(nms=ConfigDict(type="nms", iou_threshold=0.5), max_per_img=2)
    box, mirrored = [0.0, 1.0, 2.0, 3.0], [4.0, 1.0, 6.0, 3.0]
    same = [view(0.6, 0, box, left, False), view(0.9, 0, mirrored, left.flip(-1), True)]
    merged = model._merge_single_sample(same).pred_instances
    assert merged.scores.tolist() == pytest.approx([0.9])
    assert torch.equal(merged.masks, left)
    assert merged.bboxes.tolist() == [box]
    other = [view(0.6, 0, box, left, False), view(0.9, 1, box, left, True)]
    merged = model._merge_single_sample(other).pred_instances
    assert merged.labels.tolist() == [1, 0]
    assert torch.equal(merged.masks, torch.cat([left.flip(-1), left]))


# What can be wrong

WRONG_SETTINGS = {
    "trian_cfg.max_epochs=2": r"the config has no 'trian_cfg'\. Did you mean 'train_cfg'\?",
    "model.neck.in_channel=3": r"FPN has no argument 'in_channel'\. Did you mean 'in_channels'\?",
    "model.neck.type=FPNN": r"there is no 'FPNN' in mmdet's registry of models\. Did you mean 'FPN'\?",
    "model.backbone.drop_pth_rate=0.1": r"no argument 'drop_pth_rate'\. Did you mean 'drop_path_rate'\?",
    "model.backbone.out_indices=[0,1,2,7]": r"out_indices must list stages from 0 to 3",
    "optim_wrapper.optimizer.lrr=1": r"AdamW has no argument 'lrr'\. Did you mean 'lr'\?",
    "default_hooks.checkpoint.intervall=1": r"no argument 'intervall'\. Did you mean 'interval'\?",
    "train_dataloader.dataset.pipeline.0.type=LoadImageFromFil": r"Did you mean 'LoadImageFromFile'\?",
    "param_scheduler.0.type=LinearR": r"in mmdet's registry of parameter schedulers\. Did you mean 'LinearLR'",
    "train_dataloader.dataset.datroot=3": r"CocoDataset has no argument 'datroot'\. Did you mean 'data_root'",
    "train_dataloader.batchsize=3": r"DataLoader has no argument 'batchsize'\. Did you mean 'batch_size'",
    "nonsense": r"nonsense: expected KEY=VALUE",
    "train_dataloader.dataset.pipeline.9.type=Resize": r"--cfg-options",
}


@pytest.mark.parametrize("setting", WRONG_SETTINGS)
def test_wrong_setting(train, setting):
    with pytest.raises(UserError, match=WRONG_SETTINGS[setting]):
        train("--cfg-options", setting)


def test_wrong_config(train, detector_config, tmp_path):
    with pytest.raises(UserError, match=r"small_detectr\.py: no such .* Did you mean 'small_detector\.py'\?"):
        train(config=detector_config.with_name("small_detectr.py"))
    for text, complaint in (("model = dict(", "never closed|syntax"), ("_base_ = 'none.py'", "none.py")):
        (tmp_path / "wrong.py").write_text(text)
        with pytest.raises(UserError, match=rf"wrong\.py: cannot be read as a config: .*({complaint})"):
            train(config=tmp_path / "wrong.py")


def test_part_of_a_config(train, score, trained):
    with pytest.raises(UserError, match=r"mamba_vision\.py: has no model; give a complete config"):
        train(config=ROOT / "object_detection" / "configs" / "_base_" / "mamba_vision.py")
    with pytest.raises(UserError, match="has no test_evaluator"):
        score(trained / "epoch_2.pth", "--cfg-options", "test_evaluator=None")
    with pytest.raises(UserError, match=r"has no default_hooks\.visualization, which --show"):
        score(trained / "epoch_2.pth", "--show-dir", "shown", "--cfg-options", "default_hooks={}")


def test_wrong_options(train, score, trained):
    with pytest.raises(UserError, match=r"--auto-scale-lr: .* does not name the batch size"):
        train("--auto-scale-lr", "--cfg-options", "auto_scale_lr={}")
    with pytest.raises(UserError, match="--launcher pytorch: this process was not launched by torchrun"):
        train("--launcher", "pytorch")
    with pytest.raises(UserError, match=r"--eval box: unknown; choose from bbox, .*Did you mean 'bbox'"):
        score(trained / "epoch_2.pth", "--eval", "box")
    with pytest.raises(UserError, match=r"--eval bbox: .* has no CocoMetric in test_evaluator"):
        score(trained / "epoch_2.pth", "--eval", "bbox", "--cfg-options", "test_evaluator.type=DumpDetResults")
    with pytest.raises(UserError, match=r"--out predictions\.json: .* ends in \.pkl"):
        score(trained / "epoch_2.pth", "--out", "predictions.json")


def test_work_dir_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/run/last_checkpoint: cannot be written"):
        train(work_dir=tmp_path / "file" / "run")


def test_wrong_checkpoint(train, score, trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"epoch_9\.pth: no such file"):
        train("--resume", trained / "epoch_9.pth")
    checkpoint = read_checkpoint(trained / "epoch_2.pth")
    weights = tmp_path / "weights.pth"
    save_checkpoint({"state_dict": checkpoint["state_dict"]}, weights)
    with pytest.raises(CheckpointError, match=r"weights\.pth: contains no training state to resume .*load_from="):
        train("--resume", weights)
    with pytest.raises(CheckpointError, match=r"belongs to another model than the config: \d+ of another shape \(neck"):
        score(weights, "--cfg-options", "model.neck.out_channels=24", "model.rpn_head.in_channels=24")
    other = tmp_path / "other.pth"
    save_checkpoint({**checkpoint, "state_dict": {"backbone.conv1.weight": torch.ones(1)}}, other)
    with pytest.raises(CheckpointError, match=r"other\.pth: belongs to another model than the config: \d+ missing"):
        train("--resume", other)


def test_weights_that_are_not_finite(train, score, trained, tmp_path):
    checkpoint = read_checkpoint(trained / "epoch_2.pth")
    key = next(key for key in checkpoint["state_dict"] if key.endswith("fc_cls.weight"))
    checkpoint["state_dict"][key][0, 0] = torch.nan
    path = tmp_path / "diverged.pth"
    save_checkpoint(checkpoint, path)
    message = rf"diverged\.pth: 1 of its weights are not finite \({key}\)"
    for refused in (
        lambda: score(path),
        lambda: train("--resume", path),
        lambda: train("--cfg-options", f"load_from={path}", work_dir=tmp_path / "other"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            refused()
        assert error.value.exit_status == 65


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_vanish_during_training_are_named(workers, coco_scenes, run_program, tmp_path):
    """They were there when the data were checked."""
    scenes = shutil.copytree(coco_scenes, tmp_path / "scenes")
    program = "tests/openmmlab/programs/train_while_images_vanish.py"
    words = [CONFIG, "--work-dir", tmp_path / "run", "--cfg-options", f"train_dataloader.num_workers={workers}"]
    words += [f"train_dataloader.persistent_workers={bool(workers)}"]
    finished = run_program(program, *words, check=False, SCENES_ROOT=str(scenes))
    assert finished.returncode == 65
    last = finished.stderr.strip().splitlines()[-1]
    assert re.fullmatch(rf"error: {scenes}/train/\d+\.jpg: cannot be read \(No such file or directory\); .*", last)


def test_starting_from_other_weights(train, trained, tmp_path):
    checkpoint = read_checkpoint(trained / "epoch_2.pth")
    weights = {key: value for key, value in checkpoint["state_dict"].items() if "fc_cls" not in key}
    save_checkpoint(weights, tmp_path / "part.safetensors")
    train("--cfg-options", f"load_from={tmp_path / 'part.safetensors'}", "train_cfg.max_epochs=1")
    save_checkpoint({"fc.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: belongs to another .* only 0 of \d+ entries fit"):
        train("--cfg-options", f"load_from={tmp_path / 'other.safetensors'}")


def test_checkpoint_of_other_classes(train, score, trained, tmp_path):
    checkpoint = read_checkpoint(trained / "epoch_1.pth")
    checkpoint["meta"]["dataset_meta"]["classes"] = ("0", "2", "1")
    save_checkpoint(checkpoint, tmp_path / "other.pth")
    sentence = r"other\.pth: was trained for 3 classes, but the data have 10; .* '2' there and '1' here"
    with pytest.raises(CheckpointError, match=sentence):
        score(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=sentence):
        train("--resume", tmp_path / "other.pth")


def test_images_without_objects(train, coco_scenes, tmp_path):
    """A single one, and batches of nothing else."""
    root = tmp_path / "scenes"
    shutil.copytree(coco_scenes, root)
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] == 0]
    file.write_text(json.dumps(content))
    keep_empty = "train_dataloader.dataset.filter_cfg.filter_empty_gt=False"
    work_dir = train(
        "--cfg-options", f"train_dataloader.dataset.data_root={root}", keep_empty, "train_cfg.max_epochs=1"
    )
    values = [loss for _, loss in losses(work_dir)]
    assert len(values) == 2
    assert torch.tensor(values).isfinite().all()


# The programs, as processes


def test_exit_status_and_sentence(run_program, detector_config, tmp_path):
    program = "object_detection/tools/train.py"
    result = run_program(program, detector_config, "--cfg-options", "model.neck.in_channel=3", check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {detector_config}: FPN has no argument 'in_channel'")
    assert "Traceback" not in result.stderr
    result = run_program("object_detection/tools/test.py", detector_config, tmp_path / "none.pth", check=False)
    assert result.returncode == 65
    assert "none.pth: no such file" in result.stderr


def test_inference_with_the_libraries_own_programs(trained, detector_config, coco_scenes, tmp_path):
    program = f"""
import mambavision.openmmlab  # before mmdet, which imports mmcv's operators
from mmdet.apis import DetInferencer
inferencer = DetInferencer({str(detector_config)!r}, {str(trained / "epoch_2.pth")!r}, device="cpu")
results = inferencer({str(coco_scenes / "val" / "00000.jpg")!r}, no_save_pred=True, no_save_vis=True)
assert len(results["predictions"]) == 1
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
