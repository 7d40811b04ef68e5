"""Draw effective receptive fields of models; see --help."""

from engine.options import ReceptiveFieldOptions


def main() -> None:
    options = ReceptiveFieldOptions.parse()  # before the slow imports, so that a mistyped flag is reported at once

    from engine.receptive_field import draw_receptive_fields
    from mambavision.running.program import run_cli

    run_cli(lambda: draw_receptive_fields(options))


if __name__ == "__main__":
    main()
