"""Transformations of trained models for faster inference."""

import copy
import itertools

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of one of this package's models with batch norms folded into the preceding convolutions.

    In evaluation mode a batch norm scales and shifts each channel, which can be merged into the weights of the
    preceding convolution. A batch norm is folded if it is the module defined right after a convolution in their parent.
    Logits change by rounding only. The copy is for inference; its state dict has other names.

    Raises:
        ValueError: The model is in training mode, where a batch norm depends on the batch.
    """
    if model.training:
        raise ValueError("fold_batch_norm needs a model in evaluation mode: call model.eval() first")
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            # Not for subclasses, which may do more: timm has batch norms with an activation.
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return model
