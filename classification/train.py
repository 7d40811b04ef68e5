"""Train an image classifier, on one CPU or many GPUs; see README.md for recipes and --help for all options."""

from engine.options import train_options


def main() -> None:
    args = train_options()  # before the slow imports: a mistyped flag answers at once

    from engine.trainer import train
    from mambavision.errors import run_cli

    run_cli(lambda: train(args))


if __name__ == "__main__":
    main()
