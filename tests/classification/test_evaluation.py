"""Evaluation: which images and classes count."""

import pytest
import torch
from batch_samples import CONFIG

from engine import data
from engine.batches import eval_loader
from engine.evaluate import evaluate
from mambavision.running.group import Group
from mambavision.running.process import Process


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_counts_every_image_once(digits, world_size):
    def model(images):
        return torch.eye(3)[torch.zeros(len(images), dtype=torch.long)]  # always class 0

    totals = torch.zeros(2)
    for rank in range(world_size):
        split = data.open_split(data_dir=str(digits), split="validation")
        loader = eval_loader(
            split, CONFIG, batch_size=4, workers=0,
            group=Group(Process(rank, 0, world_size)), prefetch=False,
        )  # fmt: skip
        scores = evaluate(model, loader, torch.device("cpu"))
        images = len(range(rank, 15, world_size))
        totals += torch.tensor([images, images * scores["top1"] / 100])
    assert totals.tolist() == pytest.approx([15, 5])


def test_evaluation_leaves_skipped_images_out(copied):
    (copied / "val" / "digit 0" / "20.png").write_bytes(b"")
    split = data.open_split(data_dir=str(copied), split="validation", skip_corrupt=True)
    for prefetch in (False, True):
        loader = eval_loader(split, CONFIG, batch_size=4, workers=1, group=Group(), prefetch=prefetch)
        scores = evaluate(lambda images: torch.eye(3)[[0] * len(images)], loader, torch.device("cpu"))
        assert scores["top1"] == pytest.approx(100 * 4 / 14)
    assert split.corrupt_files == ["digit 0/20.png"]


def test_evaluation_on_chosen_columns(digits):
    split = data.open_split(data_dir=str(digits), split="validation")
    loader = eval_loader(split, CONFIG, batch_size=4, workers=0, group=Group(), prefetch=False)
    logits = torch.tensor([9.0, 0.0, 5.0, 1.0, 2.0])
    scores = evaluate(lambda images: logits.repeat(len(images), 1), loader, torch.device("cpu"), classes=[1, 3, 4])
    assert scores["top1"] == pytest.approx(100 / 3)  # column 4 is the best of these: the class with index 2
