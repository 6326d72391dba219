"""The release's recorded outputs: `tests/golden/`, or the folder named by EPO_GOLDEN_DIR.

`check(function, reproduce)` runs every recorded case of a function through `reproduce(inputs, **kwargs) -> outputs` and
compares every output, and every recorded gradient with the gradient of ours; it fails where one is left out. String inputs
(group, trajectory and observation names) arrive as integers. NaN equals NaN. `test_golden_coverage.py` sees to it that
every recorded function is checked.
"""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

FOLDER = pathlib.Path(os.environ.get("EPO_GOLDEN_DIR") or pathlib.Path(__file__).parents[1] / "golden")


@functools.cache
def manifest() -> list[dict]:
    return json.loads((FOLDER / "manifest.json").read_text())["cases"]


@functools.cache
def _arrays(file: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / file))


def cases(function: str, raising: bool = False) -> list[dict]:
    return [c for c in manifest() if c["function"] == function and bool(c.get("raises")) == raising]


def arrays(case: dict, kind: str) -> dict[str, np.ndarray]:
    """The arrays of a case by name; `kind` is "in", "out" or "grad"."""
    prefix = f"{case['case']}__{kind}__"
    return {k.removeprefix(prefix): v for k, v in _arrays(case["file"]).items() if k.startswith(prefix)}


def inputs(case: dict) -> dict[str, jax.Array]:
    """As device arrays; names become integers, and int64 and float64 become int32 and float32."""
    device = {}
    for name, value in arrays(case, "in").items():
        if value.dtype.kind == "U":
            value = np.unique(value, return_inverse=True)[1]
        device[name] = jnp.asarray(value, jnp.int32 if value.dtype.kind in "iu" else jnp.float32)
    return device


@functools.cache
def _compiled(reproduce, settings: str, with_gradient: tuple[str, ...]):
    def run(arguments, numbers):
        keywords = json.loads(settings) | numbers

        def first(differentiated):
            outputs = reproduce({**arguments, **differentiated}, **keywords)
            return next(iter(outputs.values())).sum(), outputs

        if not with_gradient:
            return first({})[1], {}
        gradients, outputs = jax.grad(first, has_aux=True)({name: arguments[name] for name in with_gradient})
        return outputs, gradients

    # Hundreds of small programs run once each: what counts is the time to compile them.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def recorded(function: str) -> set[tuple[str, str, str]]:
    """(case, "out" or "grad", name) of everything that the manifest says was recorded of a function's return."""
    return {
        (case["case"], kind, name)
        for case in cases(function)
        for kind, field in (("out", "outputs"), ("grad", "grads"))
        for name, *_ in case[field]
    }


def check(function: str, reproduce, rtol: float = 1e-5, atol: float = 1e-6, compiled: bool = True) -> None:
    """Asserts that every case of `function` is reproduced, every array of it. With `compiled=False`, `reproduce` runs as it
    stands and sees all of its keywords."""
    failures, compared = [], set()
    for case in cases(function):
        expected_out, expected_grad = arrays(case, "out"), arrays(case, "grad")
        if compiled:
            numbers = {k: v for k, v in case["kwargs"].items() if isinstance(v, float)}
            settings = json.dumps({k: v for k, v in case["kwargs"].items() if k not in numbers}, sort_keys=True)
            run = _compiled(reproduce, settings, tuple(sorted(expected_grad)))
            outputs, gradients = jax.device_get(run(inputs(case), numbers))
        else:
            outputs, gradients = reproduce(inputs(case), **case["kwargs"]), {}
        for kind, expected, found in (("out", expected_out, outputs), ("grad", expected_grad, gradients)):
            for name, value in expected.items():
                compared.add((case["case"], kind, name))
                try:
                    np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol)
                except (AssertionError, KeyError) as error:
                    failures.append(f"{case['case']} {kind} {name} ({case['note']}, {case['kwargs']}): {error!r}")
    assert not failures, f"{len(failures)} of {len(compared)} arrays of {function} differ:\n" + "\n".join(failures[:3])
    assert compared == recorded(function) != set(), f"{FOLDER}: the arrays of {function} are not those of the manifest."
