"""Work done as Ray tasks: each item once, refused where nothing can hold it, given up where it is lost again and again.

The functions are of the standard library: workers import what they do by name.
"""

import os

import pytest

from repa.cache_specs.errors import JobError
from repa.pipeline.building.ray_tasks import run_tasks


def test_each_item_is_done_once_on_the_cluster_and_told(ray_head):
    done: dict[str, int] = {}
    run_tasks(
        len, ["a", "bb", "ccc"], address=ray_head[0], cpus=1, gpus=0, on_done=done.__setitem__, stop=lambda: False
    )
    assert done == {"a": 1, "bb": 2, "ccc": 3}


def test_what_no_node_can_hold_is_refused_before_it_waits_for_ever(ray_head):
    with pytest.raises(JobError, match=r"a run wants 99 CPUs and 0 GPUs, and Ray has 2 and 0"):
        run_tasks(len, ["a"], address=ray_head[0], cpus=99, gpus=0, on_done=print, stop=lambda: False)


def test_work_that_kills_its_process_is_tried_again_and_then_given_up(ray_head):
    with pytest.raises(JobError, match=r"3: its node or process was lost 4 times .* give the same command again"):
        run_tasks(os._exit, [3], address=ray_head[0], cpus=1, gpus=0, on_done=print, stop=lambda: False)
