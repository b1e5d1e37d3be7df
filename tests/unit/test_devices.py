"""What a GPU would punish, found without one: on the meta device a read of a value raises, as does mixing devices.

A copy between host and device waits for all that the device still has to do. So a cycle may ask the device for values
once, and may send it nothing. Nor may it use float64, which not every device has.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, auto_plan, head_training, requests_for, tiny_llama
from torch.fx.experimental import _config as symbolic_shapes
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draftwing.config import Loss, Objective, TrainConfig
from draftwing.drafts.eagle.build_head import build_network
from draftwing.drafts.family import Draft, DrafterOptions
from draftwing.drafts.head_loss import HeadLoss
from draftwing.drafts.kinds import new_drafter
from draftwing.drafts.medusa.network import MedusaConfig, MedusaModel
from draftwing.engine.drafter import NoDrafter
from draftwing.engine.engine import Engine, NewDrafter
from draftwing.engine.readback import CycleReading, join_parts, split_parts
from draftwing.engine.tree import Candidates, best_subtree, walk
from draftwing.engine.tree_plan import Plan, TreePlan
from draftwing.layers import DraftConfig
from draftwing.losses import fused_head, ttt
from draftwing.target.model import TargetModel

META, DTYPE = torch.device("meta"), torch.bfloat16
UPLOADS = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.2, "logit_bias": {3: 1.0}},
    "all": {
        "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "logit_bias": {3: 1.0},
    },
}  # fmt: skip
CYCLES = {
    "plain": ("plain", "off"),
    "eagle1, its static tree": ("eagle1", "eagle1"),
    "eagle2": ("eagle2", "tree:4x4x12"),
    "eagle3": ("eagle3", "tree:4x4x12"),
    "eagle3, a static tree": ("eagle3", "eagle1"),
    "eagle3, a chain": ("eagle3", "chain:3"),
    "eagle3, sizing itself": ("eagle3", "auto"),
    "eagle3 with n-grams": ("eagle3", "tree:4x4x12+ngram"),
    "ngram": ("ngram", "chain:4"),
    "draft model": ("draft_model", "tree:4x4x12"),
    "draft model, a static tree": ("draft_model", "eagle1"),
    "medusa": ("medusa", "medusa"),
    "medusa, a dynamic tree": ("medusa", "tree:4x3x12"),
    "lookahead": ("lookahead", "lookahead:4x3x4"),
}


class Transfers:
    """While it is entered: `reads` counts arrays read from the device (as zeros), `uploads` lists what is sent to it.

    Every other read raises, since a meta tensor has no values (`nonzeros` counts searches, where those are allowed).
    `doubles` lists what makes float64 tensors there.
    """

    def __init__(self) -> None:
        self.reads = 0
        self.uploads: list[str] = []
        self.doubles: list[str] = []
        self.nonzeros = 0
        self._entered = ExitStack()

    def __enter__(self) -> "Transfers":
        self._entered.enter_context(_Calls(self))
        self._entered.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)


class _Calls(TorchFunctionMode):
    """Sees Python's calls: a list becomes a tensor of the device without an operation that could be seen."""

    def __init__(self, seen: Transfers) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if call is torch.Tensor.numpy and args[0].device == META:
            self._seen.reads += 1
            return np.zeros(args[0].shape, str(args[0].dtype).removeprefix("torch."))
        result = call(*args, **(kwargs or {}))
        is_indexing = call in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        sends_index = is_indexing and any(isinstance(part, int | float) for part in _listed(args[1]))
        if sends_index or (call in UPLOADS and result.device == META):
            self._seen.uploads.append(call.__name__)
        return result


class _Operations(TorchDispatchMode):
    """Sees the operations: those on the device take no tensor of the host, but for single numbers."""

    def __init__(self, seen: Transfers) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        read, made = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)] for part in ((args, kwargs), result)
        )
        on_host = [tensor for tensor in read if tensor.device != META]
        is_number = all(tensor.dim() == 0 for tensor in on_host) and len(on_host) < len(read)  # an operand, no copy
        if on_host and not is_number and any(tensor.device == META for tensor in (*read, *made)):
            self._seen.uploads.append(str(operation))
        self._seen.nonzeros += operation is torch.ops.aten.nonzero.default
        if any(tensor.device == META and tensor.dtype == torch.float64 for tensor in made):
            self._seen.doubles.append(str(operation))
        return result


def _listed(index: Any) -> list[Any]:
    """The members of the lists and arrays in an index."""
    parts = index if isinstance(index, tuple) else (index,)
    return [member for part in parts if isinstance(part, list | range | np.ndarray) for member in part]


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama(num_hidden_layers=2).to(META, DTYPE))


def draft_for(method: str, target: TargetModel) -> Draft | None:
    """A draft on the target's device, of random weights."""
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": VOCAB_SIZE, "target_hidden_size": 32,
    }  # fmt: skip
    if method in ("eagle1", "eagle2"):
        return build_network(DraftConfig(**sizes, draft_vocab_size=VOCAB_SIZE), target, None).to(META, DTYPE)
    if method == "eagle3":
        config = DraftConfig(**sizes, draft_vocab_size=48, aux_layers=(0, 1, 2))
        return build_network(config, target, torch.arange(48)).to(META, DTYPE)  # the ids as from a file, on the host
    if method == "medusa":
        return MedusaModel(MedusaConfig(32, VOCAB_SIZE, 3)).to(META, DTYPE)
    if method == "draft_model":
        return TargetModel(tiny_llama(1, num_hidden_layers=2).to(META, DTYPE), role="draft")
    return None


def plan_of(text: str) -> Plan:
    if text == "auto":
        shapes = ["chain:2", "tree:4x4x12"]
        return auto_plan(largest=TreePlan.parse(shapes[-1]), fixed_shapes=shapes, device=META)
    plan = TreePlan.parse(text.removesuffix("+ngram"))
    return plan.with_lookup() if text.endswith("+ngram") else plan


class Sabotaged(NoDrafter):
    """Plain decoding that does something with the chosen token in every cycle."""

    def __init__(self, act: Callable[[torch.Tensor], Any]) -> None:
        self._act = act

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        if tokens.shape[1] == 1:  # a cycle's, no prompt's
            self._act(tokens[:, 0])


def start(
    target: TargetModel, drafter: NewDrafter, plan: Plan, sampling: str = "greedy", batch_size: int = 1
) -> Engine:
    """An engine whose prompts are read."""
    prompts = [[1, 2, 3, 4, 5], [7], [3, 3, 3]][:batch_size]
    engine = Engine(target, drafter, batch_size, 64, plan)
    for request in requests_for(prompts, eos=(), **SAMPLINGS[sampling]):
        engine.admit(request)
    engine._read_prompts()
    return engine


def run_cycle(engine: Engine) -> Transfers:
    """What a cycle copies before the host reads what it has brought; asserts that this is its only read."""
    with Transfers() as cycle:
        brought = engine._cycle()
    with Transfers() as host:
        engine._emit(*brought)
    assert (cycle.reads, host.reads) == (0, 1)
    cycle.doubles += host.doubles
    return cycle


class TestCycle:
    @pytest.mark.parametrize(("sampling", "batch_size"), [("greedy", 1), ("penalty", 3), ("all", 3)])
    @pytest.mark.parametrize("cycle", CYCLES)
    def test_reads_once_and_sends_nothing(
        self, target: TargetModel, cycle: str, sampling: str, batch_size: int
    ) -> None:
        method, plan = CYCLES[cycle]
        with_lookup, shape = plan.endswith("+ngram"), plan_of(plan)
        wanted = DrafterOptions(with_lookup, plan=shape.largest)
        drafter = new_drafter(method, draft_for(method, target), target, wanted)
        with Transfers() as prefill:
            engine = start(target, drafter, shape, sampling, batch_size)
        first, second = run_cycle(engine), run_cycle(engine)
        assert not second.uploads  # in the first cycle, what a plan always needs is sent
        assert not (*prefill.doubles, *first.doubles, *second.doubles)

    @pytest.mark.parametrize(
        ("sabotage", "error"),
        [
            (lambda token: token[0].item(), "meta tensors"),
            (lambda token: token[token > 0], "nonzero"),
            (lambda token: token.cpu(), "no data"),
            (lambda token: token + torch.ones(len(token), dtype=torch.int64), "device"),
        ],
        ids=["item", "rows of a mask", "copy to the host", "operands on two devices"],
    )
    def test_notices_a_read(self, target: TargetModel, sabotage: Callable[[torch.Tensor], Any], error: str) -> None:
        generation = start(target, lambda *_: Sabotaged(sabotage), TreePlan.off())
        with pytest.raises((RuntimeError, NotImplementedError), match=error):
            run_cycle(generation)

    @pytest.mark.parametrize(
        "sabotage",
        [
            lambda token: token[[0, 0]],
            lambda token: token[torch.tensor([0, 0])],
            lambda token: torch.tensor([1, 2], device=token.device),
            lambda token: torch.ones(()).to(token.device),
            lambda token: token.gather(0, torch.zeros(1, dtype=torch.int64)),
        ],
        ids=["list as an index", "index on the host", "list to a tensor", "number to the device", "gather"],
    )
    def test_notices_what_is_sent(self, target: TargetModel, sabotage: Callable[[torch.Tensor], Any]) -> None:
        assert len(run_cycle(start(target, lambda *_: Sabotaged(sabotage), TreePlan.off())).uploads) == 1

    def test_notices_float64(self, target: TargetModel) -> None:
        generation = start(target, lambda *_: Sabotaged(torch.Tensor.double), TreePlan.off())
        assert run_cycle(generation).doubles

    def test_notices_a_second_read(self, target: TargetModel) -> None:
        generation = start(target, lambda *_: Sabotaged(lambda token: token.numpy(force=True)), TreePlan.off())
        with pytest.raises(AssertionError):
            run_cycle(generation)


class TestTraining:
    """A step waits for the device once, to learn which slots are supervised."""

    @pytest.fixture(autouse=True)
    def _parts_that_meta_tensors_lack(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(TargetModel, "check_logits", lambda self: None)  # reads, when training begins
        monkeypatch.setattr(ttt, "_compiled_flex_attention", lambda: plain_flex_attention)
        monkeypatch.setattr(fused_head, "_in_autocast", lambda x: x.to(DTYPE))
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
        with symbolic_shapes.patch(meta_nonzero_assume_all_nonzero=True):
            yield

    @pytest.mark.parametrize("is_packed", [False, True])
    @pytest.mark.parametrize("loss", ["kl", "cross_entropy", "lk"])
    @pytest.mark.parametrize("objective", ["eagle1", "eagle3", "medusa"])
    def test_a_step_reads_once_and_sends_nothing(
        self, target: TargetModel, objective: Objective, loss: Loss, is_packed: bool
    ) -> None:
        training = new_training(target, objective, loss)
        with Transfers() as step:
            training(**batch(objective, is_packed))["loss"].backward()
        assert step.uploads == []
        assert step.nonzeros == 1 and step.reads == 0
        trained = [parameter for parameter in training.parameters() if parameter.requires_grad]
        assert trained and all(parameter.grad is not None for parameter in trained)

    def test_notices_another_read(self, target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
        training = new_training(target, "eagle3", "kl")
        monkeypatch.setattr(training, "_add", lambda figures, num_slots: num_slots.tolist())
        with pytest.raises(NotImplementedError, match="no data"), Transfers():
            training(**batch("eagle3", is_packed=False))


def new_training(target: TargetModel, objective: Objective, loss: Loss) -> HeadLoss:
    config = TrainConfig(
        objective=objective, loss=loss, output="", target="unused", ttt_steps=3, medusa_heads=3, draft_vocab_size=48
    )
    head = draft_for(objective, target)
    assert isinstance(head, torch.nn.Module)
    return head_training(head.float(), target, config)


def batch(objective: Objective, is_packed: bool) -> dict[str, torch.Tensor]:
    """Two rows of 128 tokens: packed ones that the target runs over, or others with stored features.

    (Over rows that are not packed, transformers reads once more to find out whether they are.)
    """
    ids = torch.zeros(2, 128, dtype=torch.int64, device=META)
    given = {"input_ids": ids, "loss_mask": torch.ones_like(ids, dtype=torch.bool)}
    if is_packed:
        return given | {"document_ids": ids}
    hidden = torch.zeros(2, 128, 32, dtype=DTYPE, device=META)
    features = {"features": torch.cat([hidden] * 3, 2)} if objective == "eagle3" else {}
    return given | features | {"last_hidden": hidden}


def plain_flex_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Shapes and dtypes of flex attention, which takes no meta tensors."""
    keys, values = (x.repeat_interleave(queries.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    scores = (queries @ keys.mT).float()
    return scores.softmax(-1).to(values.dtype) @ values, SimpleNamespace(lse=scores.logsumexp(-1))


def test_what_is_read_together_keeps_its_values() -> None:
    flags = torch.tensor([[True, False]]).expand(2, 2)
    scores = torch.tensor([[0.0, -1.5, -torch.inf], [-0.1, torch.nan, 3e-39]])
    ids = torch.tensor([[2**31 - 1], [-1]])
    parts = (ids, flags, scores[:, 1:], scores[:, :1].double())
    for part, array in zip(parts, split_parts(join_parts(parts).numpy(), parts), strict=True):
        np.testing.assert_array_equal(
            array.astype(part.numpy().dtype), part.float().numpy() if part.is_floating_point() else part.numpy()
        )


def test_facts_are_the_same_however_they_are_read() -> None:
    root, tokens = torch.tensor([1, 2]), torch.tensor([[3, 4, 5], [3, 4, 5]])
    scores = torch.tensor([[-0.5, -1.0, -1.5], [-0.25, -torch.inf, -2.0]])
    parents, depths = torch.tensor([-1, -1, 0]).expand(2, 3), torch.tensor([1, 1, 2]).expand(2, 3)
    tree = best_subtree(root, Candidates(tokens, scores, scores, parents, depths), 4, 2)
    verdict = walk(tree, torch.tensor([[3, 5, 7, 8], [4, 1, 1, 1]]))
    in_place, copied = CycleReading(verdict, tree), CycleReading(verdict, tree)
    copied._joined = join_parts(copied._parts)  # as on a device
    np.testing.assert_array_equal(in_place.result(), copied.result())
    for mine, expected in zip(vars(copied.facts(1)).values(), vars(in_place.facts(1)).values(), strict=True):
        np.testing.assert_array_equal(mine, expected)
