"""Options of train.py and test.py of both OpenMMLab tasks."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from mambavision.running.process import Launcher
from mambavision.running.record import AUTO


@dataclass
class CommonOptions:
    """Options of both programs."""

    config: str
    work_dir: str | None
    cfg_options: list[str]
    launcher: Launcher | None
    local_rank: int | None


@dataclass
class TrainOptions(CommonOptions):
    """Options of train.py."""

    amp: bool
    auto_scale_lr: bool
    resume: str | None

    @classmethod
    def parse(cls, words: Sequence[str] | None = None) -> "TrainOptions":
        """Parse a command line; by default that of the program."""
        parser = _parser("Train a model of OpenMMLab, on one CPU or many GPUs.")
        parser.add_argument("--amp", action="store_true", help="mixed precision, on a GPU")
        parser.add_argument(
            "--drop-path",
            dest="cfg_options",
            action="append",
            type="model.backbone.drop_path_rate={}".format,
            metavar="RATE",
            help="stochastic depth rate: short for --cfg-options model.backbone.drop_path_rate=RATE",
        )
        parser.add_argument(
            "--auto-scale-lr", action="store_true", help="scale the learning rate with the global batch size"
        )
        parser.add_argument(
            "--resume",
            nargs="?",
            const=AUTO,
            metavar="CHECKPOINT",
            help="resume from a checkpoint, or from the newest readable one of a folder (default: the work dir); a "
            "preempted run is resumed without this option, unless it is 'never'",
        )
        return cls(**vars(parser.parse_args(words)))


@dataclass
class TestOptions(CommonOptions):
    """Options of test.py."""

    __test__ = False  # no test class, whatever its name suggests to pytest

    checkpoint: str
    eval: list[str] | None
    out: str | None
    tta: bool
    show: bool
    show_dir: str | None
    wait_time: float

    @classmethod
    def parse(cls, words: Sequence[str] | None = None) -> "TestOptions":
        """Parse a command line; by default that of the program."""
        parser = _parser("Score a checkpoint of a model of OpenMMLab.")
        parser.add_argument("checkpoint", help="checkpoint file")
        parser.add_argument("--eval", nargs="+", metavar="METRIC", help="metrics, instead of the config's")
        parser.add_argument("--out", help="file or folder to write the predictions to")
        parser.add_argument("--tta", action="store_true", help="average over flipped or scaled images")
        parser.add_argument("--show", action="store_true", help="show the predictions in a window")
        parser.add_argument("--show-dir", help="folder for pictures of the predictions")
        parser.add_argument(
            "--wait-time", type=float, default=2, help="seconds to show each picture (default: %(default)s)"
        )
        return cls(**vars(parser.parse_args(words)))


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (default: work_dirs/NAME_OF_CONFIG)")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that override the config",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        help="how the processes were launched (default: detected)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # torch.distributed.launch
    return parser
