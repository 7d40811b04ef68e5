"""Image folders: splits, classes, and what could hang a run or count images twice."""

import os
import shutil

import pytest

from engine import data
from mambavision.errors import DataError, UserError

# Splits and classes


def test_splits_are_found_under_their_usual_names(digits):
    train = data.open_split(data_dir=str(digits), split="train", is_training=True)
    validation = data.open_split(data_dir=str(digits), split="validation")
    assert (len(train), len(validation)) == (60, 15)
    assert data.class_names(train) == data.class_names(validation) == ["digit 0", "digit 1", "digit 2"]
    assert len(data.open_split(data_dir=str(digits / "val"), split="validation")) == 15
    assert len(data.open_split(data_dir=None, split=str(digits / "train"), is_training=True)) == 60


@pytest.mark.parametrize(
    ("spoil", "split", "message"),
    [
        (lambda root: shutil.rmtree(root), "train", r"digits: no such folder; --data-dir needs train/ and val/"),
        (lambda root: shutil.rmtree(root / "train"), "train", r"no folder for the split 'train' \(looked for train/"),
        (lambda root: shutil.rmtree(root / "val"), "validation", r"looked for validation/, val/, valid/"),
        (lambda root: [path.unlink() for path in root.glob("train/*/*")], "train", "no images in its 3 class folders"),
        (lambda root: [path.unlink() for path in root.glob("train/digit 1/*")], "train", r"no images in .*'digit 1';"),
        (lambda root: [shutil.rmtree(path) for path in root.glob("train/*")], "train", "no class folders inside"),
    ],
)
def test_missing_and_empty_folders_are_named(copied, spoil, split, message):
    spoil(copied)
    with pytest.raises(DataError, match=message):
        data.open_split(data_dir=str(copied), split=split, is_training=split == "train")


def test_no_folder_at_all_is_an_error():
    with pytest.raises(DataError, match="--data-dir"):
        data.open_split(data_dir=None, split="train")


def test_folders_of_the_working_directory_are_not_taken_for_missing_splits(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(digits)
    for split in ("train", "val"):
        for root in (str(tmp_path), None):
            with pytest.raises(DataError):
                data.open_split(data_dir=root, split=split, is_training=True)
    for path in ("./train", "val/", str(digits / "val")):
        assert data.find_split(str(tmp_path), path, may_be_root=False).samefile(path)
    with pytest.raises(DataError, match="has no folder for the split 'holdout'"):
        data.find_split(str(digits / "val"), "holdout", may_be_root=True)


def test_differing_classes_are_listed():
    names = ["cat", "dog", "owl"]
    data.check_same_classes(names, ["cat", "dog", "owl"], "a", "b")
    data.check_same_classes(None, names, "a", "b")
    with pytest.raises(DataError, match="classes of b differ from those of a: b lacks 'dog' and has the unknown 'fox'"):
        data.check_same_classes(names, ["cat", "fox", "owl"], "a", "b")
    with pytest.raises(DataError, match="another order, first at index 1: 'owl' instead of 'dog'"):
        data.check_same_classes(names, ["cat", "owl", "dog"], "a", "b")
    with pytest.raises(DataError, match="'0', '1', '10', '11', '12' and 15 more"):
        data.check_same_classes([str(index) for index in range(20)], [], "a", "b")


def test_class_maps_choose_and_order_classes(digits, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("digit 2\ndigit 0\n")
    split = data.open_split(data_dir=str(digits), split="train", class_map=str(path))
    assert data.class_names(split) == ["digit 2", "digit 0"]
    assert len(split) == 40
    with pytest.raises(DataError, match="no such class map"):
        data.open_split(data_dir=str(digits), split="train", class_map="nothing.txt")
    with pytest.raises(UserError, match="a class map is a text file"):
        data.open_split(data_dir=str(digits), split="train", class_map=__file__)
    path.write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"train: no images of the classes 'cat', 'dog' in the class map"):
        data.open_split(data_dir=str(digits), split="train", class_map=str(path))


def test_class_maps_are_never_unpickled(digits, tmp_path):
    (tmp_path / "classes.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(UserError, match=r"a class map is a text file \(\.txt\)"):
        data.open_split(data_dir=str(digits), split="train", class_map=str(tmp_path / "classes.pkl"))


# Folders that could hang a run, or count images twice


def _pipe(folder):
    os.mkfifo(folder / "pipe.png")
    return "pipe.png"


def _device(folder):
    (folder / "device.png").symlink_to("/dev/zero")
    return "device.png"


def _broken_link(folder):
    (folder / "broken.png").symlink_to("nowhere.png")
    return "broken.png"


def _link_to_itself(folder):
    (folder / "loop.png").symlink_to("loop.png")
    return "loop.png"


def _loop(folder):
    (folder / "again").symlink_to(folder)
    return "again"


def _loop_through_the_parent(folder):
    (folder / "up").symlink_to(folder.parent)
    return "up"


def _class_twice(folder):
    (folder / "other").symlink_to(next(each for each in folder.parent.iterdir() if each != folder))
    return "other"


def _image_twice(folder):
    (folder / "twin.png").symlink_to(folder / "01.png")
    return "twin.png"


def _image_from_outside_twice(folder):
    outside = folder.parent.parent.parent / "outside.png"
    shutil.copy(folder / "01.png", outside)
    for name in ("one.png", "two.png"):
        (folder / name).symlink_to(outside)
    return "outside|one|two"


TRAPS = [
    _pipe, _device, _broken_link, _link_to_itself, _loop, _loop_through_the_parent, _class_twice, _image_twice,
    _image_from_outside_twice,
]  # fmt: skip


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__.strip("_"))
def test_folders_that_hang_or_count_twice_are_refused(trap, dataset, copied):
    name = trap(copied / "train" / "digit 0")
    with pytest.raises(DataError, match=name) as refused:
        data.open_split(data_dir=str(copied), split="train", dataset=dataset)
    assert refused.value.exit_status == 65
    assert str(copied) in str(refused.value)


def test_links_to_folders_and_files_elsewhere_are_followed(copied, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (copied / "train" / "digit 0").rename(elsewhere)
    (copied / "train" / "digit 0").symlink_to(elsewhere)
    (copied / "train" / "digit 1" / "linked.png").symlink_to(copied / "val" / "digit 1" / "20.png")
    assert len(data.open_split(data_dir=str(copied), split="train")) == 61
