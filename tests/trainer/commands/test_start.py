"""What a plain run on the CPU loads: its start, of which torch's compiler would be the larger part."""

import subprocess
import sys

# Less what torch's own optimizer loads: torch 2.9's loads the compiler.
RUN = """
import sys, torch
torch.optim.AdamW([torch.zeros(1)])
theirs = set(sys.modules)
from repa.trainer.commands.train import train_command
train_command(sys.argv[1:], standalone_mode=False)
print("loaded:", *(sys.modules.keys() - theirs))
"""


def test_a_run_that_compiles_nothing_loads_no_compiler(make_cache, tmp_path):
    arguments = {"cache": make_cache(latents="mean_std").path, "model": "SiT-Ti/2", "recipe": "irepa", "steps": 2}
    arguments |= {"batch-size": 4, "out": tmp_path / "run", "device": "cpu", "set": "alignment.encoder_depth=1"}
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-c", RUN, *flags, "--set", "grid.every=0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "repa.kernels.alignment" in loaded
    heavy = {"torch._dynamo", "torch._inductor", "triton", "sympy", "ray", "timm", "diffusers", "transformers"}
    assert not loaded & (heavy | {"tensorstore", "obstore"})
