"""Time models side by side; see --help."""

from engine.options import ThroughputOptions


def main() -> None:
    options = ThroughputOptions.parse()  # before the slow imports, so that a mistyped flag is reported at once

    from engine.throughput import compare
    from mambavision.running.program import run_cli

    run_cli(lambda: compare(options))


if __name__ == "__main__":
    main()
