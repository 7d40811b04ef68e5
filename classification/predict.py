"""Classify images; see --help."""

from engine.options import PredictOptions


def main() -> None:
    options = PredictOptions.parse()  # before the slow imports, so that a mistyped flag is reported at once

    from engine.predict import predict
    from mambavision.running.program import run_cli

    run_cli(lambda: predict(options))


if __name__ == "__main__":
    main()
