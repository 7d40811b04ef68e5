"""Check that a data set in COCO's layout is complete and consistent; see --help."""

import argparse
import os


def options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check a data set in COCO's layout: COCO 2017, or the one given by --ann and --images."
    )
    add = parser.add_argument
    root = os.environ.get("COCO_ROOT", "data/coco")
    add("--root", default=root, metavar="DIR", help="data set folder (default: $COCO_ROOT or data/coco)")
    add("--ann", action="append", default=[], metavar="FILE", help="annotations, below --root; may be repeated")
    add("--images", action="append", default=[], metavar="DIR", help="folder of the images of the same --ann")
    add("--full", action="store_true", help="decode all images and check their sizes, not a sample of 200 of each part")
    args = parser.parse_args(words)
    if len(args.ann) != len(args.images):
        parser.error("give as many --images as --ann")
    return args


def main() -> None:
    args = options()  # before the slow imports, so that a mistyped option is reported at once

    from mambavision.openmmlab.data.coco_check import check
    from mambavision.running.program import run_cli

    run_cli(lambda: check(**vars(args)))


if __name__ == "__main__":
    main()
