"""Building a model from its registry entry: timm's builder, with download failures said in one sentence."""

from typing import Any
from urllib.error import URLError

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg
from torch import nn

from mambavision.errors import CheckpointError


def build(model_class: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build `model_class` for a registered variant, with features through ``forward_intermediates``.

    Released weights come from the Hugging Face hub through its cache, or from an address through that of torch.hub.
    Both are safe for many processes at once: a file takes its name there when it is complete.

    Raises:
        CheckpointError: `pretrained` weights cannot be downloaded, or nobody offers them for download.
    """
    config = get_pretrained_cfg(variant)
    if pretrained and not config.has_weights:
        raise CheckpointError(
            f"{variant}: the authors' weights ({config.notes[0]}) have no address to download them from. Get the file "
            f"through {config.origin_url} and pass it as checkpoint_path= (--checkpoint, --initial-checkpoint)."
        )
    try:
        return build_model_with_cfg(
            model_class,
            variant,
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **kwargs,
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, URLError, ConnectionError, TimeoutError) as error:
        wanted, cache = _origin(config)
        reason = getattr(error, "reason", type(error).__name__)
        raise CheckpointError(
            f"{variant}: the released weights could not be downloaded ({reason}). Get {wanted} on a machine with "
            "network and pass it as checkpoint_path= (--checkpoint, --initial-checkpoint), or copy that machine's "
            f"{cache} here."
        ) from error


def _origin(config: PretrainedCfg) -> tuple[str, str]:
    """Return the address of released weights, and the cache that they are downloaded to."""
    if config.url:
        return config.url, "cache of torch.hub (TORCH_HOME)"
    address = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{config.hf_hub_filename}"
    return address, "Hugging Face cache (HF_HOME)"
