"""Score image classifiers on a labelled data set; see --help."""

from engine.options import ValidateOptions


def main() -> None:
    options = ValidateOptions.parse()  # before the slow imports, so that a mistyped flag is reported at once

    from engine.validate import validate
    from mambavision.running.program import run_cli

    run_cli(lambda: validate(options))


if __name__ == "__main__":
    main()
