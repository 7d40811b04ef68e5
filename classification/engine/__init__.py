"""Implementation of the classification programs: options, data, training, evaluation and reporting."""
