"""Meshes of fake devices: what lies where, what crosses between devices, and that the result is one device's."""

import concurrent.futures
import dataclasses
import functools
import math
import re

import jax
import numpy as np
import optax
import pytest

from epo_jax.common.errors import UserError
from epo_jax.models.decoder import DecoderConfig, Lora, init_params, param_axes
from epo_jax.models.generate import cache_axes, init_cache
from epo_jax.parallel import mesh
from epo_jax.settings.config import base_config
from epo_jax.training.batch import step_batch
from epo_jax.training.optim import OptimConfig
from epo_jax.training.sft import warm_start
from epo_jax.training.state import init_state_on, state_shardings
from epo_jax.training.step import batch_shardings, make_train_step
from tests import tiny
from tests.rollout.test_windows import EPISODE_TOKENS, pack_split, split

MODEL = DecoderConfig(40, 16, 1, 8, 4, 4, 32)
SHAPES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
MICRO_ROWS, ROW = 8, tiny.ROW
fresh = jax.jit(init_params, static_argnums=0)


@functools.cache
def learner():
    config, hyper = tiny.learner("grpo+epo", MICRO_ROWS)
    objective = dataclasses.replace(config.objective, kl="none")
    optim = dataclasses.replace(config.optim, lr=1e-3)
    return dataclasses.replace(config, model=MODEL, objective=objective, reference=False, optim=optim), hyper


@functools.cache
def batch():
    return tiny.batched(tiny.episodes(0), 1, 2 * MICRO_ROWS)


@functools.cache
def programs():
    """The train step for each mesh, compiled. Compilation lets other threads work; tracing does not."""
    config, hyper = learner()
    lowered = {}
    for shape in SHAPES:
        on = mesh.make_mesh(*shape)
        lowered[shape] = make_train_step(config, on).lower(start(on), batch(), hyper)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        return dict(zip(SHAPES, executor.map(lambda low: low.compile(), lowered.values()), strict=True))


def start(on):
    params = fresh(MODEL, jax.random.key(0))
    return init_state_on(learner()[0], jax.device_put(params, mesh.shardings(on, params, param_axes(MODEL))), on)


def three_updates(shape):
    on, (_, hyper) = mesh.make_mesh(*shape), learner()
    state = start(on)
    placed = jax.device_put(batch(), batch_shardings(on)), jax.device_put(hyper, mesh.replicated(on))
    for _ in range(3):
        state, metrics = programs()[shape](state, *placed)
    return state, metrics


@functools.cache
def of_one_device():
    return jax.tree.map(np.asarray, three_updates(SHAPES[0]))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_three_updates_are_those_of_one_device(shape):
    state, metrics = three_updates(shape)
    alone, alone_metrics = of_one_device()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, alone.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), metrics, alone_metrics)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone.params, jax.tree.map(np.asarray, start(None_mesh()).params))
    assert max(jax.tree.leaves(moved)) > 2e-3  # three steps of Adam at a rate of 1e-3
    wanted = state_shardings(learner()[0], mesh.make_mesh(*shape))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 3]
    held = {math.prod(x.sharding.shard_shape(x.shape)) * shape[1] * shape[2] for x in moments}
    assert held == {x.size for x in moments}


def test_the_releases_mini_batches_are_those_of_one_device():
    """Packed as a run packs them, whatever its `algo.mini_batches`; rows change devices as each mini-batch takes its own."""
    config, hyper = tiny.learner("grpo+released", MICRO_ROWS, mini_turns=10)
    config = dataclasses.replace(config, model=MODEL, optim=dataclasses.replace(config.optim, lr=1e-3))
    run = base_config("toy")
    run.train.update(rows_tokens=ROW, rows_policy_tokens=tiny.POLICY)
    run.env.max_turns, run.agent.context, run.algo.mini_batches = tiny.TURNS, "chat", 2
    packed = step_batch(run, config.objective, 0, tiny.episodes(0), MICRO_ROWS)
    assert packed.rows.shape == (1,)
    found = []
    for on in (None_mesh(), mesh.make_mesh(2, 2, 2)):
        params = fresh(MODEL, jax.random.key(0))
        state = init_state_on(config, jax.device_put(params, mesh.shardings(on, params, param_axes(config.model))), on)
        placed = mesh.place(packed, batch_shardings(on)), jax.device_put(hyper, mesh.replicated(on))
        state, metrics = make_train_step(config, on)(state, *placed)
        found.append((jax.tree.map(np.asarray, state.params), metrics))
    (alone, alone_metrics), (together, metrics) = found
    assert metrics["updates"] == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together, alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), metrics, alone_metrics)


def first_moments(opt_state) -> np.ndarray:
    """After one update, a multiple of the gradient."""
    moments = [value for _, value in optax.tree_utils.tree_get_all_with_path(opt_state, "mu")]
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(moments)])


def batch_of_chats():
    return tiny.batched(tiny.episodes(0), 1, MICRO_ROWS)


def None_mesh():
    return mesh.make_mesh(1, 1, 1)


def collectives(text: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(operation, type, dimensions) of every array that an operation between devices takes or makes."""
    found = []
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in text.splitlines():
        if m := re.search(rf"= (.*?) ({names})(?:-start)?\(", line):
            for kind, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", m[1]):
                found.append((m[2], kind, tuple(map(int, dimensions.split(","))) if dimensions else ()))
    return found


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_what_crosses_between_devices(shape):
    """Weights are gathered along `fsdp` alone, tokens of activations along `tensor`; logits and the whole vocabulary never."""
    data, fsdp, tensor = shape
    seen = collectives(programs()[shape].as_text())
    assert seen
    words, policy = MODEL.vocab_size, MICRO_ROWS * tiny.POLICY // (data * fsdp)
    for operation, kind, dimensions in seen:
        if operation in ("all-gather", "all-to-all") and tensor > 1:
            assert words not in dimensions, f"{operation} of {kind}{list(dimensions)} holds all words"
        # [V / tensor, tokens of a chunk] and anything else with words beside tokens
        local = words // tensor
        assert not (local in dimensions and policy in dimensions), f"{operation} of logits {kind}{list(dimensions)}"
    gathered = {d for operation, kind, d in seen if operation == "all-gather" and kind == "f32"}
    weights = {d[-2:] for d in gathered if d[-2:] in {(16, 32 // tensor), (32 // tensor, 16)} and d != (1, MICRO_ROWS * 2, 24)}
    assert bool(weights) == (fsdp > 1), f"{sorted(gathered)}"
    # Each device keeps to its own rows: an activation of every row of a micro-batch is nowhere.
    assert not any(MICRO_ROWS * ROW in d for _, kind, d in seen if kind == "f32")


def test_a_step_without_a_finite_gradient_is_skipped_and_counted():
    config, hyper = learner()
    on = None_mesh()
    state = start(on)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    poisoned = batch()._replace(behaviour_log_prob=np.where(batch().policy_mask > 0, np.float32(np.nan), 0.0))
    placed = jax.device_put(poisoned, batch_shardings(on)), jax.device_put(hyper, mesh.replicated(on))
    state, metrics = programs()[SHAPES[0]](state, *placed)
    assert metrics["skipped_updates"] == 1.0 and not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    assert int(state.step) == 1
    _, metrics = programs()[SHAPES[0]](
        state, jax.device_put(batch(), placed[0].tokens.sharding and batch_shardings(on)), placed[1]
    )
    assert metrics["skipped_updates"] == 0.0


# Together these cover everything in a train step that sums over devices: both heads of a full KL, every critic, tied heads or
# not, adapters whose rank the devices do not divide, turns in one row or in rows of their own, both optimizers.
KINDS = {
    "window": (dict(tie_embeddings=True), dict(critic="own", episode_policy_tokens=EPISODE_TOKENS), True, (8, 1, 1)),
    "chat": (dict(tie_embeddings=False, lora=Lora(3, 6.0)), dict(critic="lora"), False, (1, 8, 1)),
    "trunk": (dict(tie_embeddings=False, lora=Lora(3, 6.0)), dict(critic="trunk"), True, (2, 2, 2)),
}


@pytest.mark.parametrize(
    "kind, dtype, bound",
    [("window", "float32", 1e-5), ("window", "bfloat16", 2**-8), ("chat", "bfloat16", 2**-8), ("trunk", "float32", 1e-5)],
)
def test_an_update_is_that_of_one_device_in_each_type(kind, dtype, bound):
    """The gradients of policy and critic in one rounding of the type, relative to their norm. XLA aborts the process where it
    cannot sum bfloat16 over devices."""
    of_model, of_learner, muon, shape = KINDS[kind]
    config, hyper = tiny.learner("ppo+epo", MICRO_ROWS, whiten=False)
    optim = dataclasses.replace(config.optim, lr=1e-3, muon=muon)
    config = dataclasses.replace(
        config, model=dataclasses.replace(MODEL, dtype=dtype, **of_model), optim=optim, critic_optim=optim, reference=True,
        objective=dataclasses.replace(config.objective, kl="full"), **of_learner,
    )  # fmt: skip
    batch = pack_split([split(t) for t in tiny.episodes(0)], 1, MICRO_ROWS) if kind == "window" else batch_of_chats()
    found = []
    for on in (None_mesh(), *(mesh.make_mesh(*sizes) for sizes in {shape, (2, 2, 2)})):
        params = fresh(config.model, jax.random.key(0))
        state = init_state_on(config, jax.device_put(params, mesh.shardings(on, params, param_axes(config.model))), on)
        placed = mesh.place(batch, batch_shardings(on)), jax.device_put(hyper, mesh.replicated(on))
        state, metrics = make_train_step(config, on)(state, *placed)
        assert metrics["skipped_updates"] == 0
        found.append([first_moments(s) for s in (state.opt_state, state.critic_opt_state)])
    for together in found[1:]:
        for alone, gradient in zip(found[0], together, strict=True):
            assert np.linalg.norm(alone) > 1e-3
            assert np.linalg.norm(gradient - alone) <= bound * np.linalg.norm(alone)


def test_no_rounding_decides_the_sign_of_a_divergence():
    """Before an update log pi - log pi_old and log pi - log pi_ref are 0 but for rounding, which is another with each split into
    micro-batches and over devices; KL-Cov's term and that of kl_kind="abs" then have no gradient."""
    found = []
    for micro_rows, shape, coef in ((8, (1, 1, 1), 0.0), (8, (1, 1, 1), 1.0), (1, (1, 1, 1), 1.0), (8, (4, 2, 1), 1.0)):
        config, hyper = tiny.learner("grpo+kl_cov", micro_rows, kl="abs", cov_fraction=0.5, cov_coef=coef, kl_coef=coef)
        on = mesh.make_mesh(*shape)
        params = tiny.as_params()
        state = init_state_on(config, jax.device_put(params, mesh.shardings(on, params, param_axes(config.model))), on)
        batch = tiny.batched(tiny.episodes(0), 1, 8)
        placed = mesh.place(batch, batch_shardings(on)), jax.device_put(hyper, mesh.replicated(on))
        found.append(first_moments(make_train_step(config, on)(state, *placed)[0].opt_state))
    without, *others = found
    for gradient in others:
        assert np.linalg.norm(gradient - without) < 1e-2 * np.linalg.norm(without)


@pytest.mark.parametrize(
    "muon, dtype, bound", [(False, "float32", 1e-4), (True, "float32", 1e-4), (True, "bfloat16", 5e-3)], ids=str
)
def test_a_warm_start_is_that_of_one_device(muon, dtype, bound):
    """Three updates of three rows each at a rate of 1e-2, on devices that three rows cannot be shared out to. The gradient of
    a key's bias is 0 but for rounding, which Adam would make a step of: there is none."""
    model, found = dataclasses.replace(MODEL, dtype=dtype, tie_embeddings=False, qkv_bias=False), []
    for on in (None_mesh(), mesh.make_mesh(8, 1, 1), mesh.make_mesh(2, 2, 2)):
        params = fresh(model, jax.random.key(0))
        params = jax.device_put(params, mesh.shardings(on, params, param_axes(model)))
        optim = OptimConfig(1e-2, 3, muon=muon)
        *_, (params, _, _, cross_entropy) = warm_start(params, tiny.episodes(0), model, optim, ROW, 3, 0.3, 0)
        found.append((jax.tree.map(np.asarray, params), cross_entropy))
    start = fresh(model, jax.random.key(0))
    alone, cross_entropy = found[0]
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), alone, start))) > 1e-2
    for params, on_mesh in found[1:]:
        np.testing.assert_allclose(on_mesh, cross_entropy, rtol=bound)
        apart = jax.tree.map(lambda a, b: np.abs(a - b).mean(), params, alone)
        assert max(jax.tree.leaves(apart)) < bound * 1e-2 * 3, apart


# How the parameters of every family of decoders, of adapters and of a critic are sharded.
PARAMETERS = {
    "embedding|lm_head": ("tensor", "fsdp"),
    "(q|k|v|gate|up)_proj": (None, "fsdp", "tensor"),
    "(o|down)_proj": (None, "tensor", "fsdp"),
    "(q|k|v|gate|up)_bias": (None, "tensor"),
    "(q|k|v|gate|up)_proj_lora_a": (None, "fsdp"),
    "(q|k|v|gate|up)_proj_lora_b": (None, None, "tensor"),
    "(o|down)_proj_lora_a": (None, "tensor"),
    "(o|down)_proj_lora_b": (None, None, "fsdp"),
    "(o|down)_bias|(input|post_attention|final|q|k)_norm|value": (),
}


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
@pytest.mark.parametrize(
    "lora, critic",
    [(None, None), (None, "own"), (None, "trunk"), (Lora(2, 4.0), None), *((Lora(2, 4.0), c) for c in ("own", "lora", "trunk"))],
    ids=str,
)
def test_every_array_of_a_state_is_sharded_like_its_parameter(lora, critic, muon):
    config, _ = tiny.learner("ppo+epo" if critic else "grpo+epo")
    model = dataclasses.replace(MODEL, lora=lora, tie_embeddings=False, o_bias=True, mlp_bias=True, qk_norm=True)
    optim = dataclasses.replace(config.optim, muon=muon)
    config = dataclasses.replace(config, model=model, reference=True, optim=optim)
    if critic:
        config = dataclasses.replace(config, critic=critic, critic_optim=optim)
    state = state_shardings(config, mesh.make_mesh(2, 2, 2))
    for name, spec in specs((state.params, state.base, state.reference, state.critic)).items():
        (expected,) = (axes for pattern, axes in PARAMETERS.items() if re.fullmatch(pattern, re.findall(r"\w+", name)[-1]))
        assert spec == expected, name
    assert bool(state.reference) == (lora is None) and bool(state.critic) == bool(critic)
    for params, opt_state in ((state.params, state.opt_state), (state.critic, state.critic_opt_state)):
        expected, moments, others = specs(params), 0, 0
        for name, spec in specs(opt_state).items():
            parameter = next((p for p in expected if name.endswith(p)), None)
            assert spec == (expected[parameter] if parameter else ()), name
            moments, others = moments + (parameter is not None), others + (parameter is None)
        # Muon has one moment of a matrix; AdamW has two of everything.
        assert moments == 2 * len(expected) - muon * sum("_proj" in name for name in expected)
        assert others >= 2 or not expected


def specs(shardings) -> dict[str, tuple]:
    """Name of each array -> the mesh axes of its axes, up to the last one that is sharded."""
    found = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        axes = list(sharding.spec)
        while axes and axes[-1] is None:
            axes.pop()
        found[jax.tree_util.keystr(path)] = tuple(axes)
    return found


def test_batches_are_sharded_over_rows_and_caches_over_slots_and_heads():
    on, rows = mesh.make_mesh(2, 2, 2), ("data", "fsdp")
    whole = {"rows", "returns", "group", "anchor", "episode", "seed"}
    for name, spec in specs(batch_shardings(on)._asdict()).items():
        assert spec == (() if name[2:-2] in whole else (None, rows)), name
    for dtype in (None, "int8"):
        cache = jax.eval_shape(functools.partial(init_cache, MODEL, 8, 32, dtype))
        placed = mesh.shardings(on, cache, cache_axes(cache))
        assert set(specs(placed.layers).values()) == {(rows, "tensor")}
        assert set(specs((placed.lengths, placed.hidden)).values()) == {(rows,)}


def test_an_array_that_nothing_places_is_an_error():
    axes, on = param_axes(MODEL), None_mesh()
    params = jax.eval_shape(functools.partial(init_params, MODEL), jax.random.key(0))
    with pytest.raises(ValueError, match="router"):
        mesh.shardings(on, params | {"router": np.zeros((4, 4))}, axes)
    with pytest.raises(ValueError, match=r"\['router'\] \[4, 4\] has the logical axes \('embed',\); name one for each dimension"):
        mesh.shardings(on, {"router": np.zeros((4, 4))}, {"router": ("embed",)})
    with pytest.raises(ValueError, match="no logical axis 'experts'"):
        mesh.shardings(on, {"router": np.zeros((4, 4))}, {"router": ("embed", "experts")})
    with pytest.raises(UserError, match=r"config.mesh.tensor=8 does not divide the 12 of \['lm_head'\]"):
        mesh.shardings(mesh.make_mesh(1, 1, 8), {"lm_head": np.zeros((12, 8))}, {"lm_head": ("vocab", "embed")})
    with pytest.raises(UserError, match="must divide the 4 key/value heads"):
        mesh.check(mesh.make_mesh(1, 1, 8), MODEL, 64)


@dataclasses.dataclass(frozen=True)
class Device:
    """What `make_mesh` asks a device."""

    platform: str
    process_index: int
    id: int


@pytest.mark.parametrize(
    "platform, processes, each, asked, expected",
    [
        ("tpu", 4, 4, (0, 0, 0), (1, 16, 1)),
        ("tpu", 4, 4, (0, 0, 4), (1, 4, 4)),
        ("tpu", 4, 4, (2, -1, -1), (2, 8, 1)),
        ("gpu", 2, 8, (0, 0, 0), (2, 8, 1)),
        ("gpu", 2, 8, (0, 4, 2), (2, 4, 2)),
        ("cpu", 1, 8, (0, 0, 0), (1, 1, 1)),
        ("cpu", 2, 8, (0, 0, 0), (2, 1, 1)),
        ("cpu", 1, 8, (0, 4, 0), (1, 4, 1)),
        ("cpu", 1, 8, (2, 2, 2), (2, 2, 2)),
    ],
)
def test_automatic_sizes(monkeypatch, platform, processes, each, asked, expected):
    made = {}
    monkeypatch.setattr(jax, "make_mesh", lambda shape, axes, devices, **_: made.update(shape=shape, devices=devices))
    mesh.make_mesh(*asked, devices=[Device(platform, p, each * p + i) for p in range(processes) for i in range(each)])
    assert made["shape"] == expected
    counts = np.bincount([d.process_index for d in made["devices"]], minlength=processes)
    assert set(counts) == {math.prod(expected) // processes}


@pytest.mark.parametrize("asked", [(16, 1, 1), (3, 4, 1), (0, 0, 16)])
def test_a_mesh_that_the_devices_cannot_make_is_refused(asked):
    with pytest.raises(UserError, match="config.mesh.data=.* 8 cpu devices|cpu devices"):
        mesh.make_mesh(*asked)
