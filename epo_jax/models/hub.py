"""From `config.model.path` to a model folder on this machine."""

from pathlib import Path

from epo_jax.common.errors import UserError
from epo_jax.common.files import expand_user
from epo_jax.models import gguf

# What a run needs of a hub repository: no pickles, no weights of other frameworks.
_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]


def resolve(path: str) -> Path:
    """The local model folder of `config.model.path`.

    `path` is a folder, a GGUF file, or a name on the Hugging Face hub. A GGUF file is converted once, into the cache; a hub
    model is downloaded into the cache of the hub's client.

    Raises:
        UserError: there is no such folder or file, and the hub has no such model or cannot be reached.
    """
    local = expand_user(path, "config.model.path")
    if local.is_dir():
        return local
    if local.suffix == ".gguf":
        return gguf.converted(local)
    import huggingface_hub  # only a pretrained model needs it

    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=_FILES))
    except Exception as error:  # its own errors and those of its HTTP and transfer libraries have no common base
        reason = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")[:200]
        raise UserError(
            f"config.model.path={path!r} is not a local folder and cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); give a local folder in config.model.path or download the model first."
        ) from error
