"""Plays given commands on stock TextWorld and ALFWorld, as `AlfredTWEnv` sets them up; a program for the tests.

Reads [[game file, [command, ...], [command, ...], ...], ...] as JSON on standard input, and prints for each game and
each of its episodes the list of [feedback, admissible commands, won] before the first and after each command.
"""

import json
import os
import sys


def play(game_file, *episodes):
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
    from textworld.envs import PddlEnv

    infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
    env = AlfredInfos(AlfredDemangler(PddlEnv(infos), shuffle=False))
    env.load(game_file)
    return [trace(env, commands) for commands in episodes]


def trace(env, commands):
    state = env.reset()
    lines = [[state.feedback, state["admissible_commands"], bool(state["won"])]]
    for command in commands:
        state, _, done = env.step(command)
        assert done == state["won"]
        lines.append([state.feedback, state["admissible_commands"], bool(state["won"])])
    return lines


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump([play(*job) for job in json.load(sys.stdin)], answers)
    answers.flush()
