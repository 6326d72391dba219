"""A profile of some RL steps: `--profile_steps=5:7` writes a trace of them to WORKDIR/profile.

TensorBoard's profile plugin, XProf and Perfetto show it.
"""

import re
from pathlib import Path

import jax
from absl import flags

from epo_jax.common.errors import UserError


def define_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "profile_steps", None, "FIRST:END, RL steps to profile, as metrics.jsonl counts them; without END.", flag_values=values
    )


def window(text: str | None, steps: int) -> tuple[int | None, int | None]:
    """(first, end) of the steps to profile, `end` not among them, in a run of `steps` RL steps; (None, None) for no text.

    Raises:
        UserError: it is not FIRST:END, or these are not steps of the run.
    """
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not int(match[1]) < int(match[2]) <= steps:
        raise UserError(
            f"--profile_steps={text} must be FIRST:END with 0 <= FIRST < END <= {steps} (config.train.steps), as 5:7 for steps "
            "5 and 6."
        )
    return int(match[1]), int(match[2])


def refuse_past(window: tuple[int | None, int | None], step: int) -> None:
    """Raises UserError if the steps to profile begin before RL step `step`, from which the run continues."""
    first, end = window
    if first is not None and first < step:
        raise UserError(f"--profile_steps={first}:{end}: the run goes on from step {step}; name later steps.")


class Profile:
    """Writes a trace of steps `first` to `end`, `end` not among them, to `folder`; with (None, None) it does nothing.

    Leaving `with` inside these steps, by a stop or an error, writes what the trace has by then.
    """

    def __init__(self, folder: Path, first: int | None, end: int | None):
        self._folder, self._first, self._end = folder, first, end
        self._under_way = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._under_way:
            self._stop()

    def begin(self, step: int) -> None:
        """Call before each step."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._under_way = True

    def finish(self, done: int) -> None:
        """Call after each step, with the number of steps done."""
        if self._under_way and done == self._end:
            self._stop()

    def _stop(self) -> None:
        self._under_way = False
        jax.profiler.stop_trace()
