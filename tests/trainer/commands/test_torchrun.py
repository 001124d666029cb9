"""torchrun takes what looks like an abbreviation of its own options, wherever it stands; ours must not."""

import re
from pathlib import Path

import click
import pytest
from torch.distributed.run import get_args_parser

from repa.trainer.commands.cknna import cknna_command
from repa.trainer.commands.sample import sample_command
from repa.trainer.commands.train import train_command

HOUSE = Path(__file__).parents[3]
COMMANDS = {"repa-train": train_command, "repa-sample": sample_command, "repa-cknna": cknna_command}
START = ["--nproc-per-node", "2", "--no-python"]
OPTIONS = [
    (name, option) for name, command in COMMANDS.items() for option in command.params if option.opts[0][0] == "-"
]


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=[f"{name} {option.opts[0]}" for name, option in OPTIONS])
def test_no_option_abbreviates_one_of_torchruns(command: str, option: click.Option):
    """By its first name; a short one that it has had before needs the `--` that all our lines have."""
    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    assert "--numa-binding" in theirs
    assert not [name for name in theirs if name.startswith(option.opts[0]) and name not in ("-h", "--help")]
    for name in option.opts:
        given = ["RUN", name, "5"]
        parsed = get_args_parser().parse_args([*START, "--", command, *given])
        assert [parsed.training_script, *parsed.training_script_args] == [command, *given]
    given = ["RUN", option.opts[0], "5"]
    assert get_args_parser().parse_args([*START, command, *given]).training_script_args == given


def test_every_line_that_we_print_ends_torchruns_options():
    lines = [
        line
        for file in (
            *HOUSE.glob("*.md"),
            *(f for room in ("trainer", "pipeline", "benchmarks") for f in (HOUSE / room).rglob("*")),
        )
        if file.suffix in (".md", ".py", ".sh")
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.search(r"torchrun -.*repa-", line)
    ]
    assert len(lines) >= 3
    assert [line for line in lines if not re.search(r"torchrun -.* --no-python -- repa-", line)] == []


@pytest.mark.parametrize("command", [sample_command, cknna_command])
def test_num_is_num_samples(command: click.Command):
    for name in ("--num-samples", "--num"):
        context = command.make_context(
            "it", ["RUN", name, "5", "--cache", "c"][: None if command is cknna_command else 3]
        )
        assert context.params["num"] == 5
    assert "--num-samples" in command.get_help(context)
