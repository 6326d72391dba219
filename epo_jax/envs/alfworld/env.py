"""An ALFWorld episode as it is told, in a worker to an agent and in a job to the expert."""

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import engine
from epo_jax.envs.base import Observation, Task

WIN_REWARD = 10.0
BANNER = "-= Welcome to TextWorld, ALFRED! =-"
GOAL_PREFIX = "Your task is to: "


def split_intro(intro: str) -> tuple[str, str]:
    """TextWorld's first text -> (what the room looks like, the task without its full stop)."""
    text, _, goal = intro.rpartition(GOAL_PREFIX)
    return text.removeprefix(BANNER).strip(), goal.strip().removesuffix(".")


class AlfworldEnv:
    """One episode at a time; the loaded games are shared by all environments of a process."""

    def __init__(self, compiled: str, admissible: bool):
        self._compiled = compiled
        self._admissible = admissible
        self._game: engine.Game | None = None
        self._state: engine.State | None = None
        self._goal = ""

    def reset(self, task: Task) -> Observation:
        """Start the task's game. Raises UserError naming the game file when it cannot be played."""
        self._file = task["file"]
        self._game = engine.load_game(self._file, self._compiled)
        self._state = self._game.start
        text, self._goal = split_intro(self._game.intro)
        return self._observe(text, reward=0.0)

    def step(self, action: str) -> Observation:
        """Play one command; case and surrounding blanks do not matter. The reward comes once, with the winning step."""
        won_before = self._state.won
        try:
            self._state, text = self._game.step(self._state, action.strip().lower())
        except UserError as error:
            raise UserError(f"the game file {self._file} cannot be played: {error}") from None
        return self._observe(text, reward=WIN_REWARD if self._state.won and not won_before else 0.0)

    def _observe(self, text: str, reward: float) -> Observation:
        won = self._state.won
        # Without "help", as in the paper's prompt: it tells about the game and does nothing in it.
        admissible = tuple(c for c in self._game.admissible(self._state) if c != "help") if self._admissible else ()
        return Observation(text, self._goal, reward, won, won, 100.0 * won, admissible)
