"""The weight of the alignment over a run: what it is in a step, where it ends, and that a resume changes nothing."""

import math

import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.objectives.alignment import Alignment, AlignmentConfig
from repa.trainer.objectives.sra import TeacherTarget
from repa.trainer.reading.reader import CacheReader

FALLING = ("--recipe", "irepa", "--set", "alignment.schedule=cosine", "--set", "alignment.horizon=5")
FALLING += ("--set", "alignment.warmup_steps=2", "--set", "save_every=3")


def test_the_weight_is_a_function_of_the_step_alone():
    constant = AlignmentConfig(proj_coeff=0.5)
    assert {constant.coefficient(step) for step in (0, 1, 10**9)} == {0.5}
    linear = AlignmentConfig(proj_coeff=2.0, schedule="linear", horizon=14, warmup_steps=4)
    found = [linear.coefficient(step) for step in range(15)]
    assert found == pytest.approx([0.5, 1.0, 1.5, 2.0] + [2.0 * (14 - step) / 10 for step in range(4, 15)])
    cosine = AlignmentConfig(proj_coeff=2.0, schedule="cosine", horizon=10)
    expected = [1 + math.cos(math.pi * step / 10) for step in range(11)]
    assert [cosine.coefficient(step) for step in range(11)] == pytest.approx(expected, abs=1e-12)
    assert cosine.coefficient(99) == linear.coefficient(99) == 0
    far = AlignmentConfig(schedule="cosine", horizon=10**9)
    assert far.coefficient(10**9 - 1) > 0  # in double precision 1 + cos would be 0 already


@pytest.mark.parametrize(
    ("settings", "end"),
    [({}, None), ({"stop_step": 7}, 7), ({"schedule": "linear", "horizon": 9}, 9),
     ({"schedule": "cosine", "horizon": 9, "stop_step": 4}, 4)],
)  # fmt: skip
def test_it_ends_with_the_first_of_stop_step_and_horizon(settings, end):
    alignment = Alignment(AlignmentConfig(**settings), names=["toy"], accumulation=1)
    assert AlignmentConfig(**settings).end == end
    assert [alignment.acts(step) for step in (0, 3, 10**6)] == [True, True, end is None]
    if end is not None:
        assert (alignment.acts(end - 1), alignment.acts(end)) == (True, False)


def test_the_loss_has_the_weight_and_the_log_has_not():
    generator = torch.Generator().manual_seed(0)
    z, tokens = (torch.randn(2, 4, 8, generator=generator) for _ in range(2))
    mean = -torch.nn.functional.cosine_similarity(z, tokens, dim=-1).mean()
    config = AlignmentConfig(schedule="linear", horizon=10, proj_coeff=0.5)
    alignment = Alignment(config, names=["toy"], accumulation=2)
    for step, weight in ((0, 0.5), (6, 0.2)):
        value, logged, _ = alignment.losses([z], [TeacherTarget(tokens=tokens)], step=step)
        torch.testing.assert_close(value, weight / 2 * mean)
        torch.testing.assert_close(logged, mean / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, "alignment.schedule is linear and alignment.horizon None: a weight that falls"),
        ({"horizon": 5}, "alignment.schedule is constant and alignment.horizon 5"),
        ({"schedule": "cosine", "horizon": 5, "warmup_steps": 5}, "expected a step after the 5"),
        ({"schedule": "cosine", "horizon": 0}, "alignment.horizon is 0; expected a step after the 0"),
        ({"warmup_steps": -1}, "alignment.warmup_steps is -1; expected 0 or more"),
        ({"projector": "none", "warmup_steps": 5}, "no weight to change: alignment.projector is none"),
    ],
)
def test_what_is_no_schedule_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        AlignmentConfig(**settings)


def test_a_falling_weight_moves_less_and_ends_reading(make_cache, repa_train, tmp_path, monkeypatch):
    """The first step of a warm-up of two has half the gradient of the alignment, and after the horizon none is read."""
    cache = make_cache().path
    read: list[int] = []
    rows = CacheReader.rows

    def counted(self, *arguments, **options):
        batch = rows(self, *arguments, **options)
        read.append(len(batch.features))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(CacheReader, "rows", counted)
        falling = repa_train(cache, tmp_path / "run", *FALLING, "--steps", "8")
    assert falling.code == 0, falling.error
    assert [("alignment_loss" in record) for record in falling.records] == [True] * 5 + [False] * 3
    assert read == [1] + [1] * 5 + [0] * 3
    half = repa_train(
        cache, tmp_path / "half", "--recipe", "irepa", "--set", "alignment.proj_coeff=0.5", "--steps", "1"
    )
    assert falling.losses()[0] == half.losses()[0]


@pytest.mark.parametrize("first", [1, 4, 6])
def test_a_resume_amid_a_schedule_changes_nothing(make_cache, repa_train, tmp_path, first):
    cache = make_cache().path
    whole = repa_train(cache, tmp_path / "whole", *FALLING, "--steps", "8")
    repa_train(cache, tmp_path / "run", *FALLING, "--steps", str(first))
    rest = repa_train(cache, tmp_path / "run", *FALLING, "--steps", "8", "--resume", "auto")
    assert rest.losses() == whole.losses()
    ours, theirs = (load_checkpoint(tmp_path / run / "checkpoints/0000008.pt") for run in ("run", "whole"))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    other = repa_train(cache, tmp_path / "run", *FALLING, "--set", "alignment.horizon=6", "--resume", "auto")
    assert other.code == 2
    assert "alignment.horizon" in other.error
