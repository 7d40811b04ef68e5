"""Building a model from its registry entry: timm's builder, with download failures said in one sentence."""

from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import build_model_with_cfg, get_pretrained_cfg
from torch import nn

from mambavision.errors import CheckpointError


def build(model_class: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build `model_class` for a registered variant, with features through ``forward_intermediates``.

    Released weights come from the Hugging Face hub through its cache, which is safe for many processes at once.

    Raises:
        CheckpointError: `pretrained` weights cannot be downloaded.
    """
    try:
        return build_model_with_cfg(
            model_class,
            variant,
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **kwargs,
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        config = get_pretrained_cfg(variant)
        wanted = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{config.hf_hub_filename}"
        raise CheckpointError(
            f"{variant}: the released weights could not be downloaded ({type(error).__name__}). Get {wanted} on a "
            "machine with network and pass it as checkpoint_path= (--checkpoint, --initial-checkpoint), or copy that "
            "machine's Hugging Face cache here (HF_HOME)."
        ) from error
