"""Trees of a draft model equal what its stock forward pass says of every path, whatever its cache has been through."""

from collections.abc import Callable
from itertools import islice

import pytest
import torch
from conftest import VOCAB_SIZE, Path, generate, language_model, nodes_of, noisy_llama, requests_for, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from draftwing.drafts.language_model import DraftModelDrafter
from draftwing.engine.generation import start_generation
from draftwing.engine.sampling import uncoupled_rank
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import TreePlan
from draftwing.target.interface import ATTENTION
from draftwing.target.model import TargetModel

UNREAD = 16
CAPACITY = 120
PLANS = ("chain:1", "chain:4", "tree:3x3x9", "tree:4x3x37", "eagle1")


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Scores are those of the stock modules."""
    return stock_target


@pytest.fixture(scope="module")
def draft_model() -> TargetModel:
    """With the stock modules, too."""
    return TargetModel(noisy_llama(), role="draft")


def sliding_window_model() -> TargetModel:
    """Reads the last 4 tokens alone, so that a node's position must be right in every layer's mask."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.25, attn_implementation=ATTENTION,
    )  # fmt: skip
    return TargetModel(MistralForCausalLM(config).double().eval(), role="draft")


def learned_positions_model() -> TargetModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.25,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return TargetModel(GPT2LMHeadModel(config).double().eval(), role="draft")


def log_probs(model: TargetModel, tokens: list[int], num_shared: int = VOCAB_SIZE) -> torch.Tensor:
    """log P(next token) after a sequence, from the stock module without a cache."""
    logits = model.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits[:num_shared].log_softmax(-1)


def path_score(model: TargetModel, sequence: list[int], path: Path) -> float:
    """log P of a path's tokens after a sequence."""
    return sum(log_probs(model, [*sequence, *path[:d]])[token].item() for d, token in enumerate(path))


def drafter_that_has_read(model: TargetModel, sequences: list[list[int]]) -> DraftModelDrafter:
    """A fresh drafter that has read whole sequences, the roots at their ends included."""
    drafter = DraftModelDrafter(model, VOCAB_SIZE, len(sequences), CAPACITY)
    longest = max(map(len, sequences))
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in sequences])
    for seat, token in enumerate(padded[:, 0].tolist()):
        drafter.begin(seat, token)
    if longest > 1:
        drafter.observe(padded[:, 1:], None, torch.tensor([len(tokens) - 1 for tokens in sequences]))
    return drafter


def grow(drafter: DraftModelDrafter, sequences: list[list[int]], plan: str) -> DraftTree:
    root = torch.tensor([tokens[-1] for tokens in sequences])
    drafter.catch_up(UNREAD)
    return drafter.grow(root, TreePlan.parse(plan), uncoupled_rank)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_scores_are_the_models_log_probabilities_along_each_path(
    draft_model: TargetModel, prompts: list[list[int]], plan: str
) -> None:
    """For ragged rows, a prompt of one token among them."""
    tree = grow(drafter_that_has_read(draft_model, prompts), prompts, plan)
    assert tree.valid.all()
    for row, prompt in enumerate(prompts):
        for path, score in nodes_of(tree, row).items():
            assert score == pytest.approx(path_score(draft_model, prompt, path), abs=1e-8)


@pytest.mark.parametrize("build", [sliding_window_model, learned_positions_model])
@torch.no_grad()
def test_levels_stand_at_their_positions_in_other_architectures(
    build: Callable[[], TargetModel], prompts: list[list[int]]
) -> None:
    model = build()
    tree = grow(drafter_that_has_read(model, prompts), prompts, "tree:3x4x20")
    for row, prompt in enumerate(prompts):
        for path, score in nodes_of(tree, row).items():
            assert score == pytest.approx(path_score(model, prompt, path), abs=1e-8)


@torch.no_grad()
def test_a_chain_is_the_models_own_greedy_continuation(draft_model: TargetModel, prompts: list[list[int]]) -> None:
    tree = grow(drafter_that_has_read(draft_model, prompts), prompts, "chain:4")
    for row, prompt in enumerate(prompts):
        for depth in range(4):
            drafted = tree.tokens[row, 1 : 1 + depth].tolist()
            assert tree.tokens[row, 1 + depth] == log_probs(draft_model, [*prompt, *drafted]).argmax()


@pytest.mark.parametrize("plan", ["chain:4", "tree:4x4x16", "eagle1"])
def test_after_cycles_with_rejections_the_cache_holds_the_committed_tokens_and_no_others(
    target: TargetModel, draft_model: TargetModel, prompts: list[list[int]], plan: str
) -> None:
    built = []

    def new_drafter(batch_size: int, capacity: int) -> DraftModelDrafter:
        built.append(DraftModelDrafter(draft_model, VOCAB_SIZE, batch_size, capacity))
        return built[0]

    requests = requests_for(prompts, max_new_tokens=60, eos=())
    generation = start_generation(target, requests, new_drafter, TreePlan.parse(plan))
    accepted = {count for committed in islice(generation.cycles(), 6) for count in committed.num_accepted}
    assert len(accepted) > 1, "some cycles must accept more than others"
    sequences = [prompt + output.tokens for prompt, output in zip(prompts, generation.outputs, strict=True)]
    with torch.no_grad():
        used = grow(built[0], sequences, "tree:3x3x9")
        for row, sequence in enumerate(sequences):
            for path, score in nodes_of(used, row).items():
                assert score == pytest.approx(path_score(draft_model, sequence, path), abs=1e-8)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_that_drafts_for_itself_is_always_right(
    target: TargetModel, prompts: list[list[int]], temperature: float
) -> None:
    """Greedy, and coupled at temperature 1: the draft perturbs the same distribution with the same noise."""
    requests = requests_for(prompts, max_new_tokens=30, eos=(), temperature=temperature)
    figures = generate(target, requests, language_model(target), "chain:4").statistics
    assert figures.acceptance_rate == [1.0] * 4
    assert figures.num_cycles == len(prompts) * 30 / 5


def test_without_the_noise_a_target_that_drafts_for_itself_is_often_wrong(
    target: TargetModel, prompts: list[list[int]]
) -> None:
    """The twin of the test above: what it asserts of temperature 1 comes from the coupling."""
    requests = requests_for(prompts, max_new_tokens=30, eos=(), temperature=1.0)
    figures = generate(target, requests, language_model(target), "chain:4", coupled=False).statistics
    assert figures.acceptance_rate[0] < 0.9


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 14, VOCAB_SIZE + 16])
@torch.no_grad()
def test_candidates_are_the_tokens_that_both_models_have(vocab_size: int) -> None:
    """Scores are over those; the target's ids that the draft model lacks can be read all the same."""
    model = TargetModel(tiny_llama(seed=3, vocab_size=vocab_size), role="draft")
    num_shared = min(vocab_size, VOCAB_SIZE)
    width = min(num_shared, 50)
    tree = grow(drafter_that_has_read(model, [[1, 2, 3]]), [[1, 2, 3]], f"tree:{width}x1x{width + 1}")
    expected = log_probs(model, [1, 2, 3], num_shared)
    assert tree.tokens.max() < num_shared
    for (token,), score in nodes_of(tree, 0).items():
        assert score == pytest.approx(expected[token].item(), abs=1e-8)
    assert grow(drafter_that_has_read(model, [[VOCAB_SIZE - 1]]), [[VOCAB_SIZE - 1]], "chain:2").valid.all()


@torch.no_grad()
def test_a_plan_wider_than_the_vocabulary_is_refused(draft_model: TargetModel) -> None:
    with pytest.raises(ValueError, match="plan: width 65 exceeds the draft vocabulary of 64 tokens"):
        grow(drafter_that_has_read(draft_model, [[1, 2]]), [[1, 2]], "tree:65x1x60")
