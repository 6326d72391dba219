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
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    base, params = lora.split(params) if model.lora else ({}, params)
    with checkpoint.open_reader(checkpoint.place(chosen.workdir, config.checkpoint.folder)) as manager:
        step = manager.latest_step() if chosen.step is None else chosen.step
        fields = checkpoint.restore_fields(manager, {"base": base, "params": params}, step)

    if chosen.adapters:
        lora.save_adapters(chosen.to, model, fields["params"], config.model.path)
    else:
        stop = {"eos_token_id": tokenizer.stop_id}
        merged = lora.merge(model, lora.join(fields["base"], fields["params"]))
        weights.save_params(chosen.to, dataclasses.replace(model, lora=None), merged, stop)
    tokenizer.save(chosen.to)
    print(f"wrote {chosen.to}: the policy after {step} RL steps")


if __name__ == "__main__":
    sys.exit(run(main))
