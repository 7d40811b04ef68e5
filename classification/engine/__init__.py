"""What the classification programs share: options, data, training, evaluation and reporting."""
