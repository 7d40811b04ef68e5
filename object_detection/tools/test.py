"""Score a detector with COCO's metrics; see --help for all options."""

import argparse
from pathlib import Path

from mmengine import Config

from mambavision.errors import UserError
from mambavision.files import check_writable
from mambavision.openmmlab.data.coco import check_datasets
from mambavision.openmmlab.config import pipeline_owner, settings_in
from mambavision.openmmlab.training.run import options_of_test, test
from mambavision.running.program import run_cli
from mambavision.text import nearest

METRICS = ("bbox", "segm", "proposal", "proposal_fast")


def check_test_data(config: Config) -> None:
    check_datasets(config, ("test",))


def adapt(config: Config, args: argparse.Namespace) -> None:
    """Set the metrics, the files of predictions and pictures, and test-time augmentation."""
    for name in args.eval or ():
        if name not in METRICS:
            raise UserError(f"--eval {name}: unknown; choose from {', '.join(METRICS)}.{nearest(name, METRICS)}")
    if args.eval:
        evaluators = [found for found in settings_in(config.test_evaluator) if found.get("type") == "CocoMetric"]
        if not evaluators:
            raise UserError(f"--eval {' '.join(args.eval)}: {args.config} has no CocoMetric in test_evaluator.")
        for evaluator in evaluators:
            evaluator.metric = args.eval
    if args.show_dir:
        config.default_hooks.visualization.test_out_dir = str(Path(args.show_dir).resolve())
    if args.out:
        if not args.out.endswith((".pkl", ".pickle")):
            raise UserError(f"--out {args.out}: predictions are written as a pickle; give a name that ends in .pkl.")
        check_writable(args.out)
        metrics = config.test_evaluator if isinstance(config.test_evaluator, list) else [config.test_evaluator]
        config.test_evaluator = [*metrics, {"type": "DumpDetResults", "out_file_path": args.out}]
    if args.tta:
        _augment(config)


def _augment(config: Config) -> None:
    """Merge the detections of each image and its mirror image, unless the config says otherwise."""
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


if __name__ == "__main__":
    args = options_of_test()
    run_cli(lambda: test(args, check_test_data, adapt))
