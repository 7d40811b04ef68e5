"""Detect objects in images and videos; see --help."""

import argparse


def options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Detect objects; writes pictures, videos and predictions.json in COCO's format, all or nothing."
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="image, video, folder of them, or quoted pattern such as 'photos/*.jpg'",
    )
    add("--config", required=True, metavar="FILE", help="config of the detector")
    add("--checkpoint", required=True, metavar="FILE", help="its trained weights")
    add("--out", default="predictions", metavar="DIR", help="output folder (default: %(default)s)")
    add("--score-threshold", type=float, default=0.3, help="ignore objects with lower scores (default: %(default)s)")
    add("--no-pictures", dest="pictures", action="store_false", help="write predictions.json only")
    add("--device", default="", help="cuda, cpu, ...; default: a GPU if there is one")
    add("--batch-size", type=int, default=1, help="images per batch (default: %(default)s)")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings that override the config")
    return parser.parse_args(words)


def main() -> None:
    args = options()  # before the slow imports, so that a mistyped option is reported at once

    from mambavision.openmmlab.prediction.detection import detect
    from mambavision.running.program import run_cli

    run_cli(lambda: detect(**vars(args)), vars(args))


if __name__ == "__main__":
    main()
