"""Writes the policy of a run as a Hugging Face folder, which transformers and vLLM load.

    epo-jax export runs/first --to=exported

Adapters are merged into the weights; with --adapters they are written alone, as a PEFT folder for the model that the run
began with. A published model keeps its own tokenizer files, chat template and generation_config.json, to which the tokens that
end a turn are added. (Load a tokenizer made from scratch with transformers.PreTrainedTokenizerFast: AutoTokenizer assumes that
every Qwen2 model has Qwen's own.)
"""

import dataclasses
import json
import sys
from pathlib import Path

from epo_jax.command import ArgumentParser, add_base_option, run
from epo_jax.common.errors import UserError
from epo_jax.common.files import write_atomically
from epo_jax.models import lora, weights
from epo_jax.models.tokenizer import ChatTokenizer
from epo_jax.runs.folder import read_config
from epo_jax.runs.policies import load_run


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="epo-jax export", description=__doc__.partition("\n")[0])
    parser.add_folder("workdir", "the run folder")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--step", type=int, help="of the checkpoint, in RL steps; the newest if left out")
    parser.add_argument("--adapters", action="store_true", help="write the adapters alone")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights that are written")
    add_base_option(parser)
    chosen = parser.parse_args(argv[1:])
    folder = Path(chosen.workdir)
    config = read_config(folder)
    if chosen.to.exists():
        raise UserError(f"--to={chosen.to} exists already; choose another folder.")
    published = config.model.path and not config.warm_start.episodes and not config.init_from.run
    if chosen.adapters and not (config.model.lora_rank and published):
        raise UserError(
            f"--adapters: {folder} did not train adapters of a published model (config.model.lora_rank, "
            "config.model.path, no warm start); leave --adapters out."
        )

    tokenizer, model, params, _, step = load_run(folder, config, chosen.step, base_path=chosen.base)
    if chosen.adapters:
        lora.save_adapters(chosen.to, model, lora.split(params)[1], config.model.path)
    else:
        model, params = dataclasses.replace(model, lora=None), lora.merge(model, params)
        weights.save_params(chosen.to, model, params, token_ids(tokenizer), chosen.dtype)
    (tokenizer.export if tokenizer.files else tokenizer.save)(chosen.to)
    path = chosen.to / "generation_config.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    settings = generation_settings(tokenizer, config) if own is None else own | end_ids(tokenizer, own)
    if settings != own:
        write_atomically(path, json.dumps(settings, indent=2) + "\n")
    print(f"wrote {chosen.to}: the policy after {step} RL steps")


def token_ids(tokenizer: ChatTokenizer) -> dict[str, int | list[int]]:
    """The ids that config.json and generation_config.json name: of ends of a turn, of padding and of a text's beginning."""
    return end_ids(tokenizer, {}) | {f"{role}_token_id": i for role, i in tokenizer.role_ids.items()}


def end_ids(tokenizer: ChatTokenizer, own: dict) -> dict[str, int | list[int]]:
    """{"eos_token_id": one id or several}, as a model's `own` settings have it where they name all of them."""
    named, ids = own.get("eos_token_id"), list(tokenizer.stop_ids)
    if set(ids) <= set(named if isinstance(named, list) else [named]):
        return {"eos_token_id": named}
    return {"eos_token_id": ids if len(ids) > 1 else ids[0]}


def generation_settings(tokenizer: ChatTokenizer, config) -> dict[str, bool | int | float | list[int]]:
    """The settings with which the run evaluated, in transformers' words."""
    settings = config.eval
    # top_k = 0: all tokens, where transformers' default is 50.
    sampled = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    return {"do_sample": settings.temperature > 0} | (sampled if settings.temperature else {}) | token_ids(tokenizer)


if __name__ == "__main__":
    sys.exit(run(main))
