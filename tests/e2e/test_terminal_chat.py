"""`draftwing chat`: piped in, as a user types it, and interrupted."""

import io
import json
import os
import pty
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from forked import COMMAND, Forked
from rich.console import Console

import draftwing
from draftwing.cli import main
from draftwing.cli.chat import Chat
from draftwing.evaluation.side_by_side import DRAFTED

QUESTION = "Write the Python function clamp."
SETTINGS = {"max_new_tokens": 24, "temperature": 0.0, "top_p": 1.0, "seed": 0, "plan": "chain:3"}


class Piped(io.TextIOWrapper):
    """Standard input that is a pipe."""

    def __init__(self, contents: bytes) -> None:
        super().__init__(io.BytesIO(contents))


def talk(monkeypatch: pytest.MonkeyPatch, text: str | bytes, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", Piped(text.encode() if isinstance(text, str) else text))
    common = ["--target", "tiny", "--max-new-tokens", "24", "--dtype", "float32"]
    return main(["chat", *common, *(options or ("--method", "ngram"))])


@pytest.fixture(scope="module")
def model() -> Any:
    return draftwing.load("tiny", "tiny", dtype="float32")


@pytest.fixture
def chat(model: Any) -> Chat:
    return Chat(model, dict(SETTINGS))


def expected(model: Any, messages: Sequence[dict[str, str]], **more: Any) -> str:
    ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    tokens = model.with_method("plain").start([ids], max_new_tokens=24, **more).run().outputs[0].tokens
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))


def test_a_piped_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Any) -> None:
    lines = [QUESTION, "", "And with floats?", "/clear", QUESTION, "/quit", "never read"]
    assert talk(monkeypatch, "\n".join(lines)) == 0
    captured = capsys.readouterr()
    user, again = {"role": "user", "content": QUESTION}, {"role": "user", "content": "And with floats?"}
    first = expected(model, [user])
    second = expected(model, [user, {"role": "assistant", "content": first}, again])
    assert captured.out == f"{first}\n{second}\n{first}\n", "the conversation counts, up to /clear"
    figures = [line for line in captured.err.splitlines() if "tokens/s" in line]
    assert len(figures) == 3
    assert all("tau" in line and line.endswith("(ngram)") for line in figures)


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Any) -> None:
    commands = ["/help", "/plain", QUESTION, "/plain", "/temperature 0.7", QUESTION, "/compare", "/nothing"]
    assert talk(monkeypatch, "\n".join([*commands, "/temperature -1", "/clear", "/compare"])) == 0
    captured = capsys.readouterr()
    user = {"role": "user", "content": QUESTION}
    first = expected(model, [user])
    second = expected(model, [user, {"role": "assistant", "content": first}, user], temperature=0.7, seed=0)
    said = captured.out.splitlines()
    assert captured.out.startswith(f"{first}\n{second}\n{second}\n"), "/compare shows the same answer"
    assert said[-1].startswith("plain ")
    assert said[-1].endswith("identical: yes")
    errors = captured.err.splitlines()
    for text in ("(plain)", "(ngram)", "method: plain", "method: ngram", "temperature: 0.7", "another conversation"):
        assert any(line.endswith(text) for line in errors), text
    assert any(line.startswith("/compare") for line in errors)
    assert "/nothing is no command; /help lists them" in errors
    assert "error: temperature: expected a number from 0 on, got -1" in errors
    assert errors[-1] == "error: compare: nothing has been answered yet"


def test_json_says_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Any
) -> None:
    assert talk(monkeypatch, f"{QUESTION}\n/compare\n", "--json", "--draft", "tiny", "--plan", "chain:3") == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["text"] == expected(model, [{"role": "user", "content": QUESTION}])
    assert answer["method"] == "eagle3"
    assert answer["acceptance_length"] > 1.5


def test_a_system_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Any) -> None:
    assert talk(monkeypatch, f"{QUESTION}\n/clear\n{QUESTION}", "--system", "Be brief.", "--method", "ngram") == 0
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert capsys.readouterr().out == f"{expected(model, messages)}\n" * 2


def test_drafted_tokens_are_coloured(chat: Chat) -> None:
    text = io.StringIO()
    chat._console = Console(file=text, force_terminal=True, color_system="standard", width=80)
    chat.hear(QUESTION)
    assert DRAFTED == "green"
    assert "\x1b[32m" in text.getvalue()


def test_mistakes_leave_the_conversation_as_it_was(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.hear("word " * 1100)
    assert "error: the conversation fills the model's 1024 positions; /clear begins another" in capsys.readouterr().err
    assert chat._messages == []
    assert chat.hear(QUESTION)
    assert len(chat.answers) == 1


def test_an_answer_ends_at_the_last_position(chat: Chat, model: Any) -> None:
    chat.hear("ab " * 1008)
    num_prompt = len(model.tokenizer.apply_chat_template(chat._messages[:1], add_generation_prompt=True)["input_ids"])
    assert 1000 < num_prompt < 1024
    assert chat.answers[0]["num_tokens"] <= 1024 - num_prompt


@pytest.mark.parametrize("num_cycles", [0, 2])
def test_ctrl_c_ends_an_answer(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_cycles: int
) -> None:
    """What was said of it stays in the conversation; a question without a word of an answer does not."""
    from draftwing.engine.engine import Engine

    step, steps = Engine.step, 0

    def interrupted(self: Engine) -> Any:
        nonlocal steps
        steps += 1
        if steps > num_cycles:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    assert chat.hear(QUESTION)
    monkeypatch.undo()
    assert "interrupted" in capsys.readouterr().err
    assert [message["role"] for message in chat._messages] == (["user", "assistant"] if num_cycles else [])
    assert chat.hear(QUESTION)
    assert chat.answers[-1]["num_tokens"] > 2


def test_a_signal_ends_an_answer_and_not_the_program() -> None:
    program = (
        "import os, signal, sys\n"
        "from draftwing.cli import main\n"
        "from draftwing.engine.engine import Engine\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "step, steps = Engine.step, []\n"
        "def interrupt(self):\n"
        "    steps.append(1)\n"
        "    if len(steps) == 3: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(self)\n"
        "Engine.step = interrupt\n"
        "sys.exit(main(['chat', '--target', 'tiny', '--method', 'ngram', '--max-new-tokens', '24']))\n"
    )
    process = Forked(program, said=f"{QUESTION}\n{QUESTION}\n")
    assert process.wait() == 0, process.errors
    assert "interrupted: " in process.errors
    assert process.errors.count("tokens/s") == 2


def test_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, colours, and the end of the conversation by Ctrl-D."""
    monkeypatch.setenv("TERM", "xterm")
    options = ["chat", "--target", "tiny", "--draft", "tiny", "--plan", "chain:3", "--max-new-tokens", "16"]
    outer, inner = pty.openpty()
    process = Forked(COMMAND, options, terminal=os.ttyname(inner))
    os.write(outer, f"{QUESTION}\n/quit\n".encode())
    status = process.wait()
    os.close(inner)
    text = b""
    with suppress(OSError), open(outer, "rb", buffering=0) as screen:  # the end of what the other end has written
        while part := screen.read(4096):
            text += part
    assert status == 0, text
    for expected_text in (b"> ", b"/help lists commands", b"\x1b[32m", b"tokens/s"):
        assert expected_text in text


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (b"\xff\n", (), "chat: standard input is not UTF-8"),
        (b"x\n", ("--method", "eagle3", "--draft", "smollm2"), "draft: smollm2 is not part of this installation"),
        (b"x\n", ("--method", "ngram", "--plan", "tree:4x4x16"), "takes chain:DEPTH"),
        (b"x\n", ("--temperature", "warm"), "temperature: expected a number from 0 on, got warm"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: bytes,
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
) -> None:
    from draftwing import embedded

    monkeypatch.setitem(embedded.EMBEDDED_DRAFTS, "smollm2", tmp_path / "nowhere")
    assert talk(monkeypatch, text, *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_target_without_a_chat_template(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    from draftwing.embedded import EMBEDDED

    shutil.copytree(EMBEDDED / "target", tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").unlink()
    assert talk(monkeypatch, "x\n", "--target", str(tmp_path / "target")) == 2
    assert "error: chat: the target's tokenizer has no chat template; " in capsys.readouterr().err
