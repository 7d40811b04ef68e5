"""Check that the data sets of a config are complete, consistent, and fit the config; see --help."""

import argparse


def options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split(";")[0] + ".")
    add = parser.add_argument
    add("config", help="config file whose data sets are checked")
    add("--full", action="store_true", help="open all images and masks, not a sample of 200 and 20 of each split")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings that override the config")
    return parser.parse_args(words)


def main() -> None:
    args = options()  # before the slow imports, so that a mistyped option is reported at once

    from mambavision.openmmlab.data.segmentation import check
    from mambavision.running.program import run_cli

    run_cli(lambda: check(**vars(args)))


if __name__ == "__main__":
    main()
