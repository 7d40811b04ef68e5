"""Checks of augmentation and preprocessing, whose wrong names timm answers with a traceback."""

import argparse

from timm.data import create_transform

from mambavision.errors import UserError


def check_values(args: argparse.Namespace) -> None:
    """Raise a UserError for an impossible policy of augmentation."""
    try:
        create_transform(64, is_training=True, auto_augment=args.aa or None)
    except (AssertionError, KeyError, ValueError) as error:
        example = "such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0"
        raise UserError(f'--aa {args.aa}: {error}; give a policy of timm, {example}, or "" for none.') from error
