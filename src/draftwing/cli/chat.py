"""`draftwing chat`: a conversation in the terminal, accepted draft tokens in colour, speed after each answer."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from draftwing.cli.arguments import (
    DRAFTS,
    TARGETS,
    add_device,
    add_execution,
    add_method,
    add_plan,
    add_remeasure,
    execution,
    plain_text,
    positive,
    positive_share,
    seed,
    temperature,
)
from draftwing.cli.generate import print_comparison
from draftwing.cli.output import new_console, note
from draftwing.drafts.kinds import PLAIN, check_drafting
from draftwing.embedded import default_draft

if TYPE_CHECKING:
    from draftwing.engine.generation import Generation

SUMMARY = "Talk with a chat model in the terminal, and see what was drafted and how fast it was."
EXAMPLES = """examples:
  draftwing chat --target smollm2                      # with its embedded head; n-grams where there is none
  draftwing chat --target smollm2 --temperature 0.7 --system "Answer in one sentence."
  draftwing chat --target org/model --draft org/head --device cuda
  echo "Why is the sky blue?" | draftwing chat --target smollm2"""
HELP = """/plain             decode plainly from now on, or draft again
/temperature 0.7   sample from now on; 0 is greedy
/compare           decode the last answer plainly and with drafts: seconds, and whether they are the same
/clear             begin another conversation
/quit              end (also Ctrl-D); Ctrl-C ends an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--target", required=True, help=f"{TARGETS}, with a chat template")
    parser.add_argument("--draft", help=f"{DRAFTS} (default: the target's embedded one, or n-grams)")
    parser.add_argument("--system", type=plain_text, help="a system message for the whole conversation")
    add_device(parser)
    add_execution(parser)
    add_method(parser)
    add_plan(parser, "auto")
    add_remeasure(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="per answer (default: 512)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=positive_share, default=1.0, help="default: 1 (off)")
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    draft = options.draft or default_draft(options.target)
    method = options.method if draft or options.method else "ngram"
    if method:
        check_drafting(method, options.plan if method != PLAIN else None)
    from draftwing.api import load
    from draftwing.data.prompts import has_chat_template
    from draftwing.target.load import load_tokenizer

    more = execution(options) | {"remeasure": options.remeasure}
    if not has_chat_template(load_tokenizer(options.target, **more)):  # before the model
        raise ValueError("chat: the target's tokenizer has no chat template; `draftwing generate` continues its texts")
    model = load(options.target, draft, options.dtype, options.device, method, **more)
    settings = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "seed", "plan")}
    chat = Chat(model, settings, options.system, options.json)
    all(map(chat.hear, _lines(is_shown=not options.json)))  # up to /quit
    if options.json:
        print(json.dumps({"answers": chat.answers}))


def _lines(is_shown: bool) -> Iterator[str]:
    """What is typed, or piped in, line by line; empty lines are left out.

    Raises:
        ValueError: a line that is not UTF-8.
    """
    is_typed = sys.stdin is not None and sys.stdin.isatty()
    if is_typed and is_shown:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its history
        note("/help lists commands; Ctrl-C ends an answer, Ctrl-D the conversation", "dim")
    while True:
        try:
            line = input("> " if is_shown else "") if is_typed else _piped_line()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_typed:
                raise
            note("\n/quit or Ctrl-D ends the conversation", "dim")
            continue
        if line.strip():
            yield line.strip()


def _piped_line() -> str:
    line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"chat: standard input is not UTF-8: {error}") from None


class Chat:
    """A conversation with a model, and the commands that are given in between.

    `answers` has a record of each answer: question, text, tokens, speed.
    """

    def __init__(self, model: Any, settings: dict[str, Any], system: str | None = None, is_quiet: bool = False) -> None:
        self._drafting = self._model = model
        self._settings, self._is_quiet = settings, is_quiet
        self._beginning = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._beginning)
        self._console = new_console()
        self.answers: list[dict[str, Any]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: note(HELP),
            "plain": self._plain,
            "temperature": self._temperature,
            "compare": self._compare,
            "clear": self._clear,
        }

    def hear(self, line: str) -> bool:
        """Take in a line: a command, or what the user says. False ends the conversation.

        A mistake is said, and leaves the conversation as it was; so does Ctrl-C where no answer has begun.
        """
        command, _, value = line[1:].partition(" ")
        messages = list(self._messages)
        try:
            if not line.startswith("/"):
                self._answer(line)
            elif command == "quit":
                return False
            elif command in self._commands:
                self._commands[command](value.strip())
            else:
                note(f"/{command} is no command; /help lists them", "yellow")
        except ValueError as error:
            note(f"error: {error}", "red")
            self._messages = messages
        except KeyboardInterrupt:
            note("interrupted", "dim")
            self._messages = messages
        return True

    def _answer(self, text: str) -> None:
        from draftwing.evaluation.side_by_side import print_stream

        self._messages.append({"role": "user", "content": text})
        ids, settings = self._prompt(self._model, self._messages)
        generation = self._model.start([ids], **settings)
        was_cut = False
        try:
            if self._is_quiet:
                generation.run()
            else:
                print_stream(self._console, generation.cycles(), self._model.tokenizer)
        except KeyboardInterrupt:
            generation.close()
            was_cut = True
            if not generation.outputs[0].tokens:
                raise
        self._take(text, generation, was_cut)

    def _take(self, text: str, generation: "Generation", was_cut: bool) -> None:
        """Keep an answer, and say how fast it was."""
        tokens, figures = generation.outputs[0].tokens, generation.statistics
        said = self._model.tokenizer.decode(tokens, skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": said})
        rate, tau = figures.tokens_per_second, figures.acceptance_length
        record = {"question": text, "text": said, "num_tokens": len(tokens), "tokens_per_second": rate}
        self.answers.append(record | {"acceptance_length": tau, "method": self._model.method})
        if not self._is_quiet:
            begin = "\ninterrupted: " if was_cut else ""
            note(f"{begin}{len(tokens)} tokens, {rate:.1f} tokens/s, tau {tau:.2f} ({self._model.method})", "dim")

    def _prompt(self, model: Any, messages: list[dict[str, str]]) -> tuple[list[int], dict[str, Any]]:
        """A conversation's ids, and the settings with at most as many new tokens as the model has positions for.

        Raises:
            ValueError: there is no room for an answer; the template refuses the conversation.
        """
        from draftwing.data.prompts import Prompt

        ids = Prompt("chat", messages=tuple(messages)).token_ids(model.tokenizer)
        most, limit = self._settings["max_new_tokens"], model.target.max_positions
        room = most if limit is None else min(most, limit - len(ids))
        if room < 1:
            raise ValueError(f"the conversation fills the model's {limit} positions; /clear begins another")
        plan = None if model.method == PLAIN else self._settings["plan"]
        return ids, self._settings | {"max_new_tokens": room, "plan": plan}

    def _plain(self, _: str) -> None:
        is_plain = self._model.method == PLAIN
        self._model = self._drafting if is_plain else self._drafting.with_method(PLAIN)
        note(f"method: {self._model.method}", "dim")

    def _temperature(self, value: str) -> None:
        try:
            self._settings["temperature"] = temperature(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"temperature: {error}") from None
        note(f"temperature: {value}", "dim")

    def _compare(self, _: str) -> None:
        """Decode the last answer again, both ways."""
        if self._drafting.method == PLAIN:
            raise ValueError("compare: nothing drafts here")
        if not self._messages or self._messages[-1]["role"] != "assistant":
            raise ValueError("compare: nothing has been answered yet")
        ids, settings = self._prompt(self._drafting, self._messages[:-1])
        if not self._is_quiet:
            print_comparison(self._drafting, ids, settings | {"stop": []}, as_json=False)

    def _clear(self, _: str) -> None:
        self._messages = list(self._beginning)
        note("another conversation", "dim")
