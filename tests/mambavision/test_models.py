"""What every registered model can do; a new model is tested without writing a test."""

import copy

import pytest
import timm
import torch
from timm.models import group_parameters

import mambavision
from small_models import SMALL

NAMES = mambavision.list_models()


@pytest.fixture(params=NAMES)
def shape_only(request):
    """A registered model at full size, without memory for its weights."""
    with torch.device("meta"):
        return mambavision.create_model(request.param).eval()


def images(batch=2, height=64, width=64, channels=3, **kwargs):
    return torch.randn(batch, channels, height, width, **kwargs)


# Every model, by shapes alone


def test_timm_makes_the_same_model(shape_only):
    name = shape_only.pretrained_cfg["architecture"]
    with torch.device("meta"):
        other = timm.create_model(name)
    assert type(other) is type(shape_only)
    assert other.state_dict().keys() == shape_only.state_dict().keys()


def test_forward_parts_fit_together(shape_only):
    channels, height, width = shape_only.pretrained_cfg["input_size"]
    x = torch.empty(2, channels, height, width, device="meta")
    features = shape_only.forward_features(x)
    assert features.shape == (2, shape_only.num_features, height // 32, width // 32)
    assert shape_only.pretrained_cfg["pool_size"] == (height // 32, width // 32)
    assert shape_only.forward_head(features, pre_logits=True).shape == (2, shape_only.head_hidden_size)
    assert shape_only(x).shape == (2, shape_only.num_classes)


def test_features_only_gives_four_maps(shape_only):
    with torch.device("meta"):
        model = mambavision.create_model(shape_only.pretrained_cfg["architecture"], features_only=True)
    features = model(torch.empty(1, 3, 256, 256, device="meta"))
    assert [feature.shape[-1] for feature in features] == [64, 32, 16, 8]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()


def test_pretrained_config_is_complete(shape_only):
    config = shape_only.pretrained_cfg
    sources = ("url", "hf_hub_filename", "notes")  # notes: where nobody but a person can fetch the file
    assert any(config.get(source) for source in sources)
    assert config["license"]
    assert shape_only.get_parameter(config["first_conv"] + ".weight").shape[1] == shape_only.in_chans
    assert shape_only.get_submodule(config["classifier"]) is shape_only.get_classifier()
    assert shape_only.get_classifier().out_features == shape_only.num_classes == config["num_classes"]


def test_groups_of_layers_cover_all_parameters_in_order(shape_only):
    order = {name: index for index, (name, _) in enumerate(shape_only.named_parameters())}
    for coarse in (False, True):
        groups = group_parameters(shape_only, shape_only.group_matcher(coarse=coarse))
        assert sorted(name for names in groups.values() for name in names) == sorted(order)
        assert len(groups) > (3 if coarse else 10)
    fine = group_parameters(shape_only, shape_only.group_matcher(), reverse=True)
    depths = [fine[name] for name in order]
    assert depths == sorted(depths)


def test_weight_decay_exceptions_are_parameters(shape_only):
    assert shape_only.no_weight_decay() <= {name for name, _ in shape_only.named_parameters()}


# Each architecture, with numbers


@torch.inference_mode()
def test_any_input_size(small_model):
    # Patches of 4x4 pixels, with which the oldest VMamba begins, need as many.
    smallest = 4 if small_model.pretrained_cfg["architecture"].startswith("vanilla") else 1
    for height, width in [(smallest, smallest), (31, 33), (100, 36), (64, 64)]:
        assert small_model(images(1, height, width)).isfinite().all()


@torch.inference_mode()
def test_images_of_a_batch_do_not_mix(small_model):
    x = images(3)
    torch.testing.assert_close(small_model(x)[1:2], small_model(x[1:2]), rtol=1e-4, atol=1e-5)
    assert small_model(images(0)).shape == (0, small_model.num_classes)


@torch.inference_mode()
def test_memory_format_does_not_matter(small_model):
    x = images()
    expected = small_model(x)
    model = copy.deepcopy(small_model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_precision(small_model, dtype):
    x = images()
    expected = small_model(x)
    with torch.autocast("cpu", dtype=dtype):
        mixed = small_model(x)
    mixed.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in small_model.parameters())
    pure = copy.deepcopy(small_model).to(dtype)(x.to(dtype))
    for logits in (mixed, pure):
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.05)


def test_every_parameter_learns(small_model):
    small_model.train()(images()).square().mean().backward()
    without = [name for name, parameter in small_model.named_parameters() if parameter.grad is None]
    assert not without


def test_gradient_checkpointing_changes_nothing_but_memory(small_model):
    x = images()
    gradients = []
    for enable in (False, True):
        model = copy.deepcopy(small_model).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)  # drop path
        model(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@torch.inference_mode()
def test_intermediates(small_model):
    x = images()
    final, features = small_model.forward_intermediates(x)
    torch.testing.assert_close(final, small_model.forward_features(x))
    assert len(features) == 4
    (last,) = small_model.forward_intermediates(x, indices=1, intermediates_only=True, norm=True)
    torch.testing.assert_close(last, final)
    early = small_model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    for feature, expected in zip(early, features[:2], strict=True):
        torch.testing.assert_close(feature, expected)
    (nhwc,) = small_model.forward_intermediates(x, indices=[2], output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(nhwc.permute(0, 3, 1, 2), features[2])
    with pytest.raises(ValueError, match="NCHW or NHWC"):
        small_model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", SMALL)
def test_features_only_is_pruned_to_what_it_needs(name):
    model = mambavision.create_model(name, features_only=True, out_indices=(0, 2), **SMALL[name])
    features = model(images())
    assert [feature.shape[-1] for feature in features] == [16, 4]
    sum(feature.square().mean() for feature in features).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.inference_mode()
def test_classifier_can_be_replaced(small_model):
    x = images()
    small_model.reset_classifier(7)
    assert small_model(x).shape == (2, 7)
    assert small_model.num_classes == 7
    small_model.reset_classifier(0)
    assert small_model(x).shape == (2, small_model.num_features)
    small_model.reset_classifier(0, "")
    assert small_model(x).shape == (2, small_model.num_features, 2, 2)
    small_model.reset_classifier(5)
    assert small_model(x).shape == (2, 5)
    small_model.reset_classifier(5, "catavgmax")
    assert small_model(x).shape == (2, 5)
    pre_logits = small_model.forward_head(small_model.forward_features(x), pre_logits=True)
    assert pre_logits.shape == (2, small_model.head_hidden_size)
    assert small_model.head_hidden_size == 2 * small_model.num_features
    with pytest.raises(ValueError, match="a classifier for 5 classes needs global_pool"):
        small_model.reset_classifier(5, "")


def test_new_classifiers_start_like_the_first(small_model):
    first = mambavision.create_model(small_model.pretrained_cfg["architecture"], num_classes=1000)
    small_model.reset_classifier(1000)
    for head in (small_model.get_classifier(), first.get_classifier()):
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not head.bias.any()


@torch.inference_mode()
def test_pruned_models_take_a_classifier(small_model):
    small_model.prune_intermediate_layers([1])
    small_model.reset_classifier(5)
    assert small_model(images()).shape == (2, 5)
    assert small_model.head_hidden_size == small_model.feature_info[1]["num_chs"]


@pytest.mark.parametrize("name", SMALL)
@torch.inference_mode()
def test_arguments_of_timm(name):
    arguments = SMALL[name] | {"in_chans": 1, "num_classes": 5, "global_pool": "max", "drop_path_rate": 0.5}
    model = mambavision.create_model(name, **arguments).eval()
    assert (model.in_chans, model.num_classes) == (1, 5)
    x = images(channels=1)
    torch.testing.assert_close(
        model.forward_head(model.forward_features(x), True), model.forward_features(x).amax((2, 3))
    )
    model = mambavision.create_model(name, **arguments | {"global_pool": "catavgmax"}).eval()
    assert model.forward_head(model.forward_features(x), True).shape == (2, model.head_hidden_size)
    with pytest.raises(ValueError, match="a classifier for 5 classes needs global_pool"):
        mambavision.create_model(name, **arguments | {"global_pool": ""})


def test_state_dict_round_trip(small_model):
    name = small_model.pretrained_cfg["architecture"]
    other = mambavision.create_model(name, **SMALL[name]).eval()
    other.load_state_dict(small_model.state_dict())
    x = images()
    torch.testing.assert_close(other(x), small_model(x))


@pytest.fixture
def traced_model(small_model):
    """Tracing takes long, and the generations of VMamba are traced through the same code."""
    if small_model.pretrained_cfg["architecture"].startswith("vanilla"):
        pytest.skip("traced as vmamba_tiny_s1l8")
    return small_model


def test_compiles_into_one_graph(traced_model):
    x = images()
    compiled = torch.compile(traced_model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), traced_model(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("options", [{"backend": "cudagraphs"}, {"mode": "reduce-overhead"}], ids=str)
@torch.inference_mode()
def test_runs_as_a_cuda_graph(traced_model, options):
    model = traced_model.cuda()
    compiled = torch.compile(model, fullgraph=True, **options)
    for x in (images(device="cuda") for _ in range(4)):  # the first ones warm up and record
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_exports_with_dynamic_batch(traced_model):
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(traced_model, (images(3),), dynamic_shapes=({0: batch},), strict=True)
    x = images(5)
    torch.testing.assert_close(program.module()(x), traced_model(x), rtol=1e-4, atol=1e-5)


# Creating models


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(mambavision.errors.UserError, match=r"unknown model 'mamba_vision_t'.*mean 'mamba_vision_T"):
        mambavision.create_model("mamba_vision_t")
    with pytest.raises(mambavision.errors.UserError, match="mean 'resnet50'"):
        mambavision.create_model("resnet5O")


def test_other_models_of_timm_can_be_created():
    assert mambavision.create_model("test_resnet", num_classes=3).num_classes == 3


def test_listing_takes_patterns():
    assert set(mambavision.list_models("mamba_vision_*")) <= set(NAMES)
    assert mambavision.list_models("no such model*") == []


RELEASED = {
    "mamba_vision_T": "https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/mambavision_tiny_1k.pth.tar",
    "vmamba_tiny_s1l8": "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth",
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_weights_without_network_say_what_to_get(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(mambavision.errors.CheckpointError) as error:
        timm.create_model(name, pretrained=True)
    message = str(error.value)
    assert f"Download {RELEASED[name]} on a machine with network access" in message
    assert "checkpoint_path" in message


def test_released_weights_without_an_address_say_where_to_look():
    with pytest.raises(mambavision.errors.CheckpointError, match=r"released as SegMAN_Encoder_t\.pth\.tar.*github"):
        mambavision.create_model("segman_encoder_t", pretrained=True)


@pytest.fixture
def put_into_cache(monkeypatch, tmp_path):
    """Save weights as what was downloaded from an address."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def put(content, address):
        file = tmp_path / "hub" / "checkpoints" / address.rsplit("/", 1)[-1]  # torch.hub's
        mambavision.save_checkpoint(content, file)

        def from_hub(repo_id, filename, **kwargs):
            assert address == f"https://huggingface.co/{repo_id}/resolve/main/{filename}"
            return str(file)

        monkeypatch.setattr("timm.models._hub.hf_hub_download", from_hub)

    return put


@pytest.mark.parametrize("name", RELEASED)
def test_released_weights_are_loaded_through_the_cache(name, put_into_cache):
    """With other classes and channels too, as timm's own models do."""
    source = mambavision.create_model(name)
    key = "model" if "vmamba" in name else "state_dict"
    put_into_cache({key: source.state_dict(), f"{key}_ema": {}}, RELEASED[name])
    same = mambavision.create_model(name, pretrained=True)
    torch.testing.assert_close(same.state_dict(), source.state_dict())
    other = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1)
    first = source.pretrained_cfg["first_conv"]
    expected = source.get_submodule(first).weight.sum(1, keepdim=True)
    torch.testing.assert_close(other.get_submodule(first).weight, expected)
    torch.testing.assert_close(other.stages[3].state_dict(), source.stages[3].state_dict())
    features = timm.create_model(name, pretrained=True, features_only=True)
    torch.testing.assert_close(features.model.patch_embed.state_dict(), source.patch_embed.state_dict())
