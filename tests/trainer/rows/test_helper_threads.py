"""Parts of a job, shared among threads: each is done once, and nothing after an error or a Ctrl-C."""

import contextlib
import gc
import signal
import threading
import time
import weakref

import numpy as np
import pytest

from repa.trainer.rows.helper_threads import HelperThreads


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num", [0, 1, 2, 100])
def test_every_part_is_done_once(num_threads, num):
    helpers, done = HelperThreads(num_threads - 1), []
    for _ in range(3):
        helpers.share([(i, i + 1) for i in range(num)], lambda start, stop: done.append((start, stop)))
        assert sorted(done) == [(i, i + 1) for i in range(num)]
        done.clear()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_nothing_runs_once_an_error_was_raised(num_threads):
    done = []

    def fail_at_seven(start, _):
        if start == 7:
            raise ValueError("seven")
        time.sleep(0.001)
        done.append(start)

    helpers = HelperThreads(num_threads - 1)
    parts = [(i, i + 1) for i in range(200)]
    with pytest.raises(ValueError, match="seven"):
        helpers.share(parts, fail_at_seven)
    left = list(done)
    assert len(left) < 50
    time.sleep(0.02)
    assert done == left
    helpers.share(parts, lambda start, _: done.append(start))  # the threads live on
    assert len(done) == len(left) + 200


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_done_meanwhile_waits_for_no_part_and_is_waited_for_with_them(fails):
    helpers, begun, called, order = HelperThreads(1), threading.Event(), threading.Event(), []
    main = threading.get_ident()

    def until_called_in_the_helper(*_):
        if threading.get_ident() == main:
            begun.wait()  # until the other part is the helper's
            return
        begun.set()
        assert called.wait(20)
        order.append("part")

    def meanwhile():
        assert threading.get_ident() == main
        order.append("meanwhile")
        called.set()
        if fails:
            raise ValueError("meanwhile")

    with pytest.raises(ValueError, match="meanwhile") if fails else contextlib.nullcontext():
        helpers.share([(0, 1), (1, 2)], until_called_in_the_helper, meanwhile=meanwhile)
    assert order == ["meanwhile", "part"]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signal to a thread")
def test_an_interrupt_waits_for_what_is_under_way():
    helpers, begun, done = HelperThreads(1), threading.Event(), []
    main = threading.get_ident()

    def slow_in_the_helper(start, _):
        if threading.get_ident() == main:
            begun.wait()  # until the other part is the helper's
            return
        begun.set()
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        done.append(start)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            helpers.share([(0, 1), (1, 2)], slow_in_the_helper)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(done) == 1


def test_nothing_runs_once_a_thread_was_not_to_be_had(monkeypatch):
    helpers, begun, done = HelperThreads(2), threading.Event(), []
    start = threading.Thread.start

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    def slow(part, _):
        begun.set()
        time.sleep(0.01)
        done.append(part)

    parts = [(i, i + 1) for i in range(20)]
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        helpers.share(parts, slow)
    assert done == []
    monkeypatch.setattr(threading.Thread, "start", start)
    helpers.share(parts, slow)
    assert sorted(done) == list(range(20))


def test_threads_end_with_their_object_and_hold_nothing_of_a_job():
    before = set(threading.enumerate())
    helpers = HelperThreads(3)

    def slow(*_):
        time.sleep(0.001)

    helpers.share([(i, i + 1) for i in range(9)], slow)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 3
    held, given_up = weakref.ref(slow), time.monotonic() + 20
    del slow
    while held() is not None and time.monotonic() < given_up:  # who was too late may still be about to look
        time.sleep(0.001)
    assert held() is None
    del helpers
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer")
def test_interrupts_at_any_moment_leave_the_threads_working():
    helpers, rng = HelperThreads(1), np.random.default_rng(0)
    interrupts = 0

    gc.collect()
    gc.disable()  # finalizers of others are not to be interrupted
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(1500):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 5e-4))
                helpers.share([(i, i + 1) for i in range(4)], lambda *_: time.sleep(1e-5))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        gc.enable()
    assert interrupts > 0
    done = []
    helpers.share([(i, i + 1) for i in range(50)], lambda part, _: done.append(part))
    assert sorted(done) == list(range(50))
