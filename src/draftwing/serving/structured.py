"""Answers in a form that is asked for: which tokens a JSON schema or a regular expression lets follow."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch

from draftwing.engine.grammar import Allowed

WHITESPACE = r"\x20|\r?\n[\x20\x09]{0,40}"
"""What may stand between the parts of a JSON text: a space, or a line's end and an indentation.

With any whitespace, small models write blanks until they are cut off.
"""
EXACTLY: Any = {"lenient": False, "whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
"""How llguidance is to read a schema."""
LEAST = -9 * 10**18
"""The least number of a schema: at those around -2^63 llguidance 1.9.1 ends the process, or says that it cannot."""
MOST_REFERENCES = 128
"""`$ref`s of a schema."""
MOST_LEVELS = 400
"""Of a schema: objects and lists in each other. In 8 MiB, a thread's stack, llguidance 1.9.1 comes to 1,170."""
MOST_REPEATED = 20_000
"""Characters and classes of a regular expression, each as often as it is repeated: llguidance takes 0.3 s for them."""
TOKEN = re.compile(r"\\[pPxuU]\{[^}]*\}|\\.|\{([\d\s,]+)\}|\[\^?\]?|.", re.DOTALL)
"""A piece of a regular expression: an escape, how often, a class's beginning, or a character."""
MOST_KEPT = 64
"""Matchers that a request keeps, each behind another beginning of its text: about a tree's nodes."""


class AllowedTokens:
    """The tokens that may follow those generated so far, as `Request.allowed` says them; for one request.

    The next node of a tree costs a copy of its parent's matcher and a token. The matchers' own `rollback` and `reset`
    are not used: behind them llguidance 1.9.1 may give the masks of what was taken back.
    """

    def __init__(self, matcher: Any, vocab_size: int, ends: Sequence[int]) -> None:
        self._start, self._vocab_size, self._ends = matcher, vocab_size, list(ends)
        self._kept: dict[tuple[int, ...], Any] = {}

    def copy(self) -> "AllowedTokens":
        """The same form for another request."""
        return AllowedTokens(self._start.deep_copy(), self._vocab_size, self._ends)

    def __call__(self, said: list[int]) -> torch.Tensor:
        """The mask `[V]`; the ends are in it exactly where the text may end.

        Raises:
            ValueError: tokens that do not have the form, or a form that has become too complex.
        """
        matcher = self._behind(tuple(said))
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]  # the model's ids, or the tokenizer's
        _check(matcher)
        mask = torch.zeros(self._vocab_size, dtype=torch.bool)
        mask[: len(known)] = torch.from_numpy(known).bool()
        mask[self._ends] = matcher.is_accepting()
        return mask

    def _behind(self, said: tuple[int, ...]) -> Any:
        """The matcher behind these tokens: a copy of one that is kept, moved on."""
        if said in self._kept:
            return self._kept[said]
        num_known = len(said)
        while num_known and said[:num_known] not in self._kept:
            num_known -= 1
        matcher = self._kept.get(said[:num_known], self._start).deep_copy()
        matcher.consume_tokens(list(said[num_known:]))
        _check(matcher)
        self._kept[said] = matcher
        if len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return matcher


def only_token(token: int, vocab_size: int) -> Allowed:
    """Lets one token follow and no other, as `Request.allowed` says it."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[token] = True
    return lambda said: mask


def check_schema(schema: Any) -> None:
    """Raise a ValueError for a schema that could end the process in llguidance, or hold it for seconds.

    - A number below `LEAST`, wherever it stands.
    - Too many levels: llguidance follows references by recursion, and a chain of them overflows its stack. Its depth is
      at most the whole's, plus once that of each part that is referred to, so that cycles are allowed.
    - A pattern that `check_pattern` refuses.
    - A type that is said twice, of which each would be an alternative that the parser follows.
    """
    depths, references, has_bases = _depths(schema), set[str](), False
    num_references = 0
    for part in _parts(schema):
        if isinstance(part, int | float) and part < LEAST:
            raise ValueError(f"expected no number below {LEAST}, got {str(part)[:20]}")
        if isinstance(part, dict):
            for pattern in (part.get("pattern"), *_names(part.get("patternProperties"))):
                if isinstance(pattern, str):
                    check_pattern(pattern)
            has_bases = has_bases or (part is not schema and "$id" in part)
            if isinstance(kinds := part.get("type"), list) and len({*map(str, kinds)}) < len(kinds):
                raise ValueError("expected different ones in a list of types")  # else each is an alternative of its own
            if isinstance(reference := part.get("$ref"), str):
                num_references += 1
                references.add(reference)
    if num_references > MOST_REFERENCES:
        raise ValueError(f"expected a schema with at most {MOST_REFERENCES} $ref, got {num_references}")
    whole = depths.get(id(schema), 0)
    targets = [None if has_bases else _target(schema, reference) for reference in references]
    depth = whole + sum(whole if target is None else depths.get(id(target), 0) for target in targets)
    if depth > MOST_LEVELS:
        raise ValueError(f"expected a schema of at most {MOST_LEVELS} levels, references followed, got {depth}")


def check_pattern(pattern: str) -> None:
    """Raise a ValueError for a regular expression that repeats so much that others would wait for seconds."""
    if re.search(r"\(\?[a-zA-Z-]*x", pattern):
        raise ValueError("expected a regular expression without the flag x")
    if _num_repeated(pattern) > MOST_REPEATED:
        raise ValueError(f"expected a regular expression that repeats at most {MOST_REPEATED} characters in all")


def _num_repeated(pattern: str) -> int:
    """Characters and classes of a regular expression, each as often as it is repeated at most."""
    groups, last, depth = [0], 0, 0  # sums of groups that are open; the last part's; how many classes are open
    for token in TOKEN.finditer(pattern):
        text, was_in_class = token[0], depth > 0
        depth += text.startswith("[") - (was_in_class and text == "]")
        if was_in_class:
            continue
        if token[1]:
            last *= max(map(int, re.findall(r"\d+", token[1])), default=1)
            continue
        if text == ")":
            last += groups.pop()
            groups = groups or [0]  # one too many closes all
            continue
        groups[-1] += last
        last = int(text != "(")
        groups += [0] * (text == "(")
    return sum(groups) + last


def _names(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _parts(value: Any) -> Iterator[Any]:
    """A value of JSON and all that is in it; each container stands in front of what it has."""
    parts = [value]
    while parts:
        yield (part := parts.pop())
        if isinstance(part, dict | list):
            parts += part.values() if isinstance(part, dict) else part


def _depths(value: Any) -> dict[int, int]:
    """Of each container in a value, by its id, how many levels of containers it has; others have none."""
    depths = dict[int, int]()
    for part in reversed(list(_parts(value))):
        if isinstance(part, dict | list):
            inner = part.values() if isinstance(part, dict) else part
            depths[id(part)] = 1 + max((depths.get(id(each), 0) for each in inner), default=0)
    return depths


def _target(schema: Any, reference: str) -> Any:
    """What a JSON pointer of a schema points at; None: it is none, or points at nothing."""
    target, (first, *names) = schema, unquote(reference).split("/")
    if first != "#":
        return None
    for name in (name.replace("~1", "/").replace("~0", "~") for name in names):
        if isinstance(target, list):
            target = dict(zip(map(str, range(len(target))), target, strict=True))
        target = target.get(name) if isinstance(target, dict) else None
    return target


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise ValueError(f"response_format: {_in_a_line(matcher.get_error())}")


class Forms:
    """Reads forms for one model: its tokenizer, how many ids its logits have, and the ids that end a text."""

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Sequence[int]) -> None:
        self._given, self._vocab_size, self._ends = tokenizer, vocab_size, tuple(ends)

    def json(self, schema: dict[str, Any]) -> AllowedTokens:
        """JSON texts that match a schema.

        Raises:
            ValueError: a schema that is none or has keywords that cannot be kept, or a tokenizer that cannot be read.
        """
        check_schema(schema)
        try:
            grammar = self._matcher.grammar_from_json_schema(schema, overrides=EXACTLY)
        except RecursionError:
            raise ValueError("the schema is nested too deeply") from None
        return self._allowed(grammar)

    def calls(self, grammar: str) -> AllowedTokens:
        """Texts of a grammar; raises as `json` does."""
        return self._allowed(self._matcher.grammar_from_lark(grammar))

    def regex(self, pattern: str) -> AllowedTokens:
        """Texts that match a regular expression from their beginning to their end; raises as `json` does."""
        check_pattern(pattern)
        return self._allowed(self._matcher.grammar_from_regex(pattern))

    def _allowed(self, grammar: str) -> AllowedTokens:
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # tells a form that no text has
        if matcher.is_error():
            raise ValueError(_in_a_line(matcher.get_error()))
        return AllowedTokens(matcher, self._vocab_size, self._ends)

    @property
    def _matcher(self) -> Any:
        """llguidance's parser, where the tokenizer can be read for it."""
        self._tokenizer  # noqa: B018 - raises what is missing
        from llguidance import LLMatcher

        return LLMatcher

    @cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer as llguidance has it."""
        if find_spec("llguidance") is None:
            raise ValueError('needs llguidance: pip install "draftwing[serve]"')
        if not self._ends:
            raise ValueError("this model has no end-of-sequence token, so that no text could end")
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._given, eos_token=list(self._ends))
        except Exception as error:  # of each kind of tokenizer its own
            raise ValueError(f"this model's tokenizer cannot be read for it: {_in_a_line(str(error))}") from None


def _in_a_line(message: str) -> str:
    """What an error says first, without the parser's state and the grammar behind it."""
    return " ".join(message.partition("\n<state>")[0].split())[:400]
