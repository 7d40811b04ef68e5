"""Command lines of the classification programs.

Imports nothing heavy, so that ``--help`` and a mistyped flag answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from engine.parser import KeyValues, NotNeeded, Parser, Refused, hyphenated


def _whole_number(least: int) -> Callable[[str], int]:
    """Return an argument type: a whole number that is not below `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return value

    return parse


_positive, _not_negative = _whole_number(1), _whole_number(0)


_NO_EFFECT = "it never had an effect"

TRAIN_REFUSED: Refused = {
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
    "opts": "every setting is a flag of its own, for example --epochs 100",
    "eval": "validate.py scores a model",
    "throughput": "throughput.py measures models",
    "zip": "unpack the archives into folders, or use one of timm's data sets (--dataset)",
    "cache-mode": "images are read when they are needed",
    "memory-limit-rate": "lower --batch-size, or add --grad-checkpointing",
}

VALIDATE_REFUSED: Refused = {
    "fuser": "it selected a TorchScript fuser; use --torchcompile",
    "aot-autograd": "use --torchcompile aot_eager",
    "amp-impl": "Apex is no longer maintained; use --amp",
    "torchscript": "TorchScript is deprecated in PyTorch and cannot script the operators; use --torchcompile",
    "fast-norm": "it replaces timm's own norm layers, which these models do not use",
    "tf-preprocessing": "it needs TensorFlow, and none of these models was trained with it",
}


_RESIZING = ["", "nearest", "bilinear", "bicubic", "lanczos", "hamming", "box"]  # of timm, as `engine.metadata` has it

# Second names of a flag are those of VMamba's program.
_CONFIG = ("-c", "--config", "--cfg")


def train_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of train.py together with its recipe."""
    parser = _train_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe.add_argument(*_CONFIG)
    path = recipe.parse_known_args([hyphenated(word) for word in argv])[0].config
    return parser.parse_args((parser.recipe_words(path) if path else []) + argv)


def _train_parser() -> Parser:
    parser = Parser(TRAIN_REFUSED, description="Train an image classifier, on GPUs or on the CPU.")
    parser.add_argument(*_CONFIG, metavar="FILE", help="YAML recipe; flags on the command line win")
    _add_data_options(parser)
    _add_model_options(parser)
    _add_optimizer_options(parser)
    _add_schedule_options(parser)
    _add_augmentation_options(parser)
    _add_averaging_options(parser)
    _add_run_options(parser)
    return parser


def _add_data_options(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--data-dir",
        "--data-path",
        metavar="DIR",
        help="folder with train/ and val/ (or validation/), each with a folder per class",
    )
    add("-d", "--dataset", default="", help="timm dataset type (torch/…, hfds/…, wds/…, tfds/…); empty: image folders")
    add("--train-split", default="train", help="name of the training split, or its folder")
    add("--val-split", default="validation", help="name of the validation split, or its folder")
    parser.switch("--dataset-download", help="let timm download the dataset")
    add("--class-map", default="", metavar="FILE", help="text file of class names in the order of their indices")
    parser.switch("--lmdb-dataset", help="splits are the folders train and val")
    add("--data-len", type=int, help="training images, for the schedule; default: counted")
    parser.switch("--skip-corrupt", help="leave out images that cannot be decoded, and count them")
    parser.switch("--exif-transpose", help="turn images upright by their EXIF tag")
    add("-j", "--workers", type=int, help="data loading processes of each process; default: 8, or the CPUs if fewer")
    parser.switch("--pin-mem", help="pin host memory of batches")
    add("--no-prefetcher", action="store_true", help="normalise in the workers instead of on the GPU")
    add("--worker-seeding", action=NotNeeded, help="not needed: every image has random numbers of its own")
    add("--use-multi-epochs-loader", action=NotNeeded, nargs=0, help="not needed: the workers always outlive epochs")
    add("--epoch-repeats", type=int, default=0, help="passes over the data in one epoch")


def _add_model_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="mamba_vision_T", help="any model of mambavision.list_models() or of timm")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="NAME=VALUE", help="further model arguments")
    parser.switch("--pretrained", help="start from the released weights; --initial-checkpoint is for those of a file")
    add("--initial-checkpoint", default="", metavar="FILE", help="start from these weights, which must fit")
    parser.switch("--skip-head", help="leave the classifier out of --initial-checkpoint")
    add("--loadcheckpoint", default="", metavar="FILE", help="start from whatever in this file fits")
    parser.switch("--trust-checkpoint", help="unpickle checkpoints without restriction: they can run any code")
    add(
        "--resume",
        default="",
        metavar="FILE|auto|never",
        help="continue a run; auto: --experiment or the newest of --tag; a preempted run of the same options goes on "
        "unless never",
    )
    add("--no-resume-opt", action="store_true", help="resume the weights only")
    add("--num-classes", type=int, help="default: counted in the data")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="default: the model's")
    add("--crop-pct", type=float, help="part of the image that validation crops; default: the model's")
    add("--crop-mode", choices=["squash", "border", "center"], help="how validation crops; default: the model's")
    add("--mean", type=float, nargs="+", help="pixel mean; default: the model's")
    add("--std", type=float, nargs="+", help="pixel standard deviation; default: the model's")
    add(
        "--interpolation",
        default="",
        choices=_RESIZING,
        metavar="NAME",
        help="resizing in validation; default: the model's",
    )
    add("-b", "--batch-size", type=int, default=128, help="images in a batch of each process")
    add("-vb", "--validation-batch-size", type=int, help="default: --batch-size")
    parser.switch("--channels-last", help="channels-last memory layout")
    parser.switch(
        "--grad-checkpointing", "--use-checkpoint", help="recompute activations in the backward pass to save memory"
    )
    _add_compilation_options(parser)
    add("--drop-rate", type=float, help="dropout; default: the model's")
    add("--attn-drop-rate", type=float, help="dropout of attention weights; default: the model's")
    add("--drop-path", type=float, help="stochastic depth; default: the variant's")


def _add_optimizer_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--opt", "--optim", default="adamw", help="any of timm.optim.list_optimizers()")
    add("--opt-eps", type=float, default=1e-8)
    add("--opt-betas", type=float, nargs="+", default=[0.9, 0.999])
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    add("--clip-grad", type=float, default=5.0, help="0: no clipping")
    add("--clip-mode", default="norm", choices=["norm", "value", "agc"])
    add("--layer-decay", type=float, help="learning rate factor from layer to layer")
    add("--grad-accum-steps", "--accumulation-steps", type=int, default=1, help="batches for each optimizer step")


def _add_schedule_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--sched", default="cosine", choices=["cosine", "tanh", "step", "multistep", "plateau", "poly", "constant"])
    parser.switch("--lr-ep", help="move the schedule every epoch instead of every step")
    add("--lr", type=float, help="learning rate, whatever the batch size; default: --lr-base scaled, or 0.001 without")
    add("--lr-base", type=float, help="learning rate for batches of --lr-base-size, scaled to the global batch")
    add("--lr-base-size", type=_positive, default=256, help="images in the global batch that --lr-base is for")
    add(
        "--lr-base-scale",
        choices=["linear", "sqrt"],
        help="how the rate grows with the batch; default: sqrt for adaptive optimizers, as in timm",
    )
    parser.switch("--lr-base-bounds", help="scale --warmup-lr and --min-lr like --lr-base")
    add("--lr-noise", type=float, nargs="+", help="epochs between which noise is added, as fractions")
    add("--lr-noise-pct", type=float, default=0.67)
    add("--lr-noise-std", type=float, default=1.0)
    add("--lr-cycle-mul", type=float, default=1.0)
    add("--lr-cycle-decay", type=float, default=1.0)
    add("--lr-cycle-limit", type=int, default=1)
    add("--lr-k-decay", type=float, default=1.0)
    add("--warmup-lr", type=float, default=1e-6)
    add("--min-lr", type=float, default=5e-6)
    add("--epochs", type=int, default=310, help="length of the schedule, warm-up included, cool-down not")
    add("--start-epoch", type=int, help="overrides the epoch of --resume")
    add("--decay-milestones", type=int, nargs="+", default=[30, 60])
    add("--decay-epochs", type=float, default=100)
    add("--warmup-epochs", type=int, default=20)
    parser.switch("--warmup-prefix", help="the schedule begins after the warm-up, not below it; --epochs is of both")
    add("--cooldown-epochs", type=int, default=10, help="epochs at --min-lr after the schedule")
    add("--patience-epochs", type=int, default=10)
    add("--decay-rate", "--dr", type=float, default=0.1)


def _add_augmentation_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--no-aug", action="store_true", help="resize and crop only")
    add("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of random crops")
    add("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio of random crops")
    add("--hflip", type=float, default=0.5)
    add("--vflip", type=float, default=0.0)
    add("--color-jitter", type=float, default=0.4)
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm auto-augment policy; empty for none")
    add("--aug-repeats", type=float, default=0)
    add("--aug-splits", type=int, default=0)
    parser.switch("--jsd-loss", help="Jensen-Shannon divergence between --aug-splits")
    parser.switch("--bce-loss", help="binary cross entropy")
    add("--bce-target-thresh", type=float)
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=["const", "rand", "pixel"])
    add("--recount", type=int, default=1)
    parser.switch("--resplit", help="do not erase in the first augmentation split")
    add("--mixup", type=float, default=0.8)
    add("--cutmix", type=float, default=1.0)
    add("--cutmix-minmax", type=float, nargs=2)
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5)
    add("--mixup-mode", default="batch", choices=["batch", "pair", "elem"])
    add("--mixup-off-epoch", type=int, default=0, help="0: never")
    add("--smoothing", type=float, default=0.1)
    add("--train-interpolation", default="random", choices=["random", "bilinear", "bicubic"])


def _add_averaging_options(parser: Parser) -> None:
    add = parser.add_argument
    parser.switch("--sync-bn", help="batch statistics over all GPUs; without effect on the CPU")
    parser.switch(
        "--fsdp",
        help="let each process keep a part of weights, average, gradients and optimizer state (PyTorch's FSDP2), for "
        "models too large for one GPU together with these, such as mamba_vision_L3 with its 740 M parameters",
    )
    add("--dist-bn", default="reduce", choices=["broadcast", "reduce", ""], help="running statistics after an epoch")
    parser.switch("--split-bn", help="batch statistics for each augmentation split")
    add("--no-ddp-bb", action="store_true", help="do not broadcast buffers before every step")
    parser.switch("--model-ema", help="keep an exponential moving average of the weights, and judge by it")
    parser.switch("--model-ema-force-cpu", help="keep it in host memory; it is then not evaluated")
    add("--model-ema-decay", type=float, default=0.9998)
    add("--mesa", type=float, default=0.0, help="weight of self-distillation from the averaged weights")
    add("--mesa-start-ratio", type=float, default=0.25, help="part of --epochs after which it starts")


def _add_run_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--tag", default="exp", help="name of the run; used in output paths")
    add("--output", default="", metavar="DIR", help="runs go to DIR/TAG; default: output/train")
    add("--experiment", default="", help="name of the run's folder; default: date, model and size")
    add("--log-dir", default="", metavar="DIR", help="TensorBoard files go to DIR_TAG; default: into the run's folder")
    parser.switch("--log-wandb", help="log to Weights & Biases as well")
    add("--eval-metric", default="top1", choices=["top1", "top5", "loss"], help="what decides the best checkpoint")
    add("--checkpoint-hist", type=int, default=1, help="epochs kept besides the last and the best")
    add("--no-saver", action="store_true", help="write no checkpoints")
    add("--recovery-interval", type=int, default=0, help="steps between checkpoints inside an epoch; 0: none")
    add("--log-interval", type=int, default=50, help="steps between log lines")
    parser.switch("--save-images", help="write the batches of logged steps as pictures")
    parser.switch("--validate-only", help="evaluate and stop")
    add("--seed", type=int, default=42, help="the rank is added")
    parser.switch("--deterministic", help="deterministic algorithms only")
    add("--device", default="", help="cuda, cpu, …; default: a GPU if there is one")
    parser.switch("--amp", "--native-amp", help="mixed precision, on a GPU in float16 unless --bfloat")
    add("--disable-amp", dest="amp", action="store_false", default=argparse.SUPPRESS, help="the same as --no-amp")
    add("--fused-layernorm", action=NotNeeded, nargs=0, help="not needed: it never had an effect")
    parser.switch("--bfloat", help="bfloat16 in mixed precision")
    add("--local-rank", type=int, help=argparse.SUPPRESS)  # from torch.distributed.launch; the environment has it too


def validate_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of validate.py."""
    parser = Parser(VALIDATE_REFUSED, description="Score image classifiers: top-1, top-5 and loss.")
    add = parser.add_argument
    add("data", nargs="?", metavar="DIR", help="the same as --data-dir")
    add(
        "--data-dir",
        "--data-path",
        metavar="DIR",
        help="folder that holds the split, or whose class folders are the split",
    )
    add("--dataset", default="", help="timm dataset type; empty: image folders")
    add("--split", default="validation")
    parser.switch("--dataset-download", help="let timm download the dataset")
    add("--class-map", default="", metavar="FILE", help="text file of class names in the order of their indices")
    parser.switch("--skip-corrupt", help="leave out images that cannot be decoded, and count them")
    add("-m", "--model", help="name, pattern, 'all', or a text file of names; default: the checkpoint's")
    parser.switch("--pretrained", help="use the released weights, as without --checkpoint anyway")
    _add_saved_model_options(parser)
    _add_speed_options(parser)
    add("--test-pool", action="store_true", help="pool over larger images than trained on as timm does")
    add("--use-train-size", action="store_true", help="the training size of models that have a larger test size")
    add("-b", "--batch-size", type=_positive, default=256)
    add("-j", "--workers", type=_not_negative, help="data loading processes; default: 8, or the CPUs if fewer")
    add("--no-prefetcher", action="store_true", help="normalise in the workers instead of on the GPU")
    parser.switch("--pin-mem", help="pin host memory of batches")
    add("--num-gpu", type=_positive, default=1, help="GPUs of this process; more processes by torchrun are faster")
    add("--log-freq", type=_positive, default=10, help="batches between log lines")
    add("--real-labels", metavar="FILE", help="ImageNet-ReaL JSON; its scores take the place of top-1 and top-5")
    add("--valid-labels", metavar="FILE", help="text file of the class indices that predictions are restricted to")
    add("--results-file", metavar="FILE", help="write the results there as well")
    add("--results-format", default="csv", choices=["csv", "json"])
    parser.switch("--retry", help="try again with a smaller batch when memory runs out")
    return parser.parse_args(argv)


def predict_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of predict.py."""
    parser = Parser({}, description="Classify images; writes predictions.json, predictions.txt and contact sheets.")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, folder of images, or pattern such as 'photos/*.jpg'")
    add("--out", default="predictions", metavar="DIR", help="folder to write to")
    add("--topk", type=_positive, default=5, help="classes to list for each image")
    add("--class-names", metavar="FILE", help="text file with a class name on each line; default: the checkpoint's")
    add("--sheet-limit", type=_not_negative, default=100, help="images on contact sheets, evenly from the inputs")
    parser.switch("--skip-corrupt", help="leave out images that cannot be decoded, and count them")
    add("-m", "--model", help="name of one model; default: the checkpoint's")
    _add_saved_model_options(parser)
    _add_speed_options(parser)
    add("-b", "--batch-size", type=_positive, default=32)
    return parser.parse_args(argv)


def _add_saved_model_options(parser: Parser, several: bool = False) -> None:
    add = parser.add_argument
    if several:
        add("--checkpoint", nargs="+", default=[], metavar="FILE", help="weights, one for each model ('' for released)")
    else:
        add("--checkpoint", default="", metavar="FILE", help="weights; default: the released ones")
    parser.switch("--use-ema", help="use the averaged weights of the checkpoint")
    parser.switch("--trust-checkpoint", help="unpickle the checkpoint without restriction: it can run any code")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="NAME=VALUE", help="further model arguments")
    add("--num-classes", type=_positive, help="default: the checkpoint's, or the model's")
    add("--in-chans", type=_positive, help="channels of the images; default: the model's")
    add("--gp", help="global pooling; default: the model's")
    add("--img-size", "--size", type=_positive, help="height and width; default: the model's")
    add("--input-size", type=_positive, nargs=3, metavar=("C", "H", "W"), help="default: the model's")
    add("--crop-pct", type=float, help="part of the image that is cropped; default: the model's")
    add("--crop-mode", choices=["squash", "border", "center"], help="default: the model's")
    add("--mean", type=float, nargs="+", help="pixel mean; default: the model's")
    add("--std", type=float, nargs="+", help="pixel standard deviation; default: the model's")
    add("--interpolation", default="", choices=_RESIZING, metavar="NAME", help="resizing; default: the model's")
    parser.switch("--exif-transpose", default=None, help="turn images upright by EXIF; default: as in training")
    add("--device", default="", help="cuda, cpu, …; default: a GPU if there is one")
    parser.switch("--channels-last", help="channels-last memory layout")


def _add_speed_options(parser: Parser) -> None:
    parser.switch("--amp", help="mixed precision")
    parser.add_argument(
        "--amp-dtype", choices=["float16", "bfloat16"], help="default: float16 on a GPU, bfloat16 on a CPU"
    )
    _add_compilation_options(parser)


def _add_compilation_options(parser: Parser) -> None:
    parser.add_argument(
        "--torchcompile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model; cudagraphs: only record its CUDA kernels and launch them together",
    )
    parser.add_argument(
        "--torchcompile-mode",
        choices=["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        help="of inductor, which it turns on; the first two record CUDA graphs",
    )


def receptive_field_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of receptive_field.py."""
    parser = Parser({}, description="Draw effective receptive fields of models, before and after training.")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, folder of images, or pattern such as 'photos/*.jpg'")
    add("--out", default="receptive_field", metavar="DIR", help="folder to write to")
    add("-m", "--model", nargs="+", default=[], metavar="NAME", help="models to compare; default: the checkpoints'")
    _add_saved_model_options(parser, several=True)
    add("--weights", nargs="+", default=["initial", "trained"], choices=["initial", "trained"], help="rows to draw")
    add("--seed", type=int, default=0, help="of the initial weights")
    add("--count", type=_positive, default=50, help="images to average over, evenly from the inputs")
    add("--stage", type=int, default=-1, help="whose output's middle is asked about; negative: from the last")
    add("--shares", type=_share, nargs="+", default=[0.2, 0.5, 0.8], help="of the whole, whose squares are measured")
    return parser.parse_args(argv)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return value


def activation_map_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of activation_map.py."""
    parser = Parser(
        {},
        description="Draw what positions of images take from which others, in the scan or the attention of a block. "
        "The original normalised images for this by --mean 0.5 --std 0.25 instead of as in training.",
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, folder of images, or pattern such as 'photos/*.jpg'")
    add("--out", default="activation_maps", metavar="DIR", help="folder to write to")
    add("-m", "--model", help="name of one model; default: the checkpoint's")
    _add_saved_model_options(parser)
    add("--stage", type=_not_negative, default=2, help="of the block, from 0 on; vision transformers have none")
    add("--block", type=_not_negative, default=1, help="in its stage, from 0 on")
    centre = [(0.5, 0.5)]
    add("--points", type=_point, nargs="+", default=centre, metavar="X,Y", help="from 0 (left, top) to 1; quoted pairs")
    maps = "such as all_norm_CB: a0, a1, …, all or nall; _norm, _absnorm or none; _CB, _CwBw, _ww, _CBdt or _CwBdtw"
    add("--maps", nargs="+", metavar="MAP", help=f"{maps}; default: all routes, each by CB, CwBw and ww")
    parser.switch("--rollout", help="combine the maps with those of the blocks before in the stage")
    return parser.parse_args(argv)


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"must be X,Y, each from 0 to 1, got {text!r}")
    return x, y


def throughput_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of throughput.py."""
    parser = Parser(
        {},
        description="Time models side by side: images a second, latency, memory, parameters and multiply-accumulates.",
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["mamba_vision_T"], metavar="NAME", help="models of this package or of timm")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="NAME=VALUE", help="arguments of all models")
    sides = "height and width, one or more; default: each model's own"
    add("--resolution", "--img-size", "--size", type=_positive, nargs="+", help=sides)
    add("-b", "--batch-size", "--bs", type=_positive, default=128, help="halved as long as a GPU's memory runs out")
    add("--data-path", action=NotNeeded, help="not needed: the images are random numbers")
    add("--rounds", type=_positive, default=20, help="timed rounds; in each, every model has its turn")
    add("--iterations", type=_not_negative, default=0, help="forwards in a turn; 0: about half a second's worth")
    add("--warmup", type=_not_negative, default=3, help="forwards of every model before the timing")
    parser.switch("--train", help="time forward, backward and loss instead of inference")
    parser.switch("--channels-last", "--channel-last", help="channels-last memory layout")
    parser.switch("--amp", help="mixed precision")
    add("--amp-dtype", choices=["float16", "bfloat16"], help="default: float16 on a GPU, bfloat16 on a CPU")
    _add_compilation_options(parser)
    add("--threads", type=_positive, help="CPU threads")
    add("--device", default="", help="cuda, cpu, …; default: a GPU if there is one")
    add("--json", metavar="FILE", help="write the figures there as well")
    return parser.parse_args(argv)
