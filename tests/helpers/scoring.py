"""validate.py and predict.py, run in the process of the tests."""

import json

from engine.options import PredictOptions, ValidateOptions
from engine.predict import predict
from engine.validate import validate

CLASSES = ["digit 0", "digit 1", "digit 2"]
CPU = ["--device", "cpu"]


def results(capsys):
    return json.loads(capsys.readouterr().out.split("--result\n")[1])


def score(*words):
    validate(ValidateOptions.parse([*CPU, "--workers", "0", *map(str, words)]))


def classify(*words):
    predict(PredictOptions.parse([*CPU, *map(str, words)]))
