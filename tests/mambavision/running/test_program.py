"""Programs that are interrupted."""

import os
import signal

import pytest

from mambavision.running.program import run_cli

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)


@pytest.fixture
def handlers():
    """Keep the signal handlers of the tests' own process."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_programs_end_with_the_status_of_the_signal(handlers, capsys):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert end.value.code == 143
    assert capsys.readouterr().err == "interrupted\n"


def test_signals_that_are_ignored_stay_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, and background jobs of scripts
    run_cli(lambda: os.kill(os.getpid(), signal.SIGINT))
