"""Score a detector; see --help."""

from mambavision.openmmlab.training.options import TestOptions


def main() -> None:
    options = TestOptions.parse()

    from mambavision.openmmlab.training.detection import DETECTION
    from mambavision.openmmlab.training.test import test
    from mambavision.running.program import run_cli

    run_cli(lambda: test(options, DETECTION))


if __name__ == "__main__":
    main()
