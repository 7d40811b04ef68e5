"""Train a segmentation model, on one CPU or many GPUs; see README.md for configs and --help for all options."""

import logging

import torch
from check_data import check_datasets
from mmengine import Config

from mambavision.errors import run_cli
from mambavision.launch import this_process
from mambavision.openmmlab.config import settings_in
from mambavision.openmmlab.run import options_of_training, train

_logger = logging.getLogger("mambavision.train")


def prepare(config: Config) -> None:
    """Check the data, fit to one process what is meant for many, and say so if the batch is not what the rate is for."""
    from labels import name_wrong_labels

    check_datasets(config)
    name_wrong_labels(config)
    pools = any(setting.get("type") in ("UPerHead", "PSPHead", "SegMANDecoder") for setting in settings_in(config.model))
    is_synchronised = this_process().is_distributed and torch.cuda.is_available()
    if pools and config.train_dataloader.batch_size == 1 and not is_synchronised:
        config.train_dataloader.batch_size = 2
        _logger.warning("one process or no GPU: batches of 2 images instead of 1, for the batch norms of pooled maps")
    scaling = config.get("auto_scale_lr", {})
    total = config.train_dataloader.batch_size * this_process().world_size
    if scaling.get("base_batch_size", total) != total and not scaling.get("enable"):
        _logger.warning(
            "batches of %d images in all, and the learning rate is meant for %d: set train_dataloader.batch_size, or "
            "give --auto-scale-lr",
            total,
            scaling.base_batch_size,
        )


if __name__ == "__main__":
    args = options_of_training()
    run_cli(lambda: train(args, prepare))
