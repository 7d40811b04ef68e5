"""Finding the files that the programs of all tasks are given as inputs."""

import glob
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePath

from timm.utils import natural_key

from mambavision.errors import DataError


def find_files(
    given: Sequence[str], extensions: Collection[str], out: Path | None, results: str = "", *, nothing: str
) -> dict[Path, PurePath]:
    """Return the files that paths, folders and patterns name, each once, in natural order within each input.

    Left out of folders are hidden files and what the program itself writes.

    Args:
        given: Paths of files and folders, patterns.
        extensions: Those that count in folders, in lower case, with their dot.
        out: Folder for results, if any. Where it lies inside a given folder, all of it is left out.
        results: Pattern of the names of results, for the case that `out` is a given folder itself.
        nothing: What to say of an input that names no such file.

    Returns:
        Paths, with the place of each below the input that names it.

    Raises:
        DataError: An input names no such file, or something that cannot be read like one.
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
    """Yield the files that one input names, each with its place below it."""
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
        else:  # reading a pipe or device could wait for ever
            raise DataError(f"{match}: is neither a file nor a folder; give files, folders, or a quoted pattern.")


def _in_folder(
    folder: Path, extensions: Collection[str], out: Path | None, results: str
) -> Iterator[tuple[Path, PurePath]]:
    is_inside = out is not None and out != folder.resolve() and out.is_relative_to(folder.resolve())
    for file in folder.rglob("*"):
        place = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in place.parts)
        if file.suffix.lower() not in extensions or is_hidden or not file.is_file():
            continue
        is_result = results and file.match(results) and file.parent.resolve() == out
        if not is_result and not (is_inside and file.resolve().is_relative_to(out)):
            yield file, place
