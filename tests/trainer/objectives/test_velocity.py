"""SiT, REPA and iREPA as an objective: a curve that stays, the step at which alignment stops, several averages."""

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.models.pretrained import open_model
from repa.trainer.reading.reader import CacheReader

# Denoising loss, alignment loss and gradient norm of 20 steps, made by the code before there were objectives (torch
# 2.14.1): posterior latents, int8 and float16 tokens, two micro-batches, normalisation by channel.
CURVE = (
    (2.892731, -0.020106, 1.257331),
    (3.017142, -0.039198, 1.175666),
    (2.887691, -0.040765, 1.305884),
    (2.920694, -0.036885, 1.124166),
    (2.949453, -0.028515, 1.281291),
    (2.752160, -0.029260, 1.094803),
    (2.712267, -0.035256, 1.058503),
    (2.946052, -0.058223, 1.054510),
    (3.027527, -0.032137, 1.209524),
    (2.786157, -0.027419, 1.197115),
    (3.045367, -0.065765, 1.208755),
    (2.927329, -0.053029, 1.314823),
    (2.720925, -0.050464, 1.035952),
    (3.026482, -0.045972, 1.106237),
    (2.957632, -0.070827, 1.527645),
    (2.920843, -0.057087, 1.284150),
    (2.719804, -0.061104, 1.165570),
    (2.733416, -0.073946, 1.294705),
    (2.794924, -0.079186, 0.987703),
    (2.776976, -0.072386, 1.106054),
)
SETTINGS = ("accumulation=2", "latent_norm=channel", "encoders=[toy-int8,wide]", "alignment.encoder_depth=1")
STOP = ("--recipe", "repa", "--set", "alignment.stop_step=4", "--set", "save_every=3")


def test_twenty_steps_give_the_curve_that_they_gave_before(make_cache, repa_train, tmp_path):
    cache = make_cache(latents="mean_std", encoders={"toy": "int8", "wide": "float16"}).path
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    outcome = repa_train(cache, tmp_path / "run", "--recipe", "irepa", "--steps", "20", *settings)
    found = [[record[name] for name in ("denoising_loss", "alignment_loss", "grad_norm")] for record in outcome.records]
    np.testing.assert_allclose(found, CURVE, rtol=1e-4, atol=1e-5)


def test_after_the_stop_step_a_run_is_sit_alone_and_reads_no_features(make_cache, repa_train, tmp_path, monkeypatch):
    """The steps before are REPA's, those after have the same state, data and noise, and no alignment."""
    cache = make_cache().path
    whole = repa_train(cache, tmp_path / "repa", "--recipe", "repa", "--steps", "4")
    read: list[int] = []
    rows = CacheReader.rows

    def counted(self, *arguments, **options):
        batch = rows(self, *arguments, **options)
        read.append(len(batch.features))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(CacheReader, "rows", counted)
        stopped = repa_train(cache, tmp_path / "run", *STOP, "--steps", "8")
    assert stopped.losses()[:4] == whole.losses()
    assert [("alignment_loss" in record) for record in stopped.records] == [True] * 4 + [False] * 4
    assert read == [1] + [1] * 4 + [0] * 4  # the first looks whether the cache can be read
    reading = [
        record["read_gb_per_s"] * 8 / record["samples_per_s"] for record in stopped.records if "read_gb_per_s" in record
    ]
    assert len(reading) == 3
    assert reading[2] < reading[0]

    # From the state of step 4 on, SiT's own gradient moves the trunk, and the projector stays as it was.
    at_four = load_checkpoint(tmp_path / "repa/checkpoints/0000004.pt")["model"]
    at_end = load_checkpoint(tmp_path / "run/checkpoints/0000008.pt")
    held = [name for name in at_four if name.startswith("projectors.")]
    assert held
    assert all(torch.equal(at_end["model"][name], at_four[name]) for name in held)
    assert not torch.equal(at_end["model"]["blocks.0.attn.qkv.weight"], at_four["blocks.0.attn.qkv.weight"])
    assert held == [name for name in at_end["ema"] if name.startswith("projectors.")]


@pytest.mark.parametrize("first", [3, 4, 6])
def test_a_resume_on_either_side_of_the_stop_step_changes_nothing(make_cache, repa_train, tmp_path, first):
    cache = make_cache().path
    whole = repa_train(cache, tmp_path / "whole", *STOP, "--steps", "8")
    repa_train(cache, tmp_path / "run", *STOP, "--steps", str(first))
    rest = repa_train(cache, tmp_path / "run", *STOP, "--steps", "8", "--resume", "auto")
    assert rest.losses() == whole.losses()
    ours, theirs = (load_checkpoint(tmp_path / run / "checkpoints/0000008.pt") for run in ("run", "whole"))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])


def test_a_stop_with_nothing_to_stop_is_refused(make_cache, repa_train, tmp_path):
    outcome = repa_train(make_cache().path, tmp_path / "run", "--recipe", "sit", "--set", "alignment.stop_step=3")
    assert "alignment.stop_step has nothing to stop" in outcome.error


def test_several_averages_are_kept_and_each_can_be_sampled(make_cache, repa_train, tmp_path):
    """Each equals the one that a run of that decay alone keeps; the first lies where published checkpoints have it."""
    cache = make_cache().path
    repa_train(cache, tmp_path / "both", "--steps", "3", "--set", "ema_decay=[0.9,0.5]")
    for decay, part in (("0.9", "ema"), ("0.5", "ema:0.5"), ("0.9", "ema:0.9")):
        alone = tmp_path / decay
        if not alone.exists():
            repa_train(cache, alone, "--steps", "3", "--set", f"ema_decay={decay}")
        expected = load_checkpoint(alone / "checkpoints/0000003.pt")
        assert "emas" not in expected
        found = open_model(tmp_path / "both", weights=part).model.state_dict()
        assert all(torch.equal(found[name], expected["ema"][name]) for name in expected["ema"])
    with pytest.raises(UsageError, match=r"holds averages of decay 0\.9, 0\.5; weights=.ema:0\.7. names none"):
        open_model(tmp_path / "both", weights="ema:0.7")
    resumed = repa_train(cache, tmp_path / "both", "--steps", "5", "--resume", "auto")
    repa_train(cache, tmp_path / "whole", "--steps", "5", "--set", "ema_decay=[0.9,0.5]")
    ours, theirs = (
        load_checkpoint(tmp_path / run / "checkpoints/0000005.pt")["emas"]["0.5"] for run in ("both", "whole")
    )
    assert resumed.code == 0
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
