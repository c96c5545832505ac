"""Small chat subjects with large random weights, dialogues of a few words, and a tokenizer of transformers."""

from __future__ import annotations

import json

import torch

from quire.contracts import Spec, build
from quire.roles.language.hf import HFCausal
from quire.roles.language.models import CausalLM
from quire.roles.sites.subject import Subject
from quire_fast_sae.instances import InstructActivations
from quire_fast_sae.tokenizer import ChatBytes

SITE = "blocks.1.resid"
LLAMA = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "llama": {"model_type": "llama", **LLAMA, "intermediate_size": 64, "max_position_embeddings": 64},
}


def loud(part, std=0.2):
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    return part.eval()


def subject(kind="gpt2"):
    """A random subject in the ids of ChatBytes."""
    torch.manual_seed(0)
    if kind == "quire":
        made = CausalLM(width=32, depth=3, heads=4, rope=False)
        build(made, Spec({"vocab_size": 260, "length": 64, "eos": 258, "pad": 259}))
    else:
        made = HFCausal(config={**CONFIGS[kind], "vocab_size": 260, "pad_token_id": 259, "eos_token_id": 258})
        build(made, Spec())
    return Subject(loud(made), kind, ChatBytes())


def said(*contents):
    """A dialogue: user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


WORDS = ["the", "a", "of", "list", "set", "key", "map", "node", "path", "file", "line", "word", "byte", "index"]


def dialogues(count=40, seed=0):
    source = torch.Generator().manual_seed(seed)

    def text(most):
        length = int(torch.randint(1, most, (1,), generator=source))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=source).tolist())

    return [said(f"{i} {text(4)}", text(6)) for i in range(count)]


def write(path, some):
    """A jsonl file of dialogues."""
    path.write_text("".join(json.dumps({"messages": d}) + "\n" for d in some))
    return str(path)


def feed(path, some=None, cls=InstructActivations, **arguments):
    given = {"site": SITE, "batch_size": 16, "buffer": 64, "contexts": 4, **arguments}
    if cls is InstructActivations:
        given.setdefault("length_buckets", 8)
    given.setdefault("subject", subject())
    given.setdefault("source", write(path / "chats.jsonl", some or dialogues()))
    return cls(**given)


def taken(loader):
    """All batches of one epoch, joined."""
    batches = list(loader)
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|tail|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
MARKS = ["<s>", "</s>", "<|head|>", "<|tail|>", "<|eot|>", "<|im_start|>", "<|im_end|>"]


def hf_tokenizer(folder, template=LLAMA_TEMPLATE):
    """Folder of a byte-level tokenizer of transformers with a chat template."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=MARKS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"{t['role']} {t['content']}" for d in dialogues(60) for t in d]
    inner.train_from_iterator([*text, "user assistant system"] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = template
    made.save_pretrained(str(folder))
    return str(folder)
