"""Writes the policy of a run as a Hugging Face folder, which transformers and vLLM load.

    python -m epo_jax.export --workdir=runs/first --to=exported

Adapters are merged into the weights; with --adapters they are written alone, as a PEFT folder for the model that the run
began with. The tokenizer carries its chat template. (One made from scratch is for transformers.PreTrainedTokenizerFast:
AutoTokenizer takes every Qwen2 model's for Qwen's own.)
"""

import dataclasses
import sys
from pathlib import Path

from epo_jax.command import ArgumentParser, read_config, run
from epo_jax.errors import UserError
from epo_jax.folders import load_run
from epo_jax.models import lora, weights


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m epo_jax.export", description=__doc__.partition("\n")[0])
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

    tokenizer, model, params, _, step = load_run(chosen.workdir, config, chosen.step)
    if chosen.adapters:
        lora.save_adapters(chosen.to, model, lora.split(params)[1], config.model.path)
    else:
        stop = {"eos_token_id": tokenizer.stop_id}
        weights.save_params(chosen.to, dataclasses.replace(model, lora=None), lora.merge(model, params), stop)
    tokenizer.save(chosen.to)
    print(f"wrote {chosen.to}: the policy after {step} RL steps")


if __name__ == "__main__":
    sys.exit(run(main))
