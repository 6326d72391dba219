"""Chat templates as published models have them, retold, with tokenizers that hold their special tokens.

Each `Case` states what a frame of the template must find. `write` makes a folder that load_tokenizer and transformers read.
"""

import dataclasses
import functools
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "You are in the middle of a room. You see a drawer 1, a cabinet 3 and a red door.",
    "user assistant system model take apple 1 from cabinet 3, then think about it.",
    "<think>The next step is to look.</think><action>look</action>",
] * 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A template and what is to be known of it.

    Attributes:
        special: special tokens; `flags` of them.
        words: added tokens that are not special.
        ends: further tokens that generation_config.json names in eos_token_id.
        family: "bytes" (a byte-level BPE, as Qwen's and Llama 3's) or "pieces" (a SentencePiece BPE, as Llama 2's).
        opened: the thought that prompts begin.
        rewrites: what later turns change in earlier ones, see ChatFrame.
        trims: messages lose outer blanks.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    words: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    family: str = "bytes"
    stop: str = ""
    opened: str = ""
    rewrites: str = ""
    trims: bool = False


def chatml(before: str = "", content: str = "m.content", prompt: str = "") -> str:
    """Messages between <|im_start|> and <|im_end|>."""
    return (
        before + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + " + content + " + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + prompt + "' }}{% endif %}"
    )


def default_system(text: str) -> str:
    return "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n" + text + "<|im_end|>\n' }}{% endif %}"


# Answers before the last message of a user lose their thoughts; those after it have them in a fixed form, empty if need be.
QWEN3 = """{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- else -%}
{%- set content, thought = m.content, '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > ns.last -%}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}{%- endif -%}
{{- content.lstrip('\n') + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""

R1 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)

LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Always a system message, with a date in it.
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set text = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set text = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: " + date_string + "\n\n" }}
{{- text + "<|eot_id|>" }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)

ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' '  + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

PHI3 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '<|end|>\n' }}"
    "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

# As GLM-4 has it: an answer ends with the token that begins the next message.
NEXT = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# A system message of the last turn alone, as a template may put it there: earlier turns change.
LAST_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('(now) ' if loop.last and m.role == 'user' else '')"
    " + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>")
THOUGHTS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
META = {"special": LLAMA, "eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "trims": True}
SENTENCE = {"special": ("<unk>", "<s>", "</s>"), "eos": "</s>", "bos": "<s>", "family": "pieces"}
FORGETS = {"rewrites": "thoughts", "words": THOUGHTS}
PHI = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")

CASES = {
    "qwen2.5": Case(
        chatml(default_system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")), QWEN, "<|im_end|>",
        pad="<|endoftext|>", ends=("<|endoftext|>",),
    ),
    "qwen3": Case(QWEN3, QWEN, "<|im_end|>", pad="<|endoftext|>", ends=("<|endoftext|>",), **FORGETS),
    "qwen3 without thinking": Case(
        "{%- set enable_thinking = false -%}" + QWEN3, QWEN, "<|im_end|>", opened="<think>\n\n</think>\n\n",
        rewrites="turns", words=THOUGHTS,
    ),
    "qwen3 thinking": Case(
        QWEN3.replace("assistant\n' -}}\n{%- if enable", "assistant\n<think>\n' -}}\n{%- if enable"), QWEN, "<|im_end|>",
        opened="<think>\n", **FORGETS,
    ),
    "r1 distill": Case(R1, DEEPSEEK, DEEPSEEK[1], bos=DEEPSEEK[0], pad=DEEPSEEK[1], opened="<think>\n", **FORGETS),
    "opens a thought and keeps it": Case(chatml(prompt="<think>\n"), QWEN, "<|im_end|>", opened="<think>\n"),
    "closes a thought and keeps it": Case(
        chatml(prompt="<think>\n\n</think>\n\n"), QWEN, "<|im_end|>", opened="<think>\n\n</think>\n\n"
    ),
    "llama 3": Case(LLAMA3, ends=("<|end_of_text|>",), **META),
    "llama 3.1": Case(LLAMA31, ends=("<|end_of_text|>", "<|eom_id|>"), **META),
    "smollm2": Case(
        chatml(default_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face")), QWEN, "<|im_end|>",
        bos="<|im_start|>", pad="<|im_end|>",
    ),
    "tinyllama": Case(ZEPHYR, pad="</s>", **SENTENCE),
    "mistral": Case(MISTRAL, **SENTENCE),
    "llama 2": Case(LLAMA2, trims=True, **SENTENCE),
    "phi 3": Case(
        PHI3, PHI, "<|endoftext|>", pad="<|endoftext|>", flags=("rstrip",), stop="<|end|>", ends=("<|end|>", "<|assistant|>")
    ),
    "phi 4": Case(PHI4, ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>", pad="<|endoftext|>"),
    "gemma": Case(
        GEMMA, ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", bos="<bos>", pad="<pad>",
        stop="<end_of_turn>", ends=("<end_of_turn>",), trims=True,
    ),
    "chatml base": Case(chatml(), QWEN, "<|endoftext|>", pad="<|endoftext|>", stop="<|im_end|>"),
    "no generation prompt": Case(chatml().partition("{% if add")[0], QWEN, "<|im_end|>"),
    "ends with the next": Case(
        NEXT, ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), "<|endoftext|>", stop="<|user|>",
        ends=("<|user|>", "<|endoftext|>"),
    ),
    "changes earlier turns": Case(LAST_ONLY, QWEN, "<|im_end|>", rewrites="turns"),
    "tags are special": Case(chatml(prompt="<think>\n"), (*QWEN, *THOUGHTS[:2], "<action>", "</action>"), "<|im_end|>",
                             opened="<think>\n"),
}  # fmt: skip


@functools.cache
def _trained(family: str) -> str:
    if family == "bytes":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False))
        return backend.to_str()
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    stored = json.loads(backend.to_str())
    vocabulary = stored["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    stored["added_tokens"] = []
    backend = tokenizers.Tokenizer.from_str(json.dumps(stored))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend.to_str()


def backend_of(case: Case) -> tokenizers.Tokenizer:
    """The tokenizer of a case: its added tokens over a few hundred learned ones."""
    backend = tokenizers.Tokenizer.from_str(_trained(case.family))
    flags = dict.fromkeys(case.flags, True)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False, **flags) for token in case.special])
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in case.words])
    return backend


def write(folder: Path, case: Case) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = backend_of(case)
    backend.save(str(folder / "tokenizer.json"))
    named = {"eos_token": case.eos, "bos_token": case.bos, "pad_token": case.pad}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": case.template}
    about |= {role: token for role, token in named.items() if token is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    ends = [backend.token_to_id(token) for token in dict.fromkeys([case.eos, *case.ends])]
    sampling = {"eos_token_id": ends if len(ends) > 1 else ends[0], "do_sample": True, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    return folder
