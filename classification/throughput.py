"""Time models side by side; see README.md and --help."""

from engine.options import throughput_options


def main() -> None:
    args = throughput_options()  # before the slow imports: a mistyped flag answers at once

    from engine.timing import compare
    from mambavision.errors import run_cli

    run_cli(lambda: compare(args))


if __name__ == "__main__":
    main()
