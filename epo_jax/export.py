"""Writes the policy of a run as a Hugging Face folder, which transformers and vLLM load.

    python -m epo_jax.export --workdir=runs/first --to=exported

Adapters are merged into the weights; with --adapters they are written alone, as a PEFT folder for the model that the run
began with. The tokenizer carries its chat template. (One made from scratch is for transformers.PreTrainedTokenizerFast:
AutoTokenizer takes every Qwen2 model's for Qwen's own.)
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax

from epo_jax import checkpoint
from epo_jax.command import read_config, run
from epo_jax.errors import UserError
from epo_jax.folders import decoder_of_run
from epo_jax.learner import init_state
from epo_jax.main import learner_config, objective_and_hyper
from epo_jax.models import lora, weights
from epo_jax.models.decoder import init_params
from epo_jax.models.tokenizer import load_tokenizer


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="epo_jax.export", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="the run folder")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--step", type=int, help="of the checkpoint, in RL steps; the newest if left out")
    parser.add_argument("--adapters", action="store_true", help="write the adapters alone")
    chosen = parser.parse_args(argv[1:])
    config = read_config(chosen.workdir)
    if chosen.to.exists():
        raise UserError(f"--to={chosen.to} exists already; choose another folder.")
    if chosen.adapters and (not config.model.lora_rank or not config.model.path or config.warm_start.episodes):
        raise UserError(
            f"--adapters: {chosen.workdir} did not train adapters of a published model (config.model.lora_rank, "
            "config.model.path, no warm start); leave --adapters out."
        )

    tokenizer = load_tokenizer(chosen.workdir / "tokenizer")
    model = decoder_of_run(config, tokenizer.vocab_size)
    learner = learner_config(config, model, objective_and_hyper(config)[0])
    like = jax.eval_shape(lambda: init_state(learner, init_params(model, jax.random.key(0))))
    state = checkpoint.restore(checkpoint.open_manager(chosen.workdir, config.checkpoint.keep), like, chosen.step)

    if chosen.adapters:
        lora.save_adapters(chosen.to, model, state.params, config.model.path)
    else:
        stop = {"eos_token_id": tokenizer.stop_id}
        weights.save_params(chosen.to, dataclasses.replace(model, lora=None), lora.merge(model, state.policy()), stop)
    tokenizer.save(chosen.to)
    print(f"wrote {chosen.to}: the policy after {int(state.step)} RL steps")


if __name__ == "__main__":
    sys.exit(run(main))
