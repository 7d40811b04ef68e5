"""Parameters and operations: VMamba's published figures to the last digit, and the command that lists them."""

import json
import math

import pytest
import torch

import mambavision
from mambavision import complexity

# Parameters, and GFLOPs at 224x224 as the original's program counts them, of its own models.
PUBLISHED = {
    "vmamba_tiny_s1l8": (30_249_064, 4.905609984),
    "vmamba_small_s1l20": (49_012_840, 8.612211456),
    "vmamba_base_s1l20": (86_614_504, 15.220859904),
    "vmamba_tiny_s2l5": (30_705_832, 4.85774208),
    "vmamba_small_s2l15": (50_147_752, 8.71577472),
    "vmamba_base_s2l15": (88_557_800, 15.358944256),
    "vanilla_vmamba_tiny": (22_893_448, 5.62689504),
    "vanilla_vmamba_small": (44_417_416, 11.231522784),
    "vanilla_vmamba_base": (76_254_056, 18.020115136),
}


def rounding_of_einsum(model):
    """Return by how much the original's count differs because it reads einsum's from a text with four digits.

    Its first generation gets x_proj and dt_projs from einsum, whose operations numpy.einsum_path prints as 1.830e+08.
    """
    total = 0.0
    for stage, layer in enumerate(model.stages):
        length = (56 >> stage) ** 2
        for block in layer.blocks:
            for weight in (block.op.x_proj_weight, block.op.dt_projs_weight):
                operations = 2 * length * math.prod(weight.shape)
                total += (float(f"{operations:.3e}") - operations) / 2
    return total


@pytest.mark.parametrize("name", PUBLISHED)
def test_vmamba_as_published(name):
    params, gflops = PUBLISHED[name]
    with torch.device("meta"):
        model = mambavision.create_model(name)
    counts = complexity.complexity(model, (3, 224, 224))
    rounding = rounding_of_einsum(model) if name.startswith("vanilla") else 0
    assert counts.params == params
    assert round(counts.gflops_vmamba * 1e9 + rounding) == round(gflops * 1e9)
    assert abs(rounding) < 1e-4 * gflops * 1e9


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["complexity", *words])
    complexity.main()
    return capsys.readouterr().out.splitlines()


def test_models_are_listed_by_pattern(monkeypatch, capsys):
    heading, *rows = run(monkeypatch, capsys, "vanilla_*", "vmamba_tiny*", "vmamba_tiny_s1l8")
    assert "params (M)" in heading
    assert [row.split()[0] for row in rows] == [
        "vanilla_vmamba_base",
        "vanilla_vmamba_small",
        "vanilla_vmamba_tiny",
        "vmamba_tiny_s1l8",
        "vmamba_tiny_s2l5",
    ]
    assert rows[3].split()[1:] == ["224", "30.25", "4.71", "0.000", "0.136", "4.91"]
    with pytest.raises(mambavision.errors.UserError, match="vvmamba_\\*: matches none of mamba_vision_B"):
        complexity.expand_model_name("vvmamba_*")


def test_attention_and_any_model_of_timm_are_counted(monkeypatch, capsys):
    (line,) = run(monkeypatch, capsys, "test_vit", "--json")
    counts = json.loads(line)
    assert counts["model"] == "test_vit"
    assert counts["gmacs_attention"] > 0
    assert counts["gmacs_scan"] == 0
    assert counts["gflops_vmamba"] > counts["gmacs"] + counts["gmacs_attention"]
