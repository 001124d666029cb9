"""What two rooms know, neither of which may ask the other: a test may ask both."""

from repa.pipeline.analysis.run_results import _AVERAGED
from repa.trainer.runs.catalogue import catalogue
from repa.trainer.runs.config import MAY_CHANGE
from repa.trainer.runs.settings import NOT_SETTINGS


def test_correlate_averages_over_the_seed_and_over_what_a_resume_may_change() -> None:
    settings = {row.key for row in catalogue()}
    averaged = {key for key in settings if key in _AVERAGED or key.partition(".")[0] in _AVERAGED}
    assert averaged == MAY_CHANGE | {"seed"}
    others = _AVERAGED - settings - {key.partition(".")[0] for key in settings}
    assert others == NOT_SETTINGS
