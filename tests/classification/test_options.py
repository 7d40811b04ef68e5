"""Command lines and recipes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from checkout import ROOT
from engine.options import (
    PredictOptions,
    ThroughputOptions,
    TrainOptions,
    ValidateOptions,
)
from engine.run_folder import write_settings
from small_runs import flat

SHOW_HELP = Path(__file__).parent / "programs" / "show_help.py"


def refusal(capsys, parse, *words):
    with pytest.raises(SystemExit) as end:
        parse(list(words))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_flags_may_be_spelled_with_hyphens_or_underscores():
    hyphens = TrainOptions.parse(["--data-dir", "a_b", "--model-ema", "--batch-size=4", "--no-amp"])
    underscores = TrainOptions.parse(["--data_dir", "a_b", "--model_ema", "--batch_size=4", "--no_amp"])
    assert hyphens == underscores
    assert flat(hyphens).data_dir == "a_b"
    assert flat(hyphens).model_ema
    assert ValidateOptions.parse(["--data_dir", "x"]) == ValidateOptions.parse(["--data-dir", "x"])


def test_launchers_of_torch_pass_a_local_rank():
    assert TrainOptions.parse(["--local-rank=3"]) == TrainOptions.parse(["--local_rank", "3"])


def test_unknown_flags_suggest_the_nearest(capsys):
    assert "'--weight-decya'. Did you mean --weight-decay?" in refusal(
        capsys, TrainOptions.parse, "--weight_decya", "0.1"
    )


@pytest.mark.parametrize(
    ("parse", "word", "flag"),
    [
        (TrainOptions.parse, "--learning_rate", "--lr"),
        (TrainOptions.parse, "--wd", "--weight-decay"),
        (TrainOptions.parse, "--num-epochs", "--epochs"),
        (ValidateOptions.parse, "--batch", "--batch-size"),
    ],
)
def test_common_names_suggest_the_flag_that_is_meant(capsys, parse, word, flag):
    assert f"Did you mean {flag}?" in refusal(capsys, parse, word, "1")


@pytest.mark.parametrize("flag", TrainOptions.refused)
def test_flags_without_effect_are_refused_with_a_hint(capsys, flag):
    spelled = "--" + flag.replace("-", "_")
    assert f"--{flag} is not available: {TrainOptions.refused[flag]}" in refusal(
        capsys, TrainOptions.parse, spelled, "1"
    )
    assert f"--{flag} is not available" in refusal(capsys, TrainOptions.parse, f"{spelled}=1")


@pytest.mark.parametrize("flag", ValidateOptions.refused)
def test_validation_has_refusals_of_its_own(capsys, flag):
    assert ValidateOptions.refused[flag] in refusal(capsys, ValidateOptions.parse, f"--{flag}")


@pytest.mark.parametrize(
    "words", [["--worker-seeding", "all"], ["--use_multi_epochs_loader"], ["--fused_layernorm"]], ids=" ".join
)
def test_flags_whose_purpose_is_served_anyway_are_noted(capsys, tmp_path, words):
    assert TrainOptions.parse(words) == TrainOptions.parse([])
    assert capsys.readouterr().err.startswith(f"note: {words[0].replace('_', '-')} is not needed: ")
    text = "worker_seeding: all\nuse_multi_epochs_loader: true\n"
    assert flat(TrainOptions.parse(["--config", recipe(tmp_path, text)])).epochs == flat(TrainOptions.parse([])).epochs
    assert capsys.readouterr().err.count("note: ") == 2


def test_prediction_is_offered_what_it_does(capsys):
    assert "'--pretrained'" in refusal(capsys, PredictOptions.parse, "x", "--pretrained")
    with pytest.raises(SystemExit):
        PredictOptions.parse(["--help"])
    assert "pattern, 'all'" not in capsys.readouterr().out


def test_negative_numbers_may_have_exponents():
    assert flat(TrainOptions.parse(["--mean", "-1e-05", "-.5", "-3"])).mean == [-1e-05, -0.5, -3]


def test_wrong_types_and_choices_are_one_sentence(capsys):
    assert "--epochs: invalid int value: 'ten'" in refusal(capsys, TrainOptions.parse, "--epochs", "ten")
    assert "invalid choice: 'cosin'" in refusal(capsys, TrainOptions.parse, "--sched", "cosin")
    assert "takes name=value, got 'depths'" in refusal(capsys, TrainOptions.parse, "--model-kwargs", "depths")
    assert "INPUT" in refusal(capsys, PredictOptions.parse)


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (ThroughputOptions.parse, ["--batch-size", "0"]),
        (ThroughputOptions.parse, ["--rounds", "0"]),
        (ThroughputOptions.parse, ["--resolution", "-5"]),
        (ThroughputOptions.parse, ["--warmup", "-1"]),
        (ValidateOptions.parse, ["--batch-size", "0"]),
        (ValidateOptions.parse, ["--input-size", "3", "0", "32"]),
        (ValidateOptions.parse, ["--workers", "-1"]),
        (PredictOptions.parse, ["x", "--topk", "0"]),
        (PredictOptions.parse, ["x", "--batch-size", "1.5"]),
    ],
)
def test_impossible_counts_are_refused_at_once(capsys, parse, words):
    assert "must be a whole number of at least " in refusal(capsys, parse, *words)


def test_model_arguments_are_literals_or_text():
    words = ["--model-kwargs", "depths=1,1,2,2", "dt_init=mamba", "layer_scale=1e-5", "qk_norm=True"]
    expected = {"depths": (1, 1, 2, 2), "dt_init": "mamba", "layer_scale": 1e-5, "qk_norm": True}
    assert flat(TrainOptions.parse(words)).model_kwargs == expected


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_recipes_set_defaults_and_the_command_line_wins(tmp_path):
    path = recipe(
        tmp_path, "lr: 0.5\nopt_betas: [0.8, 0.9]\namp: true\nepochs: 7\nmodel_kwargs: {depths: [1, 2, 3, 4]}\n"
    )
    args = flat(TrainOptions.parse(["--config", path, "--epochs", "9", "--no-amp"]))
    assert (args.lr, args.opt_betas, args.epochs, args.amp) == (0.5, [0.8, 0.9], 9, False)
    assert args.model_kwargs == {"depths": [1, 2, 3, 4]}
    assert flat(TrainOptions.parse([f"-c{path}"])).epochs == 7
    args = flat(
        TrainOptions.parse(
            ["--config", recipe(tmp_path, "mean: [-1.0e-05, -2.5, .5]\nno_amp: false\nno_bfloat: true\n")]
        )
    )
    assert (args.mean, args.amp, args.bfloat) == ([-1e-05, -2.5, 0.5], True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 0.1", "unknown key 'learning_rate'. Did you mean --lr?"),
        ("weight_decai: 0.1", "unknown key 'weight_decai'. Did you mean --weight-decay?"),
        ("drop_block: 0.1", "drop_block is not available"),
        ("amp: 1", "amp must be true or false, got 1"),
        ("epochs: many", "argument --epochs: invalid int value: 'many'"),
        ("- epochs", "a recipe is a list of `flag: value` lines"),
        ("epochs: [", "cannot be read as a YAML recipe"),
    ],
)
def test_wrong_recipes_are_one_sentence(capsys, tmp_path, text, message):
    assert message in refusal(capsys, TrainOptions.parse, "--config", recipe(tmp_path, text))


def test_missing_recipe_is_one_sentence(capsys):
    assert "nothing.yaml: cannot be read" in refusal(capsys, TrainOptions.parse, "--config", "nothing.yaml")


def test_recipes_may_mention_refused_flags_that_are_off(tmp_path):
    TrainOptions.parse(["--config", recipe(tmp_path, "drop_block: null\nfuser: ''\naot_autograd: false\n")])


# model, weight decay, warm-up epochs, weight and start of the self-distillation, crop
# model and stochastic depth; None for that of the model
# stochastic depth, batch of each of 8 processes, mixed precision
def test_flags_of_vmamba_are_understood(capsys, tmp_path):
    path = recipe(tmp_path, "epochs: 7\namp: true\nuse_checkpoint: false\n")
    theirs = (
        f"--cfg {path} --batch-size 64 --data-path data --output out --tag first --accumulation-steps 2 --optim sgd "
        "--use-checkpoint --disable_amp --model_ema True --model_ema_decay 0.99 --model_ema_force_cpu False"
    )
    ours = (
        f"--config {path} --batch-size 64 --data-dir data --output out --tag first --grad-accum-steps 2 --opt sgd "
        "--grad-checkpointing --no-amp --model-ema --model-ema-decay 0.99"
    )
    assert TrainOptions.parse(theirs.split()) == TrainOptions.parse(ours.split())
    assert not flat(TrainOptions.parse(["--model-ema", "--model-ema", "False"])).model_ema
    assert ValidateOptions.parse(["--data-path", "data"]) == ValidateOptions.parse(["--data-dir", "data"])
    assert flat(ValidateOptions.parse(["--amp", "data"])).data == "data"  # a switch takes nothing but true and false
    message = refusal(capsys, TrainOptions.parse, "--pretrained", "ckpt_epoch_264.pth")
    assert "--pretrained takes no value, got 'ckpt_epoch_264.pth': " in message
    assert "--initial-checkpoint" in message
    assert "Did you mean --checkpoint?" in refusal(capsys, ValidateOptions.parse, "--resume", "ckpt_epoch_264.pth")


@pytest.mark.parametrize("line", ["trust_checkpoint: true", "trust-checkpoint: yes", "no_trust_checkpoint: false"])
def test_trust_comes_from_the_command_line_only(line, tmp_path, capsys):
    message = refusal(capsys, TrainOptions.parse, "--config", str(recipe(tmp_path, line)))
    assert "is accepted on the command line only, as it lets a checkpoint run any code" in message
    assert flat(TrainOptions.parse(["--trust-checkpoint"])).trust_checkpoint
    assert not flat(TrainOptions.parse(["--config", str(recipe(tmp_path, "trust_checkpoint: false"))])).trust_checkpoint


def test_settings_of_a_run_are_a_recipe(tmp_path):
    options = TrainOptions.parse(
        ["--model-kwargs", "depths=1,2,2,2", "--aa", "", "--amp", "--crop-mode", "squash", "--lr=1e-3"]
    )
    settings = {key: value for key, value in options.flat().items() if key not in ("config", "local_rank", "resume")}
    write_settings(tmp_path, settings)
    again = TrainOptions.parse(["--config", str(tmp_path / "args.yaml")]).flat()
    assert again | {"config": None, "model_kwargs": None} == options.flat() | {"model_kwargs": None}
    assert again["model_kwargs"] == {"depths": [1, 2, 2, 2]}
    assert yaml.safe_load(Path(tmp_path / "args.yaml").read_text()).keys() == settings.keys()


@pytest.mark.parametrize("program", ["train", "validate", "predict", "throughput"])
def test_help_imports_nothing_heavy(program):
    command = [sys.executable, str(SHOW_HELP), f"{program}.py"]
    result = subprocess.run(command, cwd=ROOT / "classification", capture_output=True, text=True, check=True)
    assert "usage:" in result.stdout
