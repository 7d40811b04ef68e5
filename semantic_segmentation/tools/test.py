"""Score a segmentation model; see --help."""

from mambavision.openmmlab.training.options import TestOptions


def main() -> None:
    options = TestOptions.parse()

    from mambavision.openmmlab.training.segmentation import SEGMENTATION
    from mambavision.openmmlab.training.test import test
    from mambavision.running.program import run_cli

    run_cli(lambda: test(options, SEGMENTATION))


if __name__ == "__main__":
    main()
