"""Train a segmentation model, on one CPU or many GPUs; see README.md for configs and --help for all options."""

import logging

import torch
from check_data import check_datasets
from mmengine import Config

from mambavision.openmmlab.config import settings_in
from mambavision.openmmlab.training.run import options_of_training, train
from mambavision.running.process import this_process
from mambavision.running.program import run_cli

_logger = logging.getLogger("mambavision.train")
_POOLING = ("UPerHead", "PSPHead", "SegMANDecoder")  # heads that normalise single pixels


def prepare(config: Config) -> None:
    """Check the data, and fit to one process what is meant for many."""
    from mambavision.openmmlab.data.masks import name_wrong_labels

    check_datasets(config)
    name_wrong_labels(config)
    process, loader = this_process(), config.train_dataloader
    pools = any(setting.get("type") in _POOLING for setting in settings_in(config.model))
    is_synchronised = process.is_distributed and torch.cuda.is_available()
    if pools and loader.batch_size == 1 and not is_synchronised:
        loader.batch_size = 2
        _logger.warning("one process or no GPU: batches of 2 images instead of 1, for the batch norms of pooled maps")
    total, scaling = loader.batch_size * process.world_size, config.get("auto_scale_lr", {})
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
