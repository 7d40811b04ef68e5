"""Draw the dependence between positions of an image; see --help."""

from engine.options import ActivationMapOptions


def main() -> None:
    options = ActivationMapOptions.parse()  # before the slow imports, so that a mistyped flag is reported at once

    from engine.activation_map import draw_activation_maps
    from mambavision.running.program import run_cli

    run_cli(lambda: draw_activation_maps(options))


if __name__ == "__main__":
    main()
