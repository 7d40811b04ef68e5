"""Choice of backends."""

import logging
import subprocess
import sys

import pytest

from vision_kernels.backends import (
    BACKEND_VARIABLE,
    OPERATORS,
    Implementation,
    Operator,
    check_forced_backend,
    overview,
)


@pytest.fixture
def operator():
    def forward():
        raise NotImplementedError

    yield Operator(
        "test_operator",
        (
            Implementation("fast", forward, forward, "needs luck", why_unavailable=lambda: "no luck: try again"),
            Implementation("gpu", forward, forward, "needs a GPU", devices=("cuda",)),
            Implementation("plain", forward, forward, "always"),
        ),
    )
    del OPERATORS["test_operator"]


def test_best_available_backend_is_chosen_and_logged_once(operator, caplog, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    with caplog.at_level(logging.INFO):
        assert operator.select("cpu").backend == "plain"
        assert operator.select("cpu").backend == "plain"
        assert operator.select("cuda").backend == "gpu"
    assert [record.getMessage() for record in caplog.records] == [
        "test_operator on cpu: backend 'plain'",
        "test_operator on cuda: backend 'gpu'",
    ]


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("fats", "test_operator has the backends fast, gpu, plain"),
        ("fast", "no luck: try again"),
        ("gpu", "runs on cuda, the inputs are on cpu"),
    ],
)
def test_forcing_an_impossible_backend_says_why(operator, monkeypatch, forced, message):
    monkeypatch.setenv(BACKEND_VARIABLE, forced)
    with pytest.raises(ValueError, match=message):
        operator.select("cpu")


def test_a_forced_backend_needs_one_operator_that_has_it(operator, monkeypatch):
    for possible in ("", "plain", "reference"):
        monkeypatch.setenv(BACKEND_VARIABLE, possible)
        check_forced_backend()
    monkeypatch.setenv(BACKEND_VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{BACKEND_VARIABLE}=fast"):
        check_forced_backend()


def test_overview_says_what_is_active_and_why_another_is_not(operator, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    lines = overview().splitlines()
    assert any(line.split()[:1] == ["plain"] and "active on cpu" in line for line in lines)
    assert any(line.split()[:1] == ["fast"] and line.endswith("no luck: try again") for line in lines)


def test_module_prints_the_overview():
    result = subprocess.run([sys.executable, "-m", "vision_kernels"], capture_output=True, text=True, check=True)
    assert "selective_scan" in result.stdout
    assert BACKEND_VARIABLE in result.stdout
