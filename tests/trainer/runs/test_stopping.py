"""What ends a run early and what it leaves: Ctrl-C, the clock, averages that stay, how it came about."""

import json
import os
import signal

import pytest
import torch

import repa
from repa.trainer.commands.train import train_command
from repa.trainer.distributed import StopRequest, World
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.models.pretrained import open_model
from repa.trainer.reading.reader import CacheReader
from repa.trainer.runs.metrics import Progress, human_seconds
from repa.trainer.training import loop

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture
def from_a_keyboard():
    """Let SIGINT end the process, as in a terminal: a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("from_a_keyboard")
def test_the_first_ctrl_c_saves_at_the_next_step_and_says_how_to_go_on(make_cache, repa_train, tmp_path, monkeypatch):
    step, cache, out = loop.train_step, make_cache().path, tmp_path / "run"

    def interrupted(run, ahead):
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, ahead)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        outcome = repa_train(cache, out, "--steps", "9")
    assert outcome.code == 0
    assert signal.getsignal(signal.SIGINT) == before
    assert f"5 of 9 steps done; go on with repa-train --resume {out}" in " ".join(outcome.output.split())
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0000005.pt"]

    train_command.main(["--resume", str(out), "--device", "cpu"], standalone_mode=False)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    whole = repa_train(cache, tmp_path / "whole", "--steps", "9")
    names = ("step", "denoising_loss", "alignment_loss", "grad_norm")
    assert [tuple(record[name] for name in names) for record in records] == whole.losses()


@pytest.mark.usefixtures("from_a_keyboard")
def test_the_second_ctrl_c_aborts():
    with StopRequest(ALONE) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.due() == (True, False)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_clock_asks_for_a_checkpoint_once_until_it_is_saved():
    now = [0.0]
    with StopRequest(ALONE, save_after_s=60, clock=lambda: now[0]) as stop:
        assert stop.due() == (False, False)
        now[0] = 60
        assert stop.due() == (False, True)
        stop.saved()
        assert stop.due() == (False, False)
        now[0] = 121
        assert stop.due() == (False, True)


def test_ranks_save_at_the_same_step_and_not_twice(monkeypatch):
    """Each answer is that of the step before: what was asked before a save is not asked again after it."""
    now = [0.0]

    class Done:
        def wait(self):
            pass

    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: Done())
    main = World(rank=0, size=2, device=torch.device("cpu"))
    with StopRequest(main, save_after_s=60, clock=lambda: now[0]) as stop:
        answers = []
        for step in range(8):
            now[0] = 25.0 * step
            _, save = stop.due()
            answers.append(save)
            if save:
                stop.saved()
    # Overdue at 75 s (step 3), answered at step 4 (100 s); overdue again at 175 s, which step 8 would answer.
    assert answers == [False] * 4 + [True] + [False] * 3
    with StopRequest(World(rank=1, size=2, device=torch.device("cpu")), save_after_s=1, clock=lambda: 1e9) as other:
        assert other.due() == other.due() == (False, False)  # rank 0's clock decides


def test_a_run_saves_by_the_clock_between_its_steps(make_cache, repa_train, tmp_path):
    settings = ("--set", "save_minutes=1e-9", "--set", "keep_last=9")
    repa_train(make_cache().path, tmp_path / "run", "--steps", "3", *settings)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["0000001.pt", "0000002.pt", "0000003.pt"]


def test_averages_stay_where_they_are_asked_for(make_cache, repa_train, tmp_path):
    out = tmp_path / "run"
    settings = ("--set", "keep_every=2", "--set", "keep_last=1", "--set", "save_every=100")
    repa_train(make_cache().path, out, "--steps", "5", *settings)
    assert sorted(path.name for path in (out / "ema").iterdir()) == ["0000002.pt", "0000004.pt"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0000005.pt"]
    repa_train(make_cache().path, tmp_path / "short", "--steps", "4")
    kept, expected = (open_model(file) for file in (out / "ema/0000004.pt", tmp_path / "short"))
    assert kept.steps == 4
    state = expected.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept.model.state_dict().items())
    assert "opt" not in load_checkpoint(out / "ema/0000004.pt")


def test_a_run_says_how_it_came_about_and_keeps_only_settings_that_do_something(make_cache, repa_train, tmp_path):
    cache, out = make_cache().path, tmp_path / "run"
    repa_train(cache, out, "--recipe", "sit", "--steps", "2")
    repa_train(cache, out, "--recipe", "sit", "--steps", "4", "--resume", "auto")
    stored = json.loads((out / "config.json").read_text())
    assert [entry["step"] for entry in stored["history"]] == [0, 2]
    assert {entry["version"] for entry in stored["history"]} == {repa.__version__}
    assert all(entry["date"].endswith("+00:00") and entry["device"] == "cpu" for entry in stored["history"])
    assert stored["alignment"] == {"projector": "none"}
    assert stored["evaluation"] == stored["grid"] == {"every": 0}
    assert stored["fingerprints"] == load_checkpoint(out / "checkpoints/0000004.pt")["fingerprints"]
    # What it left starts another run, too.
    again = repa_train(
        cache, tmp_path / "again", "--config", str(out / "config.json"), "--recipe", "sit", "--steps", "4"
    )
    assert again.losses() == repa_train(cache, tmp_path / "whole", "--recipe", "sit", "--steps", "4").losses()


def test_wall_time_goes_on_after_a_resume(make_cache, repa_train, tmp_path):
    cache, out = make_cache().path, tmp_path / "run"
    repa_train(cache, out, "--steps", "3")
    rest = repa_train(cache, out, "--steps", "9", "--resume", "auto")
    walls = [record["wall_s"] for record in rest.records if "wall_s" in record]
    assert len(walls) == 3
    assert 0 < walls[0] < walls[1] < walls[2]


def test_a_run_without_its_mirror_images_reads_view_0_alone(make_cache, repa_train, tmp_path, monkeypatch):
    cache, seen = make_cache(num_views=2).path, set()
    rows = CacheReader.rows

    def looked(self, indices, views=None, **options):
        seen.update([] if views is None else views.tolist())
        return rows(self, indices, views, **options)

    monkeypatch.setattr(CacheReader, "rows", looked)
    unmirrored = repa_train(cache, tmp_path / "one", "--steps", "3", "--set", "flip=false")
    assert "1 view(s)" in unmirrored.output
    assert seen == {0}
    assert "2 view(s)" in repa_train(cache, tmp_path / "both", "--steps", "3").output
    assert seen == {0, 1}


def test_the_opening_says_what_is_not_the_recipes_in_lines_of_80(make_cache, repa_train, tmp_path):
    arguments = ("--steps", "1", "--lr", "2e-3", "--gamma", "none", "--seed", "3", "--dry-run")
    outcome = repa_train(make_cache().path, tmp_path / "run", *arguments)
    said = " ".join(outcome.output.split())
    assert "recipe: irepa, with batch_size 8 (256)" in said
    assert "seed 3 (0)" in said
    assert "alignment.gamma null (0.6)" in said
    assert "optimizer.learning_rate 0.002 (0.0001)" in said
    assert all(len(line) <= 80 or " " not in line.strip() for line in outcome.output.splitlines())
    assert "label_dropout" not in outcome.output
    full = repa_train(make_cache().path, tmp_path / "run", *arguments, "--verbose")
    assert "label_dropout: 0.1" in full.output


def test_without_a_terminal_there_is_a_line_at_first_each_minute_and_at_the_end(capsys):
    now = [0.0]
    with Progress(done=0, total=1000, clock=lambda: now[0]) as progress:
        for step in range(50, 1001, 50):
            now[0] = step / 5  # 10 s a log
            progress.log({"step": step, "denoising_loss": 0.5, "grad_norm": 1.0, "samples_per_s": 1280.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["50/1000", "350/1000", "650/1000", "950/1000", "1000/1000"]
    assert lines[1] == "step 350/1000  denoising 0.5000  1280 samples/s  2 min left"
    assert "left" not in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8 s"), (100, "2 min"), (7199, "2 h 0 min"), (9000, "2 h 30 min"), (400_000, "4 d 15 h")]
)
def test_durations_in_two_units(seconds, text):
    assert human_seconds(seconds) == text
