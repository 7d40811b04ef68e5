"""Count the parameters and operations of a segmentation model, by shapes alone; see --help."""

import argparse


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Count the parameters of a config's model and the multiply-accumulates of one image, without heads "
        "that only training uses. Published FLOPs are multiply-accumulates."
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="config of the model")
    add(
        "--shape", type=int, nargs="+", default=[512], metavar="SIDE", help="height and width of the image, or one side"
    )
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override")
    args = parser.parse_args(argv)
    if len(args.shape) > 2:
        parser.error("--shape: expected HEIGHT WIDTH, or one side of a square")
    return args


def count(args: argparse.Namespace) -> None:
    """Print the counts of a config's model."""
    import torch
    from mmengine.registry import MODELS, init_default_scope

    from mambavision.complexity import complexity
    from mambavision.openmmlab.config import explained, load_config
    from mambavision.running.ranges import check_ranges

    check_ranges(vars(args))
    config = load_config(args.config, args.cfg_options)
    init_default_scope(config.default_scope)
    with torch.device("meta"), explained(args.config):
        model = MODELS.build(config.model)
    height, width = args.shape[0], args.shape[-1]
    found = complexity(model, (3, height, width))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    counts = {
        "params": found.params,
        **{f"params {name}": number for name, number in parts.items() if number},
        "GMACs of convolutions and linear layers": round(found.gmacs, 3),
        "GMACs of attention": round(found.gmacs_attention, 3),
        "GMACs of scans and neighbourhood attention": round(found.gmacs_scan, 3),
        "GMACs": round(found.gmacs + found.gmacs_attention + found.gmacs_scan, 3),
    }
    print(f"{args.config}, {height} x {width}")
    for name, number in counts.items():
        print(f"{name:<45}{number:>16,}")


if __name__ == "__main__":
    args = options()

    from mambavision.running.program import run_cli

    run_cli(lambda: count(args))
