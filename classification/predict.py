"""Classify images, folders of images or patterns; see README.md and --help."""

from engine.options import predict_options


def main() -> None:
    args = predict_options()  # before the slow imports: a mistyped flag answers at once

    from engine.classify import predict
    from mambavision.errors import run_cli

    run_cli(lambda: predict(args))


if __name__ == "__main__":
    main()
