"""Train a segmentation model, on one CPU or many GPUs; see --help."""

from mambavision.openmmlab.training.options import TrainOptions


def main() -> None:
    options = TrainOptions.parse()

    from mambavision.openmmlab.training.segmentation import SEGMENTATION
    from mambavision.openmmlab.training.train import train
    from mambavision.running.program import run_cli

    run_cli(lambda: train(options, SEGMENTATION))


if __name__ == "__main__":
    main()
