"""Internal guidance against its equations: the second head, the loss, the velocity that samples follow, a run."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repa.cache_specs.errors import UsageError
from repa.trainer.commands.sample import sample_command
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.models.pretrained import open_model
from repa.trainer.models.sit import SiT, sit_config
from repa.trainer.objectives.choose import stored_field
from repa.trainer.objectives.internal import Internal, InternalConfig, InternalField
from repa.trainer.objectives.velocity import VelocityField
from repa.trainer.sampling.samplers import SamplerConfig, sample_latents, score

from ..models.test_sit import randomized

INTERNAL = ("--recipe", "sit-internal", "--set", "internal.depth=1", "--set", "save_every=3")
ALIGNED = ("--recipe", "irepa-internal", "--set", "internal.depth=1", "--set", "ema_decay=0.5")
ALIGNED += ("--set", "optimizer.learning_rate=0.01")
SHAPE = {"input_size": 8, "in_channels": 3, "num_classes": 3}


class Linear:
    """Velocities that are linear in x, t and the label, known to this test: v the last layer's, m the head's."""

    null_label = 3

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        v = 0.5 * x + (t + 0.1 * y).view(-1, 1, 1, 1)
        return v, 0.8 * v - 0.3 * x


@pytest.mark.parametrize("convention", ["repa", "sit"])
def test_the_head_is_a_final_layer_after_its_block(small_sit, convention):
    model = randomized(SiT(sit_config("SiT-Ti/2", **SHAPE, middle_head=1, convention=convention)), 0)
    generator = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    with torch.no_grad():
        velocity, middle = model(x, t, y)
        tokens = model.tokens_after(1, x, t, y)
        conditioning = F.silu(model.t_embedder(t if convention == "repa" else 1 - t) + model.y_embedder(y))
        head = model.middle_layer
        shift, scale = F.linear(conditioning, *head.adaLN_modulation[1].parameters()).unsqueeze(1).chunk(2, dim=-1)
        patches = F.linear(F.layer_norm(tokens, (32,), eps=1e-6) * (1 + scale) + shift, *head.linear.parameters())
    expected = patches.view(2, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 8, 8)
    torch.testing.assert_close(middle, expected if convention == "repa" else -expected, rtol=1e-4, atol=1e-4)
    assert velocity.shape == middle.shape == x.shape


def test_a_fresh_model_is_a_sit_with_a_head_that_answers_zero(small_sit):
    plain, ours = SiT(sit_config("SiT-Ti/2", **SHAPE)), SiT(sit_config("SiT-Ti/2", **SHAPE, middle_head=1))
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    added = {name: value for name, value in ours.state_dict().items() if name not in plain.state_dict()}
    assert {name.partition(".")[0] for name in added} == {"middle_layer"}
    assert not any(value.any() for value in added.values())


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_samples_follow_the_velocity_that_leads_away_from_the_head(cfg_scale):
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 2])
    options = {"steps": 4, "cfg_scale": cfg_scale, "guidance_low": 0.3, "guidance_high": 0.8, "internal_guidance": 1.4}
    field = InternalField(interpolant=Interpolant())
    (found,) = sample_latents(Linear(), (noise,), labels, SamplerConfig(**options), field=field)
    x = noise
    for t in (1.0, 0.75, 0.5, 0.25):

        def led(y: torch.Tensor, x=x, t=t) -> torch.Tensor:
            v, m = Linear()(x, torch.full((2,), t, dtype=torch.float64), y)
            return m + 1.4 * (v - m) if 0.3 <= t <= 0.8 else v

        conditional, unconditional = led(labels), led(torch.full((2,), 3))
        guided = unconditional + cfg_scale * (conditional - unconditional) if 0.3 <= t <= 0.8 else conditional
        x = x - 0.25 * guided
    torch.testing.assert_close(found, x)

    config = SamplerConfig(sampler="sde", steps=2, internal_guidance=1.4)
    (found,) = sample_latents(Linear(), (noise,), labels, config, field=field, sde_noise=lambda: (torch.zeros(1),))
    x = noise
    for t, dt in ((1.0, 0.96), (0.04, 0.04)):
        v, m = Linear()(x, torch.full((2,), t, dtype=torch.float64), labels)
        u = m + 1.4 * (v - m)
        x = x - dt * (u - t * score(u, x, t, Interpolant()))
    torch.testing.assert_close(found, x)


def test_the_loss_is_both_heads(make_cache, repa_train, tmp_path):
    """The first step of a fresh model: both heads answer 0, so that both losses are the mean square of the velocity."""
    cache = make_cache().path
    plain = repa_train(cache, tmp_path / "sit", "--recipe", "sit", "--steps", "1").records[0]
    ours = repa_train(cache, tmp_path / "run", *INTERNAL, "--steps", "1").records[0]
    assert ours["denoising_loss"] == plain["denoising_loss"] == ours["middle_loss"]

    # The head's gradient has the weight, and at this state none reaches what is before it.
    grads = {}
    for name in ("0.5", "0.25"):
        options = ("--set", f"internal.weight={name}", "--set", "optimizer.clip=null")
        repa_train(cache, tmp_path / name, *INTERNAL, "--steps", "1", *options)
        grads[name] = load_checkpoint(tmp_path / name / "checkpoints/0000001.pt")["opt"]
    names = [name for name, _ in open_model(tmp_path / "0.5").model.named_parameters()]
    names.remove("pos_embed")  # which is not trained
    index = names.index("middle_layer.linear.bias")
    first, half = (stored["state"][index]["exp_avg"] for stored in grads.values())
    assert first.any()
    torch.testing.assert_close(first, 2 * half)


def test_a_run_is_resumed_exactly_and_sampled_with_and_without_guidance(make_cache, repa_train, tmp_path, capsys):
    cache = make_cache().path
    whole = repa_train(cache, tmp_path / "whole", *ALIGNED, "--steps", "5")
    assert whole.code == 0, whole.error
    assert {"denoising_loss", "middle_loss", "alignment_loss"} <= set(whole.records[0])
    run = tmp_path / "run"
    repa_train(cache, run, *ALIGNED, "--steps", "2")
    rest = repa_train(cache, run, *ALIGNED, "--steps", "5", "--resume", "auto")
    assert rest.losses() == whole.losses()
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoints/0000005.pt")["model"] for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    trained = open_model(run)
    assert stored_field(trained.method, trained.interpolant) == InternalField(interpolant=Interpolant())
    found = []
    for options in ([], ["--internal-guidance", "1.4"], ["--internal-guidance", "1.4", "--cfg-scale", "2"]):
        sample_command.main(
            [str(run), "--num", "4", "--steps", "3", "--device", "cpu", *options], standalone_mode=False
        )
        file = Path(capsys.readouterr().out.splitlines()[0].partition(": ")[2])
        assert ("-ig1.4-" in file.name) == bool(options)
        found.append(np.load(file)["arr_0"])
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])


def test_what_has_no_head_and_what_is_no_middle_is_refused(make_cache, repa_train, tmp_path, capsys):
    cache = make_cache().path
    assert "internal.depth is 2; SiT-Ti/2 has 2 blocks" in repa_train(cache, tmp_path / "a", *INTERNAL[:2]).error
    deep = repa_train(cache, tmp_path / "a", *INTERNAL[:2], "--set", "internal.depth=2")
    assert (deep.code, "Choose one before the last" in deep.error) == (2, True)
    assert repa_train(cache, tmp_path / "sit", "--recipe", "sit", "--steps", "1").code == 0
    with pytest.raises(SystemExit):
        sample_command.main([str(tmp_path / "sit"), "--internal-guidance", "1.4"], standalone_mode=False)
    assert "this model has no middle head to lead away from" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"internal_guidance is 0\.5; expected 1 \(none\) or more"):
        SamplerConfig(internal_guidance=0.5)
    with pytest.raises(UsageError, match=r"internal.weight is 0"):
        InternalConfig(weight=0)
    assert Internal.field(Interpolant(), InternalConfig()).led(1.4).scale == 1.4
    assert VelocityField(interpolant=Interpolant()).led(1.0) == VelocityField(interpolant=Interpolant())


def test_it_begins_with_the_weights_of_a_sit(make_cache, repa_train, tmp_path):
    cache = make_cache().path
    repa_train(cache, tmp_path / "sit", "--recipe", "sit", "--steps", "2", "--set", "ema_decay=0.5")
    begun = repa_train(cache, tmp_path / "run", *INTERNAL, "--steps", "1", "--set", f"init={tmp_path / 'sit'}")
    assert begun.code == 0, begun.error
    assert "drawn from the seed: middle_layer" in begun.output
