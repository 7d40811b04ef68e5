"""Train a detector, on one CPU or many GPUs; see README.md for configs and --help for all options."""

from mambavision.openmmlab.data.coco import check_datasets
from mambavision.openmmlab.training.run import options_of_training, train
from mambavision.running.program import run_cli

if __name__ == "__main__":
    args = options_of_training()
    run_cli(lambda: train(args, check_datasets))
