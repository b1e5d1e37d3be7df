"""Exact loss masks: the assistant's words and its end-of-turn token, nothing else."""

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from draftwing.data.chat_template import Example, encode_row, normalise, render
from draftwing.data.corpus import Row
from draftwing.data.messages import read_conversation
from draftwing.training.train_language_model import END_OF_TEXT, END_OF_TURN, train_tokenizer

THINKING = (
    "{% set of = namespace(question=-1) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set of.question = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.reasoning_content and loop.index0 > of.question %}"
    "<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Writes thoughts behind the last question only, as Qwen3's does."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges."""
    return train_tokenizer(["yes sir, yes sir", "hello there, hello you"] * 4, vocab_size=290)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def tokens_of(example: Example, tokenizer: PreTrainedTokenizerFast, supervised: bool) -> str:
    """The text of the tokens that are (not) supervised."""
    return tokenizer.decode(example.input_ids[example.loss_mask == supervised])


def test_a_conversation_of_one_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = encode_row({"messages": [say("user", "hi"), say("assistant", "yes sir")]}, tokenizer)
    assert tokenizer.decode(example.input_ids) == "<|user|>\nhi<|end|>\n<|assistant|>\nyes sir<|end|>\n"
    # One entry a token: user, \n, h, i, end, \n, assistant, \n | yes and sir in some pieces, end | \n
    before, answer = tokenizer("<|user|>\nhi<|end|>\n<|assistant|>\n").input_ids, tokenizer("yes sir<|end|>").input_ids
    assert example.loss_mask.tolist() == [False] * len(before) + [True] * len(answer) + [False]
    assert example.input_ids.dtype == torch.int64
    assert example.loss_mask.dtype == torch.bool


def test_every_answer_of_several_turns_is_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        say("system", "yes sir"),
        say("user", "hello"),
        say("assistant", "hello you"),
        say("user", "hello you"),  # the same words, not the model's to say
        say("assistant", "yes"),
    ]
    (example,) = encode_row({"messages": messages}, tokenizer)
    assert tokens_of(example, tokenizer, supervised=True) == "hello you<|end|>yes<|end|>"
    assert tokens_of(example, tokenizer, supervised=False) == (
        "<|system|>\nyes sir<|end|>\n<|user|>\nhello<|end|>\n<|assistant|>\n"
        "\n<|user|>\nhello you<|end|>\n<|assistant|>\n\n"
    )


@pytest.mark.parametrize("content", ["", "  indented", "ends in spaces  \n", "naïve → 字"])
def test_any_content_is_supervised_whole(tokenizer: PreTrainedTokenizerFast, content: str) -> None:
    (example,) = encode_row({"messages": [say("user", "hi"), say("assistant", content)]}, tokenizer)
    if content.startswith(" "):  # the line break before may share a token with the spaces: that one is not supervised
        assert tokens_of(example, tokenizer, supervised=True).endswith("indented<|end|>")
    else:
        assert tokens_of(example, tokenizer, supervised=True) == content + END_OF_TURN


def test_a_conversation_without_an_answer_has_nothing_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = encode_row({"messages": [say("user", "hi")]}, tokenizer)
    assert not example.loss_mask.any()


def test_sharegpt_rows_equal_openai_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("system", "yes"), ("human", "hello"), ("gpt", "hello you")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    messages = [say("system", "yes"), say("user", "hello"), say("assistant", "hello you")]
    assert read_conversation(row)["messages"] == messages
    (ours,), (theirs,) = encode_row(row, tokenizer), encode_row({"messages": messages}, tokenizer)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.loss_mask, theirs.loss_mask)


def test_an_unknown_sharegpt_speaker_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        ValueError, match=r"^conversations: turn 0 has the role 'narrator', which nobody knows; expected"
    ):
        encode_row({"conversations": [{"from": "narrator", "value": "42"}]}, tokenizer)
    for speaker in (["tool"], None):
        with pytest.raises(ValueError, match=r"^conversations: turn 0 has no role"):
            encode_row({"conversations": [{"from": speaker, "value": "42"}]}, tokenizer)


def test_plain_text_is_supervised_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = encode_row({"text": "hello there"}, tokenizer)
    assert tokenizer.decode(example.input_ids) == "hello there"
    assert example.loss_mask.all()
    assert len(example) == len(example.input_ids) == len(example.loss_mask)


@pytest.mark.parametrize(
    ("row", "mask"),
    [
        ({"input_ids": [5, 6, 7]}, [True, True, True]),
        ({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, [False, True, True]),
    ],
)
def test_token_ids_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast, row: Row, mask: list[bool]) -> None:
    (example,) = encode_row(row, tokenizer)
    assert example.input_ids.tolist() == [5, 6, 7]
    assert example.loss_mask.tolist() == mask


@pytest.mark.parametrize("mask", [[0, 1], [None, 1, 1], ["a", "b", "c"], [[1], [1], [1]], [0.5, 2, 1]])
def test_other_masks_are_refused(tokenizer: PreTrainedTokenizerFast, mask: list[object]) -> None:
    with pytest.raises(ValueError, match="loss_mask: expected 3 entries as in input_ids, 0 or 1"):
        encode_row({"input_ids": [5, 6, 7], "loss_mask": mask}, tokenizer)


def test_other_rows_are_refused_and_their_fields_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"expected one of messages, .*; got the fields \['answer', 'question'\]"):
        encode_row({"question": "a", "answer": "b"}, tokenizer)


def test_render_can_open_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [say("user", "hi")]
    assert render(messages, tokenizer) == "<|user|>\nhi<|end|>\n"
    assert render(messages, tokenizer, add_generation_prompt=True) == "<|user|>\nhi<|end|>\n<|assistant|>\n"


def test_the_tokenizers_special_tokens_are_single_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 290
    assert (tokenizer.pad_token, tokenizer.eos_token) == (END_OF_TEXT, END_OF_TURN)
    for special in (END_OF_TEXT, END_OF_TURN, "<|user|>", "<|assistant|>", "<|system|>"):
        assert len(tokenizer(special).input_ids) == 1


TOOL_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "yes"}}]}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)


class TestMessages:
    def test_text_parts_are_joined(self, tokenizer: PreTrainedTokenizerFast) -> None:
        parts = [{"type": "text", "text": "yes "}, {"type": "text", "text": "sir"}]
        row = {"messages": [say("user", "hi"), {"role": "assistant", "content": parts}]}
        assert tokens_of(*encode_row(row, tokenizer), tokenizer, supervised=True) == "yes sir<|end|>"

    def test_tool_calls_are_supervised_as_the_template_writes_them(self, tokenizer: PreTrainedTokenizerFast) -> None:
        row = {"messages": [say("user", "hi"), CALL, say("tool", "hello"), say("assistant", "yes")]}
        (example,) = encode_row(row, with_template(tokenizer, TOOL_TEMPLATE))
        assert tokens_of(example, tokenizer, supervised=True) == "<call>yes</call><|end|>yes<|end|>"

    def test_a_template_that_loses_tool_calls_is_refused(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match="does not write the tool calls of turn 1"):
            encode_row({"messages": [say("user", "hi"), CALL]}, tokenizer)

    def test_the_cut_off_end_of_an_answer_is_not_supervised(self, tokenizer: PreTrainedTokenizerFast) -> None:
        row = {"messages": [say("user", "hi"), say("assistant", "yes sir")], "truncated": True}
        assert tokens_of(*encode_row(row, tokenizer), tokenizer, supervised=True) == "yes sir"

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "expected a list of at least one turn"),
            ("hi", "expected a list of at least one turn"),
            ([{"content": "hi"}], "turn 0 has no role"),
            ([{"role": None, "content": "hi"}], "turn 0 has no role"),
            ([say("user", "hi"), {"role": "assistant"}], "turn 1 has as content NoneType; expected text"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "turn 0 has a part of type 'image_url'"),
            ([{"role": "user", "content": [{"type": "text"}]}], "turn 0 has a part of type 'text' without a text"),
            ([say("assistant", "hi"), say("user", "hi")], "turn 0 is an answer"),
        ],
    )
    def test_other_turns_are_refused(self, tokenizer: PreTrainedTokenizerFast, messages: object, message: str) -> None:
        with pytest.raises(ValueError, match=f"^messages: {message}"):
            encode_row({"messages": messages}, tokenizer)

    def test_a_tokenizer_without_a_template_is_named(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match="chat_template: the target's tokenizer has none"):
            encode_row({"messages": [say("user", "hi")]}, with_template(tokenizer, None))

    def test_what_a_template_raises_is_told(self, tokenizer: PreTrainedTokenizerFast) -> None:
        template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(ValueError, match=r"chat_template: the template refuses .*roles must alternate"):
            encode_row({"messages": [say("user", "hi")]}, with_template(tokenizer, template))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"tools": 5}, "^tools: expected a list of objects, got 5"),
            ({"tools": ["add"]}, "^tools: expected a list of objects"),
            ({"messages": [CALL | {"tool_calls": 5}]}, "^messages: turn 1 has a tool call without a function's name"),
            (
                {"messages": [CALL | {"tool_calls": [{}]}]},
                "^messages: turn 1 has a tool call without a function's name",
            ),
            ({"truncated": "no"}, "^truncated: expected true or false, got 'no'"),
            ({"held_out": "no"}, "^held_out: expected true or false, got 'no'"),
        ],
    )
    def test_fields_of_another_form_are_refused(
        self, tokenizer: PreTrainedTokenizerFast, fields: Row, message: str
    ) -> None:
        row = fields | {"messages": [say("user", "hi"), *fields.get("messages", [say("assistant", "yes")])]}
        with pytest.raises(ValueError, match=message):
            encode_row(row, with_template(tokenizer, TOOL_TEMPLATE))


def call_of(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}


class TestForms:
    """What clients, tables and other formats write is one conversation."""

    @pytest.mark.parametrize("nothing", [{"tool_calls": None}, {"tool_calls": []}, {"refusal": None, "name": None}])
    def test_a_null_is_no_field(self, nothing: Row) -> None:
        messages = [say("user", "hi"), say("assistant", "yes")]
        row = {"messages": [message | nothing for message in messages], "text": None, "tools": None, "held_out": None}
        assert normalise(row) == {"messages": messages}

    @pytest.mark.parametrize(
        "calls",
        [
            {"tool_calls": [call_of({"a": 2, "b": None})]},
            {"tool_calls": [call_of('{"a": 2, "b": null}')]},
            {"tool_calls": json.dumps([call_of('{"a": 2, "b": null}')]), "function_call": None},
            {"tool_calls": [call_of({"a": 2, "b": None}) | {"custom": None}]},
        ],
    )
    def test_arguments_are_a_mapping(self, calls: Row) -> None:
        (message,) = read_conversation({"messages": [{"role": "assistant", "content": None} | calls]})["messages"]
        assert message == {"role": "assistant", "content": "", "tool_calls": [call_of({"a": 2, "b": None})]}

    def test_no_arguments_are_an_empty_mapping(self) -> None:
        for arguments in (None, "", "{}", {}):
            (message,) = read_conversation({"messages": [CALL | {"tool_calls": [call_of(arguments)]}]})["messages"]
            assert message["tool_calls"] == [call_of({})]

    @pytest.mark.parametrize("arguments", ["{broken", "[1]", 5])
    def test_arguments_that_are_no_object_are_refused(self, arguments: object) -> None:
        with pytest.raises(ValueError, match=r"messages: turn 0 has as arguments of a tool call .*; expected a JSON"):
            read_conversation({"messages": [CALL | {"tool_calls": [call_of(arguments)]}]})

    def test_a_template_that_joins_texts_gets_the_arguments_as_json(self, tokenizer: PreTrainedTokenizerFast) -> None:
        template = TOOL_TEMPLATE.replace(
            "{{ call.function.name }}", "{{ call.function.name + call.function.arguments }}"
        )
        row = {"messages": [say("user", "hi"), CALL | {"tool_calls": [call_of({"a": "é"})]}]}
        (example,) = encode_row(row, with_template(tokenizer, template))
        assert tokens_of(example, tokenizer, supervised=True) == '<call>add{"a": "é"}</call><|end|>'

    def test_the_older_function_call_is_a_tool_call(self) -> None:
        turns = [
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}},
            {"role": "function", "name": "add", "content": "5"},
        ]
        assert read_conversation({"messages": turns})["messages"] == [
            {"role": "assistant", "content": "", "tool_calls": [call_without_id({"a": 2})]},
            {"role": "tool", "name": "add", "content": "5"},
        ]

    def test_sharegpt_calls_and_what_the_tools_said(self) -> None:
        turns = [("human", "2+3?"), ("function_call", '{"name": "add", "arguments": {"a": 2}}'), ("observation", "5")]
        row = {"conversations": [{"from": who, "value": text} for who, text in turns], "system": "be brief"}
        row["tools"] = json.dumps([{"name": "add", "parameters": {}}])
        read = read_conversation(row)
        assert read["messages"] == [
            say("system", "be brief"),
            say("user", "2+3?"),
            {"role": "assistant", "content": "", "tool_calls": [call_without_id({"a": 2})]},
            say("tool", "5"),
        ]
        assert read["tools"] == [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    def test_conversations_may_have_openai_turns_and_their_fields(self) -> None:
        messages = [say("user", "hi"), say("assistant", "yes") | {"name": "Ann"}]
        assert read_conversation({"conversations": messages})["messages"] == messages
        assert read_conversation({"messages": json.dumps(messages)})["messages"] == messages

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
    def test_what_was_thought_has_one_name(self, name: str) -> None:
        turn = {"role": "assistant", "content": None, name: "hm", "reasoning_details": None}
        expected = {"role": "assistant", "content": "", "reasoning_content": "hm"}
        assert read_conversation({"messages": [turn]})["messages"] == [expected]
        both = turn | {"reasoning_content": "hm", "thinking": ""}
        assert read_conversation({"messages": [both]})["messages"] == [expected]

    @pytest.mark.parametrize("reads", ["reasoning_content", "reasoning", "thinking"])
    def test_a_template_finds_it_under_the_name_that_it_reads(
        self, tokenizer: PreTrainedTokenizerFast, reads: str
    ) -> None:
        thinking = with_template(tokenizer, THINKING.replace("reasoning_content", reads))
        row = {"messages": [say("user", "a"), {"role": "assistant", "content": "yes", "thinking": "hm"}]}
        assert tokens_of(*encode_row(row, thinking), tokenizer, supervised=True) == "<think>hm</think>yes<|end|>"

    def test_a_template_that_loses_it_is_refused(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match="does not write what was thought in turn 1"):
            encode_row({"messages": [say("user", "a"), think("hm", "yes")]}, tokenizer)

    def test_an_answer_that_was_cut_off_in_thought(self, tokenizer: PreTrainedTokenizerFast) -> None:
        row = {"messages": [say("user", "a"), think("hm, so", "")], "truncated": True}
        (example,) = encode_row(row, with_template(tokenizer, THINKING))
        assert tokens_of(example, tokenizer, supervised=True) == "<think>hm, so"

    def test_a_developer_is_the_system_where_the_template_knows_none(self, tokenizer: PreTrainedTokenizerFast) -> None:
        messages = [say("developer", "be brief"), say("user", "hi")]
        assert render(messages, tokenizer) == render([say("system", "be brief"), messages[1]], tokenizer)
        knows = with_template(tokenizer, "{# developer #}" + str(tokenizer.chat_template))
        assert render(messages, knows).startswith("<|developer|>")

    def test_a_role_that_nobody_knows_is_refused(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match=r"^messages: turn 1 has the role 'expert', which nobody knows; expected"):
            encode_row({"messages": [say("user", "hi"), say("expert", "yes")]}, tokenizer)


def call_without_id(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


class Pieces(PreTrainedTokenizer):
    """Written in Python: a token per byte, but for pieces that the line break before and spaces may be part of."""

    pieces = ("\n  ", "yes", " sir", "sir<", "!<|end|")

    def __init__(self, decodes: bool = True, **options: Any) -> None:
        self.decodes = decodes
        super().__init__(additional_special_tokens=["<|user|>", "<|assistant|>"], **options)

    @property
    def vocab_size(self) -> int:
        return 256 + len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        tokens = []
        while text:
            piece = next((piece for piece in self.pieces if text.startswith(piece)), None)
            tokens += (
                [str(byte) for byte in text[0].encode()] if piece is None else [str(256 + self.pieces.index(piece))]
            )
            text = text[len(piece or text[0]) :]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return int(token)

    def _convert_id_to_token(self, index: int) -> str:
        return str(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        if not self.decodes:
            raise KeyError(tokens[0])
        texts = [*(bytes([i]) for i in range(256)), *(piece.encode() for piece in self.pieces)]
        read = (texts[int(token)] if token.isdecimal() else token.encode() for token in tokens)
        return b"".join(read).decode(errors="replace")


class TestTokenizersWrittenInPython:
    """They have no offsets; the masks are those that offsets would give."""

    def test_masks_are_exact(self, tokenizer: PreTrainedTokenizerFast) -> None:
        slow = Pieces(chat_template=tokenizer.chat_template)
        messages = [say("user", "yes 字"), say("assistant", "yes sir 字é"), say("user", "yes"), say("assistant", "")]
        (example,) = encode_row({"messages": messages}, slow)
        assert tokens_of(example, slow, supervised=True) == "yes sir 字é<|end|><|end|>"
        assert slow.decode(example.input_ids) == render(messages, slow)

    def test_a_token_across_the_border_is_not_supervised(self, tokenizer: PreTrainedTokenizerFast) -> None:
        slow = Pieces(chat_template=tokenizer.chat_template)
        (example,) = encode_row({"messages": [say("user", "a"), say("assistant", "  yes")]}, slow)
        assert tokens_of(example, slow, supervised=True) == "yes<|end|>"
        (cut_off,) = encode_row({"messages": [say("user", "a"), say("assistant", "yes!")], "truncated": True}, slow)
        assert tokens_of(cut_off, slow, supervised=True) == "yes"  # the piece goes on into the end of turn

    def test_it_says_so_where_that_cannot_be_told(self, tokenizer: PreTrainedTokenizerFast) -> None:
        row = {"messages": [say("user", "a"), say("assistant", "yes")]}
        slow = Pieces(chat_template=tokenizer.chat_template, decodes=False)
        with pytest.raises(ValueError, match=r"^tokenizer: .* no offsets; .* it cannot decode its own: '257'"):
            encode_row(row, slow)

        class Counting(Pieces):
            """Begins every text with its length, so that no text begins as a longer one does."""

            def _tokenize(self, text: str, **options: Any) -> list[str]:
                return [str(len(text) % 256), *super()._tokenize(text)]

        with pytest.raises(ValueError, match="cannot be told: prefixes of the text have other tokens"):
            encode_row(row, Counting(chat_template=tokenizer.chat_template))

    def test_plain_text_needs_no_offsets(self) -> None:
        (example,) = encode_row({"text": "yes 字"}, Pieces())
        assert example.loss_mask.all()
        assert Pieces().decode(example.input_ids) == "yes 字"


def test_ids_beyond_a_gap_in_the_vocabulary_are_ids() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "far": 7}, unk_token="a"))
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode_row({"input_ids": [1, 7]}, gaps)[0].input_ids.tolist() == [1, 7]
    with pytest.raises(ValueError, match="input_ids: 8 is outside the tokenizer's vocabulary"):
        encode_row({"input_ids": [1, 8]}, gaps)


def think(thought: str, content: str) -> dict[str, str]:
    return {"role": "assistant", "reasoning_content": thought, "content": content}


class TestTemplatesThatRewriteEarlierTurns:
    """Each answer is learnt behind the prompt that the model saw, in as few examples as that takes."""

    def shown(self, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
        """All of each example's text and what of it is supervised."""
        thinking = with_template(tokenizer, THINKING)
        examples = encode_row({"messages": messages}, thinking)
        return [(tokenizer.decode(example.input_ids), tokens_of(example, tokenizer, True)) for example in examples]

    def test_every_answer_is_learnt_with_its_thought_and_without_earlier_ones(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        messages = [say("user", "a"), think("hm", "yes"), say("user", "b"), think("oh", "sir"), say("user", "c")]
        assert self.shown(messages, tokenizer) == [
            ("<|user|>\na<|end|>\n<|assistant|>\n<think>hm</think>yes<|end|>\n", "<think>hm</think>yes<|end|>"),
            (
                "<|user|>\na<|end|>\n<|assistant|>\nyes<|end|>\n<|user|>\nb<|end|>\n"
                "<|assistant|>\n<think>oh</think>sir<|end|>\n",
                "<think>oh</think>sir<|end|>",
            ),
        ]

    def test_turns_whose_text_stays_share_an_example(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Thoughts are dropped at the next question only; turns without any are never rewritten."""
        steps = [say("user", "a"), think("hm", "yes"), say("tool", "1"), think("oh", "sir")]
        (example,) = self.shown(steps, tokenizer)
        assert example[1] == "<think>hm</think>yes<|end|><think>oh</think>sir<|end|>"
        assert [part for _, part in self.shown([*steps, say("user", "b"), think("ah", "you")], tokenizer)] == [
            example[1], "<think>ah</think>you<|end|>",
        ]  # fmt: skip
        plain = [say("user", "a"), say("assistant", "yes"), say("user", "b"), think("oh", "sir")]
        ((_, supervised),) = self.shown(plain, tokenizer)
        assert supervised == "yes<|end|><think>oh</think>sir<|end|>"

    def test_an_answer_that_is_not_written_behind_its_prompt_is_refused(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
        with pytest.raises(ValueError) as error:
            encode_row({"messages": [say("user", "a"), say("assistant", "yes")]}, with_template(tokenizer, template))
        shown = (
            "turn 1 ('yes') behind the prompt for it: that has '1a', the conversation '2ayes'; they part at character 0"
        )
        assert shown in str(error.value)
