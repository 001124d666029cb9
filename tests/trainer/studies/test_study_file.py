"""What a study file asks for: rows, seeds, names; and what it may not say."""

from pathlib import Path

import pytest

from repa.cache_specs.errors import UsageError
from repa.trainer.studies.study_file import read_study, rows_of

BASE = "base: {cache: c, model: SiT-B/2, optimizer: {learning_rate: 2e-4}}\n"


@pytest.fixture
def rows(tmp_path: Path):
    def read(text: str):
        (tmp_path / "study.yaml").write_text(text)
        return rows_of(read_study(tmp_path / "study.yaml"))

    return read


def test_lists_are_crossed_and_each_combination_has_every_seed(rows):
    found = rows(BASE + "grid: {recipe: [repa, irepa], encoders: [a, b]}\nseeds: [0, 3]\n")
    assert len(found) == 2 * 2 * 2
    assert [row.label for row in found[:4]] == ["repa-a-s0", "repa-a-s3", "repa-b-s0", "repa-b-s3"]
    assert {(row.config.recipe, row.config.encoders, row.config.seed) for row in found} == {
        (recipe, (encoder,), seed) for recipe in ("repa", "irepa") for encoder in "ab" for seed in (0, 3)
    }
    assert {row.config.optimizer.learning_rate for row in found} == {2e-4}
    # Each recipe brings its own settings.
    assert {(row.config.recipe, row.config.alignment.projector) for row in found} == {
        ("repa", "mlp"),
        ("irepa", "conv"),
    }


def test_a_baseline_that_reads_no_encoder_is_one_run_not_one_an_encoder(rows):
    found = rows(BASE + "grid: {recipe: [sit, irepa], encoders: [a, b], alignment.gamma: [0, 0.6]}\n")
    assert [row.label for row in found] == [
        "sit-s0", "irepa-a-gamma0-s0", "irepa-a-gamma0.6-s0", "irepa-b-gamma0-s0", "irepa-b-gamma0.6-s0",
    ]  # fmt: skip
    assert found[0].config.encoders == ()


def test_rows_beside_the_grid_and_rows_left_out_of_it(rows):
    found = rows(
        BASE
        + "grid: {recipe: [irepa], encoders: [a, [a, b]], alignment.proj_coeff: [0.5, 1]}\n"
        + "exclude: [{encoders: a, alignment.proj_coeff: 1}]\n"
        + "runs: [{recipe: sit, steps: 7}]\nevaluation: {every: 5, encoders: judge}\n"
    )
    assert [row.label for row in found] == [
        "irepa-a-coeff0.5-s0",
        "irepa-a+b-coeff0.5-s0",
        "irepa-a+b-coeff1-s0",
        "sit-steps7-s0",
    ]
    assert found[-1].config.steps == 7
    assert {row.config.evaluation.encoders for row in found} == {("judge",)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gird: {}\n", "unknown section 'gird'; did you mean 'grid'"),
        (BASE + "grid: {recipe: irepa}\n", "grid.recipe is 'irepa'; expected a list"),
        (BASE + "grid: {recipe: [irepa], lr: [1]}\n", "unknown key 'lr'; did you mean 'optimizer.learning_rate'"),
        (BASE + "grid: {recipe: [irep]}\n", "unknown recipe 'irep'; did you mean 'irepa'"),
        (BASE + "grid: {recipe: [irepa], alignment.gamma: [2]}\n", "alignment.gamma is 2.0"),
        (BASE + "grid: {recipe: [irepa], seed: [1]}\n", "say the seeds of all runs in seeds"),
        (BASE + "grid: {recipe: [irepa]}\nseeds: [1, 1]\n", "seeds is [1, 1]"),
        (BASE + "grid: {recipe: [irepa]}\nseeds: 3\n", "seeds is 3; expected a list"),
        (BASE + "runs: [3]\n", "runs, entry 1 is 3"),
        (BASE, "not set: recipe"),
        ("- a\n", "holds a list"),
        ("a: [", "not a study"),
        (
            BASE + f"grid: {{recipe: [irepa], steps: {list(range(1, 200))}, batch_size: {list(range(1, 100))}}}\n",
            "more than",
        ),
    ],
)
def test_what_makes_no_sense_is_named(rows, text, said):
    with pytest.raises(UsageError) as caught:
        rows(text)
    assert said in str(caught.value)
    assert "study.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
