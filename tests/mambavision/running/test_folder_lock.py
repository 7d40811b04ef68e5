"""Folders that belong to one run, and temporary files that belong to living processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mambavision.errors import OutputError, UserError
from mambavision.files import check_writable, link, remove_temporaries, replacing
from mambavision.running import folder_lock
from mambavision.running.folder_lock import LOCK, FolderLock

PROGRAMS = Path(__file__).parent / "programs"
HOLD, WRITE = PROGRAMS / "hold_folder.py", PROGRAMS / "write_slowly.py"


def start(*words):
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_folder_is_taken_until_its_process_is_killed_whatever_its_children_do(tmp_path):
    folder = tmp_path / "new" / "run"
    with start(HOLD, folder) as holder:
        child = int(holder.stdout.readline())
        try:
            sentence = (
                rf"run: process {holder.pid} on \S+ \(since [\d :-]+\) is training there; wait for it or end it, or"
            )
            with pytest.raises(UserError, match=sentence), FolderLock() as lock:
                lock.acquire(folder, "or name another.")
            assert os.listdir(folder) == [LOCK]
            holder.kill()
            holder.wait()
            os.kill(child, 0)
            with FolderLock() as lock:
                lock.acquire(folder, "")
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)
    assert os.listdir(folder) == []  # it was there before


def test_folder_is_taken_within_a_process_too(tmp_path):
    with FolderLock() as lock:
        lock.acquire(tmp_path, "")
        with pytest.raises(UserError, match="another run of this process is training there"):
            FolderLock().acquire(tmp_path / ".." / tmp_path.name, "")
        with start(HOLD, tmp_path) as other:  # the attempt has not opened the way for others
            assert other.wait() == 1
    with FolderLock() as lock:
        lock.acquire(tmp_path, "")


def test_waiting_for_a_run_that_ends(tmp_path, monkeypatch):
    first = FolderLock()
    first.acquire(tmp_path, "")
    monkeypatch.setattr(folder_lock.time, "sleep", lambda seconds: first.release())
    with FolderLock() as lock:
        lock.acquire(tmp_path, "", patience=600)


def test_new_folders_are_made_once_and_do_not_stay_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    with FolderLock() as lock:
        lock.acquire(folder, "", new=True)
        with pytest.raises(FileExistsError):
            FolderLock().acquire(folder, "", new=True)
    assert not (tmp_path / "a").exists()
    with FolderLock() as lock:
        lock.acquire(folder, "", new=True)
        (folder / "checkpoint").touch()
    assert os.listdir(folder) == ["checkpoint"]


def claim(folder, results):
    lock = FolderLock()
    try:
        lock.acquire(folder, "", new=True)
        results.put("taken")
    except FileExistsError:
        results.put("there")
    time.sleep(1)


def test_of_many_starts_at_once_one_makes_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=claim, args=(tmp_path / "run", results)) for _ in range(8)]
    for process in processes:
        process.start()
    assert sorted(results.get() for _ in processes) == sorted(["taken", *["there"] * 7])
    for process in processes:
        process.join()


def write_into(folder, lock):
    with lock:
        lock.acquire(folder, "")
        lock.check()
        folder.rename(folder.with_name("moved"))
        (folder / "log").open("w")


def test_folder_that_is_deleted(tmp_path):
    with pytest.raises(OutputError, match="run: was deleted or moved while this run was writing there"):
        write_into(tmp_path / "run", FolderLock())
    assert os.listdir(tmp_path) == ["moved"]


def test_file_systems_without_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folder_lock, "try_lock", lambda descriptor: None)
    with FolderLock() as lock:
        lock.acquire(tmp_path, "")
    assert "no locks on this file system: make sure that no second run uses it" in caplog.text


@pytest.mark.parametrize("module", ["mambavision.files", "mambavision.running.folder_lock"])
def test_systems_without_fcntl(tmp_path, module):
    program = f"import sys; sys.modules['fcntl'] = None; import {module}; from mambavision.files import replacing\n"
    program += "with replacing(sys.argv[1]) as file: file.write(b'new')"
    assert start("-c", program, tmp_path / "file").wait() == 0
    assert (tmp_path / "file").read_bytes() == b"new"


# Temporary files


def temporaries(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_unfinished_files_of_killed_processes_only_are_removed(tmp_path):
    with start(WRITE, tmp_path / "results.json") as writer:
        writer.stdout.readline()
        (name,) = temporaries(tmp_path)
        remove_temporaries(tmp_path)
        assert temporaries(tmp_path) == [name]
        writer.kill()
    with replacing(tmp_path / "results.json") as file:  # the next program removes it by itself
        (own,) = temporaries(tmp_path)
        assert own != name
        remove_temporaries(tmp_path)
        assert temporaries(tmp_path) == [own]
        file.write(b"results")
    assert os.listdir(tmp_path) == ["results.json"]


def test_threads_write_the_same_file(tmp_path):
    path, both = tmp_path / "file", threading.Barrier(2)

    def write(text):
        with replacing(path) as file:
            both.wait()
            file.write(text)
            both.wait()

    threads = [threading.Thread(target=write, args=[text]) for text in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"one", b"two")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" + "é" * 127])
def test_longest_names(tmp_path, name):
    with replacing(tmp_path / name) as file:
        file.write(b"content")
    link(tmp_path / name, tmp_path / (name[:-1] + "y"))
    assert sorted(os.listdir(tmp_path)) == sorted([name, name[:-1] + "y"])


def test_names_that_are_too_long_are_refused_before_the_work(tmp_path):
    for path in (tmp_path / ("x" * 300) / "args.yaml", tmp_path / "missing" / ("x" * 256), tmp_path / ("é" * 128)):
        with pytest.raises(OutputError, match=r"cannot be written \(File name too long\); choose a shorter one"):
            check_writable(path)
    assert os.listdir(tmp_path) == []
