"""repa-train as a user meets it: help, dry run, refusals in one line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import UsageError
from repa.trainer.commands import borrowed, said
from repa.trainer.commands import sample as sample_cli
from repa.trainer.diffusion.latents import LatentSource
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.runs import metrics

HEAVY = ("torch", "ray", "timm", "diffusers", "transformers", "zarr", "tensorboard", "matplotlib", "repa.pipeline")


def test_help_loads_nothing_heavy():
    program = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from repa.trainer.commands import cknna, features, sample, train\n"
        "commands = (train.train_command, sample.sample_command, cknna.cknna_command, features.features_command)\n"
        "for command in commands:\n"
        "    result = CliRunner().invoke(command, ['--help'])\n"
        "    assert result.exit_code == 0 and 'runs/irepa' in result.output, result.output\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_needs_no_optional_library(make_cache, tmp_path):
    """A run in a process where everything that is not a trainer's dependency cannot be imported."""
    absent = ["ray", "timm", "diffusers", "transformers", "tensorboard", "tqdm", "matplotlib", "skimage"]
    absent += ["tensorstore", "obstore"]  # a local cache as it is built needs neither
    program = (
        "import sys\n"
        f"for name in {absent!r}: sys.modules[name] = None\n"
        "from repa.trainer.commands.train import train_command\n"
        "train_command.main(sys.argv[1:], standalone_mode=False)\n"
        "assert 'repa.pipeline' not in sys.modules\n"
    )
    out = tmp_path / "run"
    arguments = ["--cache", make_cache(grid=2).path, "--out", out, "--model", "SiT-Ti/4", "--recipe", "irepa"]
    arguments += ["--batch-size", "2", "--steps", "1", "--device", "cpu"]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tensorboard is not installed") == 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_resolved_settings_are_printed_and_stored(make_cache, repa_train, tmp_path):
    out = tmp_path / "run"
    outcome = repa_train(make_cache().path, out, "--steps", "1", "--set", "latent_norm=channel", "--verbose")
    stored = json.loads((out / "config.json").read_text())
    assert stored["recipe"] == "irepa"
    assert stored["encoders"] == ["toy"]
    assert stored["autoencoder"] == "toy-ae"
    assert stored["precision"] == "fp32"
    assert stored["resolved"]["latents"]["scale"] == [1.0, 0.5, 2.0]
    assert stored["resolved"]["latents"]["bias"] == [0.1, -0.2, 0.3]
    assert "alignment: {projector: conv" in outcome.output
    assert "23 of 23 samples" in outcome.output


def test_dry_run_writes_nothing(make_cache, repa_train, tmp_path):
    outcome = repa_train(make_cache().path, tmp_path / "run", "--dry-run")
    assert outcome.code == 0
    assert "dry run: nothing was trained or written" in outcome.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--encoder", "toyy"], 2, "holds no encoder 'toyy'; did you mean 'toy'"),
        (["--autoencoder", "toy-a"], 2, "holds no autoencoder 'toy-a'; did you mean 'toy-ae'"),
        (["--model", "SiT-T/2"], 2, "unknown model 'SiT-T/2'; did you mean 'SiT-Ti/2'"),
        (["--model", "SiT-Ti/4"], 2, "features/toy has 4 x 4 tokens; SiT-Ti/4 on latents of 8 x 8 has 2 x 2"),
        (["--model", "SiT-Ti/3"], 2, "do not divide"),
        (["--recipe", "irepaa"], 2, "unknown recipe 'irepaa'; did you mean 'irepa'"),
        (["--recipe", "sit", "--encoder", "toy"], 2, "recipe sit reads no encoder"),
        (["--set", "optimizer.learning_rte=1"], 2, "did you mean 'optimizer.learning_rate'"),
        (["--shuffle", "block"], 2, "flags: shuffle is 'block'; did you mean 'blocks'"),
        (["--prefetch-bytes", "512XB"], 2, "flags: prefetch_bytes 512XB: expected a size"),
        (["--set", "precision=fp16"], 2, "underflows"),
        (["--set", "alignment.encoder_depth=3"], 2, "encoder_depth is 3"),
        (["--batch-size", "7", "--set", "accumulation=2"], 2, "not a multiple of accumulation 2"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml: No such file"),
        (["--out", ""], 2, "out is empty; name a folder"),
        (["--cache", ""], 2, "cache is empty; name a folder"),
        (["--out", "runs/\udcff"], 2, "flags: out is 'runs/\\udcff', which is not UTF-8; rename it, or choose another"),
    ],
)
def test_bad_requests_are_one_line(make_cache, repa_train, tmp_path, arguments, code, message):
    outcome = repa_train(make_cache().path, tmp_path / "run", *arguments)
    assert outcome.code == code
    assert message in outcome.error
    assert outcome.error.startswith("repa-train: ")
    assert outcome.error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_flags_of_reading_reach_the_run(make_cache, repa_train, tmp_path):
    """A batch larger than the bound is read all the same, and the run says so."""
    written, out = make_cache(num_views=1), tmp_path / "run"
    flags = ("--shuffle", "blocks", "--prefetch-bytes", "1kB", "--check-reads", "--set", "shuffle_window=2")
    outcome = repa_train(written.path, out, "--steps", "2", *flags)
    stored = json.loads((out / "config.json").read_text())
    names = ("shuffle", "shuffle_window", "prefetch_bytes", "check_reads")
    assert [stored[name] for name in names] == ["blocks", 2, 1000, True]
    assert "read ahead: 1 x " in outcome.output
    assert "on every rank; one alone is more than prefetch_bytes" in outcome.output

    other = ("--shuffle", "global", "--set", "shuffle_window=16")
    resumed = repa_train(written.path, out, "--steps", "4", "--resume", "auto", *other)
    assert "shuffle: stored 'blocks', asked 'global'. Go on with its own by repa-train --resume" in resumed.error
    other = ("--set", "shuffle_window=16")
    resumed = repa_train(written.path, out, "--steps", "4", "--resume", "auto", *other)
    assert "shuffle_window: stored 2, asked 16" in resumed.error
    shard = written.shard("latents/toy-ae/moments", 0)
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    for checked in ((), ("--check-reads",)):
        outcome = repa_train(written.path, tmp_path / f"again{len(checked)}", "--steps", "9", *checked)
        assert outcome.code == len(checked)
    assert "whose checksum does not hold" in outcome.error


def test_a_staged_copy_trains_as_the_cache_and_is_shared(make_cache, repa_train, tmp_path):
    """Two caches of the same images share the folder; each run takes the encoder of its own."""
    here, toy, wide = tmp_path / "here", make_cache().path, make_cache(encoders={"wide": "int8"}).path
    expected = {cache: repa_train(cache, tmp_path / cache.parent.name, "--steps", "3") for cache in (toy, wide)}
    for number, cache in enumerate((toy, wide, toy)):
        run = tmp_path / f"run{number}"
        outcome = repa_train(cache, run, "--steps", "3", "--stage", str(here))
        assert outcome.losses() == expected[cache].losses(), outcome.error
        stored = json.loads((run / "config.json").read_text())
        assert (stored["cache"], stored["stage"]) == (str(cache), str(here))
        assert ("\nstaged " in outcome.output) == (number < 2)
    resumed = repa_train(toy, run, "--steps", "5", "--resume", "auto")
    assert resumed.losses()[:3] == expected[toy].losses()
    refused = ((tmp_path / "new", "--model", "SiT-Ti/4"), (run, "--steps", "9"), (run, "--resume", "auto"))
    for code, (out, *more) in ((0, (tmp_path / "dry", "--dry-run")), *((2, arguments) for arguments in refused)):
        assert repa_train(toy, out, "--stage", str(tmp_path / "nothing"), "--set", "seed=1", *more).code == code
        assert not (tmp_path / "nothing").exists()


def test_an_incomplete_cache_is_refused(make_cache, repa_train, tmp_path):
    outcome = repa_train(make_cache(complete=False).path, tmp_path / "run")
    assert outcome.code == 1
    assert "is not complete" in outcome.error
    assert "Finish it with repa-cache build" in outcome.error


def test_a_missing_shard_stops_the_run_in_one_line(make_cache, repa_train, tmp_path):
    written = make_cache()
    written.shard("features/toy/patch_tokens", 1).unlink()
    outcome = repa_train(written.path, tmp_path / "run", "--steps", "9")
    assert outcome.code == 1
    assert "patch_tokens/c.1.0.0.0 (samples 5 to 9) cannot be opened" in outcome.error
    assert outcome.error.count("\n") == 1


def run_sample(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = 0
    try:
        sample_cli.sample_command.main(
            [str(argument) for argument in arguments] + ["--device", "cpu"], standalone_mode=False
        )
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    ("device", "precision", "loader", "expected"),
    [
        ("cuda", "bf16", "diffusers", "tf32"),
        ("cuda:1", "fp32", "diffusers", "fp32"),
        ("cpu", "bf16", "diffusers", "fp32"),
        ("cuda", "bf16", "builtin", "fp32"),
    ],
)
def test_pictures_are_decoded_in_what_fits_the_model(monkeypatch, device, precision, loader, expected):
    def load(spec, *, precision, **_):
        return SimpleNamespace(weights="sha256:1", decode=precision)

    monkeypatch.setattr("repa.pipeline.models.autoencoders.load_autoencoder", load)
    source = LatentSource(name="x", spec={"loader": loader, "entry": "x"}, weights=None, norm=None)
    decode, name = borrowed.load_decoder(source, weights=None, device=device, precision=precision)
    assert decode == expected
    assert name == "x sha256:1" + (" tf32" if expected == "tf32" else "")


def test_repa_sample_draws_from_a_run_whatever_the_batch_size(make_cache, repa_train, tmp_path, capsys):
    run = tmp_path / "run"
    repa_train(make_cache().path, run, "--steps", "2")
    request = (run, "--num", 7, "--steps", 3, "--labels", "balanced", "--cfg-scale", 2, "--sampler", "heun")
    code, out, _ = run_sample(capsys, *request, "--batch-size", 2)
    assert code == 0
    npz = run / "samples/0000002-ema-fp32-heun3-cfg2-t0to1-balanced-seed0-7.npz"
    assert f"7 samples: {npz}" in out
    images = np.load(npz)["arr_0"]
    assert images.shape == (7, 8, 8, 3)
    assert images.dtype == np.uint8
    assert npz.with_suffix(".png").exists()
    run_sample(capsys, *request, "--batch-size", 7, "--out", tmp_path / "other.npz")
    difference = np.abs(np.load(tmp_path / "other.npz")["arr_0"].astype(int) - images)
    assert difference.max() <= 1  # another batch size rounds matrix products differently
    for last in (0, 1):  # labels too long for a file's name, which must still tell them apart
        labels = ",".join(["2"] * 199 + [str(last)])
        assert run_sample(capsys, run, "--num", 1, "--steps", 1, "--labels", labels)[0] == 0
    assert len(list((run / "samples").glob("*-200labels*-seed0-1.npz"))) == 2
    newest = run / "checkpoints/0000002.pt"
    run_sample(capsys, newest, *request[1:], "--weights", "model", "--out", tmp_path / "model.npz")
    assert not np.array_equal(np.load(tmp_path / "model.npz")["arr_0"], images)


def test_repa_sample_refuses_in_one_line(make_cache, repa_train, tmp_path, capsys):
    run = tmp_path / "run"
    repa_train(make_cache().path, run, "--steps", "1")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((tmp_path / "empty",), "there is no checkpoint in this run yet"),
        ((tmp_path / "none.pt",), "there is no such checkpoint"),
        ((run, "--sampler", "eule"), "did you mean 'euler'"),
        ((run, "--labels", "5"), "the model's classes are 0 to 2"),
        ((run, "--labels", "some"), "labels: no class 'some'; Known: class 0, class 1, class 2. Or random"),
        ((run, "--cfg-scale", "0.5"), "cfg_scale is 0.5"),
        ((run, "--autoencoder", "pixels"), "says itself whose latents it draws"),
        ((run, "--checkpoint-convention", "sit"), "it says itself which way its t runs"),
        ((tmp_path / "\udcff.pt",), "\\udcff.pt': a name that is not UTF-8; rename it, or choose another"),
        ((run, "--out", tmp_path / "\udcff.npz"), "\\udcff.npz': a name that is not UTF-8"),
        ((run, "--out", ""), "expected a name that ends in .npz"),
    ):
        code, _, error = run_sample(capsys, *arguments)
        assert code in (1, 2)
        assert message in error
        assert error.startswith("repa-sample: ")
        assert error.count("\n") == 1
    state = load_checkpoint(run / "checkpoints/0000001.pt")
    torch.save({"ema": {k: v for k, v in state["ema"].items() if "projectors" not in k}}, tmp_path / "published.pt")
    code, _, error = run_sample(capsys, tmp_path / "published.pt")
    assert code == 2
    assert "published.pt" in error


def test_a_decoder_of_other_weights_is_refused():
    source = LatentSource.published("pixels", input_size=8, channels=3)
    assert borrowed.load_decoder(source, weights=None, device="cpu")[1] == "pixels none"
    other = dataclasses.replace(source, weights="sha256:0")
    with pytest.raises(UsageError, match=r"weights of pixels \(none\) are not those .* \(sha256:0\)"):
        borrowed.load_decoder(other, weights=None, device="cpu")


def test_names_are_shown_and_never_obeyed(capsys, monkeypatch):
    said.say("out: runs/\x1b[2Ja\u202eb\nsecond\udcff", err=True)
    assert capsys.readouterr().err == "out: runs/\\x1b[2Ja\\u202eb\nsecond\\udcff\n"
    metrics.say("\x1b]0;title\x07")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07\n"


def test_every_line_of_a_command_is_said():
    folder = Path(said.__file__).parent
    for file in folder.glob("*.py"):
        if file.name != "said.py":
            assert not re.search(r"\bclick\.echo\b|(?<!\w)print\(", file.read_text()), file.name
