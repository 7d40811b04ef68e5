"""Building a model from its registry entry: timm's builder, with one sentence for download failures."""

from typing import Any, TypeVar, cast
from urllib.error import URLError

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg
from torch import nn

from mambavision.errors import CheckpointError

Model = TypeVar("Model", bound=nn.Module)


def build(model_class: type[Model], variant: str, pretrained: bool, **kwargs: Any) -> Model:
    """Build `model_class` for a registered variant, with features through ``forward_intermediates``.

    Released weights are downloaded from the Hugging Face hub, or from an address, into the cache of the hub or of
    torch.hub. Both caches are safe for many processes at once: a file gets its name when it is complete.

    Raises:
        CheckpointError: The `pretrained` weights cannot be downloaded, or are not available for download.
    """
    config = get_pretrained_cfg(variant)
    assert config is not None  # every variant has an entry
    if pretrained and not config.has_weights:
        notes = "; ".join(config.notes or ())
        raise CheckpointError(
            f"{variant}: the authors' weights ({notes}) are not available for download; get the file from "
            f"{config.origin_url} and pass it as checkpoint_path."
        )
    try:
        model = build_model_with_cfg(
            model_class,
            variant,
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **kwargs,
        )
        return cast(Model, model)  # or timm's wrapper of it, with features_only
    except (LocalEntryNotFoundError, HfHubHTTPError, URLError, ConnectionError, TimeoutError) as error:
        wanted, cache = _origin(config)
        reason = getattr(error, "reason", type(error).__name__)
        raise CheckpointError(
            f"{variant}: the released weights could not be downloaded ({reason}). Download {wanted} on a machine "
            f"with network access and pass it as checkpoint_path, or copy that machine's {cache} here."
        ) from error


def _origin(config: PretrainedCfg) -> tuple[str, str]:
    """Return the address of the released weights, and the cache for their download."""
    if config.url:
        return str(config.url), "cache of torch.hub (TORCH_HOME)"
    address = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{config.hf_hub_filename}"
    return address, "Hugging Face cache (HF_HOME)"
