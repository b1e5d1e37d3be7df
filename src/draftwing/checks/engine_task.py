"""What an engine is asked to decode, and what it answers: tokens, and how many each of its cycles brought."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class EngineTask:
    """Prompts to decode greedily in float32 with chains of `depth` drafted tokens.

    Attributes:
        folder: the exported draft.
        target: the target's folder, or its hub id.
        method: ours, of the draft's family.
        prompts: token ids.
        num_tokens: at most so many new ones of each prompt.
        seconds: how long the engine may take for its start, and for each answer.
    """

    folder: Path
    target: str
    target_gguf: Path | None
    method: str
    prompts: list[list[int]]
    num_tokens: int
    depth: int
    seconds: float

    def on(self, prompts: list[list[int]]) -> "EngineTask":
        """The same task on other prompts."""
        return replace(self, prompts=prompts)

    @property
    def capacity(self) -> int:
        """Tokens of the longest text, with what is drafted beyond its end."""
        return max(map(len, self.prompts)) + self.num_tokens + self.depth + 1


@dataclass(frozen=True)
class EngineAnswer:
    """New tokens: the first from the pass over the prompt, the others from `cycles`, each with so many of them."""

    tokens: list[int]
    cycles: list[int]


@dataclass(frozen=True)
class EngineSession:
    """An engine that has started: its version, and an answer to each prompt as it comes."""

    version: str
    answers: Iterator[EngineAnswer]
