"""The feed: a dialogue is alone, every real token comes once, and its place is kept."""

from __future__ import annotations

import pytest
import torch
from fast_toys import SITE, dialogues, feed, hf_tokenizer, said, subject, taken, write

from quire.data import DataModule, Fields
from quire.datasets.activations import harvest
from quire.errors import ConfigError, DataError
from quire.roles.language.text import Bytes, HFTokenizer
from quire.roles.sites.subject import Subject
from quire_fast_sae.blocks import BlockActivations
from quire_fast_sae.instances import InstructActivations
from quire_fast_sae.template import Template


def keys(rows):
    return rows["instance"] * 1000 + rows["position"]


def in_order(data):
    rows = taken(data.train_dataloader())
    order = keys(rows).argsort()
    return {k: v[order] for k, v in rows.items()}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "quire"])
def test_a_dialogue_does_not_depend_on_what_runs_beside_it(tmp_path, kind):  # oracle: fp32 1e-5
    same = {"subject": subject(kind), "batch_size": 1}
    alone = in_order(feed(tmp_path, contexts=1, **same))
    crowd = in_order(feed(tmp_path, contexts=9, length_buckets=64, **same))
    other = in_order(feed(tmp_path, contexts=9, length_buckets=4, seed=3, **same))
    for rows in (crowd, other):
        assert torch.equal(keys(alone), keys(rows))
        assert torch.allclose(alone["activation"], rows["activation"], atol=1e-5)
    again = in_order(feed(tmp_path, contexts=9, length_buckets=64, **same))
    assert torch.equal(crowd["activation"], again["activation"])  # bitwise: the same shapes


def test_the_same_batch_in_another_order_gives_the_same_bits(tmp_path):
    data = feed(tmp_path)
    rows = data.rows("train")
    chosen = [3, 8, 1, 12]
    one, two = (data.studied().sites.read(rows.batch(c), [SITE]).values[SITE] for c in (chosen, chosen[::-1]))
    assert torch.equal(one, two.flip(0))


def test_a_token_of_a_block_depends_on_what_stands_before_it(tmp_path):  # positive control
    some = dialogues(40)
    one = feed(tmp_path, some, BlockActivations, block=64, batch_size=1, buffer=4096)
    rows = in_order(one)
    alone = in_order(feed(tmp_path, some, subject=one.subject, batch_size=1, buffer=4096))
    starts = rows["special"] & (rows["token"] == 256) & (rows["position"] > 0)
    first = alone["activation"][alone["position"] == 0][0]
    assert int(starts.sum()) > 5
    assert ((rows["activation"][starts] - first).abs().amax(1) > 1e-2).all()
    assert torch.allclose(
        alone["activation"][alone["position"] == 0], first.expand(len(alone["token"]), -1)[:36], atol=1e-5
    )


def test_real_tokens_and_special_tokens_are_conserved(tmp_path):  # oracle
    data = feed(tmp_path, batch_size=1)
    rows = taken(data.train_dataloader())
    split = data.source.dataset("train")
    assert len(rows["token"]) == int(split.lengths.sum()) and not (rows["token"] == 259).any()
    assert int(rows["special"].sum()) == sum(int(s.sum()) for s in split.special) == 3 * len(split)
    assert len(keys(rows).unique()) == len(rows["token"])
    assert torch.equal(rows["special"], rows["token"] >= 256)
    less = feed(tmp_path, batch_size=1, drop_special=True)
    assert len(taken(less.train_dataloader())["token"]) == int(split.lengths.sum()) - 3 * len(split)


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_is_exact(tmp_path, side):  # oracle
    whole = feed(tmp_path).source.dataset("train")
    data = feed(tmp_path, max_tokens=12, truncate=side, batch_size=1)
    split = data.source.dataset("train")
    assert len(taken(data.train_dataloader())["token"]) == int(whole.lengths.clamp(max=12).sum())
    for row, full in zip(split.tokens, whole.tokens):
        assert torch.equal(row, full[:12] if side == "right" else full[-12:])
    for n, prompt, full in zip(split.fields["prompt_length"], whole.fields["prompt_length"], whole.tokens):
        cut = max(0, len(full) - 12) if side == "left" else 0
        assert int(n) == max(0, min(int(prompt) - cut, 12))


def test_the_buffer_gives_what_it_got_and_the_same_seed_the_same_stream(tmp_path):  # oracle
    data = feed(tmp_path)
    loader = data.train_dataloader()
    total, most, batches = int(data.source.dataset("train").lengths.sum()), 0, []
    for batch in loader:
        batches.append(batch)
        held = loader.buffer
        most = max(most, held.used)
    rows = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    assert most <= 64 and len(rows["token"]) == total // 16 * 16
    assert len(keys(rows).unique()) == len(rows["token"])
    again = taken(feed(tmp_path).train_dataloader())
    assert all(torch.equal(rows[k], again[k]) for k in rows)
    assert not torch.equal(rows["token"], taken(feed(tmp_path, seed=1).train_dataloader())["token"])
    mixed = [len(m.unique()) for m in rows["instance"].view(-1, 16)]
    assert sum(mixed) / len(mixed) > 3  # shuffled across dialogues, which are longer than a batch


def test_it_goes_on_in_the_middle_of_the_buffer(tmp_path):  # oracle
    whole = [b["activation"] for b in feed(tmp_path).train_dataloader()]
    loader = feed(tmp_path).train_dataloader()
    walk = iter(loader)
    first = [next(walk)["activation"] for _ in range(5)]
    place, rows = loader.state()
    later = feed(tmp_path).train_dataloader()
    later.restore(place, {k: v.clone() for k, v in rows.items()})
    rest = [b["activation"] for b in later]
    assert len(first) + len(rest) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip([*first, *rest], whole))


def test_evaluation_gives_the_last_short_batch_too(tmp_path):
    data = feed(tmp_path)
    batches = list(data.val_dataloader())
    total = int(data.source.dataset("val").lengths.sum())
    assert sum(len(b["token"]) for b in batches) == total and len(batches[-1]["token"]) == (total % 16 or 16)


def test_gradients_are_those_of_the_dialogue_alone(tmp_path):
    data = feed(tmp_path, with_grad=True, batch_size=1)
    rows = in_order(data)
    ids = data.source.dataset("train").tokens[2][None]
    alone = data.studied().sites.read({"tokens": ids}, [SITE], grad=True)
    assert torch.allclose(rows["grad"][rows["instance"] == 2], alone.grads[SITE][0], atol=1e-4)


def test_listed_ids_are_special_wherever_they_stand(tmp_path):
    rows = taken(feed(tmp_path, special_ids=[258, ord("e")], batch_size=1).train_dataloader())
    assert torch.equal(rows["special"], (rows["token"] == 258) | (rows["token"] == ord("e")))


def test_raw_blocks_are_text_of_the_training_documents(tmp_path):
    data = BlockActivations(subject(), SITE, "stdlib:docs", templated=False, batch_size=64, buffer=256, train_samples=8)
    rows = taken(data.train_dataloader())
    assert data.source.length == 64 and len(rows["token"]) == 8 * 64 and int(rows["position"].max()) == 63
    assert not ((rows["token"] == 256) | (rows["token"] == 257)).any()


def test_rows_of_padding_alone_are_skipped():
    class Half(DataModule):
        fields = ("tokens", "mask", "special")

        def sizes(self):
            return {"vocab_size": 260, "length": 6}

        def split(self, name):
            mask = (torch.arange(10) % 2 == 0)[:, None].expand(10, 6)
            return Fields(tokens=torch.full((10, 6), 65).where(mask, torch.tensor(259)), mask=mask, special=~mask)

    data = InstructActivations(subject(), SITE, Half(), contexts=3, batch_size=1, buffer=8)
    rows = taken(data.train_dataloader())
    assert len(rows["token"]) == 30 and (rows["instance"] % 2 == 0).all() and (rows["token"] == 65).all()


def test_a_tokenizer_of_transformers_feeds_dialogues_too(tmp_path):
    tok = HFTokenizer(hf_tokenizer(tmp_path / "tok"))
    made = Subject(subject().part, "mine", tok)  # 260 rows of embedding: ids above are not met in this text
    some = [said("a b", "c d"), *dialogues(20)]
    data = feed(tmp_path, some, subject=made, batch_size=1)
    first = Template(tok).encode(data.source.dialogues()["train"][0], 0)
    assert data.source.dataset("train").tokens[0].tolist() == first.ids
    assert data.source.dataset("train").special[0].tolist() == first.scaffolding


@pytest.mark.parametrize(
    ("cls", "given", "sentence"),
    [
        (InstructActivations, {"max_tokens": 65}, "data.max_tokens is 65, but subject gpt2 takes 64 tokens"),
        (BlockActivations, {"block": 128}, "data.block is 128, but subject gpt2 takes 64 tokens"),
        (InstructActivations, {"buffer": 8}, "data.buffer is 8 rows, less than a batch of 16"),
        (InstructActivations, {"length_buckets": 0}, "data.length_buckets must be at least 1"),
        (InstructActivations, {"truncate": "both"}, "data.truncate is right or left"),
        (InstructActivations, {"max_tokens": -1}, "data.max_tokens must be at least 1"),
        (InstructActivations, {"special_ids": "all"}, "data.special_ids is template or a list"),
        (BlockActivations, {"block": 1}, "data.block must be at least 2"),
        (BlockActivations, {"templated": False, "source": ["a", "b"]}, "one text source without templated"),
        (
            InstructActivations,
            {"subject": Subject(subject().part, "bytes", Bytes())},
            "no chat_template; pass template=…",
        ),
        (InstructActivations, {"subject": Subject(subject().part, "mute")}, "has no tokenizer of its own"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(tmp_path, cls, given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        feed(tmp_path, cls=cls, **given).train_dataloader()


def test_a_block_longer_than_all_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="data.block is 64 tokens, but the val dialogues"):
        feed(tmp_path, dialogues(12), cls=BlockActivations).val_dataloader()


def test_a_source_without_a_dialogue_for_a_split_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no dialogue for the"):
        feed(tmp_path, source=write(tmp_path / "few.jsonl", dialogues(2))).val_dataloader()


def test_a_harvested_folder_holds_what_the_stream_gives_and_knows_its_template(tmp_path):
    given = {"subject": subject(), "batch_size": 1, "max_tokens": 20}
    streamed = in_order(feed(tmp_path, **given))
    options = harvest._parser().parse_args(["--out", str(tmp_path / "kept"), "--shard-rows", "100"])
    harvest.run(feed(tmp_path, **given), tmp_path / "kept", ["train"], options)
    kept = in_order(feed(tmp_path, **given, folder=str(tmp_path / "kept")))
    assert torch.equal(keys(streamed), keys(kept)) and torch.equal(streamed["special"], kept["special"])
    assert torch.allclose(streamed["activation"], kept["activation"], atol=1e-5)
    for other in ({"max_tokens": 19}, {"template": "<U>{{ messages[0].content }}"}, {"special_ids": [258]}):
        with pytest.raises(ConfigError, match=f"was harvested with data.{next(iter(other))}"):
            feed(tmp_path, **{**given, **other}, folder=str(tmp_path / "kept")).train_dataloader()
    blocks = feed(tmp_path, cls=BlockActivations, subject=given["subject"], folder=str(tmp_path / "kept"))
    with pytest.raises(ConfigError, match=r"data\.feed InstructActivations, not BlockActivations"):
        blocks.train_dataloader()
