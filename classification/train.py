"""Train an image classifier, on one CPU or many GPUs; see the documentation for recipes and --help for all options."""

from engine.options import TrainOptions


def main() -> None:
    options = TrainOptions.parse()  # before the slow imports, so that a mistyped flag is reported at once

    from engine.train import train
    from mambavision.running.program import run_cli

    run_cli(lambda: train(options))


if __name__ == "__main__":
    main()
