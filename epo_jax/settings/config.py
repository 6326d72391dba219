"""Every setting of a run: what it means, its unit and the paper's value.

`base_config` is the list to read. `configs/*.py` change values of it, the command line overrides single keys
(`--config.epo.lam=0.002`), and `validate` refuses impossible values before anything loads. The paper is
arXiv 2509.22576 (v2); a value that the paper leaves open is the released code's or, failing that, ours.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from epo_jax.common.errors import UserError, nearest

AGGREGATIONS = ("trajectory", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")

# Allowed values of the keys that name a variant.
CHOICES: dict[str, tuple[str, ...]] = {
    "agent.style": ("bare", "tagged"),
    "agent.context": ("window", "chat"),
    "warm_start.optimizer": ("adamw", "muon"),
    "init_from.state": ("weights", "everything"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "attention", "full"),
    "algo.critic": ("own", "lora", "trunk"),
    "rollout.dtype": ("", "float32", "bfloat16"),
    "rollout.cache_dtype": ("", "int8"),
    "algo.kl_kind": ("k1", "abs", "k2", "k3", "full"),
    "algo.kl_place": ("loss", "reward"),
    "algo.kl_controller": ("fixed", "adaptive"),
    "algo.gae_scope": ("trajectory", "turn"),
    "algo.old_log_prob": ("auto", "learner", "sampler"),
    "algo.format_penalty_place": ("after", "before"),
    "algo.aggregation": AGGREGATIONS,
    "epo.penalty": ("hinge", "indicator"),
    "epo.scope": ("token", "turn", "trajectory", "batch"),
    "epo.history": ("cumulative", "sliding", "ema", "initial"),
    "epo.history_index": ("global", "turn"),
    "epo.phase": ("exponential", "constant", "released"),
    "epo.aggregation": AGGREGATIONS,
}

# The projections of a layer that adapters can go beside.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Advantages measured against the other episodes of the same task, which need a group of two or more.
GROUP_ALGORITHMS = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "gigpo", "dapo", "gspo")

SPLITS = ("train", "valid_seen", "valid_unseen")


def base_config(env: str = "alfworld", **options: Any) -> ConfigDict:
    """All keys with the paper's values, for environment `env`: "alfworld", "scienceworld", or one of your own, whose keys
    are `options` and those that every environment has."""
    config = ConfigDict()
    config.seed = 0  # of everything random: games of an episode, initial weights, sampling

    config.env = ENV_SECTIONS[env]() if env in ENV_SECTIONS else _own(env, options)

    config.agent = agent = ConfigDict()
    agent.style = "tagged"  # "tagged": the paper's instructions, <think> and <action>; "bare": the turn is the action
    agent.response_tokens = 512  # tokens that the policy may emit in one turn
    agent.context = "window"  # "window": each turn's prompt is built anew from the last turns; "chat": one growing conversation
    agent.history_turns = 2  # turns that a window repeats in full
    agent.history_actions = env == "scienceworld"  # a window also lists the actions of all earlier turns
    agent.max_tokens = 2560  # tokens of a context with its answer; a conversation that would pass it ends, a window is cut

    config.model = model = ConfigDict()
    # Folder, GGUF file or hub name of a Qwen2, Qwen2.5, Qwen3 or Llama model; "" = from scratch, of the sizes below.
    model.path = "Qwen/Qwen2.5-3B-Instruct"
    model.d_model = 2048  # width
    model.num_layers = 36
    model.num_heads = 16
    model.num_kv_heads = 2
    model.head_dim = 128
    model.d_ff = 11008  # width of the gated feed-forward layer
    model.vocab_size = 151936  # from scratch: rows of the embedding, and the most tokens of a BPE trained on expert episodes
    model.rope_theta = 1_000_000.0
    model.norm_eps = 1e-6
    model.tie_embeddings = True
    model.qkv_bias = True
    model.dtype = "bfloat16"  # of the arithmetic; weights and reductions stay float32
    # What a layer keeps for the backward pass, which computes the rest again: "none" everything, "dots" what matrix products
    # made, "attention" what attention gave, "full" nothing. Less memory, up to a quarter more arithmetic.
    model.remat = "full"
    model.lora_rank = 0  # of adapters that RL trains in place of the weights; 0 = it trains the weights
    model.lora_alpha = 32.0  # adapters are scaled by lora_alpha / lora_rank
    model.lora_targets = LORA_TARGETS

    # A run that begins from the checkpoint of another: it takes the place of model.path and of the warm start.
    config.init_from = init_from = ConfigDict()
    init_from.run = ""  # the other's run folder; "" = none
    init_from.step = -1  # RL steps of that checkpoint; -1 = the newest
    # "weights": the policy alone, as it was then; "everything": also the optimizer, critic, reference, entropy history and the
    # number of RL steps, from which it goes on.
    init_from.state = "weights"

    # Devices along each axis of the mesh (epo_jax/parallel/mesh.py); 0 or -1 = automatic: one CPU, or all GPUs or TPUs.
    config.mesh = mesh = ConfigDict()
    mesh.data = 0  # share the rows of a batch, with a copy of the weights each
    mesh.fsdp = 0  # share the rows and the weights; divides model.d_model
    mesh.tensor = 0  # share heads, hidden units and words, by which weights and activations of a row take less room

    config.warm_start = warm_start = ConfigDict()
    warm_start.episodes = 0  # expert episodes cloned before RL; 0 = none
    warm_start.steps = 0  # updates
    warm_start.batch_tokens = 16384  # tokens of one update, on all devices together
    warm_start.lost = False  # True: also clone the expert episodes that were lost
    warm_start.optimizer = "adamw"  # "muon": orthogonalises the layers' matrices, learns more from the same updates
    warm_start.lr = 1e-5
    warm_start.copies = 0  # renamed versions of each expert episode that are added to it
    warm_start.prompt_weight = 0.0  # of also predicting the game's tokens, from which a blank model learns its words

    config.rollout = rollout = ConfigDict()
    rollout.groups = 16  # task instances per RL step
    rollout.group_size = 8  # episodes of each instance
    rollout.slots = 128  # episodes alive at once, on all hosts together
    rollout.lanes = 2  # groups of slots that work in turn, one while another waits for its environments
    rollout.ahead = 2  # resets that each lane sends before a slot is free
    rollout.block = 64  # tokens decoded at most before a slot whose turn ended can go on
    rollout.dtype = ""  # of weights and arithmetic while sampling; "" = model.dtype; needs algo.importance_cap where it differs
    rollout.cache_dtype = ""  # "int8": keys and values in 8 bits; "" = as the arithmetic
    # Devices that share the slots of each lane, each with a copy of the weights; where the mesh has several, they do instead.
    rollout.devices = 1
    rollout.temperature = 1.0
    rollout.resample = 3  # rounds of `groups` more that dapo plays at most while groups of equal returns fill its batch

    config.algo = algo = ConfigDict()
    # Base algorithm and overlays, as objectives/registry.py names them: "ppo+epo" learns a critic, "grpo" is plain GRPO,
    # "grpo+epo_wo_dw", "grpo+ea", "dapo+epo" ... What an arm is defined by, it sets; everything else is taken from here.
    algo.name = "grpo+epo"
    algo.epochs = 1  # passes over the episodes of one RL step
    algo.mini_batches = 8  # optimiser updates per pass
    # Packed rows per forward and backward pass of each device (along `data` and `fsdp`); changes memory, not the result.
    algo.micro_batch_rows = 1
    algo.kl_coef = 0.01  # weight of the divergence from the frozen reference policy; 0 = no reference is kept
    algo.kl_kind = "k3"  # k1, abs, k2 and k3 are estimates from the sampled token; "full" sums over the vocabulary
    algo.kl_place = "loss"  # "reward": taken from each token's reward instead
    algo.kl_controller = "fixed"  # "adaptive": kl_coef is where it starts; it follows the divergence (arXiv 1909.08593)
    algo.kl_target = 0.1  # nats per policy token, for "adaptive"
    algo.kl_horizon = 10_000.0  # episodes over which "adaptive" acts; smaller is quicker
    # Whose log-probabilities before the update the ratios are taken against: "sampler" what was recorded while sampling,
    # "learner" its own, for one more forward pass; "auto" the sampler's where model, rollout and cache are all float32.
    # With importance_cap, which compares the two, always the learner's.
    algo.old_log_prob = "auto"
    algo.clip_low = 0.2  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    algo.clip_high = 0.2
    algo.dual_clip = 3.0  # bound on the ratio where the advantage is negative
    algo.gamma = 1.0  # discount per policy token
    algo.gae_lambda = 1.0
    algo.gae_scope = "trajectory"  # "turn": the episode's return on every turn's last token, GAE inside the turn (release)
    algo.whiten = True  # advantages of ppo, reinforce_pp and reinforce_pp_baseline over the policy tokens of the step
    algo.importance_cap = 0.0  # truncated importance sampling: bound on pi_learner / pi_sampler; 0 = taken to agree
    algo.value_clip = 0.5
    algo.value_coef = 1.0
    algo.critic_lr = 1e-5
    # The decoder that the critic looks at: its own, the policy's frozen base with adapters of its own, or the policy's as it
    # stands, to which no gradient of the value goes.
    algo.critic = "own"
    algo.format_penalty = 0.1  # for a turn that holds no action
    algo.format_penalty_place = "after"  # taken from its advantage; "before": from its reward, before normalisation (release)
    algo.gigpo_weight = 1.0  # of gigpo's step advantage, beside its episode advantage
    algo.aggregation = "token-mean"  # how the policy loss is averaged
    # Arms with "+released" alone: turns of a mini-batch, which takes the place of algo.mini_batches, and of a micro-batch.
    # The release's PPO on ScienceWorld has 64 and 8.
    algo.released_mini_turns = 256 if env == "alfworld" else 128
    algo.released_micro_turns = 32 if env == "alfworld" else 16

    config.epo = epo = ConfigDict()
    epo.lam = 0.001  # weight of the whole term; 0 = the base algorithm alone
    epo.alpha = 0.1 if env == "alfworld" else 0.05  # weight of the corridor penalty inside it
    epo.kappa_l = 0.0  # corridor: [kappa_l, kappa_r] times the mean entropy of earlier steps
    epo.kappa_r = 2.0
    epo.gamma = 3.0  # decay of the phase weight beta_k = 1 + exp(-gamma k / k_mid)
    epo.penalty = "hinge"  # "indicator" is the released code's, without gradient
    epo.scope = "token"  # what entropy is averaged over before it is compared with the corridor
    epo.history = "cumulative"  # which earlier steps make the corridor's centre
    epo.window = 10  # steps, for history "sliding"
    epo.ema_decay = 0.9  # per step, for history "ema"
    epo.history_index = "global"  # "turn": one history per turn number
    epo.phase = "exponential"
    epo.turn_gate = False  # True: penalty only from the middle turn on
    epo.aggregation = "trajectory"  # mean over episodes of mean over turns of mean over tokens (Eq. 2)
    epo.turn_decay = 0.0  # turn t weighs exp(-turn_decay t / max_turns) inside that mean; 0 = all alike

    config.control = control = ConfigDict()  # coefficients of the entropy controls beside EPO, read by their own arms
    control.shaping_scale = 0.4  # +ea: the bonus per nat of entropy ...
    control.shaping_kappa = 2.0  # ... and the share 1 / kappa of the advantage that it may reach
    control.empg_sharpness = 1.0  # +empg: how much more a confident turn weighs
    control.empg_bonus = 0.1  # for a turn that leads to a confident one
    control.cov_fraction = 0.0002  # +clip_cov, +kl_cov: share of the policy tokens that are treated
    control.cov_low = 1.0  # +clip_cov: the band of covariances that it draws from
    control.cov_high = 5.0
    control.cov_coef = 1.0  # +kl_cov: weight of the divergence
    control.nucleus = 0.8  # +siren: the share of the probability whose words make an entropy
    control.peak_quantile = 0.8  # +siren: of an episode's entropies, above which they are regularised
    control.target_entropy = 0.2  # +target: nats per policy token; epo.lam is where the coefficient starts
    control.target_delta = 1e-4  # its move per RL step
    control.target_cap = 0.005  # the most it may become

    config.optim = optim = ConfigDict()
    optim.lr = 5e-6
    optim.warmup_ratio = 0.1  # share of all updates over which the rate rises from 0
    optim.floor_ratio = 0.2  # where the cosine ends, as a share of lr
    optim.weight_decay = 0.01
    optim.clip_norm = 1.0  # global norm of the gradient
    optim.b1 = 0.9
    optim.b2 = 0.999

    config.train = train = ConfigDict()
    train.steps = 150 if env == "alfworld" else 125  # RL steps K
    # RL steps in a row without one finite gradient (such updates are skipped), after which the run ends. A sweep's member
    # stops at the first.
    train.max_skipped = 3
    train.rows_tokens = 16384  # length of a packed row; at least agent.max_tokens
    train.rows_policy_tokens = 8192  # policy tokens a packed row has room for; also the most in a conversation

    config.eval = evaluation = ConfigDict()
    evaluation.every = 5  # RL steps between evaluations; 0 = only at the end
    evaluation.temperature = 0.4
    evaluation.top_k = 0  # likeliest tokens to choose from; 0 = all
    evaluation.top_p = 1.0  # share of the probability that the likeliest tokens to choose from must hold
    evaluation.splits = ("valid_seen", "valid_unseen")
    evaluation.before = True  # also before the first RL step

    config.metrics = metrics = ConfigDict()
    # Episodes kept for reading (trajectories.jsonl), of each evaluated split and of each training step that is sampled; 0 = none.
    metrics.trajectories = 6
    metrics.trajectories_every = 10  # RL steps between training steps that are sampled; 0 = evaluations only
    metrics.trajectories_megabytes = 16.0  # bound on the file; past it, steps from its middle go
    metrics.wandb_project = ""  # Weights & Biases project that metrics and evaluations go to as well; "" = none

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 10  # RL steps
    checkpoint.keep = 2  # newest ones kept on disk
    # Kept besides: so many of highest success on the last of eval.splits; a new best is saved at once. 0 = none (as in a sweep).
    checkpoint.keep_best = 1
    checkpoint.folder = ""  # where they go, on this machine or in a bucket (gs://...); "" = the run folder
    return config


def _alfworld() -> ConfigDict:
    env = ConfigDict()
    env.name = "alfworld"
    env.data_dir = ""  # cache of generated games; "" = $EPO_JAX_DATA, else ~/.cache/epo_jax
    env.workers = 2  # processes of each host that hold the live games
    env.max_turns = 50
    env.train_games = 3553  # generated games per split, the dataset's own counts; unused when ALFWORLD_DATA is set
    env.valid_seen_games = 140
    env.valid_unseen_games = 134
    # None = the whole room; a number = that many of its receptacles, drawn by seed, with all that the task needs.
    env.max_receptacles = config_dict.placeholder(int)
    env.hints = "admissible"  # at every turn, the commands that work now; "none": no list
    env.hesitation = 0.0  # share of the warm start's expert episodes that waste a turn before every move; leaves room for RL
    env.mistakes = 0.0  # how often they try what cannot be done, which is not cloned: shows the way back from a mistake
    env.seed = 0  # of the generator
    return env


def _scienceworld() -> ConfigDict:
    env = ConfigDict()
    env.name = "scienceworld"
    env.data_dir = ""  # cache of gold paths; "" = $EPO_JAX_DATA, else ~/.cache/epo_jax
    env.workers = 8  # processes, each with one Java simulator (at most 1.2 GB) for up to 32 live episodes
    env.max_turns = 30
    env.tasks = ()  # task names; () = all 30
    env.level = "L1"  # valid_unseen: "L1" other variations of the trained tasks; "L2" ten task types never trained on
    env.hints = "objects"  # at every turn, the things in reach; "admissible": every valid action (slow); "none": no list
    env.simplification = "easy"  # or "" (none), or names of the simulator's simplifications, comma-separated
    env.train_variations = -1  # variations per task of each split; -1 = all
    env.valid_seen_variations = -1
    env.valid_unseen_variations = -1
    return env


def _own(name: str, options: dict[str, Any]) -> ConfigDict:
    return ConfigDict({"name": name, "workers": 2, "max_turns": 50, **options})  # with the meaning they have elsewhere


ENV_SECTIONS = {"alfworld": _alfworld, "scienceworld": _scienceworld}


def validate(config: ConfigDict) -> None:
    """Raises UserError, in one sentence naming key and mend, for a value that no run could use."""
    values = flatten(config)
    for key, allowed in CHOICES.items():
        if key in values and values[key] not in allowed:
            listed = ", ".join(repr(choice) for choice in allowed)
            raise UserError(f"config.{key}={values[key]!r} is not known; choose one of {listed}{nearest(values[key], allowed)}.")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key}={value} is not a finite number.")
    for keys, holds, rule in _RANGES:
        for key in keys.split():
            if values.get(key) is not None and not holds(values[key]):
                raise UserError(f"config.{key}={values[key]} must be {rule}.")
    _validate_pairs(config)


def _validate_pairs(config: ConfigDict) -> None:
    """The rules that hold between keys."""
    epo, model, algo, rollout, agent = config.epo, config.model, config.algo, config.rollout, config.agent
    if epo.kappa_l > epo.kappa_r:
        raise UserError(f"config.epo.kappa_l={epo.kappa_l} must not exceed config.epo.kappa_r={epo.kappa_r}.")
    if config.control.cov_low >= config.control.cov_high:
        raise UserError(
            f"config.control.cov_low={config.control.cov_low} must be below config.control.cov_high={config.control.cov_high}."
        )
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"config.model.num_heads={model.num_heads} must be a multiple of "
            f"config.model.num_kv_heads={model.num_kv_heads}."
        )
    if model.head_dim % 2:
        raise UserError(f"config.model.head_dim={model.head_dim} must be even, as rotary positions turn pairs.")
    if algo.name.split("+")[0] in GROUP_ALGORITHMS and rollout.group_size < 2:
        raise UserError(
            f"config.rollout.group_size={rollout.group_size} must be at least 2 for config.algo.name={algo.name!r}, "
            "which compares episodes of one task."
        )
    if algo.released_mini_turns % algo.released_micro_turns:
        raise UserError(
            f"config.algo.released_mini_turns={algo.released_mini_turns} must be a multiple of "
            f"config.algo.released_micro_turns={algo.released_micro_turns}."
        )
    if algo.kl_kind == "full" and algo.kl_place == "reward":
        raise UserError(
            "config.algo.kl_kind='full' belongs in the loss; for config.algo.kl_place='reward' choose an estimate "
            "from the sampled token: 'k1', 'abs', 'k2' or 'k3'."
        )
    if algo.kl_controller == "adaptive" and not algo.kl_coef:
        raise UserError(
            "config.algo.kl_coef=0 must be positive for config.algo.kl_controller='adaptive', which multiplies it."
        )
    episodes = rollout.groups * rollout.group_size
    if rollout.slots > episodes:
        raise UserError(
            f"config.rollout.slots={rollout.slots} must not exceed the {episodes} episodes of a step "
            "(config.rollout.groups x config.rollout.group_size)."
        )
    if agent.response_tokens >= agent.max_tokens:
        raise UserError(
            f"config.agent.response_tokens={agent.response_tokens} must be below "
            f"config.agent.max_tokens={agent.max_tokens}."
        )
    if config.train.rows_tokens < agent.max_tokens:
        raise UserError(
            f"config.train.rows_tokens={config.train.rows_tokens} must be at least "
            f"config.agent.max_tokens={agent.max_tokens}, so that an episode fits in a row."
        )
    if config.train.rows_policy_tokens < agent.response_tokens:
        raise UserError(
            f"config.train.rows_policy_tokens={config.train.rows_policy_tokens} must be at least "
            f"config.agent.response_tokens={agent.response_tokens}, so that a turn fits in a row."
        )
    if algo.mini_batches > episodes:
        raise UserError(
            f"config.algo.mini_batches={algo.mini_batches} must not exceed the {episodes} episodes of a step."
        )
    if config.warm_start.copies and config.env.name != "alfworld":
        raise UserError(f"config.warm_start.copies={config.warm_start.copies} must be 0: only ALFWorld's experts are renamed.")
    if config.warm_start.episodes and not config.warm_start.steps:
        raise UserError("config.warm_start.steps must be positive when config.warm_start.episodes is.")
    for target in model.lora_targets:
        if target not in LORA_TARGETS:
            raise UserError(f"config.model.lora_targets names {target!r}; choose from {', '.join(map(repr, LORA_TARGETS))}.")
    if model.lora_rank and not model.lora_targets:
        raise UserError("config.model.lora_targets is empty; name a projection, or set config.model.lora_rank=0.")
    if algo.critic == "lora" and not model.lora_rank:
        raise UserError("config.algo.critic='lora' needs the policy's frozen base: set config.model.lora_rank, or choose 'own'.")
    if rollout.devices > 1 and any(size > 1 for size in config.mesh.values()):
        raise UserError(
            f"config.rollout.devices={rollout.devices} must be 1 with a mesh of several devices (config.mesh), which share the "
            "slots too."
        )
    for split in config.eval.splits:
        if split not in SPLITS:
            near = nearest(split, SPLITS)
            raise UserError(f"config.eval.splits names {split!r}{near}; choose from {', '.join(map(repr, SPLITS))}.")


SEED_RULE = "a whole number from 0 to 4294967295, as random keys are made from 32 bits"


def is_seed(value: int) -> bool:
    """Whether no smaller seed has the same random keys."""
    return 0 <= value < 2**32


# (keys, what must hold, the rule in words). None values are skipped: they mean "no limit".
_RANGES = (
    (
        "env.workers env.max_turns env.max_receptacles env.train_games env.valid_seen_games env.valid_unseen_games "
        "agent.response_tokens agent.max_tokens model.d_model model.num_layers model.num_heads model.num_kv_heads "
        "model.head_dim model.d_ff warm_start.batch_tokens rollout.groups rollout.group_size rollout.slots rollout.lanes "
        "rollout.block rollout.devices "
        "algo.epochs algo.mini_batches algo.micro_batch_rows algo.released_mini_turns algo.released_micro_turns epo.window "
        "train.steps train.rows_tokens train.rows_policy_tokens checkpoint.every checkpoint.keep train.max_skipped",
        lambda value: value >= 1,
        "a whole number of at least 1",
    ),
    (
        "env.seed agent.history_turns rollout.ahead rollout.resample warm_start.episodes warm_start.steps eval.every "
        "eval.top_k model.lora_rank algo.kl_coef algo.value_clip algo.value_coef algo.importance_cap algo.format_penalty "
        "algo.gigpo_weight control.shaping_scale control.empg_sharpness control.empg_bonus control.cov_coef "
        "control.target_entropy control.target_delta control.target_cap epo.lam epo.alpha epo.kappa_l epo.kappa_r epo.gamma "
        "epo.turn_decay warm_start.copies warm_start.prompt_weight optim.weight_decay metrics.trajectories "
        "metrics.trajectories_every checkpoint.keep_best",
        lambda value: value >= 0,
        "zero or positive",
    ),
    (
        "model.rope_theta model.norm_eps model.lora_alpha warm_start.lr rollout.temperature algo.critic_lr optim.lr "
        "optim.clip_norm algo.clip_low algo.clip_high algo.kl_target algo.kl_horizon control.shaping_kappa "
        "metrics.trajectories_megabytes",
        lambda value: value > 0,
        "positive",
    ),
    ("seed", is_seed, SEED_RULE),
    ("init_from.step", lambda value: value >= -1, "a number of RL steps, or -1 for the newest checkpoint"),
    ("mesh.data mesh.fsdp mesh.tensor", lambda value: value >= -1, "a number of devices, or 0 (or -1) for an automatic one"),
    ("eval.temperature", lambda value: value >= 0, "zero (always the likeliest token) or positive"),
    (
        "algo.gamma algo.gae_lambda optim.warmup_ratio optim.floor_ratio control.cov_fraction control.peak_quantile",
        lambda value: 0 <= value <= 1,
        "in [0, 1]",
    ),
    ("optim.b1 optim.b2 epo.ema_decay env.hesitation env.mistakes", lambda value: 0 <= value < 1, "in [0, 1)"),
    ("algo.clip_low", lambda value: value < 1, "below 1"),
    ("eval.top_p control.nucleus", lambda value: 0 < value <= 1, "in (0, 1]"),
    ("algo.dual_clip", lambda value: value > 1, "above 1"),
    ("model.vocab_size", lambda value: value >= 300, "at least 300, as 256 bytes and the special tokens come first"),
    (
        "env.train_variations env.valid_seen_variations env.valid_unseen_variations",
        lambda value: value == -1 or value >= 1,
        "-1 (all) or at least 1",
    ),
)


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"epo.lam": 0.001, ...}: every leaf under its dotted name."""
    leaves = {}
    for key in config.keys():
        value = config[key]
        if isinstance(value, (ConfigDict, Mapping)):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
