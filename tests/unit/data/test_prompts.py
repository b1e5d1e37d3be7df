"""Prompts: what rows may be, turns that follow an answer, tokenizers without a chat template."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from draftwing.data.benchmarks import BENCHMARKS, load_benchmark
from draftwing.data.prompts import Prompt, as_prompt, read_prompts, spread, write_held_out_prompts


class Letters:
    """A tokenizer of one token per character, 0 in front where special tokens are asked for."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(
        self, messages: list[dict[str, str]], tools: None, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>" * add_generation_prompt

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_a_later_turn_follows_the_answer() -> None:
    prompt = as_prompt({"question_id": 7, "category": "math", "turns": ["one?", "two?"]}, "here")
    assert (prompt.name, prompt.category, prompt.num_turns) == ("7", "math", 2)
    second = prompt.followed_by("1.")
    assert text_of(second.token_ids(Letters("template"))) == "<u>one?<a>1.<u>two?<a>"
    assert second.num_turns == 1


def test_without_a_chat_template_turns_are_plain_text() -> None:
    second = as_prompt({"turns": ["one?", "two?"]}, "here").followed_by("1.")
    assert text_of(second.token_ids(Letters())) == "\0one?\n\n1.\n\ntwo?\n\n"


@pytest.mark.parametrize("template", ["template", None])
def test_text_parts_of_a_turn_are_joined(template: str | None) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "?"}]
    prompt = as_prompt({"messages": [{"role": "user", "content": parts}]}, "here")
    assert text_of(prompt.token_ids(Letters(template))) == ("<u>one?<a>" if template else "\0one?\n\n")


def test_a_question_id_of_zero_is_a_name() -> None:
    assert as_prompt({"question_id": 0, "turns": ["a"]}, "here").name == "0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (
            '{"turns": ["a"]}\n{"question": "b"}\n',
            r"line 2: expected one of prompt, messages, .*; got \['question'\]",
        ),
        ('{"turns": []}', "line 1: turns: expected a list of texts"),
        ('{"turns": "a"}', "line 1: turns: expected a list of texts"),
        ('{"prompt": ["a"]}', "line 1: prompt: expected a text"),
        ('{"messages": [{"role": "user"}]}', "line 1: messages: turn 0 has as content NoneType"),
        ('{"messages": []}', "line 1: messages: expected a list of at least one turn"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 1: messages: turn 0 has as content NoneType"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "line 1: messages: turn 0 has a part of type 'image_url'; only text is read",
        ),
        ('{"messages": ["a role and content"]}', "line 1: messages: expected"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: messages: expected something to answer"),
        ('{"messages": [{"role": "expert", "content": "a"}]}', "line 1: messages: turn 0 has the role 'expert'"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 5}', "line 1: tools: expected a list of objects"),
        ('{"prompt": "a"', "line 1: no JSON"),
        ("[1]", "line 1: expected an object"),
    ],
)
def test_bad_files_are_named_by_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_line_separators_inside_texts_do_not_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.jsonl")] == ["a\u2028b"]


def test_a_sample_is_spread_over_the_file() -> None:
    prompts = [Prompt(str(number)) for number in range(10)]
    assert [prompt.name for prompt in spread(prompts, 3)] == ["0", "3", "6"]
    assert spread(prompts, 99) == spread(prompts, None) == prompts


ROWS: dict[str, dict[str, Any]] = {
    "mt_bench": {"prompt": ["a", "b"], "prompt_id": 81, "category": "writing", "reference": []},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f():", "canonical_solution": "", "test": ""},
    "gsm8k": {"question": "a", "answer": "b"},
    "alpaca": {"instruction": "a", "input": "", "output": "b", "text": "c"},
    "cnn_dm": {"article": "a", "highlights": "b", "id": "c"},
    "spec_bench": {"question_id": 1, "category": "qa", "turns": ["a"], "reference": []},
    "speed_bench": {"question_id": "x", "category": "rag", "sub_category": "", "turns": ["a"], "source": "s"},
}
"""A row of each benchmark, as the hub has it."""


def hub_of(rows: list[dict[str, Any]], calls: list[Any]) -> Any:
    """Stands for `datasets`."""

    def load_dataset(path: str, config: str | None, *, split: str, data_files: str | None) -> list[dict[str, Any]]:
        calls.append((path, config, split, data_files))
        return rows

    return SimpleNamespace(load_dataset=load_dataset)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_become_prompts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "datasets", hub_of([ROWS[name]] * 2, calls))
    prompts = load_benchmark(name)
    benchmark = BENCHMARKS[name]
    assert calls == [(benchmark.path, benchmark.config, benchmark.split, benchmark.data_files)]
    assert len(prompts) == 2
    assert all(prompt.messages[0]["role"] == "user" for prompt in prompts)
    assert prompts[0].num_turns == (2 if name == "mt_bench" else 1)
    assert prompts[0].category == ROWS[name].get("category", "")


def test_a_benchmark_of_other_columns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", hub_of([{"problem": "a"}], []))
    with pytest.raises(ValueError, match=r"gsm8k, row 0: no column 'question'; it has \['problem'\]"):
        load_benchmark("gsm8k")


def test_rows_that_the_hub_withholds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    withheld = ROWS["speed_bench"] | {"turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"]}
    monkeypatch.setitem(sys.modules, "datasets", hub_of([withheld], []))
    with pytest.raises(ValueError, match="speed_bench=PATH"):
        load_benchmark("speed_bench")


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"draftwing\[eval\]"):
        load_benchmark("gsm8k")


def test_the_real_loader_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    from dataclasses import replace

    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS["gsm8k"]) + "\n", encoding="utf-8")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    local = replace(
        BENCHMARKS["gsm8k"], path="json", config=None, split="train", data_files=str(tmp_path / "test.jsonl")
    )
    monkeypatch.setitem(BENCHMARKS, "gsm8k", local)
    assert [prompt.messages[0]["content"] for prompt in load_benchmark("gsm8k")] == ["a"]


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"^prompts: .*latin.jsonl, line 1: not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def test_tools_are_told_of_in_every_turn() -> None:
    class Told(Letters):
        def apply_chat_template(self, messages: list[dict[str, str]], tools: Any, **options: Any) -> str:
            return json.dumps(tools) + super().apply_chat_template(messages, None, **options)

    for tools in ([TOOL], json.dumps([TOOL]), json.dumps([TOOL["function"]])):
        prompt = as_prompt({"messages": [{"role": "user", "content": "2+3?"}], "tools": tools}, "here")
        assert text_of(prompt.token_ids(Told("template"))) == json.dumps([TOOL]) + "<u>2+3?<a>"
    followed = Prompt("", messages=prompt.messages, tools=prompt.tools, later_turns=("so?",)).followed_by("5")
    assert text_of(followed.token_ids(Told("template"))).startswith(json.dumps([TOOL]))
    with pytest.raises(ValueError, match=r"chat_template: .* has none, so no prompt can have tools"):
        prompt.token_ids(Letters())


def test_training_rows_are_prompts_without_the_answer_at_their_end() -> None:
    row = {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "1."}], "prompt": None}
    assert text_of(as_prompt(row, "here").token_ids(Letters("template"))) == "<u>one?<a>"


def test_prompts_are_made_of_one_request_and_a_long_answer(tmp_path: Path) -> None:
    """Other conversations are left out, whatever they are."""
    user, answer = {"role": "user", "content": "Write it."}, {"role": "assistant", "content": "line\n" * 9}
    call = {"role": "assistant", "content": None, "tool_calls": []}
    others = [
        [user],
        [],
        [user, answer, user, answer],
        [{"role": "system", "content": "s"}, user, answer],
        [user, call],
    ]
    rows: list[dict[str, Any]] = [{"messages": messages} for messages in (*others, [user, answer])]
    write_held_out_prompts([{"text": "x"}, {"input_ids": [1]}, *rows], tmp_path / "prompts.jsonl")
    (prompt,) = read_prompts(tmp_path / "prompts.jsonl")
    assert prompt.messages == (user,)


def test_arrays_and_texts_are_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"turns": ["one?"]}, {"prompt": "two"}], indent=1), encoding="utf-8")
    assert [prompt.num_turns for prompt in read_prompts(tmp_path / "a.json")] == [1, 1]
    (tmp_path / "lines.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(tmp_path / "lines.txt")] == ["one", "two"]
    (tmp_path / "broken.json").write_text("[{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^prompts: .*broken.json begins as an array and is no JSON"):
        read_prompts(tmp_path / "broken.json")
