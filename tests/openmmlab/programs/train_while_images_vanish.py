"""Train a detector whose training images are deleted after its data were checked."""

import dataclasses
import os
from pathlib import Path

from mambavision.openmmlab.training.detection import DETECTION
from mambavision.openmmlab.training.options import TrainOptions
from mambavision.openmmlab.training.train import train
from mambavision.running.program import run_cli


def check(config):
    DETECTION.check_training_data(config)
    for image in Path(os.environ["SCENES_ROOT"], "train").glob("*.jpg"):
        image.unlink()


if __name__ == "__main__":
    run_cli(lambda: train(TrainOptions.parse(), dataclasses.replace(DETECTION, check_training_data=check)))
