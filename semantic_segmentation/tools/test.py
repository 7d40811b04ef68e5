"""Score a segmentation model by intersection over union; see --help for all options."""

import argparse

from check_data import check_datasets
from mmengine import Config

from mambavision.errors import UserError
from mambavision.files import check_writable
from mambavision.openmmlab.config import pipeline_owner, settings_in
from mambavision.openmmlab.training.run import options_of_test, test
from mambavision.running.program import run_cli
from mambavision.text import nearest

METRICS = ("mIoU", "mDice", "mFscore")


def check(config: Config) -> None:
    """Check the data that are scored on."""
    from mambavision.openmmlab.data.masks import name_wrong_labels

    check_datasets(config, ("test",))
    name_wrong_labels(config)


def adapt(config: Config, args: argparse.Namespace) -> None:
    """Set the metrics, the folder of predicted masks, multi-scale testing, and that every picture is drawn."""
    _set_metrics(config, args)
    if args.out:
        check_writable(f"{args.out}/mask.png")
    if args.show_dir:
        config.visualizer.save_dir = args.show_dir
    if args.tta:
        if "tta_pipeline" not in config:
            raise UserError(f"--tta: {args.config} has no tta_pipeline, which says how images are varied.")
        pipeline_owner(config).pipeline = config.tta_pipeline
        config.model = {**config.get("tta_model", {"type": "SegTTAModel"}), "module": config.model}
    for hook in settings_in(config.default_hooks):
        if hook.get("type") == "SegVisualizationHook":
            hook.interval = 1


def _set_metrics(config: Config, args: argparse.Namespace) -> None:
    for name in args.eval or ():
        if name not in METRICS:
            raise UserError(f"--eval {name}: unknown; choose from {', '.join(METRICS)}.{nearest(name, METRICS)}")
    evaluators = [found for found in settings_in(config.test_evaluator) if found.get("type") == "IoUMetric"]
    if (args.eval or args.out) and not evaluators:
        raise UserError(f"--eval and --out: {args.config} has no IoUMetric in test_evaluator.")
    for evaluator in evaluators:
        evaluator.update({"iou_metrics": args.eval} if args.eval else {})
        evaluator.update({"output_dir": args.out} if args.out else {})


if __name__ == "__main__":
    args = options_of_test()
    run_cli(lambda: test(args, check, adapt))
