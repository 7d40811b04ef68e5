"""What the demos of all tasks have in common: runs that go on, programs run as the README does, and the outcome."""

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
    """Return the folder for a run of a config: that of an interrupted one, or else of a new one.

    Args:
        runs: Folder of all runs.
        config: The file that says what is trained; a run of another content is another run.
        results: Name of the file that makes a run complete.
    """
    interrupted = [folder for folder in runs.glob(f"*-{_digest(config)}") if not (folder / results).exists()]
    return max(interrupted, default=runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{_digest(config)}")


def complete_run(runs: Path, config: Path, results: str) -> Path | None:
    """Return the folder of the newest complete run of a config, or None; arguments as for `run_folder`."""
    complete = [folder for folder in runs.glob(f"*-{_digest(config)}") if (folder / results).exists()]
    return max(complete, default=None)


def leave_interrupts_to_programs() -> None:
    """Let Ctrl-C end the demo through the program that it runs, which receives it too and says how far it came."""
    signal.signal(signal.SIGINT, lambda *_: None)


def run_program(
    program: str, *arguments: str | Path, quiet: bool = False, environment: Mapping[str, str] | None = None
) -> float:
    """Run a Python program of the working folder, ending with its status if it fails; return the seconds it took.

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
        print("interrupted; start the demo again, and it goes on from there", file=sys.stderr)
    if status:
        sys.exit(status)
    return time.monotonic() - started


def print_outcome(title: str, rows: Mapping[str, str | Path]) -> None:
    """Print a table of what came out, and how to go on by hand."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, str(value.resolve() if isinstance(value, Path) else value))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if sys.prefix != sys.base_prefix:
        print(f"\nFor the other commands of the README: source {Path(sys.prefix) / 'bin' / 'activate'}")
