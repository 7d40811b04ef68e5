"""The training loop, and what build makes of the options."""

import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.data import FastCollateMixup, resolve_data_config
from timm.utils import unwrap_model
from torch.nn.utils import parameters_to_vector

import mambavision
from engine import batches as batches_module
from engine import run_folder
from engine.batches import build_batches
from engine.data import open_training_data
from engine.objective import MesaTask
from engine.train import Trainer
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import NonFiniteError
from mambavision.running.group import Group
from mambavision.running.process import Process
from small_models import SMALL
from small_runs import identical, summary, weights

UNMIXED = ["--mixup", "0", "--cutmix", "0"]
STILL = ["--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--opt", "sgd", "--no-aug", "--drop-path", "0", *UNMIXED]


def gradient(task):
    return torch.cat([weight.grad.flatten() for weight in task.trainable_module.parameters()])


# The optimizer step


@pytest.fixture
def gradients(prepare):
    """Return the gradients of the steps of an epoch in which neither weights nor batch statistics change."""

    def run_epoch(*words):
        small, seen = prepare(*STILL, *words), []
        small.learner.task.train = lambda: small.learner.task.eval()
        small.learner.task.eval = lambda: type(small.learner.task).train(small.learner.task, False)
        small.learner.optimizer.register_step_pre_hook(lambda *_: seen.append(gradient(small.learner.task)))
        small._train_epoch(0)
        return seen

    return run_epoch


def test_accumulated_batches_count_like_one_large_batch(gradients):
    (large,) = gradients("--batch-size", "60", "--clip-grad", "0")
    (accumulated,) = gradients("--grad-accum-steps", "6", "--clip-grad", "0")
    torch.testing.assert_close(accumulated, large)
    four, two = gradients("--grad-accum-steps", "4", "--clip-grad", "0")  # the last group is smaller
    torch.testing.assert_close((4 * four + 2 * two) / 6, large)


def test_gradients_are_clipped(gradients):
    assert all(step.norm() > 0.1 for step in gradients("--clip-grad", "0"))
    assert [step.norm().item() for step in gradients("--clip-grad", "0.01")] == pytest.approx([0.01] * 6, rel=1e-3)
    assert max(step.abs().max() for step in gradients("--clip-grad", "0.01", "--clip-mode", "value")) == 0.01


def test_average_follows_every_step(prepare):
    small = prepare("--model-ema", "--model-ema-decay", "0.75", "--grad-accum-steps", "2")
    student, average = small.learner.task.trainable_module, small.learner.task.get_eval_model(ema=True).module
    expected = [parameters_to_vector(average.parameters())]

    def follow(*_):
        expected.append(0.75 * expected[-1] + 0.25 * parameters_to_vector(student.parameters()).detach())

    small.learner.optimizer.register_step_post_hook(follow)
    small._train_epoch(0)
    assert len(expected) == 1 + 3
    torch.testing.assert_close(parameters_to_vector(average.parameters()), expected[-1])
    assert not torch.equal(expected[-1], expected[0])


# What the model is trained on


@pytest.fixture
def seen():
    """Collect the (images, targets) that the objective of a trainer is given."""

    def collect(small):
        batches = []
        small.learner.task.register_forward_pre_hook(lambda task, batch: batches.append(batch))
        return batches

    return collect


def test_model_sees_mixed_images_and_targets(prepare, seen):
    small = prepare()
    small.batches.mixup = lambda images, targets: (torch.full_like(images, 0.5), torch.full((len(images), 3), 0.25))
    batches = seen(small)
    small._train_epoch(0)
    assert all((images == 0.5).all() and (targets == 0.25).all() for images, targets in batches)


def test_mixing_ends(prepare, seen, monkeypatch):
    small, stopped = prepare("--mixup-off-epoch", "1", "--smoothing", "0"), []
    monkeypatch.setattr(small.batches.train, "stop_mixup", lambda: stopped.append(True))  # for mixing loaders
    batches = seen(small)
    small._run_epoch(0, None)
    assert not stopped
    small._run_epoch(1, None)
    assert stopped
    is_hard = [bool(((targets == 0) | (targets == 1)).all()) for _, targets in batches]
    assert is_hard == [False] * 6 + [True] * 6


def test_distillation_sets_in(prepare):
    small = prepare("--model-ema", "--model-ema-decay", "0.5", "--mesa", "0.5", "--mesa-start-ratio", "0.25")
    terms = []

    def note_term(task, batch, result):
        terms.append((result["loss"] - task.criterion(result["output"], batch[1])).item())

    small.learner.task.register_forward_hook(note_term)
    small.fit()  # two epochs
    assert terms[:6] == [0] * 6
    assert all(term > 0 for term in terms[6:])


@pytest.mark.parametrize(
    ("words", "averaged"),
    [
        ([], [False, True]),
        (["--model-ema-force-cpu"], [False]),
        (["--dist-bn", ""], []),
    ],
)
def test_processes_share_running_statistics(prepare, monkeypatch, words, averaged):
    small, shared = prepare("--model-ema", "--no-saver", *words), []
    small.group = Group(Process(0, 0, 2, "pytorch"))
    monkeypatch.setattr(small, "_train_epoch", lambda epoch: (1.0, 1.0))
    monkeypatch.setattr(small, "_scores", lambda: {"raw": {"top1": 1.0, "top5": 1.0, "loss": 1.0}})
    monkeypatch.setattr("engine.train.distribute_bn", lambda model, size, reduce: shared.append((model, size, reduce)))
    small._run_epoch(0, None)
    models = [unwrap_model(small.learner.task.get_eval_model(ema=ema)) for ema in averaged]
    assert shared == [(model, 2, True) for model in models]


# What the options build


def test_augmentation_follows_the_options(prepare):
    words = ["--reprob", "0.3", "--recount", "2", "--vflip", "0.2", "--color-jitter", "0.15", "--aa", ""]
    small = prepare(*words)
    steps = {type(step).__name__: step for step in small.datasets[0].transform.transforms}
    assert (steps["RandomErasing"].probability, steps["RandomErasing"].max_count) == (0.3, 2)
    assert steps["RandomVerticalFlip"].p == 0.2
    assert "RandomHorizontalFlip" not in steps
    assert steps["ColorJitter"].contrast == pytest.approx((0.85, 1.15))
    prefetching = prepare(*words, *UNMIXED, "--aug-splits", "2").batches.train.loader
    assert prefetching.random_erasing.probability == 0.3


@pytest.mark.parametrize(("words", "order"), [([], ["mix", "erase"]), (["--no-prefetcher"], ["erase", "mix"])])
def test_erasing_and_mixing_are_in_the_order_of_the_originals(words, order, training_options):
    """On a GPU: VMamba's recipes erase parts of single images, the others' parts of mixed ones, as timm does."""
    options, gpu = training_options(*words, "--reprob", "0.3"), torch.device("cuda")
    train_data, validation_data, _ = open_training_data(options.data, (10, 10), 3, 0)
    config = resolve_data_config({"input_size": (3, 32, 32)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            batches_module, "PrefetchLoader", lambda loader, *_, **options: SimpleNamespace(loader=loader, **options)
        )
        batches = build_batches(options, config, 3, train_data, validation_data, Group(device=gpu))
    erases_single = any(type(step).__name__ == "RandomErasing" for step in train_data.transform.transforms)
    assert erases_single == (order[0] == "erase")
    assert (batches.mixup is not None) == (order[1] == "mix")  # or while collating, before the prefetcher erases
    if order[1] == "erase":
        assert isinstance(batches.train.loader.loader.collate_fn, FastCollateMixup)
        assert batches.train.loader.re_prob == 0.3


def test_model_follows_the_options(prepare):
    model = prepare("--drop-path", "0.35", "--grad-checkpointing").learner.task.trainable_module
    assert model.levels[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.35)
    assert all(level.grad_checkpointing for level in model.levels)


def test_labels_are_smoothed(prepare):
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    smoothed = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.3)
    criterion = prepare(*UNMIXED, "--smoothing", "0.3").learner.task.criterion
    torch.testing.assert_close(criterion(logits, targets), smoothed)
    _, mixed = prepare("--smoothing", "0.3").batches.mixup(torch.zeros(4, 3, 8, 8), targets)
    assert mixed.min().item() == pytest.approx(0.1)  # of a class that neither image has


def test_optimizer_follows_the_options(prepare):
    groups = prepare("--weight-decay", "0.3", "--layer-decay", "0.5").learner.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0, 0.3}
    assert {1.0, 0.5, 0.25} <= {group["lr_scale"] for group in groups}
    assert all(group["lr"] == pytest.approx(1e-6 * group["lr_scale"]) for group in groups)  # warm-up starts


# Not a number


def test_loss_that_is_not_finite_stops_before_the_step(train, monkeypatch):
    forward, batches = MesaTask.forward, itertools.count()

    def poisoned(self, images, targets):
        result = forward(self, images, targets)
        return result | {"loss": result["loss"] * (math.nan if next(batches) == 8 else 1.0)}

    seen = []
    finish = Trainer._finish_step
    monkeypatch.setattr(MesaTask, "forward", poisoned)
    monkeypatch.setattr(
        Trainer,
        "_finish_step",
        lambda self: (seen.append(self.learner.task.trainable_module.head.weight.clone()), finish(self))[1],
    )
    words = ["--model-ema", "--mesa", "0.1", "--mesa-start-ratio", "1"]
    message = r"the loss is not finite.* Samples: .*epoch 1, batch 2, .*last\.pth\.tar is untouched"
    with pytest.raises(NonFiniteError, match=message) as error:
        train(*words)
    assert error.value.exit_status == 65
    names = re.search(r"process 0: (.*), \.\.\.\. It", str(error.value))[1].split(", ")
    assert len(names) == 8
    assert all(re.fullmatch(r"digit \d/\d\d\.png", name) for name in names)
    (folder,) = Path("output/train/exp").iterdir()
    checkpoint = read_checkpoint(folder / run_folder.LAST)
    assert checkpoint["epoch"] == 0
    assert torch.equal(checkpoint["state_dict"]["head.weight"], seen[6])
    assert len(seen) == 9
    assert not torch.equal(seen[8], seen[7])


@pytest.mark.parametrize("clip", ["0", "5"])
def test_gradient_that_is_not_finite_stops_before_the_step(prepare, clip):
    small, stepped = prepare("--clip-grad", clip), []
    head = small.learner.task.trainable_module.head.weight
    calls = itertools.count()
    head.register_hook(lambda gradient: gradient * (math.inf if next(calls) == 2 else 1.0))
    small.learner.optimizer.register_step_post_hook(lambda *_: stepped.append(head.detach().clone()))
    with pytest.raises(
        NonFiniteError, match=r"the gradient is not finite.*epoch 0, batch 2.*no checkpoint was written"
    ):
        small.fit()
    assert len(stepped) == 2
    assert torch.equal(head, stepped[-1])


def test_overflow_with_a_loss_scale_has_a_limit(prepare):
    small = prepare("--epochs", "5", "--no-saver")
    small.learner.scaler = torch.amp.GradScaler("cpu")
    head = small.learner.task.trainable_module.head.weight
    before = head.detach().clone()
    calls = itertools.count()
    head.register_hook(lambda gradient: gradient * (1.0 if next(calls) == 3 else math.inf))
    with pytest.raises(NonFiniteError, match=r"overflowed in 25 steps in a row.*epoch 4, batch 4"):
        small.fit()
    assert not torch.equal(head, before)  # one step of 29 was taken
    assert small.learner.optimizer.state[head]["step"] == 1


def test_a_loss_that_is_not_finite_is_skipped_by_a_loss_scale(prepare, monkeypatch):
    """As the originals' programs do under float16."""
    small = prepare("--epochs", "1", "--warmup-epochs", "0")
    small.learner.scaler = torch.amp.GradScaler("cpu")
    task, calls = small.learner.task, itertools.count()
    task.register_forward_hook(lambda *_: {**_[2], "loss": _[2]["loss"] * (math.nan if next(calls) == 2 else 1.0)})
    small.fit()
    head = task.trainable_module.head.weight
    assert small.learner.optimizer.state[head]["step"] == 5  # of 6
    assert head.isfinite().all()
    (row,) = summary(small.folder)
    assert math.isfinite(float(row["train_loss"]))


def test_names_of_samples_are_those_of_the_batch(prepare):
    small = prepare(*STILL, "--epoch-repeats", "2")
    train, (images, _) = small.batches.train, small.datasets
    batches = list(train.epoch(3))
    names = [train.sample_names(3, batch) for batch in range(12)]
    assert [len(set(each)) for each in names] == [10] * 12
    assert sorted(name for each in names[:6] for name in each) == sorted(images.filenames())
    for each, (_, targets) in zip(names, batches, strict=True):
        assert [int(name[len("digit ")]) for name in each] == targets.tolist()


# The same again


def test_equal_seeds_give_equal_runs_whatever_the_workers(train):
    words = ["--model-ema", "--drop-path", "0.3", "--reprob", "0.5", "--log-interval", "1"]
    runs = [
        train(*words, "--workers", workers, "--seed", seed, "--experiment", name)
        for name, workers, seed in [("a", 0, 1), ("b", 0, 1), ("c", 2, 1), ("d", 1, 2)]
    ]
    for key in ("state_dict", "state_dict_ema"):
        first, *others = (weights(run, key=key) for run in runs)
        assert [identical(first, other) for other in others] == [True, True, False]


# Self-distillation


def test_distillation_is_the_published_term():
    torch.manual_seed(0)
    model = mambavision.create_model("mamba_vision_T", **SMALL["mamba_vision_T"], drop_path_rate=0.0)
    task = MesaTask(model, 0.5, verbose=False)
    task.setup_ema(decay=0.9)
    teacher = task.get_eval_model(ema=True)
    with torch.no_grad():
        teacher.module.head.weight.mul_(5)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    task.train()
    assert model.training
    assert not teacher.training
    task.distilling = True
    result = task(images, targets)
    taught = (teacher(images) / 3).softmax(1)
    log_ratio = taught.log() - (result["output"] / 3).log_softmax(1)
    divergence = (taught * log_ratio).sum(1).mean()
    expected = torch.nn.functional.cross_entropy(result["output"], targets) + 0.5 * 50 * divergence
    torch.testing.assert_close(result["loss"], expected)
    result["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
