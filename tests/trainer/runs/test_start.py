"""Beginning with the weights of another run or of a published checkpoint, in whichever convention it counts time."""

import dataclasses

import torch

from repa.trainer.models.checkpoint import load_checkpoint, save_checkpoint
from repa.trainer.models.pretrained import open_model
from repa.trainer.models.sit import SiT


def test_a_run_begins_with_the_average_of_another_and_with_nothing_else_of_it(make_cache, repa_train, tmp_path):
    cache = make_cache().path
    fast = ("--set", "optimizer.learning_rate=1e-2", "--set", "ema_decay=0.5")
    repa_train(cache, tmp_path / "first", "--steps", "4", *fast)
    begun = repa_train(cache, tmp_path / "run", "--recipe", "repa", "--steps", "1", "--init", str(tmp_path / "first"))
    assert "init: " in " ".join(begun.output.split())
    assert "drawn from the seed: projectors" in " ".join(begun.output.split())  # conv there, mlp here
    # One step of 1e-4 moves no weight by more than that.
    ours = load_checkpoint(tmp_path / "run/checkpoints/0000001.pt")
    theirs = load_checkpoint(tmp_path / "first/checkpoints/0000004.pt")["ema"]
    for name, tensor in theirs.items():
        if not name.startswith("projectors."):
            assert torch.allclose(ours["model"][name], tensor, atol=1.1e-4), name
            assert torch.allclose(ours["ema"][name], tensor, atol=1e-5), name
    assert ours["steps"] == 1
    # What was begun goes on without the run that it began with.
    (tmp_path / "first").rename(tmp_path / "moved")
    resumed = repa_train(cache, tmp_path / "run", "--recipe", "repa", "--steps", "2", "--resume", "auto")
    assert resumed.code == 0, resumed.error


def test_a_foreign_convention_comes_with_the_weights(make_cache, repa_train, tmp_path):
    """A model that counts time backwards is trained as it is: the velocity that it gives is ours, at our time."""
    cache = make_cache().path
    repa_train(cache, tmp_path / "first", "--recipe", "sit", "--steps", "1")
    trained = open_model(tmp_path / "first").model
    shape = dataclasses.replace(trained.config, convention="sit")
    foreign = SiT(shape)
    foreign.load_state_dict(trained.state_dict())
    stored = load_checkpoint(tmp_path / "first/checkpoints/0000001.pt")
    save_checkpoint(
        tmp_path / "foreign", steps=1, model=foreign, ema=foreign, opt=stored["opt"], args={}, config=stored["config"],
        fingerprints=stored["fingerprints"], keep_last=1,
    )  # fmt: skip
    repa_train(cache, tmp_path / "run", "--recipe", "sit", "--steps", "1", "--init", str(tmp_path / "foreign"))
    begun = open_model(tmp_path / "run").model
    assert begun.config.convention == "sit"


def test_weights_of_another_shape_are_refused_by_name(make_cache, repa_train, tmp_path):
    cache = make_cache().path
    repa_train(cache, tmp_path / "first", "--recipe", "sit", "--steps", "1")
    other = ("--recipe", "sit", "--model", "SiT-Ti/4", "--init", str(tmp_path / "first"))
    refused = repa_train(cache, tmp_path / "run", *other)
    assert refused.code == 2
    assert "holds pos_embed [1, 16, 32], and SiT-Ti/4 has [1, 4, 32]" in refused.error
    assert "start from weights of the same model" in refused.error
    dry = repa_train(cache, tmp_path / "run", *other, "--dry-run")
    assert (dry.code, dry.error) == (2, refused.error)
    assert "no checkpoint" in repa_train(cache, tmp_path / "other", "--init", str(tmp_path)).error
