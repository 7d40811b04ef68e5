"""Command lines and recipes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from engine.options import (
    TRAIN_REFUSED,
    VALIDATE_REFUSED,
    predict_options,
    throughput_options,
    train_options,
    validate_options,
)

RECIPES = sorted((ROOT / "classification" / "configs").glob("*/*.yaml"))


def refusal(capsys, parse, *words):
    with pytest.raises(SystemExit) as end:
        parse(list(words))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_flags_may_be_spelled_with_hyphens_or_underscores():
    hyphens = train_options(["--data-dir", "a_b", "--model-ema", "--batch-size=4", "--no-amp"])
    underscores = train_options(["--data_dir", "a_b", "--model_ema", "--batch_size=4", "--no_amp"])
    assert hyphens == underscores
    assert hyphens.data_dir == "a_b"
    assert hyphens.model_ema
    assert validate_options(["--data_dir", "x"]) == validate_options(["--data-dir", "x"])


def test_launchers_of_torch_pass_a_local_rank():
    assert train_options(["--local-rank=3"]) == train_options(["--local_rank", "3"])


def test_unknown_flags_suggest_the_nearest(capsys):
    assert "'--weight-decya'. Did you mean --weight-decay?" in refusal(capsys, train_options, "--weight_decya", "0.1")


@pytest.mark.parametrize(
    ("parse", "word", "flag"),
    [
        (train_options, "--learning_rate", "--lr"),
        (train_options, "--wd", "--weight-decay"),
        (train_options, "--num-epochs", "--epochs"),
        (validate_options, "--batch", "--batch-size"),
    ],
)
def test_common_names_suggest_the_flag_that_is_meant(capsys, parse, word, flag):
    assert f"Did you mean {flag}?" in refusal(capsys, parse, word, "1")


@pytest.mark.parametrize("flag", TRAIN_REFUSED)
def test_flags_without_effect_are_refused_with_a_hint(capsys, flag):
    spelled = "--" + flag.replace("-", "_")
    assert f"--{flag} is not available: {TRAIN_REFUSED[flag]}" in refusal(capsys, train_options, spelled, "1")
    assert f"--{flag} is not available" in refusal(capsys, train_options, f"{spelled}=1")


@pytest.mark.parametrize("flag", VALIDATE_REFUSED)
def test_validation_has_refusals_of_its_own(capsys, flag):
    assert VALIDATE_REFUSED[flag] in refusal(capsys, validate_options, f"--{flag}")


@pytest.mark.parametrize(
    "words", [["--worker-seeding", "all"], ["--use_multi_epochs_loader"], ["--fused_layernorm"]], ids=" ".join
)
def test_flags_whose_purpose_is_served_anyway_are_noted(capsys, tmp_path, words):
    assert train_options(words) == train_options([])
    assert capsys.readouterr().err.startswith(f"note: {words[0].replace('_', '-')} is not needed: ")
    text = "worker_seeding: all\nuse_multi_epochs_loader: true\n"
    assert train_options(["--config", recipe(tmp_path, text)]).epochs == train_options([]).epochs
    assert capsys.readouterr().err.count("note: ") == 2


def test_prediction_is_offered_what_it_does(capsys):
    assert "'--pretrained'" in refusal(capsys, predict_options, "x", "--pretrained")
    with pytest.raises(SystemExit):
        predict_options(["--help"])
    assert "pattern, 'all'" not in capsys.readouterr().out


def test_negative_numbers_may_have_exponents():
    assert train_options(["--mean", "-1e-05", "-.5", "-3"]).mean == [-1e-05, -0.5, -3]


def test_wrong_types_and_choices_are_one_sentence(capsys):
    assert "--epochs: invalid int value: 'ten'" in refusal(capsys, train_options, "--epochs", "ten")
    assert "invalid choice: 'cosin'" in refusal(capsys, train_options, "--sched", "cosin")
    assert "takes name=value, got 'depths'" in refusal(capsys, train_options, "--model-kwargs", "depths")
    assert "INPUT" in refusal(capsys, predict_options)


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (throughput_options, ["--batch-size", "0"]),
        (throughput_options, ["--rounds", "0"]),
        (throughput_options, ["--resolution", "-5"]),
        (throughput_options, ["--warmup", "-1"]),
        (validate_options, ["--batch-size", "0"]),
        (validate_options, ["--input-size", "3", "0", "32"]),
        (validate_options, ["--workers", "-1"]),
        (predict_options, ["x", "--topk", "0"]),
        (predict_options, ["x", "--batch-size", "1.5"]),
    ],
)
def test_impossible_counts_are_refused_at_once(capsys, parse, words):
    assert "must be a whole number of at least " in refusal(capsys, parse, *words)


def test_model_arguments_are_literals_or_text():
    words = ["--model-kwargs", "depths=1,1,2,2", "dt_init=mamba", "layer_scale=1e-5", "qk_norm=True"]
    expected = {"depths": (1, 1, 2, 2), "dt_init": "mamba", "layer_scale": 1e-5, "qk_norm": True}
    assert train_options(words).model_kwargs == expected


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_recipes_set_defaults_and_the_command_line_wins(tmp_path):
    path = recipe(
        tmp_path, "lr: 0.5\nopt_betas: [0.8, 0.9]\namp: true\nepochs: 7\nmodel_kwargs: {depths: [1, 2, 3, 4]}\n"
    )
    args = train_options(["--config", path, "--epochs", "9", "--no-amp"])
    assert (args.lr, args.opt_betas, args.epochs, args.amp) == (0.5, [0.8, 0.9], 9, False)
    assert args.model_kwargs == {"depths": [1, 2, 3, 4]}
    assert train_options([f"-c{path}"]).epochs == 7
    args = train_options(["--config", recipe(tmp_path, "mean: [-1.0e-05, -2.5, .5]\nno_amp: false\nno_bfloat: true\n")])
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
    assert message in refusal(capsys, train_options, "--config", recipe(tmp_path, text))


def test_missing_recipe_is_one_sentence(capsys):
    assert "nothing.yaml: cannot be read" in refusal(capsys, train_options, "--config", "nothing.yaml")


def test_recipes_may_mention_refused_flags_that_are_off(tmp_path):
    train_options(["--config", recipe(tmp_path, "drop_block: null\nfuser: ''\naot_autograd: false\n")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    train_options(["--config", str(path)])


# model, weight decay, warm-up epochs, weight and start of the self-distillation, crop
PUBLISHED = {
    "mambavision_tiny_1k": ("mamba_vision_T", 0.05, 20, 0.5, 0.25, 1.0),
    "mambavision_tiny2_1k": ("mamba_vision_T2", 0.05, 20, 0.75, 0.25, 1.0),
    "mambavision_small_1k": ("mamba_vision_S", 0.05, 20, 1.0, 0.25, 0.875),
    "mambavision_base_1k": ("mamba_vision_B", 0.075, 35, 1.0, 0.3, 1.0),
    "mambavision_large_1k": ("mamba_vision_L", 0.12, 20, 6.0, 0.25, 1.0),
    "mambavision_large2_1k": ("mamba_vision_L2", 0.12, 20, 6.0, 0.25, 1.0),
}

COMMON = {
    "opt": "lamb", "lr": 5e-3, "opt_betas": [0.9, 0.999], "opt_eps": 1e-8, "clip_grad": 5.0, "clip_mode": "norm",
    "batch_size": 128, "sched": "cosine", "epochs": 310, "cooldown_epochs": 10, "warmup_lr": 1e-6, "min_lr": 5e-6,
    "amp": True, "bfloat": False, "channels_last": True, "model_ema": True, "model_ema_decay": 0.9998,
    "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "smoothing": 0.1,
    "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "remode": "pixel", "recount": 1, "color_jitter": 0.4,
    "hflip": 0.5, "vflip": 0.0, "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "train_interpolation": "random",
    "drop_rate": None, "drop_path": None, "dist_bn": "reduce", "sync_bn": False, "seed": 31,
    "input_size": [3, 224, 224], "checkpoint_hist": 1, "log_interval": 50, "lr_ep": False,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name):
    args = vars(train_options(["--config", str(ROOT / f"classification/configs/mambavision/{name}.yaml")]))
    keys = ("model", "weight_decay", "warmup_epochs", "mesa", "mesa_start_ratio", "crop_pct")
    expected = COMMON | dict(zip(keys, PUBLISHED[name], strict=True))
    assert {key: args[key] for key in expected} == expected


# model and stochastic depth; None for that of the model
VMAMBA = {
    "vmambav2v_tiny_224": ("vmamba_tiny_s1l8", None),
    "vmambav2v_small_224": ("vmamba_small_s1l20", None),
    "vmambav2v_base_224": ("vmamba_base_s1l20", None),
    "vmambav2_tiny_224": ("vmamba_tiny_s2l5", None),
    "vmambav2_small_224": ("vmamba_small_s2l15", None),
    "vmambav2_base_224": ("vmamba_base_s2l15", None),
    "vmambav0_tiny_224": ("vanilla_vmamba_tiny", None),
    "vmambav0_small_224": ("vanilla_vmamba_small", None),
    "vmambav0_base_224": ("vanilla_vmamba_base", 0.5),
}

OF_VMAMBA = COMMON | {
    "opt": "adamw", "weight_decay": 0.05, "epochs": 300, "warmup_epochs": 20, "warmup_prefix": True,
    "cooldown_epochs": 0, "lr": None, "lr_base": 5e-4, "lr_base_size": 512, "lr_base_scale": "linear",
    "lr_base_bounds": True, "warmup_lr": 5e-7, "min_lr": 5e-6, "no_prefetcher": True,
    "grad_accum_steps": 1, "mesa": 0.0, "model_ema_decay": 0.9999, "channels_last": False, "crop_pct": None,
    "train_interpolation": "bicubic", "seed": 0, "pin_mem": True, "grad_checkpointing": False, "model_kwargs": {},
}  # fmt: skip


@pytest.mark.parametrize("name", VMAMBA)
def test_recipes_of_vmamba_are_the_published_ones(name):
    args = vars(train_options(["--config", str(ROOT / f"classification/configs/vmamba/{name}.yaml")]))
    expected = OF_VMAMBA | dict(zip(("model", "drop_path"), VMAMBA[name], strict=True))
    assert {key: args[key] for key in expected} == expected


# stochastic depth, batch of each of 8 processes, mixed precision
SEGMAN = {"t": (0.0, 512, False), "s": (0.15, 256, True), "b": (0.3, 256, True), "l": (0.3, 256, True)}

OF_SEGMAN = COMMON | {
    "opt": "adamw", "weight_decay": 0.05, "epochs": 300, "warmup_epochs": 5, "warmup_prefix": False, "min_lr": 1e-5,
    "model_ema_decay": 0.99984, "channels_last": False, "crop_pct": None, "seed": 42, "sync_bn": True, "mesa": 0.0,
    "lr": None, "lr_base": 1e-3, "lr_base_size": 1024, "lr_base_scale": "linear", "lr_base_bounds": False,
    "lr_ep": True, "no_prefetcher": False,
}  # fmt: skip


@pytest.mark.parametrize("variant", SEGMAN)
def test_recipes_of_segman_are_the_published_ones(variant):
    args = vars(train_options(["--config", str(ROOT / f"classification/configs/segman/segman_{variant}_1k.yaml")]))
    expected = OF_SEGMAN | dict(zip(("drop_path", "batch_size", "amp"), SEGMAN[variant], strict=True))
    expected |= {"model": f"segman_encoder_{variant}"}
    assert {key: args[key] for key in expected} == expected


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
    assert train_options(theirs.split()) == train_options(ours.split())
    assert not train_options(["--model-ema", "--model-ema", "False"]).model_ema
    assert validate_options(["--data-path", "data"]) == validate_options(["--data-dir", "data"])
    assert validate_options(["--amp", "data"]).data == "data"  # a switch takes nothing but true and false
    message = refusal(capsys, train_options, "--pretrained", "ckpt_epoch_264.pth")
    assert "--pretrained takes no value, got 'ckpt_epoch_264.pth': " in message
    assert "--initial-checkpoint" in message
    assert "Did you mean --checkpoint?" in refusal(capsys, validate_options, "--resume", "ckpt_epoch_264.pth")


@pytest.mark.parametrize("line", ["trust_checkpoint: true", "trust-checkpoint: yes", "no_trust_checkpoint: false"])
def test_trust_comes_from_the_command_line_only(line, tmp_path, capsys):
    message = refusal(capsys, train_options, "--config", str(recipe(tmp_path, line)))
    assert "is accepted on the command line only, as it lets a checkpoint run any code" in message
    assert train_options(["--trust-checkpoint"]).trust_checkpoint
    assert not train_options(["--config", str(recipe(tmp_path, "trust_checkpoint: false"))]).trust_checkpoint


def test_settings_of_a_run_are_a_recipe(tmp_path):
    from engine.run_folder import write_settings

    args = train_options(
        ["--model-kwargs", "depths=1,2,2,2", "--aa", "", "--amp", "--crop-mode", "squash", "--lr=1e-3"]
    )
    settings = {key: value for key, value in vars(args).items() if key not in ("config", "local_rank", "resume")}
    write_settings(tmp_path, settings)
    again = vars(train_options(["--config", str(tmp_path / "args.yaml")]))
    assert again | {"config": None, "model_kwargs": None} == vars(args) | {"model_kwargs": None}
    assert again["model_kwargs"] == {"depths": [1, 2, 2, 2]}
    assert yaml.safe_load(Path(tmp_path / "args.yaml").read_text()).keys() == settings.keys()


@pytest.mark.parametrize("program", ["train", "validate", "predict", "throughput"])
def test_help_imports_nothing_heavy(program):
    code = f"""
import sys, runpy
sys.argv = ["{program}.py", "--help"]
try:
    runpy.run_path("{program}.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "timm", "PIL"}} & set(sys.modules)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT / "classification", capture_output=True, text=True, check=True)
    assert "usage:" in result.stdout
