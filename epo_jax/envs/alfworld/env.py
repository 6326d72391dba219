"""The environment: an ALFWorld game as observations and actions, for agents and for the expert."""

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import engine
from epo_jax.envs.base import Observation, Task

WIN_REWARD = 10.0
BANNER = "-= Welcome to TextWorld, ALFRED! =-"
GOAL_PREFIX = "Your task is to: "


def split_intro(intro: str) -> tuple[str, str]:
    """Splits TextWorld's first text into the description of the room and the task without its full stop."""
    text, _, goal = intro.rpartition(GOAL_PREFIX)
    return text.removeprefix(BANNER).strip(), goal.strip().removesuffix(".")


class AlfworldEnv:
    """One live episode; all environments of a process share the loaded games."""

    def __init__(self, admissible: bool):
        self._admissible = admissible
        self._game: engine.Game | None = None
        self._state: engine.State | None = None
        self._goal = ""

    def reset(self, task: Task) -> Observation:
        """Starts the game of a task. Raises UserError with the name of the file if it cannot be played."""
        self._file = task["file"]
        self._game = engine.load_game(self._file)
        self._state = self._game.start
        text, self._goal = split_intro(self._game.intro)
        return self._observe(text, reward=0.0)

    def step(self, action: str) -> Observation:
        """Takes one command; ignores case and outer blanks. Only the winning step has a reward."""
        won_before = self._state.won
        try:
            self._state, text = self._game.step(self._state, action.strip().lower())
        except UserError as error:
            raise UserError(f"the game file {self._file} cannot be played: {error}") from None
        return self._observe(text, reward=WIN_REWARD if self._state.won and not won_before else 0.0)

    def _observe(self, text: str, reward: float) -> Observation:
        won = self._state.won
        # Without "help", as in the paper's prompt: it only describes the game.
        admissible = tuple(c for c in self._game.admissible(self._state) if c != "help") if self._admissible else ()
        return Observation(text, self._goal, reward, won, won, 100.0 * won, admissible)
