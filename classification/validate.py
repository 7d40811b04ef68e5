"""Score image classifiers on a labelled data set; see README.md and --help."""

from engine.options import validate_options


def main() -> None:
    args = validate_options()  # before the slow imports: a mistyped flag answers at once

    from engine.scoring import validate
    from mambavision.errors import run_cli

    run_cli(lambda: validate(args))


if __name__ == "__main__":
    main()
