"""Small subjects with random weights, text for them, and dictionaries at their z site; nothing is trained."""

import torch

from quire.contracts import Spec, build
from quire.data import DataModule, Fields
from quire.datasets.activations.module import Activations
from quire.model import Model
from quire.roles.language.hf import HFCausal
from quire.roles.language.models import CausalLM
from quire.roles.sites.subject import Subject
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import ReLU

VOCAB = 60
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 64}
NEOX = {"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX |= {"intermediate_size": 64, "max_position_embeddings": 64, "use_parallel_residual": True}
KINDS = {"gpt2": GPT2, "llama": LLAMA, "neox": NEOX}


def language_model(kind="gpt2"):
    """A random language model of a kind: of transformers, or ``quire``."""
    torch.manual_seed(0)
    if kind == "quire":
        made = CausalLM(width=32, depth=2, heads=4)
        build(made, Spec({"vocab_size": VOCAB, "length": 64}))
    else:
        made = HFCausal(config={**KINDS[kind], "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 3})
        build(made, Spec())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))  # norms and biases too
    return made.eval()


class Ids(DataModule):
    """Rows of random ids, short ones padded on the right (or the left)."""

    fields = ("tokens", "mask", "special")

    def __init__(self, samples=24, length=10, ragged=True, left=False, **kwargs):
        super().__init__(**{"batch_size": 4, **kwargs})
        self.samples, self.length, self.ragged, self.left = samples, length, ragged, left

    def sizes(self):
        return {"vocab_size": VOCAB, "length": self.length, "bos": 1, "eos": 3, "pad": 0}

    def split(self, name):
        source = torch.Generator().manual_seed(("train", "val", "test").index(name))
        ids = torch.randint(4, 16, (self.samples, self.length), generator=source)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if self.ragged:
            mask = torch.arange(self.length) < torch.randint(3, self.length + 1, (self.samples, 1), generator=source)
        mask = mask.flip(1) if self.left else mask
        return Fields(tokens=ids * mask, mask=mask, special=~mask)


def feed(kind="gpt2", site="blocks.1.z", analysis=True, **more):
    """Whole samples of a random subject."""
    given = {"subject": Subject(language_model(kind), kind), "source": Ids(), "batch_size": 4, "buffer": 64, **more}
    return Activations(site=site, analysis=analysis, contexts=4, **given)


def dictionary(data, sampler=None, selector=None, metrics=None, latents=24, **given):
    """A built dictionary of the feed's site, away from its start; its run is the feed's."""
    torch.manual_seed(1)
    encoder = SparseEncoder(latents, selector or ReLU(), **given)
    model = Model(encoder, SparseDecoder(), SparseReconstruction(), sampler, metrics, spec=data.spec)
    model.configure_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("sampler"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model._trainer = type("Run", (), {"datamodule": data, "global_step": 0})()
    return model.eval()


def batch_of(data):
    """The first batch of a feed."""
    return next(iter(data.predict_dataloader()))
