"""Changes to a trained model that leave its function as it is and make it faster."""

import copy
import itertools

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of one of this package's models in which convolutions do the work of the batch norms behind them.

    In evaluation mode a batch norm is a scale and a shift for each channel, which the weights of the convolution before
    it can take over. A batch norm belongs to a convolution if it is the next module that their parent defines. Logits
    change by rounding only; the copy is for inference, and its state dict has other names.

    Raises:
        ValueError: The model is in training mode, where a batch norm depends on the batch.
    """
    if model.training:
        raise ValueError("fold_batch_norm needs a model in evaluation mode: call model.eval() first")
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            # Not subclasses, which may do more: timm has batch norms with an activation.
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return model
