"""Jobs in separate processes: generating ALFWorld games, and playing them with the expert.

`run_jobs` starts one `python -m epo_jax.envs.alfworld.jobs` for each job. The process reads the job, a JSON line, and writes a
JSON line for each item as soon as it is done, or {"error": ...} before it stops. The training process never imports the
`alfworld` package.
"""

import concurrent.futures
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from epo_jax.common import stopping
from epo_jax.common.errors import UserError, explain
from epo_jax.common.files import OTHER_CACHE, child_environment
from epo_jax.envs.alfworld import engine, experts, games
from epo_jax.envs.alfworld.env import AlfworldEnv
from epo_jax.envs.base import Observation, to_fields

# ---------------------------------------------------------------------------------------------- the parent's side


def run_jobs(jobs: list[dict[str, Any]], progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """Runs all jobs at once, each in its own process, and returns their answers, job by job.

    Args:
        progress: called after each answer with the number of answers so far.

    Raises:
        UserError: a job reports bad input; the other jobs are killed.
    """
    count = itertools.count(1)
    processes = [_start(job) for job in jobs]

    def listen(process: subprocess.Popen) -> list[dict[str, Any]]:
        answers = []
        with process.stdout as lines:
            for line in lines:
                answers.append(json.loads(line))
                if "error" in answers[-1]:
                    raise UserError(answers[-1]["error"])
                progress(next(count))
        if process.wait() != 0:
            raise RuntimeError(f"a process of ALFWorld jobs ended with code {process.returncode}")
        return answers

    with concurrent.futures.ThreadPoolExecutor(max(1, len(processes))) as threads:
        listening = [threads.submit(listen, process) for process in processes]
        try:
            ended, _ = concurrent.futures.wait(listening, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in ended:
                future.result()  # raises the first failure, not those that killing the others causes
        finally:
            for process in processes:
                process.kill()
                stopping.process_groups.discard(process.pid)
                process.wait()
    return [answer for future in listening for answer in future.result()]


def _start(job: dict[str, Any]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "epo_jax.envs.alfworld.jobs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,  # Ctrl-C reaches the parent only, which then ends this process
    )
    stopping.process_groups.add(process.pid)
    with process.stdin as requests:
        requests.write(json.dumps(job).encode() + b"\n")
    return process


# ---------------------------------------------------------------------------------------------- the process's side


def make_games(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Writes the games {"split", "index"} of job["games"] below job["root"], after playing each walkthrough to its end.

    Existing games, from an interrupted process, are kept.
    """
    for item in job["games"]:
        split, index = item["split"], item["index"]
        generated = games.generate(split, index, job["seed"], job["max_receptacles"])
        folder = Path(job["root"]) / split / generated.folder
        answer = {"split": split, "index": index, "type": generated.task_type, "folder": f"{split}/{generated.folder}"}
        if folder.exists():
            yield answer
            continue
        game = engine.read_game(generated.files["game.tw-pddl"].encode())
        state = game.start
        wins = []
        for command in generated.walkthrough:
            wins.append(state.won)
            state, _ = game.step(state, command)
        if any(wins) or not state.won:
            raise RuntimeError(f"the walkthrough of generated game {split}/{generated.folder} does not win at its end")
        unfinished = Path(f"{job['unfinished']}-{os.getpid()}")
        unfinished.mkdir(parents=True)
        for name, content in generated.files.items():
            (unfinished / name).write_text(content)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.exists():  # no other process made it in the meantime
                raise
            shutil.rmtree(unfinished)
        yield answer


def demonstrate(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Plays job["tasks"] with the expert or, if it fails, with the walkthrough of the game (which knows the hidden state).

    The "seed" of a task is that of its hesitations and mistakes.
    """
    env = AlfworldEnv(job["admissible"])
    for task in job["tasks"]:
        start = env.reset(task)
        goal = _goal(task["file"])
        moves = experts.expert_moves(goal, start.text)
        if job["mistakes"]:
            moves = experts.erring(moves, job["mistakes"], f"{task['seed']}/mistakes", start.text, goal.object)
        if job["hesitation"]:
            moves = experts.hesitating(moves, job["hesitation"], task["seed"])
        episode = _play(env, start, moves, job["max_turns"])
        if not episode["won"]:
            walkthrough = json.loads(Path(task["file"]).read_bytes()).get("walkthrough") or ()
            recited = _play(env, env.reset(task), _recite(walkthrough), job["max_turns"])
            episode = recited if recited["won"] else episode
        yield episode


def _goal(game_file: str) -> experts.Goal:
    path = Path(game_file).with_name("traj_data.json")
    try:
        data = json.loads(path.read_text())
        params = data["pddl_params"]
        target = params["parent_target"] or params["toggle_target"]
        return experts.Goal(data["task_type"], params["object_target"].lower(), target.lower())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read {explain(error, 'restore the data')}.") from None


def _recite(walkthrough) -> experts.Moves:
    for command in walkthrough:
        _ = yield command  # not `yield from`, which would send the texts to the list


def _play(env: AlfworldEnv, start: Observation, moves: experts.Moves, max_turns: int) -> dict[str, Any]:
    observations, actions, mistakes = [start], [], []
    action = next(moves, None)
    while action is not None and not observations[-1].won and len(actions) < max_turns:
        if isinstance(action, experts.Mistake):
            mistakes.append(len(actions))
        actions.append(action)
        observations.append(env.step(action))
        try:
            action = moves.send(observations[-1].text)
        except StopIteration:
            action = None
    fields = [to_fields(observation) for observation in observations]
    return {"observations": fields, "actions": actions, "mistakes": mistakes, "won": observations[-1].won}


def main() -> None:
    job = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of the packages must not mix with the answers
    try:
        for answer in {"games": make_games, "demonstrations": demonstrate}[job["job"]](job):
            answers.write(json.dumps(answer) + "\n")
    except UserError as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
    except BrokenPipeError:
        os._exit(1)  # the parent has died
    except OSError as error:
        message = f"cannot write {error.filename}: {error.strerror}; {OTHER_CACHE}."
        answers.write(json.dumps({"error": message}) + "\n")


if __name__ == "__main__":
    main()
