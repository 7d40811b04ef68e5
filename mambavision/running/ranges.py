"""Range checks for the numeric options of all programs."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mambavision.errors import UserError


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds.

    Attributes:
        low: Lower bound.
        high: Upper bound; infinity for none.
        above: Exclude `low` itself.
        below: Exclude `high` itself.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        is_high_enough = number > self.low if self.above else number >= self.low
        is_low_enough = number < self.high if self.below else number <= self.high
        return math.isfinite(number) and is_high_enough and is_low_enough

    def __str__(self) -> str:
        low, high = (f"{bound:,d}" if isinstance(bound, int) else f"{bound:g}" for bound in (self.low, self.high))
        if self.high == math.inf:
            return f"more than {low}" if self.above else f"{low} or more"
        if not (self.above or self.below):
            return f"from {low} to {high}"
        least = f"more than {low}" if self.above else f"at least {low}"
        return f"{least} and {'less than' if self.below else 'at most'} {high}"


_MANY = 1_000_000  # of epochs, images in a batch and the like
_RANGES: dict[Range, str] = {
    # Schedules and rates
    Range(0): (
        "lr lr_noise_std warmup_lr min_lr opt_eps weight_decay clip_grad color_jitter mixup cutmix mesa wait_time"
    ),
    Range(0, above=True): "lr_base lr_cycle_mul lr_k_decay ratio std decay_epochs",
    Range(0, 1): (
        "drop_rate attn_drop_rate drop_path model_ema_decay smoothing hflip vflip reprob mixup_prob mixup_switch_prob "
        "momentum lr_noise lr_noise_pct bce_target_thresh cutmix_minmax mesa_start_ratio score_threshold opacity points"
    ),
    Range(0, 1, above=True): "crop_pct scale lr_cycle_decay decay_rate layer_decay",
    Range(0, 1, below=True): "opt_betas",
    Range(0, 1, above=True, below=True): "shares",
    Range(-1000, 1000): "mean",
    # Counts
    Range(1, _MANY): (
        "epochs batch_size validation_batch_size grad_accum_steps log_interval log_freq recount lr_cycle_limit topk "
        "rounds count num_classes"
    ),
    Range(1, 2**40): "data_len lr_base_size",
    Range(0, _MANY): (
        "warmup_epochs cooldown_epochs patience_epochs start_epoch decay_milestones mixup_off_epoch epoch_repeats "
        "recovery_interval checkpoint_hist sheet_limit iterations warmup block local_rank"
    ),
    Range(0, 100): "aug_repeats aug_splits",
    Range(-100, 100): "stage",
    Range(0, 512): "workers",
    Range(1, 4096): "threads num_gpu",
    Range(0, 2**32 - 1): "seed",  # of NumPy's generators
    # Pixels
    Range(1, 2**14): "input_size img_size size resolution shape",
    Range(1, 1024): "in_chans",
}
RANGES: dict[str, Range] = {name: span for span, names in _RANGES.items() for name in names.split()}

# Options with several numbers that must not decrease.
_ORDERED = ("scale", "ratio", "cutmix_minmax", "decay_milestones", "lr_noise")


def check_ranges(options: Mapping[str, Any]) -> None:
    """Raise a UserError that names the first option whose value is out of range.

    Args:
        options: Options of a program, by name. Those without a range are not checked.
    """
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        numbers = list(_numbers(value)) if name in RANGES else []
        for number in numbers:
            if number not in RANGES[name]:
                raise UserError(f"{option} {number:g}: must be {RANGES[name]}.")
        if name in _ORDERED and numbers != sorted(numbers):
            shown = " ".join(f"{number:g}" for number in numbers)
            raise UserError(f"{option} {shown}: the numbers must not decrease.")


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)
    elif type(value) in (int, float):
        yield value
