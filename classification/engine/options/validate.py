"""Options of validate.py."""

from dataclasses import dataclass
from typing import Literal

from engine.options.fields import ProgramOptions, group, non_negative, option, positive
from engine.options.shared import PreprocessingOptions, SpeedOptions, checkpoint_option


@dataclass
class DataOptions:
    """Labelled images to score on."""

    data: str | None = option(None, positional=True, nargs="?", metavar="DIR", help="the same as --data-dir")
    data_dir: str | None = option(
        None,
        "--data-path",
        metavar="DIR",
        help="folder that contains the split, or whose class folders are the split",
    )
    dataset: str = option("", help="timm data set type; default: image folders")
    split: str = option("validation", help="name or folder of the split")
    dataset_download: bool = option(False, help="let timm download the data set")
    class_map: str = option("", metavar="FILE", help="text file with the class names in the order of their indices")
    skip_corrupt: bool = option(False, help="skip images that cannot be decoded, and count them")
    batch_size: int = option(256, "-b", type=positive, help="images per batch and process")
    workers: int | None = option(
        None, "-j", type=non_negative, help="data loader workers per process; default: 8, or the CPUs if fewer"
    )
    no_prefetcher: bool = option(False, plain=True, help="normalise images in the workers instead of on the GPU")
    pin_mem: bool = option(False, help="pin the host memory of batches")


@dataclass
class ModelOptions:
    """Models to score."""

    model: str | None = option(
        None, "-m", help="name, pattern, 'all', or a text file of names; default: the checkpoint's"
    )
    checkpoint: str = checkpoint_option()
    pretrained: bool = option(False, help="use the released weights, which is the default without --checkpoint")
    test_pool: bool = option(False, plain=True, help="pool images larger than in training as timm does")
    use_train_size: bool = option(
        False, plain=True, help="use the training size of models that have a larger test size"
    )
    num_gpu: int = option(1, type=positive, help="GPUs of this process; several processes (torchrun) are faster")


@dataclass
class ScoringOptions:
    """Labels and results."""

    log_freq: int = option(10, type=positive, help="batches between log lines")
    real_labels: str | None = option(
        None, metavar="FILE", help="ImageNet-ReaL JSON; its scores replace top-1 and top-5"
    )
    valid_labels: str | None = option(
        None, metavar="FILE", help="text file with the class indices that predictions are restricted to"
    )
    results_file: str | None = option(None, metavar="FILE", help="also write the results to this file")
    results_format: Literal["csv", "json"] = option("csv", help="format of --results-file")
    retry: bool = option(False, help="retry with a smaller batch when memory runs out")


@dataclass
class ValidateOptions(ProgramOptions):
    """Options of validate.py."""

    description = "Score image classifiers: top-1, top-5 and loss."
    refused = {
        "fuser": "it selected a TorchScript fuser; use --torchcompile",
        "aot-autograd": "use --torchcompile aot_eager",
        "amp-impl": "Apex is no longer maintained; use --amp",
        "torchscript": "TorchScript is deprecated in PyTorch and cannot script the operators; use --torchcompile",
        "fast-norm": "it replaces timm's own norm layers, which these models do not use",
        "tf-preprocessing": "it needs TensorFlow, and none of these models was trained with it",
    }

    data: DataOptions = group(DataOptions, "data")
    model: ModelOptions = group(ModelOptions, "model")
    preprocessing: PreprocessingOptions = group(PreprocessingOptions, "weights and preprocessing")
    speed: SpeedOptions = group(SpeedOptions, "speed")
    scoring: ScoringOptions = group(ScoringOptions, "scoring")
