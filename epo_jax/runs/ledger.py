"""sweep.json: the members of a sweep, and which of them stopped."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from epo_jax.common.errors import UserError, explain
from epo_jax.common.files import write_atomically
from epo_jax.models.decoder import DecoderConfig
from epo_jax.models.tokenizer import load_tokenizer
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.runs import checkpoint
from epo_jax.runs.folder import write_config
from epo_jax.runs.metrics import read_rows
from epo_jax.runs.policies import decoder_of_run


class Member(NamedTuple):
    """One run of a sweep.

    A run of its own has neither name nor coefficients.

    Attributes:
        config: the whole config, as `epo_jax.main` takes it.
        coefficients: the values by which the members differ, by key: method, seed, and what is swept.
    """

    name: str
    config: ConfigDict
    coefficients: dict[str, str | int | float]
    objective: ObjectiveConfig
    hyper: Hyper


class Ledger:
    """The members of the sweep in `workdir`.

    Attributes:
        name: the sweep's name.
        stopped: {member's name: RL step in which it stopped}.
    """

    def __init__(self, workdir: Path, members: list[Member]):
        self._workdir, self._members, self.name = workdir, members, workdir.name
        path = workdir / "sweep.json"
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["members"] if path.exists() else []
            self._before = [m["name"] for m in before]
            self.stopped: dict[str, int] = {m["name"]: m["stopped"] for m in before if m["stopped"] is not None}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read {explain(error, 'put a copy back')}.") from None

    def open(self) -> None:
        """Makes the members' run folders and writes sweep.json."""
        for member in self._members:
            self.folder(member).mkdir(parents=True, exist_ok=True)
            write_config(member.config, self.folder(member))
        self._write()

    def folder(self, member: Member) -> Path:
        """A member's run folder."""
        return self._workdir / "members" / member.name

    def checkpoints(self, member: Member) -> epath.Path:
        """The folder of a member's checkpoints."""
        return checkpoint.place(self.folder(member), member.config.checkpoint.folder)

    def model(self, member: Member) -> DecoderConfig | None:
        """The decoder that a member trains; None before its first checkpoint."""
        if checkpoint.newest(self.checkpoints(member)) is None:
            return None
        folder = self.folder(member)
        return decoder_of_run(folder, member.config, load_tokenizer(folder / "tokenizer"))

    def vocabulary(self, member: Member) -> int | None:
        """Size of a member's tokenizer; None before it has one."""
        folder = self.folder(member) / "tokenizer"
        return load_tokenizer(folder).vocab_size if folder.exists() else None

    def refuse_other_members(self) -> None:
        """Raises UserError if sweep.json has other members."""
        before, now = ({*names} for names in (self._before, [m.name for m in self._members]))
        if before and before != now:
            raise UserError(
                f"--resume: the sweep had other members ({', '.join(sorted(before ^ now))}); leave those changes out."
            )

    def stop(self, member: Member, step: int) -> None:
        """Records that a member stopped in RL step `step`."""
        self.stopped[member.name] = step
        self._write()

    def go_back(self, members: list[Member], step: int) -> None:
        """Forgets which members stopped in RL step `step` or later."""
        for member in members:
            if self.stopped.get(member.name, -1) >= step:
                del self.stopped[member.name]
        self._write()

    def resume_point(self, members: list[Member]) -> int | None:
        """The RL step from which members continue; None without checkpoints.

        Raises:
            UserError: a member lacks checkpoints that others have. If a sweep is killed while it saves, some members are one
                checkpoint ahead, which is written again. If more is missing, to continue would lose steps of the others.
        """
        stopped = [self.stopped.get(member.name) for member in members]
        saved = [checkpoint.steps(self.checkpoints(member)) for member in members]
        step = last_common_step(saved, stopped)
        ahead = [{later for later in steps if step is None or later > step} for steps in saved]
        began = any(read_rows(self.folder(member) / "metrics.jsonl") for member in members)
        if max(map(len, ahead)) > 1 or (step is None and began):
            behind = min(range(len(members)), key=lambda i: max(saved[i], default=-1) if stopped[i] is None else math.inf)
            missing = ", ".join(map(str, sorted(set().union(*ahead) - saved[behind]))) or "those of every step"
            go_on = f"move the other members' after step {step} away to go on from there"
            raise UserError(
                f"--resume: {self.checkpoints(members[behind])} lacks checkpoints that the sweep saved ({missing}); put them "
                f"back, or {'begin in a new folder' if step is None else go_on}."
            )
        return step

    def _write(self) -> None:
        members = [{"name": m.name, "coefficients": m.coefficients, "stopped": self.stopped.get(m.name)} for m in self._members]
        write_atomically(self._workdir / "sweep.json", json.dumps({"members": members}, indent=1) + "\n")


def last_common_step(saved: list[set[int]], stopped: list[int | None]) -> int | None:
    """The newest RL step of which every member has a checkpoint.

    Members that had stopped by then need none.
    """
    for step in sorted(set().union(*saved), reverse=True):
        if all(step in steps for steps, stop in zip(saved, stopped, strict=True) if stop is None or stop >= step):
            return step
    return None
