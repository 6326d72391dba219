"""The line that is shown while a command works: what it contains, where it goes, and that it leaves nothing behind."""

import io
import sys
import threading
import time

import pytest

from epo_jax.common import progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def redirect(monkeypatch, terminal=False):
    """Standard error as a stream to read, drawn on often. (In a fixture, pytest would put its own in its place.)"""
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_TICK", 0.01)
    monkeypatch.setattr(progress, "_EVERY", 0.01)
    return stream


def wait_for(condition):
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_the_line_has_the_time_left():
    assert progress.line("evaluation", 30, 120, "episodes", 10.0, bar=False) == (
        "evaluation  30 of 120 episodes  0:10, about 0:30 left"
    )
    assert progress.line("warm start", 0, 3000, "updates", 5.0, bar=True) == (
        "warm start  [........................]  0 of 3,000 updates  0:05"
    )
    assert progress.line("update", 0, 0, "", 65.0, bar=True) == "update  1:05"
    assert progress.line("rollout", 8, 8, "episodes", 3700.0, bar=True).startswith("rollout  [########################]  8 of 8")


def test_lines_elsewhere_than_on_a_terminal(monkeypatch):
    stream = redirect(monkeypatch)
    monkeypatch.setattr(sys, "stdout", output := Stream(False))
    with progress.shown("rollout", 4, "episodes") as reach:
        reach(3)
        wait_for(lambda: stream.getvalue().count("\n") >= 2)
    lines = stream.getvalue().splitlines()
    assert set(lines) == {"rollout  3 of 4 episodes  0:00, about 0:00 left"}
    assert output.getvalue() == "", "the output proper is what it would be without"


def test_a_terminal_has_one_line_that_is_erased(monkeypatch):
    stream = redirect(monkeypatch, terminal=True)
    with progress.shown("update"):
        wait_for(lambda: stream.getvalue().count("update  0:00") >= 2)
        progress.clear()
    assert "\n" not in stream.getvalue() and stream.getvalue().endswith("\r\033[K")


def test_the_innermost_activity_is_shown(monkeypatch):
    stream = redirect(monkeypatch)
    with progress.shown("outer"):
        with progress.shown("inner"):
            wait_for(lambda: "inner" in stream.getvalue())
            assert "outer" not in stream.getvalue()
        wait_for(lambda: "outer" in stream.getvalue())


def test_what_is_quick_shows_nothing_and_no_thread_is_left(monkeypatch):
    stream = Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(KeyboardInterrupt), progress.shown("rollout", 4, "episodes") as reach:
        reach(1)
        raise KeyboardInterrupt
    assert stream.getvalue() == "" and "progress" not in {thread.name for thread in threading.enumerate()}


def test_other_processes_of_a_run_show_nothing(monkeypatch):
    stream = redirect(monkeypatch)
    monkeypatch.setattr(progress, "_is_first", lambda: False)
    with progress.shown("rollout") as reach:
        reach(1)
        time.sleep(0.05)
    assert stream.getvalue() == ""
