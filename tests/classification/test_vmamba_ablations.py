"""The ablations of VMamba's authors (their configs of the folder vssmab), each written as arguments of a model."""

import pytest
import torch

from engine.model import create_any
from engine.options import TrainOptions

# By the name of their config: the model that it varies, and what to give to --model-kwargs.
ABLATIONS = {
    name: ("vmamba_tiny_s1l8", words)
    for name, words in {
        # which ways the map is scanned; "ndw": without the depthwise convolution in front of the scan
        "unidi": "routes=unidirectional",
        "unidi_ndw": "routes=unidirectional ssm_conv=-1",
        "bidi": "routes=bidirectional",
        "bidi_ndw": "routes=bidirectional ssm_conv=-1",
        "cas2d": "routes=cascade",
        "cas2d_ndw": "routes=cascade ssm_conv=-1",
        "ndw": "ssm_conv=-1",
        "posndw": "ssm_conv=-1 pos_embed_size=224,224",
        # the activation in front of the scan, its initialisation, and what follows it
        "gelu": "ssm_act_layer=gelu",
        "relu": "ssm_act_layer=relu",
        "init1": "ssm_init=normal",
        "init2": "ssm_init=uniform",
        "ondw": "out_norm=depthwise",
        "onone": "out_norm=none",
        "onsoftmax": "out_norm=softmax",
        # wider scan, narrower MLP
        "m3s1h": "ssm_ratio=1.5 mlp_ratio=3.0",
        "m2s2h": "ssm_ratio=2.5 mlp_ratio=2.0",
        # states of the scan and its width, in a shorter network
        "ds2": "depths=2,2,5,2 ssm_d_state=2 ssm_ratio=2.0",
        "ds4": "depths=2,2,5,2 ssm_d_state=4 ssm_ratio=2.0",
        "ds8": "depths=2,2,5,2 ssm_d_state=8 ssm_ratio=1.5",
        "ds16": "depths=2,2,5,2 ssm_d_state=16 ssm_ratio=1.0",
        "sr1l5": "depths=2,2,5,2 ssm_ratio=1.0",
        "sr1hl5": "depths=2,2,5,2 ssm_ratio=1.5",
        "a9d": "depths=2,2,5,2 ssm_d_state=16 ssm_ratio=1.0 ssm_conv=-1",
    }.items()
} | {
    name: ("vanilla_vmamba_tiny", words)
    for name, words in {
        # one function computed in six ways: by other kernels, one route after the other, in other layouts
        **dict.fromkeys(("a0", "a0seq", "a01", "a1", "a2", "a3"), ""),
        # steps from there to the second generation
        "a7": "depths=2,2,2,2 ssm_conv=-1 mlp_ratio=4.0 stem=overlapping downsample=conv3x3",
        "a7a": "depths=2,2,2,2 ssm_conv=-1 mlp_ratio=4.0 stem=overlapping downsample=conv3x3 ssm_ratio=1.0",
        "a8": "depths=2,2,5,2 ssm_conv=-1 mlp_ratio=4.0 stem=overlapping downsample=conv3x3 ssm_ratio=1.0",
    }.items()
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_is_a_matter_of_arguments(name):
    """A misspelt argument or choice would be refused."""
    model, words = ABLATIONS[name]
    options = TrainOptions.parse(["--model", model, "--model-kwargs", *words.split()])
    with torch.device("meta"):
        assert create_any(model, False, options.model.model_kwargs)(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
