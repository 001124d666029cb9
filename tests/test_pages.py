"""What the pages say: their length, links and paths that lead somewhere, commands and code that are the house's."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from repa.pipeline.commands.cache import cli
from repa.trainer.commands.ablate import ablate_command
from repa.trainer.commands.cknna import cknna_command
from repa.trainer.commands.features import features_command
from repa.trainer.commands.report import report_command
from repa.trainer.commands.sample import sample_command
from repa.trainer.commands.train import resolve_flags, train_command

HOUSE = Path(__file__).parents[1]
FOLDERS = ("cache_specs", "kernels", "pipeline", "trainer", "benchmarks")
PAGES = [*HOUSE.glob("*.md"), *(page for folder in FOLDERS for page in sorted((HOUSE / folder).rglob("*.md")))]
COMMANDS = {
    "repa-train": train_command,
    "repa-sample": sample_command,
    "repa-features": features_command,
    "repa-cknna": cknna_command,
    "repa-ablate": ablate_command,
    "repa-report": report_command,
}
MOST_WORDS = 1500

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(rf"\b(?:{'|'.join((*FOLDERS, 'tests'))})/[\w/.-]+\.(?:py|yaml|md|png|jsonl)\b")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HOUSE)))


def anchors(page: Path) -> set[str]:
    """Return the names under which the headings of a page are linked, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", _FENCE.sub("", page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in _FENCE.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Return the words of each of our commands in a page's blocks, from its name on: those after `$` and of scripts."""
    lines = [
        line.removeprefix("$ ")
        for language, code in _FENCE.findall(page.read_text())
        for line in code.replace("\\\n", " ").splitlines()
        if language == "bash" or line.startswith("$ ")
    ]
    found = []
    for words in (shlex.split(line, comments=True) for line in lines):
        starts = [i for i, word in enumerate(words) if word in ("repa-cache", *COMMANDS)]
        found += [words[starts[0] :]] if starts else []
    return found


def test_the_readme_is_short() -> None:
    assert len((HOUSE / "README.md").read_text().split()) <= MOST_WORDS, "move detail to the page of its room"


@every_page
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in _LINK.findall(_FENCE.sub("", text)):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    missing = [path for path in _PATH.findall(text) if not (HOUSE / path).exists()]
    assert not missing


@every_page
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options, values and settings of every command; nothing is run."""
    monkeypatch.chdir(HOUSE)  # where --config benchmarks/demo.yaml is
    for name, *arguments in commands(page):
        command: click.Command = COMMANDS[name] if name in COMMANDS else cli.commands[arguments.pop(0)]
        given = dict(command.make_context(name, list(arguments)).params)
        if name == "repa-train":
            files, assignments = given.pop("files"), given.pop("assignments")
            resumed = given.pop("resume")
            for key in ("device", "dry_run", "verbose", "settings"):
                given.pop(key)
            if resumed in (None, "auto"):  # else the settings are those of a run that is not here
                resolve_flags(files, assignments, given)


@every_page
def test_python_imports_what_is_there(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repa"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_commands_are_found() -> None:
    names = [words[0] for page in PAGES for words in commands(page)]
    assert {"repa-cache", "repa-train", "repa-sample"} <= set(names)
