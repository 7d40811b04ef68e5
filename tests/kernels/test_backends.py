"""Selection of backends."""

import logging
import runpy

import pytest

import emulation
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

    def too_big(*arguments):
        return None if arguments == ("little",) else "too big"

    yield Operator(
        "test_operator",
        (
            Implementation("fast", forward, forward, "needs luck", why_unavailable=lambda: "no luck: try again"),
            Implementation("gpu", forward, forward, "needs a GPU", devices=("cuda",)),
            Implementation("small", forward, forward, "what is small", why_unable=too_big),
            Implementation("plain", forward, forward, "always"),
        ),
    )
    del OPERATORS["test_operator"]


def test_best_available_backend_is_chosen_and_logged_once(operator, caplog, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    with caplog.at_level(logging.INFO):
        assert operator.select("cpu", "big").backend == "plain"
        assert operator.select("cpu", "big").backend == "plain"
        assert operator.select("cuda").backend == "gpu"
    assert [record.getMessage() for record in caplog.records] == [
        "test_operator on cpu: backend 'plain'",
        "test_operator on cuda: backend 'gpu'",
    ]


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("fats", "test_operator=fats: this operator has the backends fast, gpu, small, plain"),
        ("fast", "no luck: try again"),
        ("gpu", "runs on cuda, the inputs are on cpu"),
    ],
)
def test_forcing_an_impossible_backend_says_why(operator, monkeypatch, forced, message):
    monkeypatch.setenv(BACKEND_VARIABLE, forced)
    with pytest.raises(ValueError, match=message):
        operator.select("cpu")


def test_each_operator_may_have_its_own_choice(operator, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "test_operator=plain,selective_scan=reference")
    assert operator.select("cpu").backend == "plain"
    assert OPERATORS["selective_scan"].select("cpu").backend == "reference"
    monkeypatch.setenv(BACKEND_VARIABLE, "selective_scan=reference")
    assert operator.select("cuda").backend == "gpu"
    monkeypatch.setenv(BACKEND_VARIABLE, "selective_sacn=reference")
    known = "conv1d_silu, cross_scan, cross_merge, selective_scan, mamba_mixer, neighborhood_attention, ss2d"
    with pytest.raises(ValueError, match=f"there is no operator selective_sacn, only {known}"):
        operator.select("cpu")


def test_unsupported_arguments_go_to_the_next_backend(operator, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    assert operator.select("cpu", "big").backend == "plain"
    monkeypatch.setenv(BACKEND_VARIABLE, "small")
    assert operator.select("cpu", "little").backend == "small"
    with pytest.raises(ValueError, match="test_operator=small: too big"):
        operator.select("cpu", "big")


def test_forced_backend_is_checked_before_work(operator, monkeypatch):
    for possible in ("", "test_operator=plain", "selective_scan=reference"):
        monkeypatch.setenv(BACKEND_VARIABLE, possible)
        check_forced_backend()
    for impossible in ("test_operator=fast", "fast", "no_operator=plain"):
        monkeypatch.setenv(BACKEND_VARIABLE, impossible)
        with pytest.raises(ValueError, match=BACKEND_VARIABLE):
            check_forced_backend()


def test_overview_says_what_is_active_and_why_another_is_not(operator, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    lines = overview().splitlines()
    assert any(line.split()[:1] == ["small"] and "active on cpu" in line for line in lines)
    assert any(line.split()[:1] == ["fast"] and line.endswith("no luck: try again") for line in lines)


def test_overview_explains_what_cannot_be_forced(operator, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "test_operator=gpu")
    assert "test_operator=gpu: runs on cuda, the inputs are on cpu" in overview()


def test_composed_operator_falls_back_to_its_parts(operator, monkeypatch):
    """If the backend named for all operators is missing in this one, or cannot run."""
    operator.composition = "plain"
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert operator.select("cpu").backend == "plain"
    monkeypatch.setenv(BACKEND_VARIABLE, "gpu")
    assert operator.select("cuda").backend == "gpu"
    assert operator.select("cpu").backend == "plain"
    monkeypatch.setenv(BACKEND_VARIABLE, "small")
    assert operator.select("cpu", "little").backend == "small"
    assert operator.select("cpu", "big").backend == "plain"
    for impossible in ("test_operator=reference", "test_operator=gpu", "test_operator=small"):
        monkeypatch.setenv(BACKEND_VARIABLE, impossible)
        with pytest.raises(ValueError, match=impossible):
            operator.select("cpu", "big")


def test_every_operator_has_a_definition_and_a_fallback():
    for each in OPERATORS.values():
        names = [other.backend for other in each.implementations if other.backend != emulation.BACKEND]
        assert names[-2:] == ["torch", "reference"] or names[-1] == each.composition


def test_module_prints_the_overview(monkeypatch, capsys):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    runpy.run_module("vision_kernels", run_name="__main__")
    assert capsys.readouterr().out == overview() + "\n"
