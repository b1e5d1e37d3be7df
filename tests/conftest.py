"""Shared models: tiny, random, float64, made here; the heads are trained for a few seconds so that they draft well."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations as combinations_of
from itertools import product
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, so that they share the cores
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Triton's interpreter, if it is installed; read at its import

from forked import measure_roughly
from transformers import LlamaConfig, LlamaForCausalLM

from draftwing import native
from draftwing.config import TrainConfig
from draftwing.data.chat_template import Example
from draftwing.drafts.eagle.drafter import EagleDrafter
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.drafts.head_loss import HeadLoss
from draftwing.drafts.kinds import objective_named
from draftwing.drafts.language_model import DraftModelDrafter
from draftwing.drafts.lookahead import LookaheadDrafter
from draftwing.drafts.medusa.drafter import MedusaDrafter
from draftwing.drafts.medusa.network import MedusaModel
from draftwing.drafts.ngram import NgramDrafter
from draftwing.engine.captured import Recorder
from draftwing.engine.drafter import NoDrafter
from draftwing.engine.engine import NewDrafter, Request, Seat
from draftwing.engine.generation import Generation, start_generation
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import StopRule
from draftwing.engine.tree import DraftTree, Verdict
from draftwing.engine.tree_plan import Plan, TreePlan
from draftwing.plans.auto import AutoPlan, SizedPlan
from draftwing.plans.costs import CycleCosts
from draftwing.plans.lessons import Experience
from draftwing.target.fused import pack_target
from draftwing.target.interface import ATTENTION
from draftwing.target.model import TargetModel

VOCAB_SIZE = 64
EOS = 11
CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels are tested."""
SLOW = pytest.mark.slow
Path = tuple[int, ...]
"""The tokens from a tree's root, which is left out, to a node."""

torch.set_num_threads(1)  # the models are tiny; threads only add noise


@pytest.fixture
def as_many_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _kernels_problem(name: str) -> str | None:
    """Why these kernels do not run here."""
    if name == "native_cycle":
        return None if DEVICE == "cpu" and native.library() is not None else "no C compiler, or a GPU"
    if find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if DEVICE == "cpu" and triton.__version__ < "3.7" and np.__version__ >= "2.4":
        return "Triton's interpreter of before 3.7 cannot loop with numpy 2.4"
    return None


@pytest.fixture(params=["native_cycle", "triton_cycle"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """Those in C, and Triton's: on a GPU, or in Triton's interpreter."""
    if problem := _kernels_problem(request.param):
        pytest.skip(problem)
    return import_module(f"draftwing.engine.{request.param}")


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C compiler."""
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.fixture(params=["as it is", "without a compiler"])
def machine(request: pytest.FixtureRequest) -> str:
    """This machine, and one without a C compiler."""
    name: str = request.param
    if name == "without a compiler":
        request.getfixturevalue("without_native")
    return name


@pytest.fixture
def sabotaged_native(monkeypatch: pytest.MonkeyPatch, tmp_path: FilePath) -> Iterator[Callable[[str, str], None]]:
    """Compiles native/*.c with one text in them replaced by another."""

    def replace(found: str, by: str) -> None:
        sources = {file.name: file.read_text("utf-8") for file in native.FOLDER.glob("*.[ch]")}
        assert sum(source.count(found) for source in sources.values()) == 1
        for name, source in sources.items():
            (tmp_path / name).write_text(source.replace(found, by))
        monkeypatch.setattr(native, "FOLDER", tmp_path)
        monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path))
        native.library.cache_clear()
        assert native.library() is not None

    yield replace
    native.library.cache_clear()


def tiny_llama(seed: int = 0, **overrides: int) -> LlamaForCausalLM:
    """A random Llama of 6 layers in float64 with grouped key/value heads and lively (not uniform) outputs."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    } | overrides
    config = LlamaConfig(**sizes, initializer_range=0.25, attn_implementation=ATTENTION)
    return LlamaForCausalLM(config).double().eval()


def noisy_llama() -> LlamaForCausalLM:
    """A model that often says what `tiny_llama` says."""
    model = tiny_llama()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session", autouse=True)
def _measurements_kept_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor write the user's cache folder; costs are measured roughly, and once for all processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRAFTWING_CACHE", str(shared / "cache"))
        measure_roughly()
        for module in ("compare", "evaluate"):
            patch.setattr(f"draftwing.evaluation.{module}.WARM_UP_TOKENS", 1)
        yield


def pytest_collection_finish() -> None:
    """The Trainer collects garbage, which takes half a second where all that is imported is looked at."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def stock_target() -> TargetModel:
    """With transformers' own modules, whose weights training reads."""
    return TargetModel(tiny_llama())


@pytest.fixture(scope="session")
def target() -> TargetModel:
    """The same model as `load` makes it: with a pass of few operations."""
    return pack_target(TargetModel(tiny_llama()))


@pytest.fixture(scope="session")
def draft_model() -> TargetModel:
    """A second model that often says what `target` says."""
    return pack_target(TargetModel(noisy_llama(), role="draft"))


@pytest.fixture(scope="session")
def drafters(
    heads: dict[str, DraftNetwork], medusa_heads: MedusaModel, draft_model: TargetModel
) -> dict[str, NewDrafter]:
    """Every method's drafter for `target`, but for those with plans of their own."""
    others = {"medusa": medusa(medusa_heads), "draft_model": language_model(draft_model)}
    return {name: eagle(head) for name, head in heads.items()} | others


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Four ragged prompts, one of a single token (nothing is prefilled there)."""
    return [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 5, 6, 7], [3, 3, 3]]


@pytest.fixture(scope="session")
def heads(stock_target: TargetModel) -> dict[str, DraftNetwork]:
    """An EAGLE-1 and an EAGLE-3 head for `target`, trained on what it says; the draft vocabulary is a proper subset."""
    data = self_generated(stock_target, num_rows=16, length=40)
    trained = {}
    for objective in ("eagle1", "eagle3"):
        config = TrainConfig(
            objective=objective, output="", target="unused", draft_vocab_size=48, ttt_steps=4, aux_layers=(1, 3, 5)
        )  # type: ignore[arg-type]
        torch.manual_seed(1)
        head = new_head(config, stock_target, data).double()
        trained[objective] = train_briefly(head, stock_target, config, data, steps=40)
    return trained


@pytest.fixture(scope="session")
def medusa_heads(stock_target: TargetModel) -> MedusaModel:
    """Three Medusa heads for `target`, trained on what it says."""
    config = TrainConfig(objective="medusa", output="", target="unused", medusa_heads=3)
    data = self_generated(stock_target, num_rows=16, length=40)
    torch.manual_seed(1)
    model = new_head(config, stock_target, data).double()
    optimise(head_training(model, stock_target, config), data, steps=40)
    return model.eval()


def self_generated(target: TargetModel, num_rows: int, length: int) -> list[Example]:
    """Rows that the target samples itself from one-token prompts."""
    requests = [
        Request([1 + row % (VOCAB_SIZE - 1)], SamplingParams(temperature=0.3, seed=row), StopRule(length))
        for row in range(num_rows)
    ]
    rows = torch.tensor(
        [request.prompt + tokens for request, tokens in zip(requests, run(target, requests), strict=True)]
    )
    return [Example(row, torch.ones_like(row, dtype=torch.bool)) for row in rows]


def new_head(config: TrainConfig, target: TargetModel, data: Sequence[Example]) -> Any:
    """The head that a recipe's stage begins with."""
    return objective_named(config.objective).make(config, target, data)


def head_training(head: Any, target: TargetModel, config: TrainConfig) -> HeadLoss:
    """What teaches it."""
    return objective_named(config.objective).training(head, target, config)


def train_briefly(
    head: DraftNetwork, target: TargetModel, config: TrainConfig, data: Sequence[Example], steps: int
) -> DraftNetwork:
    optimise(head_training(head, target, config), data, steps)
    return head.eval()


def optimise(module: HeadLoss, data: Sequence[Example], steps: int) -> None:
    """Train on all of the data at once."""
    optimizer = torch.optim.AdamW([p for p in module.head.parameters() if p.requires_grad], lr=2e-2)
    ids = torch.stack([example.input_ids for example in data])
    mask = torch.stack([example.loss_mask for example in data])
    for _ in range(steps):
        loss = module(ids, mask)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def eagle(head: DraftNetwork) -> NewDrafter:
    """Builds the drafter of a head for the engine."""
    return lambda batch_size, capacity: EagleDrafter(head, batch_size, capacity)


def language_model(model: TargetModel) -> NewDrafter:
    """Builds the drafter of a draft model, for a target of VOCAB_SIZE tokens."""
    return lambda batch_size, capacity: DraftModelDrafter(model, VOCAB_SIZE, batch_size, capacity)


def medusa(model: MedusaModel) -> NewDrafter:
    """Builds the drafter of Medusa heads for the engine."""
    return lambda batch_size, capacity: MedusaDrafter(model, batch_size, torch.float64, CPU)


def lookahead(plan: str) -> NewDrafter:
    """Builds the drafter of Lookahead decoding for the engine."""
    return lambda num_seats, num_slots: LookaheadDrafter(TreePlan.parse(plan), num_seats, num_slots, CPU)


def ngram(batch_size: int, capacity: int) -> NgramDrafter:
    """Builds the n-gram drafter for the engine."""
    return NgramDrafter(batch_size, capacity, CPU)


def eagle_with_ngram(head: DraftNetwork) -> NewDrafter:
    """Builds a head's drafter into whose trees n-grams are merged; for plans with a lookup."""
    return lambda batch_size, capacity: EagleDrafter(head, batch_size, capacity, ngram(batch_size, capacity))


def no_draft(batch_size: int, capacity: int) -> NoDrafter:
    return NoDrafter()


def costs(plain: float = 1.0, node: float = 0.02, step: float = 0.1) -> CycleCosts:
    """Invented costs: a target's pass of `plain` seconds and `node` more for each further node, steps of `step`."""
    return CycleCosts(
        contexts=[0],
        plain=[plain],
        num_nodes=[1, 101],
        verify=[[plain, plain + 100 * node]],
        widths=[1, 10],
        draft_step=[[step, step]],
        extend=[step],
        fixed=[0.0],
    )


def sized_plan(
    experience: Experience | None = None,
    largest: TreePlan | None = None,
    fixed_shapes: Sequence[str] = (),
    device: torch.device = CPU,
    **seconds: float,
) -> SizedPlan:
    """A plan that sizes itself by invented costs."""
    shapes = [TreePlan.parse(shape) for shape in fixed_shapes]
    return SizedPlan(costs(**seconds), experience or Experience(), largest or TreePlan(4, 6, 24), device, shapes)


def auto_plan(
    experience: Experience | None = None,
    largest: TreePlan | None = None,
    fixed_shapes: Sequence[str] = (),
    device: torch.device = CPU,
    with_lookup: bool = False,
    **seconds: float,
) -> AutoPlan:
    """A plan that sizes itself by invented costs, the same for any number of rows."""
    known, shapes = experience or Experience(), [TreePlan.parse(shape) for shape in fixed_shapes]
    largest = largest or TreePlan(4, 6, 24)
    return AutoPlan(lambda *_: costs(**seconds), lambda *_: known, largest, device, shapes, with_lookup)


def generate(
    target: TargetModel,
    requests: Sequence[Request],
    drafter: NewDrafter = no_draft,
    plan: str | Plan = "off",
    coupled: bool = True,
    recorder: Recorder | None = None,
    num_seats: int | None = None,
) -> Generation:
    """Run requests to their end."""
    plan = TreePlan.parse(plan) if isinstance(plan, str) else plan
    return start_generation(target, requests, drafter, plan, coupled, recorder, num_seats).run()


def run(
    target: TargetModel, requests: Sequence[Request], drafter: NewDrafter = no_draft, plan: str | Plan = "off"
) -> list[list[int]]:
    """The tokens of each request."""
    return [output.tokens for output in generate(target, requests, drafter, plan).outputs]


_PLAIN: WeakKeyDictionary[TargetModel, dict[str, Sequence[Seat]]] = WeakKeyDictionary()


def plain_outputs(target: TargetModel, requests: Sequence[Request]) -> Sequence[Seat]:
    """What plain decoding gives; decoded once for requests that say the same, so not for tests that break it."""
    known, key = _PLAIN.setdefault(target, {}), str(requests)
    if key not in known:
        known[key] = generate(target, requests).outputs
    return known[key]


def plain(target: TargetModel, requests: Sequence[Request]) -> list[list[int]]:
    """The tokens of `plain_outputs`."""
    return [output.tokens for output in plain_outputs(target, requests)]


def pairwise(*axes: Sequence[Any]) -> list[Any]:
    """All combinations, for `parametrize`: any two values meet in one that always runs; the others are slow."""
    combinations = list(product(*(range(len(axis)) for axis in axes)))
    pairs = {chosen: set(combinations_of(enumerate(chosen), 2)) for chosen in combinations}
    missing, always = set().union(*pairs.values()), set()
    while missing:
        best = max(combinations, key=lambda chosen: len(pairs[chosen] & missing))
        always.add(best)
        missing -= pairs[best]
    return [
        pytest.param(*(axis[i] for axis, i in zip(axes, chosen, strict=True)), marks=() if chosen in always else SLOW)
        for chosen in combinations
    ]


def requests_for(
    prompts: Sequence[Sequence[int]], max_new_tokens: int = 24, eos: tuple[int, ...] = (EOS,), **sampling: float
) -> list[Request]:
    """One request per prompt; row b has seed b."""
    return [
        Request(prompt, SamplingParams(**sampling, seed=row), StopRule(max_new_tokens, eos))  # type: ignore[arg-type]
        for row, prompt in enumerate(prompts)
    ]


def nodes_of(tree: DraftTree, row: int) -> dict[Path, float]:
    """A row's nodes as token paths from the root, with their scores."""
    paths: list[Path] = [()]
    for node in range(1, tree.num_nodes):
        assert tree.parents[row, node] < node, "parents come before children"
        paths.append((*paths[int(tree.parents[row, node])], int(tree.tokens[row, node])))
        assert tree.depths[row, node] == len(paths[-1])
    assert len(set(paths)) == len(paths), "siblings differ"
    return dict(zip(paths[1:], tree.scores[row, 1:].tolist(), strict=True))


def accept_always(tree: DraftTree, chosen: torch.Tensor) -> Verdict:
    """Sabotage of `walk`: accepts the best-scored branch without asking the target."""
    depths = torch.where(tree.valid, tree.depths, -1)
    leaf = depths.argmax(1, keepdim=True)
    path = leaf
    for _ in range(tree.max_depth):
        path = torch.cat((tree.parents.gather(1, path[:, :1]), path), 1)
    num_accepted = torch.full_like(leaf.squeeze(1), tree.max_depth)
    tokens = torch.cat((tree.tokens.gather(1, path[:, 1:]), chosen.gather(1, leaf)), 1)
    return Verdict(tree.valid, path, num_accepted, tokens)
