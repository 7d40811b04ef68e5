"""Draw what positions of images take from which others; see README.md and --help."""

from engine.options import activation_map_options


def main() -> None:
    args = activation_map_options()  # before the slow imports: a mistyped flag answers at once

    from engine.maps import draw_activation_maps
    from mambavision.errors import run_cli

    run_cli(lambda: draw_activation_maps(args))


if __name__ == "__main__":
    main()
