"""Whether a model is compiled: left open, the first step on a GPU decides once, and the run keeps it."""

import json

import pytest
import torch

from repa.trainer.runs import run as runs
from repa.trainer.runs.parts import resolve_compile


@pytest.fixture
def compiler(monkeypatch):
    """A CPU that is asked as a GPU would be; the list holds what its compiler raises, if anything."""
    compile_module, raises = torch.nn.Module.compile, []

    def backend(graph, inputs):
        for error in raises:
            raise error
        return graph.forward

    monkeypatch.setattr(runs, "resolve_compile", lambda choice, device: choice)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options)
    )
    yield raises
    torch._dynamo.reset()


def stored(folder) -> object:
    return json.loads((folder / "config.json").read_text())["compile"]


def test_a_cpu_compiles_only_what_it_is_told_to():
    for device, expected in (("cpu", False), ("cuda", "auto")):
        assert resolve_compile("auto", torch.device(device)) == expected
        assert [resolve_compile(choice, torch.device(device)) for choice in (True, False)] == [True, False]


def test_what_works_is_compiled_and_stays_so(make_cache, repa_train, tmp_path, compiler):
    cache, out = make_cache().path, tmp_path / "run"
    begun = repa_train(cache, out, "--steps", "2")
    assert "compiled, " in begun.output
    assert " s to a first step" in begun.output
    assert stored(out) is True
    compiler.append(RuntimeError("no C compiler"))
    torch._dynamo.reset()
    # Nothing is decided again, whether asked to or not: what was compiled fails now instead of going on otherwise.
    for asked in ((), ("--set", "compile=auto")):
        with pytest.raises(Exception, match="no C compiler"):
            repa_train(cache, out, "--steps", "4", "--resume", "auto", *asked)
    compiler.clear()
    torch._dynamo.reset()
    resumed = repa_train(cache, out, "--steps", "4", "--resume", "auto")
    assert "to a first step" not in resumed.output
    assert resumed.losses() == repa_train(cache, tmp_path / "plain", "--steps", "4", "--no-compile").losses()
    refused = repa_train(cache, out, "--steps", "4", "--resume", "auto", "--no-compile")
    assert "compile: stored True, asked False" in refused.error


def test_what_does_not_work_costs_speed_alone(make_cache, repa_train, tmp_path, compiler):
    cache, out = make_cache().path, tmp_path / "run"
    compiler.append(RuntimeError("no C compiler\nand more"))
    outcome = repa_train(cache, out, "--steps", "2")
    assert "not compiled, which costs speed alone: " in outcome.output
    assert "no C compiler" in outcome.output
    assert stored(out) is False
    compiler.clear()
    assert repa_train(cache, out, "--steps", "4", "--resume", "auto").code == 0
    assert stored(out) is False
    plain = repa_train(cache, tmp_path / "plain", "--steps", "2", "--no-compile")
    assert outcome.losses() == plain.losses()


def test_activations_may_be_computed_again_from_any_step_on(make_cache, repa_train, tmp_path):
    cache = make_cache().path
    whole = repa_train(cache, tmp_path / "whole", "--steps", "4")
    assert repa_train(cache, tmp_path / "run", "--steps", "2").code == 0
    rest = ("--steps", "4", "--resume", "auto", "--set", "activation_checkpointing=true")
    assert repa_train(cache, tmp_path / "run", *rest).losses() == whole.losses()
