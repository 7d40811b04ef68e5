"""Values of train.py's options that no run can have. timm and torch answer them with a traceback, or not at all."""

import argparse

from timm.data import create_transform

from mambavision.errors import UserError

_NUMBERS = {
    "0 or more": (
        lambda number: number >= 0,
        "lr min_lr warmup_lr warmup_epochs cooldown_epochs opt_eps momentum weight_decay clip_grad "
        "validation_batch_size workers checkpoint_hist color_jitter mixup cutmix",
    ),
    "from 0 to 1": (
        lambda number: 0 <= number <= 1,
        "drop_rate attn_drop_rate drop_path model_ema_decay smoothing hflip vflip reprob mixup_prob mixup_switch_prob",
    ),
    "at least 0 and less than 1": (lambda number: 0 <= number < 1, "opt_betas"),
}


def check_values(args: argparse.Namespace) -> None:
    """Raise a UserError that names the first impossible value."""
    for wanted, (is_possible, names) in _NUMBERS.items():
        for name in names.split():
            value = getattr(args, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not is_possible(number):
                    raise UserError(f"--{name.replace('_', '-')} {number:g}: must be {wanted}.")
    try:
        create_transform(64, is_training=True, auto_augment=args.aa or None)
    except (AssertionError, KeyError, ValueError) as error:
        example = "such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0"
        raise UserError(f'--aa {args.aa}: {error}; give a policy of timm, {example}, or "" for none.') from error
