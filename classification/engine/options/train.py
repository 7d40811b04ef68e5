"""Options of train.py."""

from dataclasses import dataclass
from typing import Any, Literal

from engine.options.fields import ProgramOptions, group, hidden, option, positive
from engine.options.parser import Refused
from engine.options.shared import CropMode, Resizing, backend_mode_option, backend_option

_NO_EFFECT = "it never had an effect"

_REFUSED: Refused = {
    "gp": f"{_NO_EFFECT}; use --model-kwargs global_pool=avg",
    "img-size": f"{_NO_EFFECT}; use --input-size 3 HEIGHT WIDTH",
    "fuser": f"{_NO_EFFECT}; use --torchcompile",
    "aot-autograd": f"{_NO_EFFECT}; use --torchcompile",
    "drop-connect": f"{_NO_EFFECT}; use --drop-path",
    "drop-block": f"{_NO_EFFECT}; use --drop-path",
    "bn-momentum": f"{_NO_EFFECT}; the models keep the normalisation of the released weights",
    "bn-eps": f"{_NO_EFFECT}; the models keep the normalisation of the released weights",
    "apex-amp": "Apex is no longer maintained; use --amp",
    "ampere-sparsity": "it called a function that did not exist",
    "torchscript": "TorchScript is deprecated in PyTorch and cannot script the operators; use --torchcompile",
    "tta": "it averaged the predictions of neighbouring images instead of augmented copies",
    "opts": "every setting is a flag, for example --epochs 100",
    "eval": "validate.py scores a model",
    "throughput": "throughput.py measures models",
    "zip": "unpack the archives into folders, or use one of timm's data sets (--dataset)",
    "cache-mode": "images are read when they are needed",
    "memory-limit-rate": "lower --batch-size, or add --grad-checkpointing",
}


@dataclass
class DataOptions:
    """Training and validation data."""

    data_dir: str | None = option(
        None, "--data-path", metavar="DIR", help="folder with train/ and val/ (or validation/), one folder per class"
    )
    dataset: str = option("", "-d", help="timm data set type (torch/…, hfds/…, wds/…, tfds/…); default: image folders")
    train_split: str = option("train", help="name or folder of the training split")
    val_split: str = option("validation", help="name or folder of the validation split")
    dataset_download: bool = option(False, help="let timm download the data set")
    class_map: str = option("", metavar="FILE", help="text file with the class names in the order of their indices")
    lmdb_dataset: bool = option(False, help="the splits are the folders train and val")
    data_len: int | None = option(None, help="number of training images for the schedule; default: counted")
    skip_corrupt: bool = option(False, help="skip images that cannot be decoded, and count them")
    exif_transpose: bool = option(False, help="rotate images as their EXIF tag says")
    workers: int | None = option(None, "-j", help="data loader workers per process; default: 8, or the CPUs if fewer")
    pin_mem: bool = option(False, help="pin the host memory of batches")
    no_prefetcher: bool = option(False, plain=True, help="normalise images in the workers instead of on the GPU")
    epoch_repeats: int = option(0, help="passes over the data in one epoch")


@dataclass
class ModelOptions:
    """Model, initial weights and preprocessing."""

    model: str = option("mamba_vision_T", help="any model of mambavision.list_models() or of timm")
    model_kwargs: dict[str, Any] = option({}, metavar="NAME=VALUE", help="further keyword arguments of the model")
    pretrained: bool = option(
        False, help="start from the released weights; to start from a file, use --initial-checkpoint"
    )
    initial_checkpoint: str = option(
        "", metavar="FILE", help="start from this checkpoint, all of whose weights must fit"
    )
    skip_head: bool = option(False, help="do not load the classifier from --initial-checkpoint")
    loadcheckpoint: str = option("", metavar="FILE", help="start from the weights in this file that fit the model")
    trust_checkpoint: bool = option(False, help="unpickle checkpoints without restriction: they can run any code")
    resume: str = option(
        "",
        metavar="FILE|auto|never",
        help="checkpoint to resume; auto: the newest of --experiment or --tag; never: start a new run; by default, a "
        "preempted run with the same options is resumed",
    )
    no_resume_opt: bool = option(False, plain=True, help="resume the weights only, not the optimizer")
    num_classes: int | None = option(None, help="number of classes; default: counted in the data")
    input_size: list[int] | None = option(
        None, nargs=3, metavar=("C", "H", "W"), help="channels, height and width (pixels); default: the model's"
    )
    crop_pct: float | None = option(None, help="fraction of the image that validation crops; default: the model's")
    crop_mode: CropMode | None = option(None, help="how validation crops; default: the model's")
    mean: list[float] | None = option(None, help="pixel mean per channel, from 0 to 1; default: the model's")
    std: list[float] | None = option(None, help="pixel standard deviation per channel; default: the model's")
    interpolation: Resizing = option("", metavar="NAME", help="interpolation in validation; default: the model's")
    batch_size: int = option(128, "-b", help="images per batch and process")
    validation_batch_size: int | None = option(
        None, "-vb", help="images per batch and process in validation; default: --batch-size"
    )
    channels_last: bool = option(False, help="use the channels-last memory layout")
    grad_checkpointing: bool = option(
        False, "--use-checkpoint", help="recompute activations in the backward pass to save memory"
    )
    torchcompile: str | None = backend_option()
    torchcompile_mode: str | None = backend_mode_option()
    drop_rate: float | None = option(None, help="dropout rate; default: the model's")
    attn_drop_rate: float | None = option(None, help="dropout rate of attention weights; default: the model's")
    drop_path: float | None = option(None, help="stochastic depth rate; default: the model's")


@dataclass
class OptimizerOptions:
    """Optimizer."""

    opt: str = option("adamw", "--optim", help="any optimizer of timm.optim.list_optimizers()")
    opt_eps: float = option(1e-8, help="epsilon of the optimizer")
    opt_betas: list[float] = option([0.9, 0.999], help="betas of the optimizer")
    momentum: float = option(0.9, help="momentum of SGD and similar optimizers")
    weight_decay: float = option(0.05, help="weight decay")
    clip_grad: float = option(5.0, help="threshold of gradient clipping, see --clip-mode; 0: no clipping")
    clip_mode: Literal["norm", "value", "agc"] = option("norm", help="clip by the global norm, by value, or adaptively")
    layer_decay: float | None = option(None, help="layer-wise decay factor of the learning rate")
    grad_accum_steps: int = option(1, "--accumulation-steps", help="batches per optimizer step")


@dataclass
class ScheduleOptions:
    """Learning rate schedule."""

    sched: Literal["cosine", "tanh", "step", "multistep", "plateau", "poly", "constant"] = option(
        "cosine", help="schedule of the learning rate"
    )
    lr_ep: bool = option(False, help="update the learning rate every epoch instead of every step")
    lr: float | None = option(
        None, help="learning rate, independent of the batch size; default: --lr-base scaled, or 0.001 without it"
    )
    lr_base: float | None = option(
        None, help="learning rate for a global batch of --lr-base-size images, scaled to the actual one"
    )
    lr_base_size: int = option(256, type=positive, help="images in the global batch of --lr-base")
    lr_base_scale: Literal["linear", "sqrt"] | None = option(
        None, help="how --lr-base scales with the batch; default: sqrt for adaptive optimizers, as in timm"
    )
    lr_base_bounds: bool = option(False, help="scale --warmup-lr and --min-lr like --lr-base")
    lr_noise: list[float] | None = option(
        None, help="add noise to the learning rate from this fraction of the schedule, or between two fractions"
    )
    lr_noise_pct: float = option(0.67, help="limit of the noise, as a fraction of the learning rate")
    lr_noise_std: float = option(1.0, help="standard deviation of the noise")
    lr_cycle_mul: float = option(1.0, help="growth factor of the cycle length")
    lr_cycle_decay: float = option(1.0, help="decay factor of the peak learning rate per cycle")
    lr_cycle_limit: int = option(1, help="number of cycles")
    lr_k_decay: float = option(1.0, help="exponent of k-decay in cosine and polynomial schedules")
    warmup_lr: float = option(1e-6, help="learning rate at the start of the warm-up")
    min_lr: float = option(5e-6, help="lower bound of the learning rate")
    epochs: int = option(310, help="length of the schedule in epochs, including the warm-up but not the cool-down")
    start_epoch: int | None = option(None, help="first epoch, instead of that of --resume")
    decay_milestones: list[int] = option([30, 60], help="epochs at which a multistep schedule decays")
    decay_epochs: float = option(100, help="epochs between the decays of a step schedule")
    warmup_epochs: int = option(20, help="epochs of warm-up")
    warmup_prefix: bool = option(
        False, help="start the schedule after the warm-up instead of at the same time; --epochs counts both"
    )
    cooldown_epochs: int = option(10, help="epochs at --min-lr after the schedule")
    patience_epochs: int = option(10, help="epochs without improvement before a plateau schedule decays")
    decay_rate: float = option(0.1, "--dr", help="decay factor of the learning rate")


@dataclass
class AugmentationOptions:
    """Augmentation and loss."""

    no_aug: bool = option(False, plain=True, help="only resize and crop")
    scale: list[float] = option([0.08, 1.0], nargs=2, help="range of the area of random crops, as fractions")
    ratio: list[float] = option([3 / 4, 4 / 3], nargs=2, help="range of the aspect ratio of random crops")
    hflip: float = option(0.5, help="probability of a horizontal flip")
    vflip: float = option(0.0, help="probability of a vertical flip")
    color_jitter: float = option(0.4, help="strength of colour jitter; ignored with --aa")
    aa: str = option("rand-m9-mstd0.5-inc1", help="timm's auto-augment policy; empty for none")
    aug_repeats: float = option(0, help="augmented copies of each image, spread over the processes")
    aug_splits: int = option(0, help="copies of each image in a batch: one clean, the others augmented")
    jsd_loss: bool = option(False, help="Jensen-Shannon divergence between --aug-splits")
    bce_loss: bool = option(False, help="binary cross entropy")
    bce_target_thresh: float | None = option(None, help="threshold of soft targets in --bce-loss; default: none")
    reprob: float = option(0.25, help="probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = option("pixel", help="content of erased areas")
    recount: int = option(1, help="number of erased areas per image")
    resplit: bool = option(False, help="do not erase in the first augmentation split")
    mixup: float = option(0.8, help="alpha of mixup; 0: off")
    cutmix: float = option(1.0, help="alpha of CutMix; 0: off")
    cutmix_minmax: list[float] | None = option(
        None, nargs=2, help="range of the side of CutMix areas, as fractions; overrides --cutmix"
    )
    mixup_prob: float = option(1.0, help="probability of mixup or CutMix")
    mixup_switch_prob: float = option(0.5, help="probability of CutMix instead of mixup if both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = option("batch", help="mix per batch, pair or image")
    mixup_off_epoch: int = option(0, help="epoch from which mixup is off; 0: never")
    smoothing: float = option(0.1, help="label smoothing")
    train_interpolation: Literal["random", "bilinear", "bicubic"] = option("random", help="interpolation in training")


@dataclass
class AveragingOptions:
    """Averaged weights, distributed training and batch statistics."""

    sync_bn: bool = option(False, help="synchronise batch statistics across all GPUs; without effect on the CPU")
    fsdp: bool = option(
        False,
        help="shard weights, averaged weights, gradients and optimizer state across the processes (PyTorch's FSDP2), "
        "for models that do not fit into one GPU, such as mamba_vision_L3 with its 740 M parameters",
    )
    dist_bn: Literal["broadcast", "reduce", ""] = option(
        "reduce", help="how to combine the running statistics of all processes after an epoch"
    )
    split_bn: bool = option(False, help="separate batch statistics for each augmentation split")
    no_ddp_bb: bool = option(False, plain=True, help="do not broadcast buffers before every step")
    model_ema: bool = option(
        False, help="keep an exponential moving average of the weights, and choose the best checkpoint by it"
    )
    model_ema_force_cpu: bool = option(False, help="keep the averaged weights in host memory; they are not evaluated")
    model_ema_decay: float = option(0.9998, help="decay of the averaged weights per step")
    mesa: float = option(0.0, help="weight of self-distillation from the averaged weights")
    mesa_start_ratio: float = option(0.25, help="fraction of --epochs after which self-distillation starts")


@dataclass
class RunOptions:
    """Output, checkpoints, precision and device."""

    tag: str = option("exp", help="name of the run; used in output paths")
    output: str = option("", metavar="DIR", help="runs are written to DIR/TAG; default: output/train")
    experiment: str = option("", help="name of the run's folder; default: date, model and size")
    log_dir: str = option("", metavar="DIR", help="TensorBoard files are written to DIR_TAG; default: the run's folder")
    log_wandb: bool = option(False, help="also log to Weights & Biases")
    eval_metric: Literal["top1", "top5", "loss"] = option("top1", help="metric that decides the best checkpoint")
    checkpoint_hist: int = option(1, help="number of epochs to keep besides the last and the best")
    no_saver: bool = option(False, plain=True, help="write no checkpoints")
    recovery_interval: int = option(0, help="steps between checkpoints within an epoch; 0: none")
    log_interval: int = option(50, help="steps between log lines")
    save_images: bool = option(False, help="write the batches of logged steps as pictures")
    validate_only: bool = option(False, help="evaluate and stop")
    seed: int = option(42, help="random seed; the rank is added")
    deterministic: bool = option(False, help="use deterministic algorithms only")
    device: str = option("", help="cuda, cpu, …; default: a GPU if there is one")
    amp: bool = option(
        False, "--native-amp", off="--disable-amp", help="mixed precision: float16 on a GPU unless --bfloat"
    )
    bfloat: bool = option(False, help="use bfloat16 in mixed precision")
    local_rank: int | None = hidden()  # from torch.distributed.launch; the environment has it too


@dataclass
class TrainOptions(ProgramOptions):
    """Options of train.py."""

    description = "Train an image classifier, on GPUs or on the CPU."
    refused = _REFUSED
    not_needed = {
        "--worker-seeding": (None, "every image has its own random numbers"),
        "--use-multi-epochs-loader": (0, "workers always persist across epochs"),
        "--fused-layernorm": (0, _NO_EFFECT),
    }

    # The second names of flags are those of VMamba's program.
    config: str | None = option(
        None, "-c", "--cfg", metavar="FILE", help="YAML recipe; flags on the command line override it"
    )
    data: DataOptions = group(DataOptions, "data")
    model: ModelOptions = group(ModelOptions, "model")
    optimizer: OptimizerOptions = group(OptimizerOptions, "optimizer")
    schedule: ScheduleOptions = group(ScheduleOptions, "learning rate schedule")
    augmentation: AugmentationOptions = group(AugmentationOptions, "augmentation and loss")
    averaging: AveragingOptions = group(AveragingOptions, "averaging and distribution")
    run: RunOptions = group(RunOptions, "run")
