"""Finding the input files of programs."""

import glob
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePath

from timm.utils import natural_key

from mambavision.errors import DataError


def find_files(
    given: Sequence[str], extensions: Collection[str], out: Path | None, results: str = "", *, nothing: str
) -> dict[Path, PurePath]:
    """Find the files named by paths, folders and patterns, each once, in natural order within each input.

    Hidden files in folders and the program's own results are ignored.

    Args:
        given: Paths of files and folders, and patterns.
        extensions: Extensions of the files to find in folders, in lower case, with their dot.
        out: Folder for results, if any; ignored where it lies inside a given folder.
        results: Pattern of the names of results, which are ignored if `out` itself is a given folder.
        nothing: Error message for an input without such files.

    Returns:
        Path of each file -> its path relative to the input that names it.

    Raises:
        DataError: An input names no such file, or is neither a file nor a folder.
    """
    found: dict[Path, tuple[Path, PurePath]] = {}
    for name in given:
        files = [*_named(name, extensions, out and out.resolve(), results)]
        if not files:
            raise DataError(f"{name}: {nothing}")
        for path, place in sorted(files, key=lambda each: natural_key(str(each[0]))):
            found.setdefault(path.resolve(), (path, place))
    return dict(found.values())


def _named(given: str, extensions: Collection[str], out: Path | None, results: str) -> Iterator[tuple[Path, PurePath]]:
    """Yield the files that an input names, and their paths relative to it."""
    path = Path(given)
    try:
        matches = [path] if path.exists() else [Path(match) for match in glob.glob(given, recursive=True)]
    except OSError as error:  # a loop of symbolic links, a name that is too long
        raise DataError(f"{given}: cannot be read ({error.strerror}).") from error
    for match in matches:
        if match.is_dir():
            yield from _in_folder(match, extensions, out, results)
        elif match.is_file():
            yield match, PurePath(match.name)
        else:  # reading a pipe or device could block forever
            raise DataError(f"{match}: is neither a file nor a folder; give files, folders, or a quoted pattern.")


def _in_folder(
    folder: Path, extensions: Collection[str], out: Path | None, results: str
) -> Iterator[tuple[Path, PurePath]]:
    top = folder.resolve()
    inside = out if out is not None and out != top and out.is_relative_to(top) else None
    for file in folder.rglob("*"):
        place = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in place.parts)
        if file.suffix.lower() not in extensions or is_hidden or not file.is_file():
            continue
        is_result = results and file.match(results) and file.parent.resolve() == out
        if not is_result and not (inside is not None and file.resolve().is_relative_to(inside)):
            yield file, place


def check_tree(root: Path, extensions: Collection[str] = ()) -> None:
    """Raise a DataError for entries of a data set's folder that would block reading or be counted twice.

    Args:
        root: The folder; links are followed.
        extensions: Extensions of the files to check, in lower case, with their dot; empty for all files.
    """
    folders: dict[tuple[int, int], str] = {}  # by device and inode
    targets: dict[str, str] = {}  # target of a link -> the link
    inside = os.path.join(os.path.realpath(root), "")
    pending = [str(root)]
    try:
        while pending:
            folder = pending.pop()
            status = os.stat(folder)
            twin = folders.setdefault((status.st_dev, status.st_ino), folder)
            if twin != folder:
                raise DataError(f"{folder}: is the same folder as {twin}, whose images would count twice; remove one.")
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        pending.append(entry.path)
                    elif not extensions or os.path.splitext(entry.name)[1].lower() in extensions:
                        _check_file(entry, targets, inside)
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read ({error.strerror}); repair or remove it.") from error


def _check_file(entry: os.DirEntry, targets: dict[str, str], inside: str) -> None:
    if not entry.is_file():
        raise DataError(f"{entry.path}: is not a file (but a pipe, a device or a broken link); remove it.")
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        twin = target if target.startswith(inside) else targets.setdefault(target, entry.path)
        if twin != entry.path:
            raise DataError(f"{entry.path}: is the same image as {twin}, which would count twice; remove one.")
