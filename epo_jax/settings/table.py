"""Every setting of a run, declared once.

This is the list to read. A config file (configs/*.py) changes defaults, the command line overrides single keys
(`--config.epo.lam=0.002`). Configs, checks, `--help`, docs/settings.md, `Hyper`, what a sweep may vary and what a resumed run may
change are made from it. `Setting` explains the columns. The paper is arXiv 2509.22576, version 2, "table" its table of
hyperparameters; the reference implementation is the code of its authors. Where both are silent, the default is ours.
"""

import math
from typing import Literal, get_args

from epo_jax.settings.setting import (
    ALL_OR_COUNT,
    COUNT,
    DEVICES,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    Rule,
    Section,
    Setting,
)  # fmt: skip

# Choices that functions take as arguments.
Aggregation = Literal["trajectory", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
CriticKind = Literal["own", "lora", "trunk"]
HistoryMode = Literal["cumulative", "sliding", "ema", "initial"]
KLKind = Literal["k1", "abs", "k2", "k3", "full"]
Penalty = Literal["hinge", "indicator"]
PenaltyScope = Literal["token", "turn", "trajectory", "batch"]
Phase = Literal["exponential", "constant", "mean", "two_stage"]

SPLITS = ("train", "valid_seen", "valid_unseen")


def _temperatures(values: tuple) -> bool:
    return len(set(values)) == len(values) and all(isinstance(x, int | float) and 0 <= x < math.inf for x in values)


# The projections of a layer that can have adapters.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SECTIONS = (
    Section("", "The run", (
        Setting("seed", 0, "Seed of everything random: tasks, initial weights, sampling.", SEED),
    )),
    Section("env", "Environment", (
        Setting("env.name", "", "Name of the environment, or a module of your own that Python can import."),
        Setting("env.workers", 2, "Processes on each host that run the games; on ScienceWorld, each has a Java simulator (at "
                "most 1.2 GB) for up to 32 live episodes.", COUNT, unit="processes", by_env={"scienceworld": 8}, resume="free"),
        Setting("env.max_turns", 50, "Turns after which an episode ends.", COUNT, unit="turns", by_env={"scienceworld": 30},
                paper="ALFWorld 50, ScienceWorld 30 (table)"),
    )),
    Section("env", "ALFWorld", (
        Setting("env.data_dir", "", "Cache of the generated games; empty: $EPO_JAX_DATA, or else ~/.cache/epo_jax.",
                resume="free"),
        Setting("env.train_games", 3553, "Generated training games, by default as many as the dataset has; unused if "
                "ALFWORLD_DATA is set.", COUNT, unit="games"),
        Setting("env.valid_seen_games", 140, "Generated evaluation games in rooms that training has.", COUNT, unit="games"),
        Setting("env.valid_unseen_games", 134, "Generated evaluation games in rooms that training does not have.", COUNT,
                unit="games"),
        Setting("env.max_receptacles", None, "Receptacles that a generated room keeps, among them all that the task needs; None: "
                "the whole room.", COUNT, unit="receptacles"),
        Setting("env.hints", "admissible", '"admissible": every turn lists the commands that work now; "none": no list.'),
        Setting("env.hesitation", 0.0, "Fraction of the warm start's expert episodes that waste a turn before every move, which "
                "leaves RL something to improve.", SHARE_BELOW_1),
        Setting("env.mistakes", 0.0, "Probability that an expert tries something impossible; the mistake is not cloned, the "
                "recovery from it is.", SHARE_BELOW_1),
        Setting("env.seed", 0, "Seed of the game generator.", NOT_NEGATIVE),
    ), env="alfworld"),
    Section("env", "ScienceWorld", (
        Setting("env.data_dir", "", "Cache of the gold paths; empty: $EPO_JAX_DATA, or else ~/.cache/epo_jax.", resume="free"),
        Setting("env.tasks", (), "Names of the tasks; (): all 30."),
        Setting("env.level", "L1", 'Tasks of valid_unseen: "L1" other variations of the training tasks, "L2" ten task types that '
                "training does not have."),
        Setting("env.hints", "objects", '"objects": every turn lists the things in reach; "admissible": all valid actions '
                '(slow); "none": no list.'),
        Setting("env.simplification", "easy", 'Simplifications of the simulator: "easy", "" (none), or their names, separated by '
                "commas."),
        Setting("env.won", "completed", 'When an episode is won: "completed" its task, with score 100; "reference" as in the '
                "reference implementation, if any score remains when its simulator's clock passes 100 (evaluations record both).",
                reference="reference", added=(3, "completed")),
        Setting("env.train_variations", -1, "Training variations of each task, evenly spaced; -1: all.", ALL_OR_COUNT,
                unit="variations"),
        Setting("env.valid_seen_variations", 5, "Evaluated variations of each task in the split valid_seen, evenly spaced and so "
                "the same in every run; -1: all, 1,796 episodes.", ALL_OR_COUNT, unit="variations",
                reference="16 episodes"),
        Setting("env.valid_unseen_variations", 5, "The same in the split valid_unseen; -1: all, 1,819 episodes.", ALL_OR_COUNT,
                unit="variations", reference="16 episodes"),
    ), env="scienceworld"),
    Section("agent", "Prompts and answers", (
        Setting("agent.style", "tagged", '"tagged": the paper\'s instructions, with <think> and <action>; "bare": the whole '
                "answer is the action.", choices=("bare", "tagged"), paper="tagged"),
        Setting("agent.response_tokens", 512, "The most tokens that the policy may generate in a turn.", COUNT, unit="tokens",
                paper="512 (table)"),
        Setting("agent.context", "window", '"window": each turn has a new prompt with the last turns in it; "chat": an episode '
                "is one growing conversation.", choices=("window", "chat"), paper="window"),
        Setting("agent.history_turns", 2, "Earlier turns that a window repeats in full.", NOT_NEGATIVE, unit="turns", paper="2"),
        Setting("agent.history_actions", False, "Whether a window also lists the actions of all earlier turns.",
                by_env={"scienceworld": True}),
        Setting("agent.max_tokens", 2560, "The most tokens of a context and its answer; a window is cut to it, and a "
                "conversation that would exceed it ends.", COUNT, unit="tokens",
                paper="2,048 + 512 (table); the authors' completing runs had up to 6,144 + 512"),
    )),
    Section("model", "Policy", (
        Setting("model.path", "Qwen/Qwen2.5-3B-Instruct", "Folder, GGUF file or hub name of a Qwen2, Qwen2.5, Qwen3 or Llama "
                "model; empty: a new model with the sizes below.",
                paper="ALFWorld Qwen2.5-3B-Instruct, ScienceWorld Qwen2.5-7B-Instruct (table)", resume="recorded"),
        Setting("model.d_model", 2048, "Width of the residual stream.", COUNT),
        Setting("model.num_layers", 36, "Number of layers.", COUNT),
        Setting("model.num_heads", 16, "Query heads.", COUNT),
        Setting("model.num_kv_heads", 2, "Key-value heads; divides the number of query heads.", COUNT),
        Setting("model.head_dim", 128, "Width of a head, an even number.", COUNT),
        Setting("model.d_ff", 11008, "Width of the gated feed-forward layer.", COUNT),
        Setting("model.vocab_size", 151936, "Rows of a new model's embedding, and the most tokens of the BPE tokenizer that is "
                "trained for it on expert episodes.",
                Rule("at least 300, as 256 bytes and the special tokens come first", lambda n: n >= 300), unit="tokens"),
        Setting("model.rope_theta", 1_000_000.0, "Base of the rotary position encoding.", POSITIVE),
        Setting("model.norm_eps", 1e-6, "Epsilon of RMSNorm.", POSITIVE),
        Setting("model.tie_embeddings", True, "Whether the output layer shares the input embedding's weights."),
        Setting("model.qkv_bias", True, "Whether the projections to queries, keys and values have a bias."),
        Setting("model.dtype", "bfloat16", "Type of the arithmetic; weights and reductions are float32.",
                choices=("float32", "bfloat16")),
        Setting("model.remat", "full", 'What a layer stores for the backward pass, which computes the rest again: "none" '
                'everything, "dots" matrix products, "attention" outputs of attention, "full" nothing; less memory, up to a '
                "quarter more arithmetic.", choices=("none", "dots", "attention", "full"), resume="recorded"),
        Setting("model.lora_rank", 0, "Rank of the adapters that RL trains in place of the weights; 0: it trains the weights.",
                NOT_NEGATIVE),
        Setting("model.lora_alpha", 32.0, "Adapters are scaled by lora_alpha / lora_rank.", POSITIVE),
        Setting("model.lora_targets", LORA_TARGETS, "Projections that have adapters.", choices=LORA_TARGETS),
    )),
    Section("init_from", "Start from another run's checkpoint, in place of model.path and of the warm start", (
        Setting("init_from.run", "", "Run folder of the other run, in which {seed} stands for the seed; empty: none.",
                added=(1, "")),
        Setting("init_from.step", -1, "RL steps of its checkpoint; -1: the newest.",
                Rule("a number of RL steps, or -1 for the newest checkpoint", lambda n: n >= -1), unit="RL steps", added=(1, -1)),
        Setting("init_from.state", "weights", '"weights": the policy alone; "everything": also the optimizer, critic, reference '
                "policy, entropy history and number of RL steps, from which the run goes on.", choices=("weights", "everything"),
                added=(1, "weights")),
    )),
    Section("mesh", "Devices along each axis of the mesh; 0 or -1: automatic, that is one CPU, or all GPUs or TPUs", (
        Setting("mesh.data", 0, "Devices that the rows of a batch are sharded over, each with a copy of the weights.", DEVICES,
                unit="devices", resume="free"),
        Setting("mesh.fsdp", 0, "Devices that the rows and the weights are sharded over; divides model.d_model.", DEVICES,
                unit="devices", resume="free"),
        Setting("mesh.tensor", 0, "Devices that heads, hidden units and vocabulary are sharded over, so that weights and "
                "activations of a row take less memory on each.", DEVICES, unit="devices", resume="free"),
    )),
    Section("warm_start", "Behavior cloning of expert episodes before RL", (
        Setting("warm_start.episodes", 0, "Expert episodes that are cloned; 0: no warm start.", NOT_NEGATIVE, unit="episodes"),
        Setting("warm_start.steps", 0, "Optimizer updates.", NOT_NEGATIVE, unit="updates"),
        Setting("warm_start.batch_tokens", 16384, "Tokens of an update, on all devices together.", COUNT, unit="tokens"),
        Setting("warm_start.lost", False, "Whether expert episodes that were lost are cloned as well.", added=(1, True)),
        Setting("warm_start.optimizer", "adamw", '"muon" orthogonalizes the updates of the layers\' matrices and learns more '
                "from as many updates.", choices=("adamw", "muon")),
        Setting("warm_start.lr", 1e-5, "Learning rate.", POSITIVE),
        Setting("warm_start.copies", 0, "Versions of each expert episode with renamed objects that are added to it (ALFWorld).",
                NOT_NEGATIVE),
        Setting("warm_start.prompt_weight", 0.0, "Weight of also predicting the observations, from which a new model learns the "
                "language of the game.", NOT_NEGATIVE),
    )),
    Section("rollout", "Sampling of episodes", (
        Setting("rollout.groups", 16, "Tasks of an RL step.", COUNT, unit="tasks", ppo={"alfworld": 128, "scienceworld": 128},
                paper="16; PPO 128 (table)"),
        Setting("rollout.group_size", 8, "Episodes of each of these tasks.", COUNT, unit="episodes",
                ppo={"alfworld": 1, "scienceworld": 1}, paper="8; PPO 1 (table)"),
        Setting("rollout.slots", 128, "Episodes that are played at the same time, on all hosts together.", COUNT, unit="episodes",
                resume="recorded"),
        Setting("rollout.lanes", 2, "Groups of slots that take turns: one decodes while another waits for its environments.",
                COUNT, resume="recorded"),
        Setting("rollout.ahead", 2, "Episodes that each lane resets before a slot is free.", NOT_NEGATIVE, unit="episodes",
                resume="recorded"),
        Setting("rollout.block", 64, "The most tokens that are decoded before a slot whose turn has ended can go on.", COUNT,
                unit="tokens", resume="recorded"),
        Setting("rollout.dtype", "", "Type of weights and arithmetic during sampling; empty: model.dtype. Another type needs "
                "algo.importance_cap.", choices=("", "float32", "bfloat16"), resume="recorded"),
        Setting("rollout.cache_dtype", "", 'Type of cached keys and values; "int8": 8 bits; empty: as the arithmetic.',
                choices=("", "int8"), resume="recorded"),
        Setting("rollout.devices", 1, "Devices that the slots of each lane are sharded over, each with a copy of the weights; a "
                "mesh of several devices replaces it.", COUNT, unit="devices", resume="recorded"),
        Setting("rollout.temperature", 1.0, "Sampling temperature, which all log-probabilities and entropies include.", POSITIVE,
                paper="1.0 (table)", resume="recorded"),
        Setting("rollout.resample", 3, "Rounds of rollout.groups further tasks that DAPO plays at most to replace groups of "
                "equal returns.", NOT_NEGATIVE, unit="rounds", resume="recorded"),
    )),
    Section("algo", "Base algorithm", (
        Setting("algo.name", "grpo+epo", 'Base algorithm and variants, as objectives/registry.py names them: "ppo+epo", "grpo", '
                '"grpo+epo_wo_dw", "dapo+epo". It sets what defines the method; the other keys set the rest.'),
        Setting("algo.epochs", 1, "Passes over the episodes of an RL step.", COUNT, reference="1"),
        Setting("algo.mini_batches_by", "episode", '"episode": algo.mini_batches, with as many episodes in each; "turn": as '
                "many as needed for at most algo.mini_batch_turns turns in each, with schedules that count RL steps; "
                "conversations are not cut, so their mini-batches are only about as large.", choices=("episode", "turn"),
                paper="turn", static="mini_batches_by", added=(3, "episode")),
        Setting("algo.mini_batches", 8, "Optimizer updates in a pass, for mini-batches by episode.", COUNT, unit="updates"),
        Setting("algo.micro_batch_rows", 1, "Packed rows of a forward and backward pass on each device along data and fsdp; "
                "changes memory, not the result.", COUNT, unit="rows", resume="recorded"),
        Setting("algo.clip_low", 0.2, "The ratio is clipped from below at 1 - clip_low.",
                Rule("positive and below 1", lambda x: 0 < x < 1), reference="0.2", traced="clip_low", resume="recorded"),
        Setting("algo.clip_high", 0.2, "The ratio is clipped from above at 1 + clip_high.", POSITIVE, reference="0.2",
                traced="clip_high", resume="recorded"),
        Setting("algo.dual_clip", 3.0, "Upper bound of the ratio for negative advantages.", Rule("above 1", lambda x: x > 1),
                reference="3.0", traced="dual_clip", resume="recorded"),
        Setting("algo.kl_coef", 0.01, "Weight of the KL divergence from the frozen reference policy; 0: there is no reference "
                "policy.", NOT_NEGATIVE, paper="no KL term (Eq. 6)", reference="0.01", traced="kl_coef", resume="recorded"),
        Setting("algo.kl_target", 0.1, "Divergence that the adaptive controller aims at.", POSITIVE, unit="nats per policy token",
                traced="kl_target", resume="recorded"),
        Setting("algo.kl_horizon", 10_000.0, "Episodes over which the adaptive controller acts; fewer: faster.", POSITIVE,
                unit="episodes", traced="kl_horizon", resume="recorded"),
        Setting("algo.kl_kind", "k3", 'Estimate of the divergence from the sampled token: "k1", "abs", "k2" or "k3"; "full": the '
                "sum over the vocabulary.", choices=get_args(KLKind), reference="k3", static="kl", resume="recorded"),
        Setting("algo.kl_place", "loss", '"loss": the divergence is a term of the loss; "reward": it is subtracted from each '
                "token's reward.", choices=("loss", "reward"), reference="loss", static="kl_place", resume="recorded"),
        Setting("algo.kl_controller", "fixed", '"adaptive": kl_coef is the first value and follows the divergence (arXiv '
                "1909.08593).", choices=("fixed", "adaptive"), reference="fixed", static="kl_controller"),
        Setting("algo.old_log_prob", "auto", 'Source of the old log-probabilities: "sampler" as recorded during sampling, '
                '"learner" one more forward pass, "auto" the sampler\'s if model, rollout and cache are float32, or else the '
                "learner's. algo.importance_cap compares the two and always takes the learner's.",
                choices=("auto", "learner", "sampler"), reference="learner", resume="recorded", added=(1, "sampler")),
        Setting("algo.gamma", 1.0, "Discount per policy token; per turn in GiGPO's step returns.", SHARE, paper="1",
                traced="discount", resume="recorded"),
        Setting("algo.gae_lambda", 1.0, "Lambda of GAE.", SHARE, paper="1", traced="gae_lambda", resume="recorded"),
        Setting("algo.gae_scope", "trajectory", '"trajectory": GAE over all policy tokens of an episode; "turn": inside each '
                "turn, whose last token has the episode's return.", choices=("trajectory", "turn"), reference="turn",
                static="gae_scope", resume="recorded"),
        Setting("algo.whiten", True, "Whether advantages of ppo, reinforce_pp and reinforce_pp_baseline are whitened over the "
                "policy tokens of the step.", reference="True", static="whiten", resume="recorded"),
        Setting("algo.value_clip", 0.5, "The value may move so far from the old value in the critic's loss.", NOT_NEGATIVE,
                reference="0.5", traced="value_clip", resume="recorded"),
        Setting("algo.value_coef", 1.0, "Weight of the critic's loss.", NOT_NEGATIVE, traced="value_coef", resume="recorded"),
        Setting("algo.format_penalty", 0.1, "Penalty for a turn without an action.", NOT_NEGATIVE, unit="reward", reference="0.1",
                traced="format_penalty", resume="recorded"),
        Setting("algo.format_penalty_place", "after", '"after": subtracted from the turn\'s advantage; "before": from its '
                "reward, before normalization.", choices=("after", "before"), reference="before", static="format_penalty_place",
                resume="recorded"),
        Setting("algo.gigpo_weight", 1.0, "Weight of GiGPO's step advantage next to its episode advantage.", NOT_NEGATIVE,
                traced="gigpo_weight", resume="recorded"),
        Setting("algo.importance_cap", 0.0, "Truncated importance sampling: upper bound of pi_learner / pi_sampler; 0: the two "
                "are taken to agree.", NOT_NEGATIVE, traced="importance_cap", resume="recorded"),
        Setting("algo.critic", "own", 'Decoder of the critic: "own" a copy of the policy, "lora" the policy\'s frozen base with '
                'adapters of its own, "trunk" the policy itself, without gradient from the value.', choices=get_args(CriticKind),
                reference="own", resume="recorded"),
        Setting("algo.critic_lr", 1e-5, "Peak learning rate of the critic; 0: optim.lr.", NOT_NEGATIVE,
                reference="that of the policy", traced="critic_lr", resume="recorded"),
        Setting("algo.critic_schedule", "policy", '"policy": the critic has the policy\'s schedule; "constant": its rate does '
                "not change.", choices=("policy", "constant"), reference="constant", added=(3, "policy")),
        Setting("algo.aggregation", "token-mean", "How the policy loss is averaged.", choices=get_args(Aggregation),
                paper="trajectory (section 3.2)", reference="token-mean", static="aggregation", resume="recorded"),
        Setting("algo.mini_batch_turns", 128, "Turns of a mini-batch at most, if they are cut by turn.",
                COUNT, unit="turns", by_env={"alfworld": 256}, ppo={"scienceworld": 64},
                paper="256 on ALFWorld, 128 on ScienceWorld (PPO: 64) (table)"),
        Setting("algo.micro_batch_turns", 16, "Turns of a micro-batch in the reference implementation's arithmetic, in which "
                "each micro-batch counts alike.", COUNT,
                unit="turns", by_env={"alfworld": 32}, ppo={"scienceworld": 8},
                paper="32 on ALFWorld, 16 on ScienceWorld (PPO: 8) (table)"),
    )),
    Section("epo", "Entropy term of EPO", (
        Setting("epo.lam", 0.001, "Weight of the entropy term; 0: the base algorithm alone.", NOT_NEGATIVE,
                paper="0.001 (table, Eq. 6)", traced="lam", resume="recorded"),
        Setting("epo.alpha", 0.05, "Weight of the corridor penalty inside the entropy term.", NOT_NEGATIVE,
                by_env={"alfworld": 0.1}, paper="ALFWorld 0.1, ScienceWorld 0.05 (table, Eq. 4)", traced="alpha",
                resume="recorded"),
        Setting("epo.kappa_l", 0.0, "Lower edge of the corridor, as a multiple of the mean past entropy.", NOT_NEGATIVE,
                paper="0.0 (table, Eq. 3); 0.5 in the appendix", traced="kappa_l", resume="recorded"),
        Setting("epo.kappa_r", 2.0, "Upper edge of the corridor, as a multiple of the mean past entropy.", NOT_NEGATIVE,
                paper="2.0 (table, Eq. 3); 1.5 in the appendix", traced="kappa_r", resume="recorded"),
        Setting("epo.gamma", 3.0, "Decay rate of the phase weight beta_k = 1 + exp(-gamma k / k_mid).", NOT_NEGATIVE,
                paper="3.0 (table, Eq. 5)", traced="gamma", resume="recorded"),
        Setting("epo.start_step", 0, "First RL step in which the corridor penalty counts; before it, beta_k is 0.", NOT_NEGATIVE,
                unit="RL steps", traced="start_step", resume="recorded", added=(2, 0)),
        Setting("epo.window", 10, 'Steps that history "sliding" averages.', COUNT, unit="RL steps", traced="window",
                resume="recorded"),
        Setting("epo.ema_decay", 0.9, 'Decay of history "ema".', SHARE_BELOW_1, unit="per RL step", traced="ema_decay",
                resume="recorded"),
        Setting("epo.turn_decay", 0.0, "Turn t has the weight exp(-turn_decay t / max_turns) in the mean entropy; 0: all turns "
                "count alike.", NOT_NEGATIVE, paper="0, except EPO-Decay (section 5.4)", traced="turn_decay", resume="recorded"),
        Setting("epo.step_decay", 0.0, "The entropy term has the weight lam exp(-step_decay k / train.steps) at RL step k; 0: "
                "lam at every step.", NOT_NEGATIVE, paper="0, except EPO-Decay (B.4.1)", traced="step_decay",
                resume="recorded", added=(3, 0.0)),
        Setting("epo.penalty", "hinge", '"hinge": distance from the corridor; "indicator": 1 outside it, without gradient.',
                choices=get_args(Penalty), paper="hinge (Eq. 3)", reference="indicator", static="penalty", resume="recorded"),
        Setting("epo.scope", "token", "What entropy is averaged over before it is compared with the corridor.",
                choices=get_args(PenaltyScope), paper="token (Eq. 4)", static="penalty_scope", resume="recorded"),
        Setting("epo.history", "cumulative", "Which earlier steps make the mean past entropy.", choices=get_args(HistoryMode),
                paper="cumulative (Eq. 3)", static="history", resume="recorded"),
        Setting("epo.history_index", "global", '"global": one mean entropy an RL step; "turn": one for each turn number.',
                choices=("global", "turn"), paper="global", reference="turn", static="history_index", resume="recorded"),
        Setting("epo.phase", "exponential", 'Schedule of beta_k: "exponential" from 2 to 1, "constant" 1, "mean" constant as '
                'well, at the mean of the exponential one over the run, "two_stage" the reference implementation\'s, from 1 to '
                "0.04.", choices=get_args(Phase), paper="exponential (Eq. 5)",
                reference="two_stage", static="phase", resume="recorded"),
        Setting("epo.turn_gate", False, "Whether the corridor penalty begins with the middle turn.", paper="False",
                reference="True", static="turn_gate", resume="recorded"),
        Setting("epo.aggregation", "trajectory", 'How entropy is averaged; "trajectory": mean over episodes of the mean over '
                "turns of the mean over tokens.", choices=get_args(Aggregation), paper="trajectory (Eq. 2)",
                reference="token-mean", static="entropy_aggregation", resume="recorded"),
    )),
    Section("control", "Other entropy controls, each read by its own variant of algo.name", (
        Setting("control.shaping_scale", 0.4, "+ea: bonus of the advantage per nat of entropy.", NOT_NEGATIVE,
                traced="shaping_scale", resume="recorded"),
        Setting("control.shaping_kappa", 2.0, "+ea: the bonus is at most |advantage| / shaping_kappa.", POSITIVE,
                traced="shaping_kappa", resume="recorded"),
        Setting("control.empg_sharpness", 1.0, "+empg: how much more a turn of low entropy weighs.", NOT_NEGATIVE,
                traced="empg_sharpness", resume="recorded"),
        Setting("control.empg_bonus", 0.1, "+empg: bonus of a turn that leads to one of low entropy.", NOT_NEGATIVE,
                traced="empg_bonus", resume="recorded"),
        Setting("control.cov_fraction", 0.0002, "+clip_cov, +kl_cov: fraction of the policy tokens that they act on.", SHARE,
                traced="cov_fraction", resume="recorded"),
        Setting("control.cov_low", 1.0, "+clip_cov: lower edge of the covariances from which it draws.", traced="cov_low",
                resume="recorded"),
        Setting("control.cov_high", 5.0, "+clip_cov: upper edge of the covariances from which it draws.", traced="cov_high",
                resume="recorded"),
        Setting("control.cov_coef", 1.0, "+kl_cov: weight of the divergence.", NOT_NEGATIVE, traced="cov_coef",
                resume="recorded"),
        Setting("control.nucleus", 0.8, "+siren: probability of the most likely tokens whose entropy is taken.", SHARE_ABOVE_0,
                static="nucleus", resume="recorded"),
        Setting("control.peak_quantile", 0.8, "+siren: quantile of an episode's entropies above which tokens are regularized.",
                SHARE, traced="peak_quantile", resume="recorded"),
        Setting("control.target_entropy", 0.2, "+target: entropy that the coefficient aims at; it starts at epo.lam.",
                NOT_NEGATIVE, unit="nats per policy token", traced="target_entropy", resume="recorded"),
        Setting("control.target_delta", 1e-4, "+target: change of the coefficient.", NOT_NEGATIVE, unit="per RL step",
                traced="target_delta", resume="recorded"),
        Setting("control.target_cap", 0.005, "+target: upper bound of the coefficient.", NOT_NEGATIVE, traced="target_cap",
                resume="recorded"),
    )),
    Section("optim", "Optimizer: AdamW, linear warm-up and cosine decay", (
        Setting("optim.lr", 5e-6, "Peak learning rate of the policy.", POSITIVE, ppo={"scienceworld": 3e-6},
                paper="5e-6; PPO on ScienceWorld 3e-6 (table)", traced="lr", resume="recorded"),
        Setting("optim.warmup_ratio", 0.1, "Fraction of all updates in which the rate rises.", SHARE, reference="0.1",
                resume="recorded"),
        Setting("optim.floor_ratio", 0.2, "Where the cosine ends, as a fraction of lr.", SHARE, reference="0.2",
                resume="recorded"),
        Setting("optim.weight_decay", 0.01, "Weight decay.", NOT_NEGATIVE, reference="0.01", resume="recorded"),
        Setting("optim.clip_norm", 1.0, "Gradients are clipped to this global norm.", POSITIVE, reference="1.0",
                resume="recorded"),
        Setting("optim.b1", 0.9, "Decay of Adam's first moment.", SHARE_BELOW_1, reference="0.9", resume="recorded"),
        Setting("optim.b2", 0.999, "Decay of Adam's second moment.", SHARE_BELOW_1, reference="0.999", resume="recorded"),
    )),
    Section("train", "Length of the run and shape of its batches", (
        Setting("train.steps", 125, "RL steps K.", COUNT, unit="RL steps", by_env={"alfworld": 150},
                paper="ALFWorld 150, ScienceWorld 125 (table)"),
        Setting("train.max_skipped", 3, "RL steps in a row without a finite gradient, whose updates are skipped, after which the "
                "run ends, or a member of a sweep stops.", COUNT, unit="RL steps", resume="recorded"),
        Setting("train.rows_tokens", 16384, "Length of a packed row; at least agent.max_tokens.", COUNT, unit="tokens",
                resume="recorded"),
        Setting("train.rows_policy_tokens", 8192, "The most policy tokens of a packed row, and so of a conversation.", COUNT,
                unit="tokens", resume="recorded"),
    )),
    Section("eval", "Evaluation: every episode of a split, once", (
        Setting("eval.every", 5, "RL steps between evaluations; 0: only at the end.", NOT_NEGATIVE, unit="RL steps",
                paper="5 (table)", resume="free"),
        Setting("eval.temperature", 0.4, "Sampling temperature; 0: always the most likely token.",
                Rule("zero (always the likeliest token) or positive", lambda x: x >= 0), paper="0.4 (table)", resume="recorded"),
        Setting("eval.also_temperatures", (), "Further temperatures at which each evaluation plays its splits, such as that of "
                "training, (1.0,). Their rows of eval.jsonl have `temperature`; they rank no checkpoints.",
                Rule("different numbers, each zero or positive", _temperatures), resume="free", added=(3, ())),
        Setting("eval.top_k", 0, "Sample from so many of the most likely tokens; 0: from all.", NOT_NEGATIVE, unit="tokens",
                resume="recorded"),
        Setting("eval.top_p", 1.0, "Sample from the most likely tokens that hold this probability together.", SHARE_ABOVE_0,
                resume="recorded"),
        Setting("eval.splits", ("valid_seen", "valid_unseen"), "Splits that are evaluated.", choices=SPLITS,
                reference="16 episodes of each"),
        Setting("eval.before", True, "Whether there is an evaluation before the first RL step.", resume="free"),
    )),
    Section("metrics", "Records of the run", (
        Setting("metrics.trajectories", 6, "Episodes in trajectories.jsonl from each evaluated split and each recorded training "
                "step; 0: none.", NOT_NEGATIVE, unit="episodes", resume="free"),
        Setting("metrics.trajectories_every", 10, "RL steps between recorded training steps; 0: evaluations only.", NOT_NEGATIVE,
                unit="RL steps", resume="free"),
        Setting("metrics.trajectories_megabytes", 16.0, "Size limit of that file; beyond it, steps from the middle are removed.",
                POSITIVE, unit="MB", resume="free"),
        Setting("metrics.gradient_norms", False, "Whether each RL step measures the gradients of the policy term and of the "
                "entropy term apart, which takes one more gradient of its first mini-batch.", resume="free", added=(2, False)),
        Setting("metrics.wandb_project", "", "Weights & Biases project that also receives metrics and evaluations; empty: none.",
                resume="free"),
    )),
    Section("checkpoint", "Checkpoints", (
        Setting("checkpoint.every", 10, "RL steps between checkpoints.", COUNT, unit="RL steps", resume="free"),
        Setting("checkpoint.keep", 2, "Newest checkpoints that are kept.", COUNT, unit="checkpoints", resume="free"),
        Setting("checkpoint.keep_best", 1, "Checkpoints with the highest success on the last of eval.splits that are kept as "
                "well, each saved at once; 0: none.", NOT_NEGATIVE, unit="checkpoints", resume="free"),
        Setting("checkpoint.folder", "", "Folder of the checkpoints, on this machine or in a bucket (gs://...); empty: the run "
                "folder. A member of a sweep has the folder NAME in it."),
    )),
)  # fmt: skip

# The section `sweep`, which the config of a sweep has besides; its sub-section `over` has a key for every traced setting.
SWEEP = Section("sweep", "Members of a sweep (epo-jax sweep)", (
    Setting("sweep.arms", (), "Values of algo.name; (): that of the config."),
    Setting("sweep.seeds", (0,), "Values of seed."),
    Setting("sweep.kind", "grid", '"grid": every combination of the values in sweep.over; "list": the first value of every key, '
            'the second of every key, and so on; "random": draws between the two values of each key, evenly on a logarithmic '
            "scale if the lower one is above 0.", choices=("grid", "list", "random")),
    Setting("sweep.samples", 8, 'Number of draws of "random".'),
    Setting("sweep.at_once", 0, "Members that are computed together; 0: one on a CPU, all that fit a device elsewhere.",
            NOT_NEGATIVE, unit="members"),
    Setting("sweep.devices", 0, "Devices that the members of a program are spread over; 0: the most that divide their number.",
            NOT_NEGATIVE, unit="devices"),
))  # fmt: skip

# All of them; env.data_dir and env.hints occur once for each environment.
SETTINGS = tuple(setting for section in (*SECTIONS, SWEEP) for setting in section.settings)

DEFAULTS = {setting.key: setting.default for setting in SETTINGS}
