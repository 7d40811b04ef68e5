"""Hostile values of the options of all programs: each is accepted because it makes sense, or refused in a sentence.

The options are read off the programs, so that a new one must have a range.
"""

import argparse
import math

import pytest
import torch

from engine.acceleration import compile_arguments
from engine.options import TrainOptions, ValidateOptions
from engine.options.parser import KeyValues
from engine.train import train
from entry_points import PROGRAMS, parser_of
from mambavision.errors import UserError
from mambavision.running.process import Process, pick_device
from mambavision.running.ranges import RANGES, Range, check_ranges
from small_runs import SETTING

HOSTILE = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e400",
    "-1e-9",
    "1e9",
    "99999999999999999999",
    "2.5",
    "x",
    "",
    "0x10",
    "1,2",
]


def is_numeric(action):
    try:
        return action.type is not None and type(action.type("0.5")) is not str
    except (argparse.ArgumentTypeError, ValueError):
        return True


PARSERS = {program: parser_of(program) for program in PROGRAMS}
NUMERIC = [
    (program, action)
    for program, parser in PARSERS.items()
    for action in parser._actions
    if is_numeric(action) and not isinstance(action, KeyValues) and action.dest != "cfg_options"
]


def test_the_options_are_found():
    dests = {(program.split("/")[-1], action.dest) for program, action in NUMERIC}
    assert {("train.py", "lr"), ("validate.py", "crop_pct"), ("predict.py", "opacity"), ("flops.py", "shape")} <= dests
    assert len(NUMERIC) > 110


@pytest.mark.parametrize(("program", "action"), NUMERIC, ids=lambda each: getattr(each, "dest", each))
def test_every_numeric_option_has_a_range(program, action):
    assert action.dest in RANGES
    default = action.default
    for number in default if isinstance(default, list) else [default]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            assert number in RANGES[action.dest]


def test_ranges_belong_to_options():
    assert RANGES.keys() <= {action.dest for _, action in NUMERIC} | {"size"}  # of python -m mambavision.complexity


@pytest.mark.parametrize(("program", "action"), NUMERIC, ids=lambda each: getattr(each, "dest", each))
def test_hostile_numbers(program, action, capsys):
    for value in HOSTILE:
        check_hostile_number(action, value, capsys)


def check_hostile_number(action, value, capsys):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    count = action.nargs if isinstance(action.nargs, int) else 1
    kwargs = {"nargs": action.nargs} if action.nargs else {}
    parser.add_argument("--option", dest=action.dest, type=action.type, choices=action.choices, **kwargs)
    words = [f"--option={value}"] if count == 1 else ["--option", *[value] * count]
    args, refusal = answer(lambda: parser.parse_args(words), capsys)
    if args is not None:
        _, refusal = answer(lambda: check_ranges(vars(args)), capsys)
    if refusal:
        assert args is None or f"--{action.dest.replace('_', '-')}" in refusal
        return
    found = getattr(args, action.dest)
    numbers = found if isinstance(found, list) else [found]
    assert all(
        math.isfinite(each) for number in numbers for each in (number if isinstance(number, tuple) else [number])
    )


def answer(call, capsys):
    """Return what a call returns and nothing, or None and the sentence by which it refuses a usage."""
    try:
        return call(), ""
    except (SystemExit, UserError) as refused:
        is_parsers = isinstance(refused, SystemExit)
        sentence = capsys.readouterr().err.strip().splitlines()[-1] if is_parsers else str(refused)
        status = refused.code if is_parsers else refused.exit_status
    assert status == 2
    assert "\n" not in sentence
    return None, sentence


# Named in public reports, and others of their kind
REFUSED = [
    ["--crop-pct", "-1"],
    ["--std", "0", "0", "0"],
    ["--std", "nan", "1", "1"],
    ["--mean", "inf", "0", "0"],
    ["--seed", "-1"],
    ["--seed", str(2**32)],
    ["--input-size", "3", "0", "0"],
    ["--input-size", "3", "-32", "32"],
    ["--input-size", "0", "32", "32"],
    ["--input-size", "3", "1000000", "1000000"],
    ["--aug-repeats", "-1"],
    ["--aug-splits", "-2"],
    ["--layer-decay", "nan"],
    ["--layer-decay", "0"],
    ["--scale", "2", "1"],
    ["--scale", "0.5", "0.1"],
    ["--ratio", "1.3", "0.7"],
    ["--cutmix-minmax", "0.9", "0.1"],
    ["--momentum", "5"],
    ["--workers", "100000"],
    ["--workers", "-1"],
    ["--device", "meta"],
    ["--device", "cuda:99"],
    ["--device", "hpu"],
    ["--device", "cpu:x"],
    ["--device", "xpu"],
    ["--epochs", "0"],
    ["--epochs", "-5"],
    ["--batch-size", "0"],
    ["--lr", "nan"],
    ["--weight-decay", "inf"],
    ["--opt-betas", "0.9"],
    ["--opt-betas", "0.9", "1.5"],
    ["--decay-milestones", "60", "30"],
    ["--decay-rate", "0"],
    ["--grad-accum-steps", "0"],
    ["--model-ema-decay", "1.5"],
    ["--num-classes", "0"],
    ["--num-classes", "-3"],
    ["--data-len", "0"],
    ["--log-interval", "0"],
    ["--recovery-interval", "-1"],
    ["--checkpoint-hist", "-1"],
    ["--mixup", "-0.1"],
    ["--mixup-prob", "2"],
    ["--smoothing", "-1"],
    ["--torchcompile", "nonsense"],
    ["--model-kwargs", "depths=-1"],
    ["--model-kwargs", "dim=0"],
    ["--model-kwargs", "num_heads=(0,0,0,0)"],
    ["--opt", "nonsense"],
    ["--aa", "nonsense"],
]


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_train_refuses_before_work(words, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [*SETTING, "--data-dir", str(digits)]
    _, refusal = answer(lambda: train(TrainOptions.parse([*given, *words])), capsys)
    torch.use_deterministic_algorithms(False)
    assert refusal
    assert not list(tmp_path.iterdir())


def test_interpolations_are_those_that_both_programs_know(capsys):
    for parse in (TrainOptions.parse, ValidateOptions.parse):
        assert parse(["--interpolation", "bicubic"]).flat()["interpolation"] == "bicubic"
        with pytest.raises(SystemExit):
            parse(["--interpolation", "nonsense"])


def test_devices():
    assert pick_device("cpu", Process()) == torch.device("cpu")
    for name in ("meta", "fpga", "cuda:1000", "cpu:5", "mps:9"):
        with pytest.raises(UserError, match=f"--device {name}"):
            pick_device(name, Process())


def test_backends_of_the_compiler():
    assert compile_arguments("inductor", None) == {"backend": "inductor"}
    with pytest.raises(UserError, match=r"--torchcompile inductr: unknown backend\. Did you mean 'inductor'\?"):
        compile_arguments("inductr", None)


@pytest.mark.parametrize(
    ("span", "text", "inside", "outside"),
    [
        (Range(0), "0 or more", [0, 1e300], [-1e-9, math.inf, math.nan]),
        (Range(0, above=True), "more than 0", [1e-300], [0, -math.inf]),
        (Range(0, 1), "from 0 to 1", [0, 1], [-0.1, 1.1]),
        (Range(0, 1, above=True), "more than 0 and at most 1", [1], [0]),
        (Range(0, 1, below=True), "at least 0 and less than 1", [0], [1]),
        (Range(0, 1, above=True, below=True), "more than 0 and less than 1", [0.5], [0, 1]),
    ],
)
def test_ranges_say_what_they_hold(span, text, inside, outside):
    assert str(span) == text
    assert all(number in span for number in inside)
    assert not any(number in span for number in outside)
