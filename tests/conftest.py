"""What all tests share: eight fake devices, strict shapes, and a guard against recompilation."""

import gc
import logging
import os
from collections import Counter
from pathlib import Path

from tests import xla

# Before the first import of jax, which reads them once. Processes that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla.of_tests()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import jax
import jaxtyping
import pytest

from epo_jax.common import compilation

# Tracing makes many objects and little garbage, for which Python would search again and again: a tenth of the time.
gc.set_threshold(50_000)

# Every annotated shape of these packages is checked at each call.
jaxtyping.install_import_hook(["epo_jax.objectives", "epo_jax.parity", "epo_jax.models"], "beartype.beartype")

# Programs are kept between sessions and shared by all processes, those that tests start included; tracing is not, so what
# `max_traces` counts stays the same. `pytest --cache-clear` deletes them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = Path(__file__).parents[1] / ".pytest_cache" / "d" / "programs" / compilation.cpu_kind()
    for _name, _value in (("compilation_cache_dir", str(_programs)), ("persistent_cache_min_compile_time_secs", 0)):
        jax.config.update(f"jax_{_name}", _value)
        os.environ[f"JAX_{_name.upper()}"] = str(_value)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        compilation.trim(_programs)

_traces: Counter[str] = Counter()


def _count_traces(event: str, _: float, **about) -> None:
    if event == "/jax/core/compile/jaxpr_trace_duration":
        _traces[about.get("fun_name", "")] += 1


jax.monitoring.register_event_duration_secs_listener(_count_traces)


# Folders whose files take longest; the first has whole commands.
_LONGEST = [Path(__file__).parent / room for room in (".", "parallel", "training", "rollout", "models")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: no process should begin one when the others have finished."""
    items.sort(key=lambda item: [*_LONGEST, item.path.parent].index(item.path.parent))


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """A compiled program takes memory maps, of which a process may have 65,530; those of all test files are too many."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def max_traces(caplog):
    """`max_traces(function, allowed)`: the test fails if jitted `function` is traced more often from then on.

    The failure names the function and, in JAX's own words, the argument that changed.
    """
    limits: dict[str, tuple[int, int]] = {}
    caplog.set_level(logging.WARNING, logger="jax")

    def allow(function, allowed: int) -> None:
        limits[function.__name__] = (_traces[function.__name__], allowed)

    with jax.explain_cache_misses(True):
        yield allow
    for name, (before, allowed) in limits.items():
        traced = _traces[name] - before
        if traced > allowed:
            told = [record.getMessage() for record in caplog.get_records("call")]
            reasons = [text for text in told if "TRACING CACHE MISS" in text and name in text]
            pytest.fail(f"{name} was traced {traced} times, {allowed} allowed:\n" + "\n".join(reasons), pytrace=False)
