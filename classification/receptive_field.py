"""Draw effective receptive fields of models; see README.md and --help."""

from engine.options import receptive_field_options


def main() -> None:
    args = receptive_field_options()  # before the slow imports: a mistyped flag answers at once

    from engine.sensitivity import draw_receptive_fields
    from mambavision.errors import run_cli

    run_cli(lambda: draw_receptive_fields(args))


if __name__ == "__main__":
    main()
