"""The fast engine against the stock one, and what it does with damaged or hostile input."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import engine, games
from epo_jax.envs.alfworld.names import display_names

HOSTILE = [
    "",
    "look at me",
    "go to fridge 99",
    "{r.name}",
    "%s\x00\n",
    "GO TO FRIDGE 1",
    "a" * 10_000,
    "🤖 help",
    "#intro#",
]
COMPACT = 8


@pytest.fixture(scope="module")
def write_game(tmp_path_factory):
    """Write a game's content to a file of its own."""
    folder = tmp_path_factory.mktemp("games")

    def write(content: dict, name: str) -> str:
        path = folder / name
        path.write_text(json.dumps(content))
        return str(path)

    return write


def game_content(index: int, max_receptacles: int | None = COMPACT) -> dict:
    return json.loads(games.generate("train", index, 7, max_receptacles).files["game.tw-pddl"])


def wander(game: engine.Game, commands, rng: random.Random, steps: int) -> list[str]:
    """A random walk with hostile strings in between, and then `commands`; what was said."""
    state, said = game.start, []
    useful = ("open", "take", "move", "heat", "cool", "clean", "use", "slice", "close", "look")
    for _ in range(steps):
        options = game.admissible(state)
        acting = [command for command in options if command.startswith(useful)]
        command = rng.choice(rng.choice([options, acting or options, acting or options, HOSTILE]))
        state, _ = game.step(state, command)
        said.append(command)
    return said + list(commands)


def trace(game: engine.Game, commands: list[str]) -> list[list]:
    state = game.start
    lines = [[game.intro, game.admissible(state), state.won]]
    for command in commands:
        state, text = game.step(state, command.strip())
        lines.append([text, game.admissible(state), state.won])
    return lines


def neighbours(content: dict) -> tuple[dict, list[str]] | None:
    """The game with two counters or shelves that are reached from one place, and commands that carry a thing across.

    There TextWorld's text depends on its own negated facts, which are not a part of the planner's state.
    """
    lines = content["pddl_problem"].split("\n")
    spots, inside = (
        [line.strip("()").split()[1:] for line in lines if line.startswith(f"({predicate} ")]
        for predicate in ("receptacleAtLocation", "inReceptacle")
    )
    things = {thing.lower(): thing for thing, _ in [*spots, *inside]}
    names = {things[spelled]: name for spelled, name in display_names(things).items()}
    flat = {place: spot for place, spot in spots if place.startswith(("Shelf", "CounterTop"))}
    for thing, place in inside:
        others = [other for other in flat if other != place and other.split("_")[0] == place.split("_")[0]]
        if place in flat and others:
            moved = [line.replace(flat[others[0]], flat[place]) for line in lines]
            once = [line for i, line in enumerate(moved) if not line.endswith("- location") or line not in moved[:i]]
            here, there, what = names[place], names[others[0]], names[thing]
            carry = [f"go to {here}", "look", f"take {what} from {here}", f"move {what} to {there}", "look"]
            # Back to where it was: the planner's state is the one of the first look, TextWorld's text is not.
            carry += [f"take {what} from {there}", f"move {what} to {here}", "look"]
            return {**content, "pddl_problem": "\n".join(once)}, carry
    return None


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="TextWorld 1.7.0's own engine fails on Python 3.13 (NameError in eval)")
def test_output_is_the_stock_engines(write_game):
    rng = random.Random(0)
    jobs = []
    for index in range(6):  # one of each task type; the last also as a whole room
        content = game_content(index, None if index == 5 else COMPACT)
        path = write_game(content, f"stock-{index}")
        game = engine.load_game(path)
        jobs.append([path, wander(game, ["inventory", "look"], rng, 12), [*content["walkthrough"], "look"]])
    crowded = next(filter(None, (neighbours(game_content(index)) for index in range(100))))
    jobs.append([write_game(crowded[0], "crowded"), crowded[1]])
    program = Path(__file__).with_name("stock_alfworld.py")
    run = subprocess.run([sys.executable, str(program)], input=json.dumps(jobs), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for (path, *episodes), traces in zip(jobs, json.loads(run.stdout), strict=True):
        for commands, expected in zip(episodes, traces, strict=True):
            actual = trace(engine.load_game(path), commands)
            for command, ours, theirs in zip(["reset", *commands], actual, expected, strict=True):
                assert ours == theirs, f"{path}: {command!r}"
    crowded_text = " ".join(line[0] for line in expected)
    assert "Next to it, you see a" in crowded_text  # the case that the shelves were put together for


def test_episodes_of_one_game_do_not_disturb_each_other(write_game):
    content = game_content(3)
    rng = random.Random(1)
    shared = engine.read_game(json.dumps(content).encode())
    walks = [wander(shared, content["walkthrough"], rng, 20) for _ in range(4)]
    alone = []
    for walk in walks:
        fresh = engine.read_game(json.dumps(content).encode())
        alone.append(trace(fresh, walk))
    states = [shared.start] * 4
    for turn in range(len(walks[0])):
        for k in rng.sample(range(4), 4):
            states[k], text = shared.step(states[k], walks[k][turn].strip())
            assert [text, shared.admissible(states[k]), states[k].won] == alone[k][turn + 1]


def test_states_past_the_limit_are_as_right_as_the_others(monkeypatch):
    content = json.dumps(game_content(4)).encode()
    game = engine.read_game(content)
    walk = wander(game, json.loads(content)["walkthrough"], random.Random(2), 30)
    expected = trace(game, walk)
    monkeypatch.setattr(engine, "MAX_REMEMBERED_STATES", 3)
    bounded = engine.read_game(content)
    assert trace(bounded, walk) == expected
    assert len(bounded._states) == 3


def test_a_repeated_transition_is_not_worked_out_again(monkeypatch):
    content = json.dumps(game_content(0)).encode()
    game = engine.read_game(content)
    walk = json.loads(content)["walkthrough"]
    first = trace(game, walk)
    monkeypatch.setattr(game, "_apply", lambda *_: pytest.fail("the engine was asked again"))
    assert trace(game, walk) == first


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('touch {mark}')",
        "o.__class__",
        "o.name.upper()",
        "(lambda: 1)()",
    ],
)
def test_a_grammar_cannot_run_code(write_game, tmp_path, expression):
    mark = tmp_path / "mark"
    content = game_content(0)
    before = "{r.indefinite} {r.name or r.id}"
    assert before in content["grammar"]
    hostile = "{" + expression.replace("{mark}", str(mark)) + "}"
    content["grammar"] = content["grammar"].replace(before, hostile)
    path = write_game(content, f"hostile-{abs(hash(expression))}")
    with pytest.raises(UserError, match=path):
        engine.load_game(path)
    assert not mark.exists()


@pytest.mark.parametrize("symbols", ["#task#", "#task##task#", "#task#" * 40], ids=["deep", "wide", "wider"])
def test_a_grammar_without_end_is_refused(write_game, symbols):
    content = game_content(0)
    goal = content["grammar"].index("Your task is to: ")
    end = content["grammar"].index('"', goal)
    content["grammar"] = content["grammar"][:goal] + symbols + content["grammar"][end:]
    path = write_game(content, f"endless-{len(symbols)}")
    with pytest.raises(UserError, match=f"{path} cannot be played: the game's grammar has no end"):
        engine.load_game(path)


def test_a_grammar_that_grows_without_bound_is_refused(write_game):
    """No rule names itself, and yet the text doubles forty times."""
    content = game_content(0)
    content["grammar"] = content["grammar"].replace("Your task is to: ", "#d0# Your task is to: ")
    rules = "".join(f'"d{i}": [{{"rhs": "#d{i + 1}##d{i + 1}#"}}],\n' for i in range(40)) + '"d40": [{"rhs": "x"}],\n'
    content["grammar"] = content["grammar"].replace('"intro": [', rules + '"intro": [', 1)
    path = write_game(content, "doubling")
    with pytest.raises(UserError, match=f"{path} cannot be played: the game's grammar has no end"):
        engine.load_game(path)


def _unknown(problem: str) -> str:
    return problem.replace("(pickupable ", "(unheardof ")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "grammar": 3}),
        lambda text: json.dumps({**json.loads(text), "pddl_problem": _unknown(json.loads(text)["pddl_problem"])}),
        lambda text: text.replace("(:init", "(:init ("),
        lambda text: text.replace("grammar ::", "grammar :"),
    ],
    ids=["half", "empty", "list", "no-grammar", "unknown-predicate", "unbalanced", "bad-grammar"],
)
def test_a_damaged_game_file_is_named(write_game, tmp_path, damage):
    path = Path(write_game(game_content(2), "whole"))
    broken = tmp_path / "game.tw-pddl"
    broken.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=str(broken)):
        engine.load_game(str(broken))


def test_a_missing_game_file_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path / "none")):
        engine.load_game(str(tmp_path / "none"))
