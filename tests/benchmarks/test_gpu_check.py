"""gpu_check's driver: a part that fails or has no time left costs itself alone, and the file says which did."""

import json

import gpu_check


def test_a_part_that_fails_or_has_no_time_is_named_and_the_file_written(tmp_path):
    out = tmp_path / "gpu_check.json"
    asked = ["--device", "cpu", "--out", str(out), "--sampled", "SiT-None/2"]
    assert gpu_check.run(gpu_check.parse([*asked, "--part", "sampling"])) == 1
    report = json.loads(out.read_text())
    assert report["parts"]["sampling"]["outcome"] == "failed: exit code 1"
    assert report["parts"]["sampling"]["lines"] == []

    assert gpu_check.run(gpu_check.parse([*asked, "--part", "attention", "--minutes", "0.1"])) == 1
    report = json.loads(out.read_text())
    assert report["parts"]["attention"]["outcome"] == "left out: no time"
    assert report["device"] == "cpu"
    assert "commit" in report
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check.json"]
