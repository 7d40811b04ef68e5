"""Segment images and videos; see --help."""

import argparse


def options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segment images; writes coloured pictures and videos with a legend and, below masks/, the class "
        "index of each pixel as PNG; all or nothing."
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="image, video, folder of them, or quoted pattern such as 'photos/*.jpg'",
    )
    add("--config", required=True, metavar="FILE", help="config of the model")
    add("--checkpoint", required=True, metavar="FILE", help="its trained weights")
    add("--out", default="predictions", metavar="DIR", help="output folder (default: %(default)s)")
    add("--opacity", type=float, default=0.5, help="opacity of the colours, from 0 to 1 (default: %(default)s)")
    add("--device", default="", help="cuda, cpu, ...; default: a GPU if there is one")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings that override the config")
    return parser.parse_args(words)


def main() -> None:
    args = options()  # before the slow imports, so that a mistyped option is reported at once

    from mambavision.openmmlab.prediction.segmentation import segment
    from mambavision.running.program import run_cli

    run_cli(lambda: segment(**vars(args)), vars(args))


if __name__ == "__main__":
    main()
