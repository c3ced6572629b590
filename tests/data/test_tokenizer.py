import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.data.problem import DataError
from miles_plan.data.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer, tokenizer_from

WORDS = ["<s>", "</s>", "<|user|>", "<|end|>", "2", "3", "+", "5", "=", " "]


@pytest.fixture
def folder(tmp_path):
    """A real `tokenizer.json`, one token a character, with BOS before each text, and the settings beside it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "chat_template": "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_go_there_and_back(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id, tokenizer.pad_token_id]) == text
    assert all(token < 256 for token in tokens)


@settings(deadline=None)
@given(st.text("0123456789+-="))
def test_characters_go_there_and_back(text):
    tokenizer = CharacterTokenizer("0123456789+-=")
    assert tokenizer.decode([tokenizer.pad_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (13, 14, 15)


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(ValueError, match=r"character 3, '\*', is not in the alphabet '0123'"):
        CharacterTokenizer("0123").encode("12*3")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("0123")])
def test_ids_beyond_the_vocabulary_cannot_pass_as_text(tokenizer):
    tokens = tokenizer.encode("12")
    assert tokenizer.decode([tokens[0], tokenizer.vocab_size + 5, tokens[1]]) == "1\ufffd2"


def test_alphabets_that_are_none():
    with pytest.raises(ValueError, match="holds '2' more than once"):
        CharacterTokenizer("1223")
    with pytest.raises(ValueError, match="the alphabet is empty"):
        CharacterTokenizer("")
    with pytest.raises(ValueError, match="needs its alphabet"):
        tokenizer_from("characters")


def test_a_hugging_face_folder(folder):
    tokenizer = tokenizer_from(folder)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (10, 1, 1)
    assert tokenizer.prefix_token_ids == (0,)
    assert tokenizer.encode("2+3=5") == [4, 6, 5, 8, 7]
    assert tokenizer.decode([0, 4, 6, 5, 8, 7, 1]) == "2+3=5"
    assert tokenizer.decode([4, 99, 5]) == "2\ufffd3"
    assert tokenizer_from(folder / "tokenizer.json", eos_token="<|end|>").eos_token_id == 3


def test_a_chat_template_is_rendered_with_its_special_tokens(folder):
    template = tokenizer_from(folder).chat_template
    assert template is not None
    text = template.render([{"role": "user", "content": "2+3"}])
    assert text == "<s><|user|>2+3<|end|>="
    assert tokenizer_from(folder).encode(text) == [0, 2, 4, 6, 5, 3, 8]


def test_the_template_file_wins_and_may_refuse(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    template = tokenizer_from(folder).chat_template
    assert template is not None
    with pytest.raises(ValueError, match="refuses these messages: no system role"):
        template.render([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ strftime_now('%Y') }}",
        "{% for",
        "{{ 1 / 0 }}",
        "{{ messages[9].x }}",
    ],
)
def test_templates_that_must_not_run(folder, source):
    (folder / "chat_template.jinja").write_text(source)
    template = tokenizer_from(folder).chat_template
    assert template is not None
    with pytest.raises(ValueError, match="refuses"):
        template.render([{"role": "user", "content": "x"}])


def test_files_that_are_no_tokenizer_are_named(folder):
    with pytest.raises(DataError, match=r"missing/tokenizer.json: cannot be read: No such file"):
        tokenizer_from(folder / "missing" / "tokenizer.json")
    with pytest.raises(DataError, match="has no token '</ss>'; did you mean '</s>'"):
        tokenizer_from(folder, eos_token="</ss>")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: cannot be read"):
        tokenizer_from(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no end token known"):
        tokenizer_from(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no tokenizer.json"):
        tokenizer_from(folder)
    with pytest.raises(ValueError, match="did you mean 'byte'"):
        tokenizer_from("bytes")
