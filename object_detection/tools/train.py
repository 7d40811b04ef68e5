"""Train a detector, on one CPU or many GPUs; see README.md for configs and --help for all options."""

from mambavision.errors import run_cli
from mambavision.openmmlab.coco import check_datasets
from mambavision.openmmlab.run import options_of_training, train

if __name__ == "__main__":
    args = options_of_training()
    run_cli(lambda: train(args, check_datasets))
