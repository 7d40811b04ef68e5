"""Count the parameters and operations of a segmentation model from shapes alone; see --help."""

import argparse


def options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Count the parameters of a config's model and the multiply-accumulate operations for one image, "
        "without heads that are used in training only. Published FLOPs are multiply-accumulate operations."
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="config of the model")
    add(
        "--shape", type=int, nargs="+", default=[512], metavar="SIDE", help="height and width of the image, or one side"
    )
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override")
    args = parser.parse_args(words)
    if len(args.shape) > 2:
        parser.error("--shape: expected HEIGHT WIDTH, or one side of a square")
    return args


def main() -> None:
    args = options()  # before the slow imports, so that a mistyped option is reported at once

    from mambavision.openmmlab.complexity import count
    from mambavision.running.program import run_cli

    run_cli(lambda: count(**vars(args)), vars(args))


if __name__ == "__main__":
    main()
