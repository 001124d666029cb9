"""The page's example of a loop of one's own: it runs as it stands, and its model learns."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "trainer" / "README.md"


def test_the_example_trains_somebody_elses_model(make_cache, tmp_path, monkeypatch, capsys):
    (code,) = [
        code for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S) if "CacheDataset" in code
    ]
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "cache").symlink_to(make_cache(num_samples=160, shard_samples=64).path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # the example draws from torch's global generator
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)

    printed = re.findall(r"epoch (\d): loss ([-.\d]+), alignment ([-.\d]+)", capsys.readouterr().out)
    assert [epoch for epoch, _, _ in printed] == ["0", "1"]
    assert names["data"].step == 5  # 320 positions in batches of 64
    saved = torch.load(tmp_path / "dit.pt", weights_only=True)
    assert saved["data"] == names["data"].state_dict()
    gradients = [parameter.grad for parameter in names["projector"].parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    first = names["model"].transformer_blocks[0].attn1.to_q.weight.grad
    assert first is not None
    assert first.abs().sum() > 0
