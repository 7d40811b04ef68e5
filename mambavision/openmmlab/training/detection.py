"""Detection: its checks of the data, and its steps from config to config."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmengine import Config

from mambavision.errors import UserError
from mambavision.files import check_writable
from mambavision.openmmlab.config import pipeline_owner, settings_in
from mambavision.openmmlab.data.coco import check_datasets
from mambavision.openmmlab.training.task import Task, check_metrics


def set_coco_metrics(config: Config, metrics: Sequence[str] | None) -> Config:
    """Compute other metrics than the config's (``--eval``)."""
    known = ("bbox", "segm", "proposal", "proposal_fast")
    check_metrics(metrics, known)
    if metrics:
        evaluators = [found for found in settings_in(config.test_evaluator) if found.get("type") == "CocoMetric"]
        if not evaluators:
            raise UserError(f"--eval {' '.join(metrics)}: {config.filename} has no CocoMetric in test_evaluator.")
        for evaluator in evaluators:
            evaluator.metric = list(metrics)
    return config


def draw_detections(config: Config, folder: str | None) -> Config:
    """Write pictures of the detections (``--show-dir``)."""
    if folder:
        config.default_hooks.visualization.test_out_dir = str(Path(folder).resolve())
    return config


def dump_detections(config: Config, path: str | None) -> Config:
    """Write the detections to a pickle (``--out``)."""
    if path:
        if not path.endswith((".pkl", ".pickle")):
            raise UserError(f"--out {path}: predictions are written as a pickle; give a name that ends in .pkl.")
        check_writable(path)
        metrics = config.test_evaluator if isinstance(config.test_evaluator, list) else [config.test_evaluator]
        config.test_evaluator = [*metrics, {"type": "DumpDetResults", "out_file_path": path}]
    return config


def augment_detection(config: Config, enabled: bool) -> Config:
    """Merge the detections of each image and its mirror image, unless the config has its own way (``--tta``)."""
    if not enabled:
        return config
    import mambavision.openmmlab.prediction.instance_tta  # noqa: F401 - registers the model

    nms = {"type": "nms", "iou_threshold": 0.5}
    config.setdefault("tta_model", {"type": "InstanceTTAModel", "tta_cfg": {"nms": nms, "max_per_img": 100}})
    dataset = pipeline_owner(config)
    *steps, pack = dataset.pipeline
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
    views = [[{"type": "RandomFlip", "prob": prob} for prob in (0.0, 1.0)], [{**pack, "meta_keys": keys}]]
    config.setdefault("tta_pipeline", [*steps, {"type": "TestTimeAug", "transforms": views}])
    dataset.pipeline = config.tta_pipeline
    config.model = {**config.tta_model, "module": config.model}
    return config


DETECTION = Task(
    check_training_data=partial(check_datasets, phases=("train", "val")),
    check_test_data=partial(check_datasets, phases=("test",)),
    training_steps=(),
    test_steps=lambda options: (
        partial(set_coco_metrics, metrics=options.eval),
        partial(draw_detections, folder=options.show_dir),
        partial(dump_detections, path=options.out),
        partial(augment_detection, enabled=options.tta),
    ),
)
