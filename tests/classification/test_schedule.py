"""Learning rates, schedules and weight decay."""

import math

import pytest
import torch

from checkout import ROOT
from engine.model import build_model, model_arguments
from engine.options import TrainOptions
from engine.schedule import build_optimizer, build_scheduler, learning_rates
from mambavision.errors import UserError


def test_warm_up_that_never_ends_is_warned_about(train, capsys):
    warning = "the learning rate never leaves its warm-up: --warmup-epochs is 2, and --epochs only 1"
    train("--epochs", "1", "--warmup-epochs", "2")
    assert warning in capsys.readouterr().out
    train("--epochs", "2", "--warmup-epochs", "1")
    assert "warm-up" not in capsys.readouterr().out


def rates(words, batches, at):
    options = TrainOptions.parse(words)
    lr = learning_rates(options, world_size=8)["lr"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, epochs = build_scheduler(options, optimizer, batches, world_size=8)
    found = {}
    for epoch in range(epochs):
        for batch in range(batches):
            scheduler.step_update(epoch * batches + batch + 1)
            if batch == 0:
                found[epoch] = optimizer.param_groups[0]["lr"]
        scheduler.step(epoch + 1, 0.0)
    return epochs, [found[epoch] for epoch in at]


def test_learning_rates_are_the_published_ones():
    recipe = str(ROOT / "classification/configs/mambavision/mambavision_tiny_1k.yaml")
    words = ["--config", recipe, "--data-len", "1281167", "--batch-size", "128"]
    epochs, found = rates(words, 1251, [0, 10, 50, 200, 309, 319])
    assert epochs == 320
    assert found == pytest.approx([1.2e-6, 2.5e-3, 4.69e-3, 1.40e-3, 5.13e-6, 5e-6], rel=5e-3)


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "classification/configs/vmamba").glob("*_224.yaml")), ids=lambda p: p.stem
)
def test_vmamba_learns_at_the_published_rates_and_depths(recipe):
    """A linear warm-up of 20 epochs from 1e-6, then a cosine over 280 epochs from 1e-3 to 1e-5, step by step."""
    words, batches = ["--config", str(recipe)], 3
    epochs, found = rates(words, batches, range(300))
    assert epochs == 300
    for epoch, rate in enumerate(found):
        step, warmup = epoch * batches + 1, 20 * batches
        cosine = 1 + math.cos(math.pi * (step - warmup) / (280 * batches))
        expected = 1e-6 + step * (1e-3 - 1e-6) / warmup if step < warmup else 1e-5 + (1e-3 - 1e-5) / 2 * cosine
        assert rate == pytest.approx(expected, rel=1e-9)
    options = TrainOptions.parse(words)
    with torch.device("meta"):
        model = build_model(options.model, options.averaging, model_arguments(options.model, None), 0)
    depths = {"tiny": 0.2, "small": 0.3, "vmambav2_base": 0.6}
    drop = next((depth for name, depth in depths.items() if name in recipe.stem), 0.5)
    assert model.layers[-1].blocks[-1].drop_path.drop_prob == pytest.approx(drop)


SEGMAN_RATES = {"t": 4e-3, "s": 2e-3, "b": 2e-3, "l": 2e-3}  # of 8 processes


@pytest.mark.parametrize("variant", SEGMAN_RATES)
def test_segman_moves_its_rate_once_an_epoch(variant):
    """The whole first epoch at 1e-6, then steps up to the peak, a cosine to 1e-5 in epoch 300, and ten more there."""
    words, batches, peak = ["--config", str(ROOT / f"classification/configs/segman/segman_{variant}_1k.yaml")], 3, None
    epochs, found = rates(words, batches, range(310))
    assert epochs == 310
    peak = SEGMAN_RATES[variant]
    assert found[:5] == pytest.approx([1e-6 + epoch * (peak - 1e-6) / 5 for epoch in range(5)], rel=1e-9)
    cosine = [1e-5 + (peak - 1e-5) / 2 * (1 + math.cos(math.pi * epoch / 300)) for epoch in range(5, 300)]
    assert found[5:300] == pytest.approx(cosine, rel=1e-9)
    assert found[300:] == pytest.approx([1e-5] * 10)


@pytest.mark.parametrize(
    ("words", "processes", "expected"),
    [
        ([], 1, (1e-3, 1e-6, 5e-6)),
        (["--lr", "0.5", "--lr-base", "0.1"], 8, (0.5, 1e-6, 5e-6)),
        (["--lr-base", "0.1", "--opt", "sgd"], 2, (0.1 * 2 * 10 / 256, 1e-6, 5e-6)),
        (["--lr-base", "0.1", "--opt", "adamw"], 2, (0.1 * (20 / 256) ** 0.5, 1e-6, 5e-6)),
        (["--lr-base", "0.1", "--opt", "lamb", "--lr-base-scale", "linear"], 2, (0.1 * 20 / 256, 1e-6, 5e-6)),
        (["--lr-base", "0.1", "--opt", "sgd", "--lr-base-scale", "sqrt"], 2, (0.1 * (20 / 256) ** 0.5, 1e-6, 5e-6)),
        (["--lr-base", "0.1", "--lr-base-size", "10", "--grad-accum-steps", "4"], 1, (0.2, 1e-6, 5e-6)),
        (["--lr-base", "0.1", "--lr-base-size", "5", "--opt", "sgd", "--lr-base-bounds"], 1, (0.2, 2e-6, 1e-5)),
    ],
)
def test_rates_follow_the_global_batch(words, processes, expected):
    options = TrainOptions.parse(["--batch-size", "10", *words])
    assert tuple(learning_rates(options, processes).values()) == pytest.approx(expected, rel=1e-12)


def test_the_log_says_the_rate_and_the_batch_it_is_for(train, capsys):
    train("--lr-base", "0.1", "--lr-base-size", "1000", "--lr-base-scale", "linear", "--epochs", "1", "--lr", "1e-3")
    assert "learning rate 0.001 for a global batch of 10 images" in capsys.readouterr().out


def test_warm_up_in_front_of_the_schedule_needs_a_schedule(train):
    with pytest.raises(UserError, match="--warmup-prefix needs more --epochs than --warmup-epochs"):
        train("--warmup-prefix", "--epochs", "2", "--warmup-epochs", "2")


@pytest.mark.parametrize("by_epoch", [[], ["--lr-ep"]])
@pytest.mark.parametrize("schedule", ["cosine", "tanh", "step", "multistep", "poly", "plateau", "constant"])
def test_every_schedule_warms_up_and_goes_on(schedule, by_epoch):
    words = ["--sched", schedule, "--epochs", "20", "--warmup-epochs", "4", "--decay-epochs", "8", "--lr", "1e-3"]
    words += ["--decay-milestones", "8", "12", "--cooldown-epochs", "2", "--min-lr", "1e-6", "--patience-epochs", "2"]
    epochs, found = rates([*words, *by_epoch], 10, range(20))
    assert epochs in (20, 22)
    assert found[0] < 0.3e-3 < 0.6e-3 < max(found[4:7]) <= 1e-3 * 1.0001
    assert schedule == "constant" or found[19] < found[5]
    assert len({round(rate, 12) for rate in found[4:]}) > 1 or schedule == "constant"


@pytest.mark.parametrize(
    ("arguments", "exempt"),
    [({}, ()), ({"decay_scan": False}, ("A_logs", "dt_projs_bias"))],
    ids=["released", "declared"],
)
def test_weight_decay_of_vmamba(arguments, exempt):
    """That of the released weights: all matrices, those of the scan included, and the biases of its step sizes."""
    options = TrainOptions.parse(["--model", "vmamba_tiny_s1l8"])
    with torch.device("meta"):
        model = build_model(options.model, options.averaging, arguments, 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in build_optimizer(options, model).param_groups
        for parameter in group["params"]
        if group["weight_decay"]
    }
    matrices = {name for name, value in model.named_parameters() if value.ndim > 1 and not name.endswith(".bias")}
    assert (len(names), len(matrices)) == (276, 132)
    assert decayed == {name for name in matrices if not name.endswith(exempt)}
    assert len(decayed) == 132 - 14 * len(exempt)
