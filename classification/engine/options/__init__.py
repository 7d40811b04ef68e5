"""Options of the classification programs as dataclasses; imports nothing heavy."""

from engine.options.activation_map import ActivationMapOptions
from engine.options.predict import PredictOptions
from engine.options.receptive_field import ReceptiveFieldOptions
from engine.options.throughput import ThroughputOptions
from engine.options.train import TrainOptions
from engine.options.validate import ValidateOptions

__all__ = [
    "ActivationMapOptions",
    "PredictOptions",
    "ReceptiveFieldOptions",
    "ThroughputOptions",
    "TrainOptions",
    "ValidateOptions",
]
