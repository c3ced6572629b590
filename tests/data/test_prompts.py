import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.data.arithmetic import ALPHABET
from miles_plan.data.chat import ChatTemplate
from miles_plan.data.demonstrations import check_demonstrations, demonstration_batch, open_demonstrations
from miles_plan.data.problem import DataError
from miles_plan.data.prompts import check_prompts, open_prompts
from miles_plan.data.tokenizer import ByteTokenizer, CharacterTokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "prompts.jsonl", [{"prompt": "9" * (1 + i % 5), "answer": str(i)} for i in range(20)])


def test_a_step_is_a_pure_function_of_seed_and_step(file):
    tokenizer = ByteTokenizer()
    one, other = (open_prompts(file, tokenizer, seed=3) for _ in range(2))
    assert one.batch(5, 8) == other.batch(5, 8)
    assert one.batch(5, 8) != open_prompts(file, tokenizer, seed=4).batch(5, 8)
    stream = [prompt for step in range(5) for prompt in one.batch(step, 8)]
    assert [prompt.position for prompt in stream] == list(range(40))
    assert sorted(prompt.row for prompt in stream[:20]) == sorted(prompt.row for prompt in stream[20:]) == list(range(20))
    assert [prompt.row for prompt in stream[:20]] != [prompt.row for prompt in stream[20:]]


def test_a_step_may_span_epochs(file):
    batch = open_prompts(file, ByteTokenizer(), seed=0).batch(0, 45)
    assert len({prompt.position for prompt in batch}) == 45
    assert np.bincount([prompt.row for prompt in batch]).tolist().count(3) == 5


def test_long_prompts_are_dropped_and_counted_or_reported(file):
    prompts = open_prompts(file, ByteTokenizer(), seed=0, max_prompt_tokens=3)
    assert (len(prompts), prompts.dropped) == (12, 8)
    assert max(len(prompt.tokens) for prompt in prompts.batch(0, 24)) == 3
    with pytest.raises(DataError) as caught:
        open_prompts(file, ByteTokenizer(), seed=0, max_prompt_tokens=3, on_too_long="fail")
    assert caught.value.total == 8
    assert str(caught.value.problems[0]).endswith(":4:12: 4 tokens are too long, 3 are allowed")
    with pytest.raises(DataError, match="every row is longer than the 0 tokens allowed; the shortest has 1"):
        open_prompts(file, ByteTokenizer(), seed=0, max_prompt_tokens=0)


def test_without_shuffle_and_for_evaluation_rows_come_in_file_order(file):
    prompts = open_prompts(file, ByteTokenizer(), seed=0, shuffle=False, max_prompt_tokens=4)
    kept = [row for row in range(20) if row % 5 != 4]
    assert [prompt.row for prompt in prompts.batch(0, 16)] == kept
    assert [prompt.row for prompt in prompts.in_file_order(chunk=3)] == kept
    assert [prompt.answer for prompt in prompts.in_file_order()] == [str(row) for row in kept]


def test_names_and_metadata(tmp_path):
    rows = [
        {"prompt": "1", "answer": "1", "id": "first", "metadata": {"level": 3}, "source": "book"},
        {"prompt": "2", "answer": "2", "id": 77},
        {"prompt": "3", "answer": "3"},
    ]
    prompts = open_prompts(write(tmp_path / "p.jsonl", rows), ByteTokenizer(), seed=0, shuffle=False).batch(0, 3)
    assert [prompt.name for prompt in prompts] == ["first", "77", "3"]
    assert [prompt.metadata for prompt in prompts] == [{"level": 3, "source": "book"}, {}, {}]


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        ('{"prompt": "1"}', 1, "'answer' is missing"),
        ('{"prompt": "1", "anwser": "2"}', 1, "'answer' is missing; 'anwser' may be meant"),
        ('{"prompt": "1", "answer": 2}', 27, "'answer' must be a string, found a number"),
        ('{"prompt": 1, "answer": "2"}', 12, "'prompt' must be a string, found a number"),
        ('{"prompt": null, "answer": "2"}', 12, "'prompt' must be a string, found null"),
        ('{"prompt": "", "answer": "2"}', 12, "the prompt is empty"),
        ('{"answer": "2"}', 1, "a row needs 'prompt', a string, or 'messages', a list"),
        ('{"prompt": "1", "messages": [{"role": "user", "content": "1"}], "answer": "2"}', 1, "not both"),
        ('{"messages": [], "answer": "2"}', 14, "messages must be a list of at least one object"),
        ('{"messages": [{"role": "user"}], "answer": "2"}', 14, "message 0 needs 'content', a string"),
        ('{"prompt": [{"role": "user", "content": "1", "name": "x"}], "answer": "2"}', 12, "unknown key 'name'"),
        ('{"prompt": "1", "answer": "\\ud800"}', 27, "half of a surrogate pair"),
        ('{"prompt": "1", "answer": "2", "metadata": []}', 44, "'metadata' must be an object, found an array"),
        ('{"prompt": "1", "answer": "2", "id": true}', 38, "'id' must be a string or a whole number, found a boolean"),
        ('{"prompt": "1", "answer": "2", "a": 1, "metadata": {"a": 2}}', 37, "'a' also stands in 'metadata'"),
    ],
)
def test_bad_rows_are_reported_where_they_are(tmp_path, line, column, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1", "answer": "1"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        check_prompts(path)
    found = [problem for problem in caught.value.problems if message in problem.message]
    assert [(problem.line, problem.column) for problem in found] == [(2, column)], str(caught.value)


def test_a_prompt_without_tokens_is_reported_with_its_line(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+x=", "answer": "2"}])
    with pytest.raises(DataError, match=r"p.jsonl:2:12: character 3, 'x', is not in the alphabet"):
        open_prompts(path, CharacterTokenizer(ALPHABET), seed=0)


def test_messages_need_and_use_a_chat_template(tmp_path):
    messages = [{"role": "user", "content": "1+1"}]
    path = write(tmp_path / "p.jsonl", [{"messages": messages, "answer": "2"}, {"prompt": messages, "answer": "2"}])
    with pytest.raises(DataError, match="a tokenizer with a chat template") as caught:
        open_prompts(path, ByteTokenizer(), seed=0)
    assert [(problem.line, problem.column) for problem in caught.value.problems] == [(1, 14), (2, 12)]

    tokenizer = ByteTokenizer(chat_template=ChatTemplate("[{{ messages[0].role }}]{{ messages[0].content }}?"))
    prompts = open_prompts(path, tokenizer, seed=0, shuffle=False).batch(0, 2)
    assert [prompt.text for prompt in prompts] == ["[user]1+1?"] * 2
    assert prompts[0].tokens == tuple(b"[user]1+1?")


def test_demonstrations_become_samples_that_end_with_the_end_token(tmp_path):
    rows = [{"prompt": "1+1=", "response": "2"}, {"prompt": "9+9=", "response": "18"}, {"prompt": "0=", "response": ""}]
    tokenizer = CharacterTokenizer(ALPHABET)
    demonstrations = open_demonstrations(write(tmp_path / "s.jsonl", rows), tokenizer, seed=0, shuffle=False)
    batch = demonstration_batch(demonstrations.batch(1, 3))
    assert batch.problems() == []
    assert batch.sample_id.tolist() == [3, 4, 5]
    assert [tokenizer.decode(batch.response(i)) for i in range(3)] == ["2", "18", ""]
    assert all(batch.response(i)[-1] == tokenizer.eos_token_id for i in range(3))
    assert batch.response_length.tolist() == [2, 3, 1]
    assert (batch.tokens.dtype, batch.length.dtype, batch.rollout_log_probs.dtype) == (np.int32, np.int32, np.float32)


def test_bad_demonstrations_are_reported(tmp_path):
    path = write(tmp_path / "s.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1", "response": ["2"]}])
    with pytest.raises(DataError) as caught:
        check_demonstrations(path)
    assert [(p.line, p.column, p.message) for p in caught.value.problems] == [
        (1, 1, "'response' is missing"),
        (2, 29, "'response' must be a string, found an array"),
    ]
    good = write(tmp_path / "t.jsonl", [{"prompt": "1+1=", "response": "2x"}])
    with pytest.raises(DataError, match=r"t.jsonl:1:12: in the response: character 2, 'x'"):
        open_demonstrations(good, CharacterTokenizer(ALPHABET), seed=0)
    with pytest.raises(DataError, match="every row is longer"):
        open_demonstrations(good, ByteTokenizer(), seed=0, max_tokens=6)
    assert len(open_demonstrations(good, ByteTokenizer(), seed=0, max_tokens=7)) == 1


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 30), st.integers(0, 1000))
def test_batches_tile_the_stream(tmp_path_factory, step, size, seed):
    path = tmp_path_factory.getbasetemp() / "tile.jsonl"
    if not path.exists():
        write(path, [{"prompt": str(i), "answer": str(i)} for i in range(7)])
    prompts = open_prompts(path, ByteTokenizer(), seed=seed)
    assert prompts.batch(step, size) == prompts.at(0, (step + 1) * size)[step * size :]
