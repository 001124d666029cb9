"""Reader and batches in somebody's own code: moved, named, shown, pickled, and what a message calls things."""

import pickle
import sys

import numpy as np
import pytest
import torch

import repa.trainer
from repa.cache_specs.errors import CacheError, UsageError, one_line_errors, option
from repa.trainer import CacheReader, draw_latents, reader_norm, to_latents, to_model_input

from ..conftest import write_cache


def test_a_batch_moves_with_everything_in_it(make_cache):
    cache = make_cache(encoders={"toy": "int8", "wide": "float16"}).path
    batch = CacheReader(cache, encoder=("toy-int8", "wide")).rows([3, 5])
    moved = batch.to("meta", non_blocking=True)
    assert {name: tensor.shape for name, tensor in moved.tensors().items()} == {
        name: tensor.shape for name, tensor in batch.tensors().items()
    }
    assert all(tensor.device.type == "meta" for tensor in moved.tensors().values())
    assert moved.encoders == ("toy-int8", "wide")
    same = batch.to("cpu")
    assert all(ours is theirs for ours, theirs in zip(same.tensors().values(), batch.tensors().values(), strict=True))


def test_tokens_are_had_by_the_encoders_name(make_cache):
    reader = CacheReader(make_cache(encoders={"toy": "int8", "wide": "float16"}).path, encoder=("wide", "toy-int8"))
    batch = reader.rows([3, 5])
    assert batch.of("toy-int8") is batch.features[1]
    with pytest.raises(UsageError, match=r"no tokens of 'toy'; did you mean 'toy-int8'\? Known: toy-int8, wide"):
        batch.of("toy")


def test_what_is_shown_is_short_and_holds_no_numbers(make_cache):
    cache = make_cache(invalid={"latents/toy-ae": [3]}).path
    reader = CacheReader(cache)
    assert repr(reader) == f"CacheReader('{cache}': 22 of 23 samples, 3 classes, toy-ae, toy)"
    assert repr(reader.rows([5])) == (
        "Batch(rows int64 [1], labels int64 [1], moments float16 [1, 3, 8, 8], toy: FeatureBatch(tokens float16 "
        "[1, 16, 16], channel_mean float32 [1, 16], channel_std float32 [1, 16], cls_token float16 [1, 16]))"
    )


def test_a_pickled_reader_opens_its_cache_again(tmp_path):
    encoders = {"toy": "float16", "wide": "float16"}
    cache = write_cache(tmp_path / "cache", encoders=encoders).path
    reader = CacheReader(cache, encoder="wide", cls_token=False, check_reads=True)
    pickled = pickle.dumps(reader)
    again = pickle.loads(pickled)
    assert repr(again) == repr(reader)
    ours, theirs = reader.rows([7, 1], [1, 0]).tensors(), again.rows([7, 1], [1, 0]).tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    write_cache(tmp_path / "cache", encoders=encoders, seed=1)
    with pytest.raises(CacheError, match="is not the cache that its reader was pickled with: it was built anew"):
        pickle.loads(pickled)


def test_latents_are_drawn_and_scaled_by_public_names(make_cache):
    reader = CacheReader(make_cache(latents="mean_std").path)
    moments = reader.rows([4, 9]).moments
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    z = draw_latents(moments, noise, reader.latents.kind)
    wide = moments.numpy().astype(np.float64)
    np.testing.assert_allclose(z.numpy(), wide[:, :3] + wide[:, 3:] * noise.numpy(), rtol=1e-6, atol=1e-7)
    scale, bias = reader_norm(reader, "channel").tensors("cpu")
    x = to_model_input(z, scale, bias)
    mean, std = (np.array(numbers).reshape(3, 1, 1) for numbers in ([0.1, -0.2, 0.3], [1.0, 2.0, 0.5]))
    np.testing.assert_allclose(x.numpy(), (z.numpy() - mean) / std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_latents(x, scale, bias), z)
    assert all(getattr(repa.trainer, name).__doc__ for name in repa.trainer.__all__)


def test_messages_name_flags_in_a_command_and_arguments_elsewhere(make_cache, monkeypatch, capsys):
    cache = make_cache(encoders={"toy": "float16", "wide": "float16"}).path
    with pytest.raises(UsageError, match=r"holds several: toy, wide\. Choose with encoder=$"):
        CacheReader(cache)
    monkeypatch.setattr(sys, "argv", ["repa-train"])
    with pytest.raises(SystemExit), one_line_errors("repa-train"):
        CacheReader(cache)
    assert capsys.readouterr().err.endswith("Choose with --encoder\n")
    assert option("--weights ema") == "weights='ema'"
    assert option("--recipe sit", "encoder=()") == "encoder=()"
