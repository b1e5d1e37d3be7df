"""What a row of an evaluation decodes with: a method, and optionally its draft, plan and options, in one short text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftwing.config import suggestion
from draftwing.drafts.kinds import PLAIN, check_drafting, methods

OPTIONS: dict[str, dict[str, Any]] = {"ngram": {"ngram": True}, "uncoupled": {"coupled": False}}
"""What may follow a method after a `+`, and the option of `generate` that it sets."""
FORM = re.compile(r"(?P<method>[^@:+]+)(@(?P<draft>[^@:+]+))?(:(?P<plan>[^+]+))?(?P<options>(\+[^+]+)*)")


@dataclass(frozen=True)
class MethodSpec:
    """`METHOD[@DRAFT][:PLAN][+OPTION...]`, such as `eagle3@large:tree:4x5x26+uncoupled`."""

    method: str
    draft: str | None = None
    plan: str | None = None
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        draft = f"@{self.draft}" if self.draft else ""
        plan = f":{self.plan}" if self.plan else ""
        return self.method + draft + plan + "".join(f"+{option}" for option in self.options)

    @property
    def settings(self) -> dict[str, Any]:
        """The options of `generate`; n-grams are merged where that is asked for only."""
        settings: dict[str, Any] = {"ngram": False} | ({} if self.plan is None else {"plan": self.plan})
        for option in self.options:
            settings |= OPTIONS[option]
        return settings

    @property
    def is_chain(self) -> bool:
        return self.plan is not None and self.plan.startswith("chain:")

    @staticmethod
    def parse(text: str, methods: Sequence[str]) -> "MethodSpec":
        """Read a spec whose method is one of `methods`.

        Raises:
            ValueError: another form, an unknown method, plan or option (the nearest is named).
        """
        match = FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"methods: expected METHOD[@DRAFT][:PLAN][+OPTION...], got {text!r}")
        _check("method", match["method"], methods)
        options = tuple(match["options"].split("+")[1:])
        for option in options:
            _check("option", option, OPTIONS)
        if match["method"] == PLAIN and (match["draft"] or match["plan"] or options):
            raise ValueError(f"methods: {PLAIN} takes no draft, plan or option, got {text!r}")
        spec = MethodSpec(match["method"], match["draft"], match["plan"], options)
        try:
            check_drafting(spec.method, **spec.settings)
        except ValueError as error:
            raise ValueError(f"methods: {text}: {error}") from None
        return spec


@dataclass(frozen=True)
class WantedMethod:
    """A method asked for; one that came with `all` is left out where no draft serves it."""

    spec: MethodSpec
    is_required: bool


def read_specs(text: str) -> list[WantedMethod]:
    """The methods asked for, `plain` first, which is the reference of all others.

    Raises:
        ValueError: as `MethodSpec.parse`.
    """
    wanted = [WantedMethod(MethodSpec(PLAIN), True)]
    for part in text.split(","):
        if part == "all":
            wanted += [WantedMethod(MethodSpec(method), False) for method in methods()]
        else:
            wanted.append(WantedMethod(MethodSpec.parse(part, methods()), True))
    return wanted


def _check(what: str, name: str, known: Sequence[str] | dict[str, Any]) -> None:
    if name not in known:
        raise ValueError(f"methods: unknown {what} {name!r}; {suggestion(name, known)}")
