"""The interface of timm's models, for type checkers."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn


class TimmModel(nn.Module):
    """A model with the interface that timm's models share.

    The models of this package derive from it. Those of timm do not, but have the same attributes, so that annotations
    use it for models of either package.
    """

    num_classes: int
    num_features: int
    feature_info: Any  # a description of each stage: ``num_chs``, ``reduction`` and ``module``
    pretrained_cfg: dict[str, Any]
    patch_embed: Any
    num_prefix_tokens: int  # of transformers

    if TYPE_CHECKING:

        def forward_features(self, x: Tensor) -> Tensor: ...

        def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any: ...

        def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]: ...

        def set_grad_checkpointing(self, enable: bool = True) -> None: ...

        def set_input_size(self, *args: Any, **kwargs: Any) -> None: ...  # of transformers

        def group_matcher(self, coarse: bool = False) -> dict[str, Any]: ...
