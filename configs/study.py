"""What does EPO do, and when? The sweeps of the study, each written down before its first run.

    ./launch/study desert    one design: its initial policies, its sweeps and its page; the same command continues it

A design is one or two presets. The members of a seed begin from one initial policy, which a preset clones* made, for all
designs. Minutes are for two quiet cores with AVX-512; without it, take four times as many.

Every design reads success at temperature 1 (training, and the held-out splits at rollout.temperature) and at 0.4. Entropy has
collapsed once it exceeds five times that of the first step. That training success stays below half of its running best for five
steps is reported beside it, but a policy that wins 2 % and never changes does so in nine of ten runs of 80 steps, by chance. The
predictions are guesses, made before any run.
"""

from ml_collections import ConfigDict

from epo_jax.common.errors import UserError, nearest
from epo_jax.configs import alfworld, scienceworld
from epo_jax.settings.sweep import sweep_section

SCIENCEWORLD = ("clones_scienceworld", "edge", "edge_controls")


def clones(config: ConfigDict) -> None:
    """Initial policies of the reward desert: ALFWorld experts that nearly always waste every second turn.

    Half of the laptop preset's behavior cloning. 25 minutes for five seeds.
    """
    config.env.update(hesitation=0.98)
    config.warm_start.update(steps=1500)
    only_clone(config)


def clones_laptop(config: ConfigDict) -> None:
    """Initial policies of the laptop preset. 45 minutes for five seeds."""
    only_clone(config)


def clones_scienceworld(config: ConfigDict) -> None:
    """Initial policies of the laptop preset on ScienceWorld."""
    only_clone(config)


def desert(config: ConfigDict) -> None:
    """Design 1, reward desert: does the corridor hold entropy if reward is nearly absent?

    So few turns that an episode is won only if the policy wastes none: nearly every group is uniform, and has no advantage.

    Primary number: runs of five whose entropy collapses within 80 RL steps. Five against none is p = 0.008 (Fisher).

    Predicted at lam 0.02: EPO-Base equals the indicator to the bit, exceeds eight times its first entropy by step 20, and wins
    under 1 % in four of five seeds (80 % sure); the paper's coefficients do as EPO-Base (90 %); the laptop preset's corridor
    (alpha 5) keeps entropy under 2.5 times the first and wins more than EPO-Base in five of five (75 %); EPO above plain GRPO:
    even odds.
    """
    starve(config)
    config.epo.update(lam=0.02)
    arms = ("grpo", "grpo+epo_base", "grpo+epo", "grpo+epo_paper", "grpo+epo_initial", "grpo+epo_indicator", "grpo+released")
    config.sweep.update(arms=arms)


def desert_weak(config: ConfigDict) -> None:
    """Design 1 with a quarter of the bonus, lam 0.005."""
    starve(config)
    config.epo.update(lam=0.005)
    config.sweep.update(arms=("grpo+epo_base", "grpo+epo"))


def ppo(config: ConfigDict) -> None:
    """Design 2, PPO's own oscillation (the paper's figure 1c): who makes it, and does the corridor remove it?

    Where all returns are equal, whitening turns the critic's noise into advantages of full size.

    Primary number: roughness of entropy, mean |H_k - H_(k-1)| / mean H.

    Predicted: plain PPO's roughness is two to four times GRPO's in the desert (60 %); EPO with the appendix's corridor halves
    the highest entropy (55 %); advantages that are not whitened remove most of it without an entropy term (70 %).
    """
    starve(config)
    config.epo.update(lam=0.02, kappa_l=0.5, kappa_r=1.5)
    config.algo.update(critic_lr=config.optim.lr)
    config.sweep.update(arms=("ppo", "ppo+epo_base", "ppo+epo", "ppo+released"))


def ppo_unwhitened(config: ConfigDict) -> None:
    """The control of design 2: plain PPO whose advantages are not whitened."""
    ppo(config)
    config.algo.update(whiten=False)
    config.sweep.update(arms=("ppo",))


def edge(config: ConfigDict) -> None:
    """Design 3, ScienceWorld at the edge of stability: is it the step size or the bonus that breaks a run?

    Twice the laptop preset's learning rate. Primary number: success on valid_unseen after 60 RL steps.

    Predicted: plain GRPO and EPO-Base fall alike, so the step size is the cause (65 %); alpha over 20 with kappa_r 1.1 holds
    entropy under 0.9 nats and reaches 40 % (55 %).
    """
    config.optim.update(lr=4e-4)
    config.train.update(steps=60)
    config.eval.update(every=20)
    config.sweep.update(arms=("grpo+epo",), seeds=(0, 1, 2))
    config.sweep.over.epo.update(alpha=(5.0, 20.0, 80.0), kappa_r=(1.1, 1.5))


def edge_controls(config: ConfigDict) -> None:
    """The controls of design 3: no entropy term, and no corridor."""
    edge(config)
    config.sweep.update(arms=("grpo", "grpo+epo_base"))
    config.sweep.over.epo.update(alpha=(), kappa_r=())


def dose(config: ConfigDict) -> None:
    """Design 4, dose of the bonus: does the corridor widen the range of lam that can be used?

    Primary number: success on valid_unseen after 60 RL steps, by lam.

    Predicted: the two agree up to lam 0.01, and at 0.1 EPO-Base wins less than half of what EPO wins.
    """
    config.train.update(steps=60)
    config.eval.update(every=30)
    config.sweep.update(arms=("grpo+epo_base", "grpo+epo"))
    config.sweep.over.epo.update(lam=(0.003, 0.01, 0.03, 0.1))


def cause(config: ConfigDict) -> None:
    """Design 5, cause or symptom: does a corridor that comes late still help?

    The desert with EPO, whose corridor begins at RL step 0, 10, 20, 30 or never. Until then all five are one run, to the bit.

    Primary number: training success over the last ten RL steps.

    Predicted: a corridor from step 10 on ends as one from step 0 on; one from step 30 on lowers entropy but not success.
    """
    starve(config)
    config.epo.update(lam=0.02)
    config.sweep.update(arms=("grpo+epo",), seeds=(0, 1, 2))
    config.sweep.over.epo.update(start_step=(0, 10, 20, 30, 80))


def seeds(config: ConfigDict) -> None:
    """Design 6, the spread between repetitions: twenty seeds of one arm from one initial policy, as of one pretrained model.

    Primary number: how often two groups of two seeds, each judged by sixteen episodes, differ by as much as the paper's pairs
    do, although nothing differs (benchmarks/repetitions.py resamples the full evaluations).
    """
    config.train.update(steps=60)
    config.eval.update(every=5, splits=("valid_unseen",), also_temperatures=())
    config.sweep.update(arms=("grpo+epo",), seeds=tuple(range(20)))


def starve(config: ConfigDict) -> None:
    """The reward desert: few turns, and evaluations at both temperatures."""
    config.env.update(hesitation=0.98, max_turns=8)
    config.train.update(steps=80)
    config.eval.update(every=40)


def only_clone(config: ConfigDict) -> None:
    """No more than the initial policies: the one RL step is not used."""
    config.train.update(steps=1)
    config.eval.update(every=0)
    config.checkpoint.update(keep_best=0)
    config.sweep.update(arms=("grpo",))


PRESETS = {
    preset.__name__: preset
    for preset in (
        clones, clones_laptop, clones_scienceworld,
        desert, desert_weak, ppo, ppo_unwhitened, edge, edge_controls, dose, cause, seeds,
    )
}  # fmt: skip


def get_config(preset: str = "desert") -> ConfigDict:
    if preset not in PRESETS:
        near = nearest(preset, PRESETS)
        raise UserError(f"configs/study.py has no preset {preset!r}{near}; choose one of {', '.join(map(repr, PRESETS))}.")
    config = (scienceworld if preset in SCIENCEWORLD else alfworld).get_config("laptop")
    config.eval.update(also_temperatures=(config.rollout.temperature,))
    config.metrics.update(trajectories=2, trajectories_every=40, gradient_norms=True)
    config.checkpoint.update(every=10)
    config.sweep = sweep_section()
    config.sweep.update(seeds=(0, 1, 2, 3, 4))
    PRESETS[preset](config)
    return config
