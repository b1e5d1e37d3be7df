"""What the package asks of a kind of draft: a Family's words, and a Kind that answers for its code.

A family is declared in kinds.py, which needs no torch, so that help texts and mistakes on the command line do not wait
for it. Its code is imported when it is first asked.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from draftwing.engine.tree_plan import LookaheadTree, TreeShape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from draftwing.drafts.eagle.formats import HeadOptions
    from draftwing.drafts.export_draft import Export, ExportRequest
    from draftwing.drafts.fit import TargetSizes, Tensors
    from draftwing.drafts.objective import Objective
    from draftwing.engine.engine import NewDrafter
    from draftwing.target.model import TargetModel

Draft: TypeAlias = Any
"""What drafts for a target, as its family's `build` makes it."""
D = TypeVar("D")
ENGINES = {
    "eagle": "the EAGLE authors' code",
    "vllm": "vLLM 0.32.0",
    "sglang": "SGLang 0.5.23",
    "speculators": "speculators 0.9.0",
    "llama.cpp": "llama.cpp 0c1e57098 (ggml 0.25.3)",
}
"""The engines that drafts are exported to, with the versions whose loaders were read."""


class Method(NamedTuple):
    """A way to decode: its name, and its plan unless one is named."""

    name: str
    plan: str = "auto"
    embedded: str = ""
    """The embedded draft that it is for: `eagle1` for tiny-eagle1; empty: the one that is called like the target."""
    clocked: str = ""
    """The tree that `auto` tries and pauses by the clock, in a family that has none to size."""


@dataclass(frozen=True)
class Family:
    """A kind of draft in words.

    Attributes:
        name: as it stands in a sentence.
        code: its Kind, or where that is: `module.Class`.
        methods: the ways to decode with it; the last is the default.
        needs_draft: whether something is loaded; else the text or the target drafts.
        takes: the options of `generate` that not every method has a use for.
        has_head_options: whether HeadOptions say something of its files.
        has_int8: whether its linear layers can be kept in 8 bits (target/rounded.py).
        has_doctor: whether the doctor knows what can be wrong with it.
        plans: the shapes that it drafts; "columns" are Lookahead decoding's.
        files: names of weight files that only this kind has.
        objectives: a recipe's objectives that train such a head, by name, and where each is: `module.Class`.
    """

    name: str
    code: "str | type[Kind[Any]]"
    methods: tuple[Method, ...]
    needs_draft: bool = True
    takes: tuple[str, ...] = ()
    has_head_options: bool = False
    has_int8: bool = False
    has_doctor: bool = False
    plans: Literal["trees", "chains", "columns", "none"] = "trees"
    files: tuple[str, ...] = ()
    objectives: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def kind(self) -> "Kind[Any]":
        """What answers for the family; its code is imported now."""
        kind: Kind[Any] = self.code() if callable(self.code) else _found(self.code)()
        return kind

    def objective(self, name: str) -> "Objective":
        """What trains a head of this kind, by one of its `objectives`' names."""
        objective: Objective = _found(self.objectives[name])()
        return objective

    def method(self, name: str) -> Method:
        """The method of this name, which the family has."""
        return next(method for method in self.methods if method.name == name)

    def check_plan(self, plan: TreeShape, method: str) -> None:
        """Raise a ValueError for a plan of another shape than the family drafts."""
        if self.plans == "none":
            raise ValueError(f"plan: {method} drafts nothing, so it takes no plan but off, got {plan}")
        if isinstance(plan, LookaheadTree) != (self.plans == "columns"):
            raise ValueError(
                f"plan: plans lookahead:WxNxG are for the method lookahead, and it takes no other; "
                f"got {plan} for {method}"
            )
        if self.plans == "chains" and not plan.is_chain:
            raise ValueError(f"plan: {self.name} has one continuation, so it takes chain:DEPTH, got {plan}")


def _found(code: str) -> Any:
    """What is named as `module.Class`."""
    module, _, name = code.rpartition(".")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class DraftFiles:
    """A draft's folder, with the values of its config.json and its tensors."""

    folder: Path
    values: dict[str, Any]
    tensors: "Tensors"


@dataclass(frozen=True)
class DrafterOptions:
    """What a drafter is made for: merging lookups, reading a `window` of tokens, the largest tree."""

    with_lookup: bool = False
    window: int | None = None
    plan: TreeShape | None = None


NOTHING_ELSE = DrafterOptions()


@dataclass(frozen=True, kw_only=True)
class DraftReport:
    """A draft's facts. `problems` are errors on loading, or make it useless; `notes` are things worth knowing."""

    folder: str
    format: str
    dtype: str
    num_parameters: int
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[str, str]]:
        """The facts that the kind alone has, as a table's rows."""
        yield from ()

    @property
    def verdict(self) -> tuple[str, str]:
        """What is said where there are no problems."""
        return "complete", "every tensor is there, known and of the expected shape"


def counted(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Kind(Generic[D]):
    """What a family's code answers. One that loads nothing needs `drafter` alone.

    Attributes:
        reads_tensors: whether `build` fills its network from the files' tensors, which must be finite then.
    """

    reads_tensors = True

    def drafter(self, draft: D, target: "TargetModel", wanted: DrafterOptions) -> "NewDrafter":
        """What makes the drafters that guess for `target`; `draft` is None in a family that needs none."""
        raise NotImplementedError

    def owns_files(self, values: Mapping[str, Any], tensors: "Tensors") -> bool:
        """Whether files hold such a draft."""
        return False

    def owns(self, draft: Draft) -> bool:
        """Whether a loaded draft is of this kind."""
        return False

    def build(
        self,
        files: DraftFiles,
        target: "TargetModel",
        dtype: "torch.dtype | None",
        options: "HeadOptions",
        tokenizer: Any,
    ) -> D:
        """The draft that files hold, on the target's device and by default in its dtype.

        Raises:
            ValueError: a tensor too many, missing or misshapen, or a draft that does not fit the target.
        """
        raise NotImplementedError

    def inspect(self, files: DraftFiles, target: "TargetSizes | None", target_name: str | None) -> DraftReport:
        """Report on what files hold, and with a target on whether it fits."""
        raise NotImplementedError

    def export(self, request: "ExportRequest") -> "Export":
        """How a draft's files are written for another engine, and what is wrong with the draft there.

        Raises:
            ValueError: no engine has a format of its own for such drafts.
        """
        raise ValueError("draft: it is not exported; engines load this folder as it is")

    def meaning(self, files: DraftFiles, target: "TargetSizes") -> "tuple[Mapping[str, Any], Tensors]":
        """What files say in our terms, whatever their format: the options and the tensors that a draft is made of."""
        raise NotImplementedError

    def prepack(self, draft: D, compiles: bool | None = None) -> D:
        """The draft with its weights laid out for decoding; `compiles` as for targets."""
        return draft

    def network(self, draft: D) -> "nn.Module":
        """The module that holds the weights."""
        module: nn.Module = draft  # type: ignore[assignment]
        return module

    def config(self, draft: Draft) -> dict[str, Any]:
        """The sizes and options that the draft's passes depend on."""
        values: dict[str, Any] = vars(draft.config)
        return values

    def places(self, draft: D) -> "set[tuple[torch.dtype, torch.device]]":
        """In which dtypes its numbers are, and where they lie."""
        from draftwing.target.packed import places

        return places(self.network(draft))

    def dtype(self, draft: D, target: "TargetModel") -> "torch.dtype":
        """The dtype that the draft's tensors have to have."""
        dtype: torch.dtype = target.dtype
        return dtype

    def feature_layers(self, draft: Draft) -> tuple[int, ...]:
        """The numbers of the target's hidden states that it reads."""
        layers: tuple[int, ...] = draft.config.feature_layers
        return layers

    def num_tokens(self, draft: Draft, target: "TargetModel") -> int:
        """How many different tokens it drafts: the widest level of a tree."""
        return len(draft.vocab)

    def max_depth(self, draft: D) -> int | None:
        """How many levels its trees have at most; None: any number."""
        return None

    def max_positions(self, draft: D) -> int | None:
        """How many tokens of text it can read; None: any number."""
        return None
