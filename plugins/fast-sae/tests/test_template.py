"""A dialogue under its template: the same tokens as the whole text, and which of them are scaffolding."""

from __future__ import annotations

import pytest
from fast_toys import LLAMA_TEMPLATE, QWEN_TEMPLATE, dialogues, hf_tokenizer, said

from quire.errors import ConfigError, DataError
from quire.roles.language.text import Bytes, HFTokenizer
from quire_fast_sae.template import Template, name_of
from quire_fast_sae.tokenizer import ChatBytes


def test_bytes_and_marks():
    tok = ChatBytes()
    made = Template(tok).encode(said("hi", "yo", "a", "b"), 0)
    assert made.ids == [256, *b"hi", 257, *b"yo", 258, 256, *b"a", 257, *b"b", 258]
    assert [i for i, s in zip(made.ids, made.scaffolding) if s] == [256, 257, 258, 256, 257, 258]
    assert made.prompt == len(made.ids) - 2
    assert tok.decode(made.ids) == "hiyoab" and [name_of(tok, i) for i in (256, 258, 65)] == ["<U>", "<E>", "A"]


@pytest.mark.parametrize("text", [LLAMA_TEMPLATE, QWEN_TEMPLATE])
def test_the_ids_are_those_of_the_whole_text_and_the_contents_are_not_special(tmp_path, text):
    tok = HFTokenizer(hf_tokenizer(tmp_path, text))
    template = Template(tok)
    for number, dialogue in enumerate([*dialogues(5), said(" user ", "assistant user"), said("only")]):
        made = template.encode(dialogue, number)
        whole = tok.inner.apply_chat_template(dialogue, tokenize=True, return_dict=False)
        assert made.ids == list(whole)
        content = tok.inner.decode([i for i, s in zip(made.ids, made.scaffolding) if not s])
        assert content.replace(" ", "") == "".join(t["content"] for t in dialogue).replace(" ", "")


def test_role_words_are_special_only_where_the_template_writes_them(tmp_path):
    tok = HFTokenizer(hf_tokenizer(tmp_path))
    made = Template(tok).encode(said("user", "user"), 0)
    user = tok.encode("user")
    assert len(user) == 1
    flags = [s for i, s in zip(made.ids, made.scaffolding) if i == user[0]]
    assert flags == [True, False, False]


def test_a_rendered_dialogue_has_exactly_one_start_token(tmp_path):  # oracle
    tok = HFTokenizer(hf_tokenizer(tmp_path))
    for number, dialogue in enumerate(dialogues(5)):
        assert Template(tok).encode(dialogue, number).ids.count(tok.bos) == 1


def test_two_start_tokens_are_refused(tmp_path):
    tok = HFTokenizer(hf_tokenizer(tmp_path))
    with pytest.raises(DataError, match="instance 7 starts with two start tokens"):
        Template(tok, "{{ bos_token }}" + LLAMA_TEMPLATE).encode(said("a", "b"), 7)


def test_no_template_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="tokenizer has no chat_template; pass template=…"):
        Template(Bytes())
    made = Template(Bytes(), "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    encoded = made.encode(said("x"), 0)
    assert Bytes().decode(encoded.ids) == "[user]x" and encoded.scaffolding == [True] * 6 + [False]


def test_contents_that_change_the_scaffolding_are_refused_unless_ids_are_listed():
    text = "{% for m in messages %}{% if 'q' in m.content %}!{% endif %}<U>{{ m.content }}{% endfor %}"
    template = Template(ChatBytes(), text)
    with pytest.raises(DataError, match="give data.special_ids as a list"):
        template.encode(said("q"), 0)
    assert template.encode(said("q"), 0, strict=False).ids == [*b"!", 256, *b"q"]


def test_a_template_may_leave_a_turn_out():
    text = "{% for m in messages %}{% if m.role != 'system' %}<U>{{ m.content }}{% endif %}{% endfor %}<E>"
    made = Template(ChatBytes(), text).encode([{"role": "system", "content": "s"}, *said("q")], 0)
    assert made.ids == [256, *b"q", 258] and made.scaffolding == [True, False, True]


def test_a_broken_template_is_refused():
    with pytest.raises(ConfigError, match="is no Jinja template"):
        Template(ChatBytes(), "{% for").encode(said("x"), 0)


def test_what_a_template_refuses_is_said_with_the_turns():
    text = "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}x"
    with pytest.raises(DataError, match="refuses a dialogue of the turns system, user: start with the user"):
        Template(ChatBytes(), text).render([{"role": "system", "content": "s"}, *said("q")])
