"""Common parts of the demos: resuming runs, running programs as documented, and printing the results."""

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


def _digest(config: Path) -> str:
    return hashlib.sha256(config.read_bytes()).hexdigest()[:8]


def run_folder(runs: Path, config: Path, results: str) -> Path:
    """Return the folder for a run of a config: that of an interrupted run, otherwise a new one.

    Args:
        runs: Folder of all runs.
        config: Config file; changing its content makes a new run.
        results: Name of the file that marks a complete run.
    """
    interrupted = [folder for folder in runs.glob(f"*-{_digest(config)}") if not (folder / results).exists()]
    return max(interrupted, default=runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{_digest(config)}")


def complete_run(runs: Path, config: Path, results: str) -> Path | None:
    """Return the folder of the newest complete run of a config, or None; arguments as for `run_folder`."""
    complete = [folder for folder in runs.glob(f"*-{_digest(config)}") if (folder / results).exists()]
    return max(complete, default=None)


def leave_interrupts_to_programs() -> None:
    """Leave Ctrl-C to the program that the demo runs, which also receives it and reports its progress."""
    signal.signal(signal.SIGINT, lambda *_: None)


def run_program(
    program: str, *arguments: str | Path, quiet: bool = False, environment: Mapping[str, str] | None = None
) -> float:
    """Run a Python program of the working folder; exit with its status if it fails, otherwise return its seconds.

    Args:
        program: Its path.
        arguments: Its arguments.
        quiet: Show nothing but errors.
        environment: Variables to set.
    """
    environment = environment or {}
    words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    words.append(shlex.join(["python", program, *map(str, arguments)]))
    print(f"\n$ cd {Path.cwd().name}; {' '.join(words)}", flush=True)
    started = time.monotonic()
    status = subprocess.run(
        [sys.executable, program, *map(str, arguments)],
        stdout=subprocess.DEVNULL if quiet else None,
        env={**os.environ, **environment},
    ).returncode
    if status in (130, 143):
        print("interrupted; run the demo again to resume", file=sys.stderr)
    if status:
        sys.exit(status)
    return time.monotonic() - started


def print_outcome(title: str, rows: Mapping[str, str | Path]) -> None:
    """Print a table of results, and how to activate the environment."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, str(value.resolve() if isinstance(value, Path) else value))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if sys.prefix != sys.base_prefix:
        print(f"\nTo run the other commands of the documentation: source {Path(sys.prefix) / 'bin' / 'activate'}")
