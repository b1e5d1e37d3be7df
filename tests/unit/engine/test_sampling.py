"""Warping as in transformers, noise that depends on (seed, position, token) alone, and the choice they make."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from draftwing.engine.noise import NOISE_WINDOW, Noise, gumbel
from draftwing.engine.sampling import (
    LOGIT_ERROR,
    Sampler,
    SamplingParams,
    below_min_p,
    stays_by_integers,
    stays_in_nucleus,
    uncoupled_rank,
)
from draftwing.engine.stepwise import Place, choose_in_steps
from draftwing.engine.stopping import StopRule
from draftwing.engine.tree import DraftTree, root_tree, walk

CPU = torch.device("cpu")
VOCAB = 50


def random_logits(rows: int = 6, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """`[1, rows, vocab_size]`, spread enough for every filter to bite."""
    return torch.randn(1, rows, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def sampler_of(*params: SamplingParams, vocab_size: int = VOCAB) -> Sampler:
    return Sampler.of(params, vocab_size, CPU)


def noise_of(*seeds: int) -> Noise:
    noise = Noise(len(seeds), VOCAB, CPU)
    for seat, seed in enumerate(seeds):
        noise.admit(seat, seed)
    return noise


def gumbel_rows(seed: int, positions: list[int], vocab_size: int = VOCAB) -> torch.Tensor:
    return gumbel(torch.tensor(seed), torch.tensor(positions), torch.arange(vocab_size))


def penalise(sampler: Sampler, scores: torch.Tensor, tree: DraftTree, length: int = 0) -> torch.Tensor:
    """Scores `[B, N, V]` as the rows' own texts change them."""
    lengths = torch.full((len(scores),), length)
    return sampler._penalties.apply(scores, tree, lengths, sampler.work)


def choose_at_root(sampler: Sampler, logits: torch.Tensor, position: int = 0) -> torch.Tensor:
    """The tokens chosen by plain decoding, `[B]`, from logits `[B, 1, V]`."""
    batch_size = logits.shape[0]
    root = torch.zeros(batch_size, dtype=torch.int64)
    sampler.reserve([position] * batch_size, 1)
    return sampler.choose(logits, root_tree(root), torch.full((batch_size,), position)).squeeze(1)


def tree_of(tokens: list[int], parents: list[int], depths: list[int]) -> DraftTree:
    """One row's tree, all of it valid."""
    rows = torch.tensor([tokens]), torch.tensor([parents]), torch.tensor([depths])
    no_scores = torch.zeros(rows[0].shape)
    return DraftTree(*rows, rows[0] >= 0, no_scores, no_scores, max(depths))


class TestWarping:
    """Which tokens survive, and with what probabilities, is what transformers' own processors say."""

    @pytest.mark.parametrize(
        ("params", "processors"),
        [
            ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
            ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
            ({"temperature": 1.0, "top_k": VOCAB + 10}, [TopKLogitsWarper(VOCAB + 10)]),
            ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
            ({"temperature": 1.0, "top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
            ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
            ({"temperature": 1.0, "min_p": 1.0}, [MinPLogitsWarper(1.0)]),
            (
                {"temperature": 1.7, "top_k": 12, "top_p": 0.7, "min_p": 0.1},
                [TemperatureLogitsWarper(1.7), TopKLogitsWarper(12), TopPLogitsWarper(0.7), MinPLogitsWarper(0.1)],
            ),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_equals_transformers(self, params: dict[str, float], processors: list[LogitsProcessor]) -> None:
        logits = random_logits()
        ours = sampler_of(SamplingParams(**params))._warp(logits)[0]  # type: ignore[arg-type]
        theirs = LogitsProcessorList(processors)(torch.zeros(6, 1, dtype=torch.int64), logits[0].clone())
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))

    def test_rows_have_their_own_parameters(self) -> None:
        logits = random_logits(rows=3).transpose(0, 1)  # [3, 1, V]
        params = [
            SamplingParams(temperature=1.0, top_k=3),
            SamplingParams(temperature=0.5, top_p=0.6),
            SamplingParams(temperature=2.0),
        ]
        together = sampler_of(*params)._warp(logits)
        for row, row_params in enumerate(params):
            alone = sampler_of(row_params)._warp(logits[row : row + 1])
            assert torch.equal(together[row].isfinite(), alone[0].isfinite())
            torch.testing.assert_close(together[row].softmax(-1), alone[0].softmax(-1))

    def test_top_k_1_is_greedy_at_any_temperature(self) -> None:
        logits = random_logits(rows=1)
        sampler = sampler_of(SamplingParams(temperature=5.0, top_k=1, seed=3))
        assert choose_at_root(sampler, logits).tolist() == [int(logits.argmax())]

    @pytest.mark.parametrize("temperature", [1e-300, 1e-38, 9e-31, 1e-30])
    def test_temperatures_near_0_are_greedy(self, temperature: float) -> None:
        """Though logits divided by them may be beyond float32."""
        logits = random_logits(rows=1) * 100
        sampler = sampler_of(SamplingParams(temperature=temperature, top_p=0.9, seed=3))
        assert choose_at_root(sampler, logits).tolist() == [int(logits.argmax())]

    def test_bias_then_penalty_in_transformers_order(self) -> None:
        """A greedy choice is the argmax of the processed scores, so processed scores can be compared through it."""
        history = [3, 4, 4, 9]
        for seed in range(20):
            logits = random_logits(rows=1, seed=seed)
            theirs = LogitsProcessorList(
                [SequenceBiasLogitsProcessor({(9,): 6.0, (3,): 7.0}), RepetitionPenaltyLogitsProcessor(1.8)]
            )(torch.tensor([history]), logits[0].clone())
            sampler = sampler_of(SamplingParams(repetition_penalty=1.8, logit_bias={9: 6.0, 3: 7.0}))
            sampler.observe(torch.tensor([history]), torch.tensor([4]))
            chosen = sampler.choose(logits, root_tree(torch.tensor([9])), torch.tensor([4]))
            assert chosen.item() == int(theirs.argmax())

    def test_a_large_bias_decides(self) -> None:
        sampler = sampler_of(SamplingParams(logit_bias={7: 100.0}), SamplingParams(logit_bias={8: 100.0}))
        assert choose_at_root(sampler, random_logits(rows=2).transpose(0, 1)).tolist() == [7, 8]


class TestSumsOfAGpu:
    """Whose order depends on the number of rows; a row's choice must not."""

    def test_integers_have_one_sum_in_any_order(self) -> None:
        ordered = random_logits(rows=8, vocab_size=5000).float().sort(-1, descending=True).values
        weights = (ordered - ordered[..., :1]).exp()
        differs = [in_blocks(weights, size).ne(weights.cumsum(-1)).any() for size in (32, 512)]
        assert all(differs), "the sabotaged twin: float32 sums by blocks are others"
        integers = (weights * 2.0**40).long()
        assert all(torch.equal(in_blocks(integers, size), integers.cumsum(-1)) for size in (32, 512))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_nucleus_is_that_of_probabilities(self, dtype: torch.dtype) -> None:
        ordered = random_logits(rows=40, vocab_size=5000).to(dtype).sort(-1, descending=True).values
        ordered[:, :, 4000:] = -torch.inf  # of top-k
        for top_p in (1e-6, 0.3, 0.7, 0.9, 0.999):
            held = torch.full((1, 1, 1), top_p)
            expected = stays_in_nucleus(ordered.double(), held.double()).sum(-1)
            assert ((stays_by_integers(ordered, held).sum(-1) - expected).abs() <= 1).all()

    def test_min_p_needs_no_sum(self) -> None:
        scores = random_logits() / 0.8
        kept = sampler_of(SamplingParams(temperature=0.8, min_p=0.05))._warp(random_logits()).isfinite()
        assert torch.equal(kept, ~below_min_p(scores, torch.tensor(0.05)))


def in_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """Running sums `[..., V]` by blocks, whose totals are summed first."""
    blocks = torch.nn.functional.pad(values, (0, -values.shape[-1] % size)).unflatten(-1, (-1, size))
    before = blocks.sum(-1).cumsum(-1) - blocks.sum(-1)
    return (blocks.cumsum(-1) + before[..., None]).flatten(-2)[..., : values.shape[-1]]


class TestRepetitionPenalty:
    def test_equals_transformers(self) -> None:
        logits, history = random_logits(rows=1), torch.tensor([[3, 4, 4, 9]])
        sampler = sampler_of(SamplingParams(repetition_penalty=1.8))
        sampler.observe(history, torch.tensor([4]))
        ours = penalise(sampler, logits, root_tree(torch.tensor([9])))
        theirs = RepetitionPenaltyLogitsProcessor(1.8)(history, logits[0].clone())
        torch.testing.assert_close(ours[0], theirs)

    def test_each_node_reads_its_own_branch(self) -> None:
        """Root 5 with children 6 and 7: node 1 has said 5 and 6, node 2 has said 5 and 7; the prompt said 2."""
        logits = torch.ones(1, 3, 10)
        tree = tree_of([5, 6, 7], parents=[0, 0, 0], depths=[0, 1, 1])
        sampler = sampler_of(SamplingParams(repetition_penalty=2.0), vocab_size=10)
        sampler.observe(torch.tensor([[2, 5, 8]]), torch.tensor([2]))  # 8 is padding
        penalised = penalise(sampler, logits, tree)[0] == 0.5
        assert [node.nonzero().squeeze(1).tolist() for node in penalised] == [[2, 5], [2, 5, 6], [2, 5, 7]]

    def test_a_negative_score_is_made_more_negative(self) -> None:
        sampler = sampler_of(SamplingParams(repetition_penalty=2.0), vocab_size=2)
        sampler.observe(torch.tensor([[0]]), torch.tensor([1]))
        scores = penalise(sampler, torch.tensor([[[-1.0, 1.0]]]), root_tree(torch.tensor([0])))
        assert scores.tolist() == [[[-2.0, 1.0]]]


class TestPresenceAndFrequency:
    def test_what_was_generated_counts_along_each_branch(self) -> None:
        """OpenAI's definition, with the root 5 said twice already; node 1 says 6, node 2 below it 6 again."""
        tree = tree_of([5, 6, 6], parents=[0, 0, 1], depths=[0, 1, 2])
        sampler = sampler_of(SamplingParams(presence_penalty=1.0, frequency_penalty=0.25), vocab_size=8)
        sampler.observe(torch.tensor([[2, 5, 5, 7]]), torch.tensor([3]))  # 7 is padding
        taken = -penalise(sampler, torch.zeros(1, 3, 8), tree)[0]
        said = {2: 1.25, 5: 1.5}
        for node, more in enumerate(({}, {6: 1.25}, {6: 1.5})):
            assert {token: value for token, value in enumerate(taken[node].tolist()) if value} == said | more

    def test_the_prompt_does_not_count(self) -> None:
        sampler = Sampler(1, 8, torch.device("cpu"))
        sampler.admit(0, SamplingParams(presence_penalty=1.0), [1, 2, 3])
        assert not penalise(sampler.part(0, 1), torch.zeros(1, 1, 8), root_tree(torch.tensor([3]))).any()

    def test_neutral_rows_keep_their_bits_beside_others(self) -> None:
        logits = random_logits(rows=2).transpose(0, 1)
        sampler = sampler_of(SamplingParams(presence_penalty=1.0, repetition_penalty=1.3), SamplingParams())
        sampler.observe(torch.tensor([[1, 2], [1, 2]]), torch.tensor([2, 2]))
        penalised = penalise(sampler, logits, root_tree(torch.tensor([2, 2])))
        assert torch.equal(penalised[1], logits[1]) and not torch.equal(penalised[0], logits[0])


def test_ends_are_held_back_until_there_are_so_many_tokens() -> None:
    """A prompt of 4 tokens, of whose continuation the first 2 may be no end: those at positions 4 and 5."""
    sampler = Sampler(2, 8, torch.device("cpu"))
    sampler.admit(0, SamplingParams(), [1] * 4, StopRule(9, (3, 6), min_new_tokens=2))
    tree = tree_of([1, 2, 2], parents=[0, 0, 1], depths=[0, 1, 2])
    held = penalise(sampler.part(0, 1), torch.zeros(1, 3, 8), tree, length=3) == -torch.inf
    assert [node.nonzero().squeeze(1).tolist() for node in held[0]] == [[3, 6], [3, 6], []]
    sampler.copy_seat(0, 1, 4)
    sampler.clear(0, 4)
    assert penalise(sampler.part(1, 2), torch.zeros(1, 1, 8), root_tree(torch.tensor([1])), length=4)[0, 0, 3] < 0
    assert not sampler.part(0, 1).work.holds_ends


class TestNoise:
    def test_is_a_function_of_seed_position_and_token(self) -> None:
        """The same rows whatever was reserved before, in one step or many, near the start or far from it."""
        expected = gumbel_rows(7, list(range(300)))
        window = NOISE_WINDOW
        around_its_ends = [0, window - 8, window - 1, window, window + 1, 2 * window - 1, 2 * window, 2 * window + 1]
        for starts in ([0], [0, 1, 2, 3], around_its_ends, [0, 200, 201, 290], [250]):
            noise = noise_of(7)
            for start in starts:
                noise.reserve(0, start, 8)
                positions = torch.arange(start, start + 8)[None]
                assert torch.equal(noise.at(positions)[0], expected[start : start + 8])

    def test_rows_advance_each_at_its_own_pace(self) -> None:
        noise = noise_of(1, 2)
        for starts in ([0, 100], [5, 100], [70, 164], [NOISE_WINDOW * 3, 165]):
            for seat, start in enumerate(starts):
                noise.reserve(seat, start, 4)
            rows = noise.at(torch.tensor(starts)[:, None] + torch.arange(4))
            for row, (seed, start) in enumerate(zip((1, 2), starts, strict=True)):
                assert torch.equal(rows[row], gumbel_rows(seed, list(range(start, start + 4))))

    def test_a_position_does_not_depend_on_those_computed_beside_it(self) -> None:
        assert torch.equal(gumbel_rows(3, [5, 17])[1], gumbel_rows(3, [17])[0])

    @pytest.mark.parametrize("other", [1, 1 + 2**32, 2**62])
    def test_seeds_differ_in_every_bit_that_they_have(self, other: int) -> None:
        assert not torch.equal(gumbel_rows(0, [4]), gumbel_rows(other, [4]))

    def test_positions_and_seeds_are_uncorrelated(self) -> None:
        size = 20_000
        rows = [gumbel_rows(0, [1, 2], size), gumbel_rows(1, [1, 2], size)]
        correlations = torch.corrcoef(torch.cat(rows)).fill_diagonal_(0)
        assert correlations.abs().max() < 4 / math.sqrt(size)

    def test_moments_are_those_of_a_standard_gumbel(self) -> None:
        noise = gumbel_rows(11, list(range(20)), vocab_size=10_000).double().flatten()
        assert noise.mean().item() == pytest.approx(0.57722, abs=4 * 1.2825 / math.sqrt(noise.numel()))
        assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)

    def test_distribution_is_gumbel(self) -> None:
        """Kolmogorov-Smirnov: the largest gap between the empirical and the true distribution function."""
        noise = gumbel_rows(5, list(range(10)), vocab_size=10_000).double().flatten().sort().values
        true = torch.exp(-torch.exp(-noise))
        steps = torch.arange(1, noise.numel() + 1, dtype=torch.float64) / noise.numel()
        assert (steps - true).abs().max() < 1.63 / math.sqrt(noise.numel())  # the 1 % level

    def test_the_tail_is_finer_than_24_bits(self) -> None:
        """Of two million draws the largest is about log(2e6) = 14.5; all are finite and hardly any repeats."""
        noise = gumbel_rows(2, list(range(4)), vocab_size=500_000).flatten()
        assert noise.isfinite().all()
        assert 13 < noise.max() < 25
        top = noise.topk(1000).values
        assert top.unique().numel() > 990

    def test_argmax_of_log_p_plus_noise_draws_from_p(self) -> None:
        probs = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
        draws = (probs.log() + gumbel_rows(9, list(range(20_000)), vocab_size=5)).argmax(-1)
        counts, expected = torch.bincount(draws, minlength=5), probs * 20_000
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < 18.47  # 4 degrees of freedom, the 0.1 % level


class TestChoose:
    def test_greedy_ties_go_to_the_lowest_id(self) -> None:
        logits = torch.zeros(1, 1, VOCAB)
        logits[0, 0, [4, 9, 40]] = 1.0
        assert choose_at_root(sampler_of(SamplingParams()), logits).tolist() == [4]

    def test_noise_is_that_of_the_chosen_tokens_position(self) -> None:
        """A node at depth d below a root at position L chooses the token of position L + d + 1."""
        logits, tree = random_logits(rows=3), tree_of([1, 2, 3], parents=[0, 0, 0], depths=[0, 1, 1])
        sampler = sampler_of(SamplingParams(temperature=0.8, seed=21))
        sampler.reserve([30], 2)
        chosen = sampler.choose(logits, tree, torch.tensor([30]))
        noise = gumbel_rows(21, [31, 32, 32])
        assert torch.equal(chosen[0], (logits[0] / 0.8 + noise).argmax(-1))

    def test_a_tree_node_chooses_what_plain_decoding_does(self) -> None:
        logits = random_logits(rows=2)
        params = SamplingParams(temperature=1.2, top_k=20, seed=4)
        plain = choose_at_root(sampler_of(params), logits[:, 1:], position=11)
        sampler = sampler_of(params)
        sampler.reserve([10], 2)
        chain = tree_of([1, 2], parents=[0, 0], depths=[0, 1])
        in_tree = sampler.choose(logits, chain, torch.tensor([10]))
        assert in_tree[0, 1] == plain[0]

    def test_a_greedy_row_beside_a_sampled_one_stays_greedy(self) -> None:
        logits = random_logits(rows=1).expand(2, 1, VOCAB)
        greedy = int(logits[0].argmax())
        for position in range(20):
            sampler = sampler_of(SamplingParams(), SamplingParams(temperature=5.0))
            chosen = choose_at_root(sampler, logits, position)
            assert chosen[0] == greedy
        alone = [
            int(choose_at_root(sampler_of(SamplingParams(temperature=5.0)), logits[:1], position))
            for position in range(20)
        ]
        assert len(set(alone)) > 5


class TestRank:
    """How a draft's candidates are scored: with the very noise that the target will use."""

    @pytest.mark.parametrize(
        "params",
        [
            {"temperature": 1.0},
            {"temperature": 0.3},
            {"temperature": 1.4, "top_k": 10},
            {"temperature": 0.9, "top_p": 0.7, "min_p": 0.05},
        ],
        ids=str,
    )
    def test_a_perfect_draft_ranks_the_targets_own_token_first(self, params: dict[str, float]) -> None:
        for position in range(20):
            logits = random_logits(rows=1, seed=position)
            sampler = sampler_of(SamplingParams(**params, seed=8))  # type: ignore[arg-type]
            chosen = choose_at_root(sampler, logits, position)
            ranked = sampler.rank(logits, torch.tensor([[position + 1]]), None)
            assert ranked.argmax(-1).item() == chosen.item()

    def test_scores_are_log_probabilities(self) -> None:
        sampler = sampler_of(SamplingParams(temperature=0.8, top_k=9))
        sampler.reserve([0], 1)
        ranked = sampler.rank(random_logits(), torch.tensor([[1]]), None)
        torch.testing.assert_close(ranked.exp().sum(-1), torch.ones(1, 6, dtype=torch.float64))
        assert (ranked.isfinite().sum(-1) == 9).all()

    def test_a_draft_vocabulary_reads_the_noise_of_its_target_ids(self) -> None:
        """With equal logits the noise alone ranks."""
        target_ids = torch.tensor([3, 8, 21, 40])
        sampler = sampler_of(SamplingParams(temperature=1.0, seed=6))
        sampler.reserve([0], 1)
        _, ranked = sampler.rank(torch.zeros(1, 1, 4), torch.tensor([[1]]), target_ids).topk(4)
        noise = gumbel_rows(6, [1])[0, target_ids]
        assert ranked[0, 0].tolist() == noise.argsort(descending=True).tolist()

    @pytest.mark.parametrize("temperature", [0.4, 1.0, 1.6])
    def test_scores_are_the_chances_of_the_draw_given_the_noise(self, temperature: float) -> None:
        """Targets that differ from one draft by Gumbel errors draw each token as often as its score says."""
        num_targets, vocab_size = 4000, 6
        torch.manual_seed(0)
        draft = torch.randn(1, 1, vocab_size, dtype=torch.float64)
        errors = -torch.empty(1, num_targets, vocab_size, dtype=torch.float64).exponential_().log()
        sampler = Sampler.of([SamplingParams(temperature=temperature, seed=3)], vocab_size, torch.device("cpu"))
        sampler.reserve([0], 0)
        chances = sampler.rank(draft, torch.tensor([[1]]), None).exp().squeeze()
        noise = gumbel_rows(3, [1])[0, :vocab_size]
        draws = ((draft + LOGIT_ERROR * errors) / temperature + noise).argmax(-1)
        shares = torch.bincount(draws.flatten(), minlength=vocab_size) / num_targets
        torch.testing.assert_close(shares.double(), chances, atol=0.025, rtol=0)

    def test_low_temperatures_approach_the_greedy_scores(self) -> None:
        logits = random_logits(rows=1)
        sampler = sampler_of(SamplingParams(temperature=1e-4))
        sampler.reserve([0], 0)
        scores = sampler.rank(logits, torch.tensor([[1]]), None)
        torch.testing.assert_close(scores, (logits / LOGIT_ERROR).log_softmax(-1), atol=0.01, rtol=0)

    def test_greedy_rows_have_the_papers_ranking(self) -> None:
        logits = random_logits(rows=2).transpose(0, 1)
        positions = torch.tensor([[1], [1]])
        papers = uncoupled_rank(logits, positions, None)
        torch.testing.assert_close(papers, logits.log_softmax(-1))
        assert torch.equal(sampler_of(SamplingParams(), SamplingParams()).rank(logits, positions, None), papers)
        mixed = sampler_of(SamplingParams(), SamplingParams(temperature=1.0))
        mixed.reserve([0, 0], 1)
        ranked = mixed.rank(logits, positions, None)
        assert torch.equal(ranked[0], papers[0])
        assert not torch.equal(ranked[1], papers[1])


class TestParameters:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", -0.1),
            ("temperature", float("inf")),
            ("temperature", float("nan")),
            ("top_k", -1),
            ("top_k", 2.5),
            ("top_k", 2**63),
            ("top_p", 0.0),
            ("top_p", 1.1),
            ("min_p", -0.1),
            ("min_p", 1.1),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", float("inf")),
            ("presence_penalty", float("nan")),
            ("frequency_penalty", float("-inf")),
            ("seed", -1),
            ("seed", 2**63),
            ("seed", 0.5),
        ],
    )
    def test_out_of_range_values_name_the_field(self, field: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"^{field}: expected .*, got {value!r}".replace("+", r"\+")):
            SamplingParams(**{field: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("field", "value"), [("temperature", 0.0), ("top_p", 1.0), ("min_p", 0.0), ("min_p", 1.0), ("seed", 2**63 - 1)]
    )
    def test_the_ends_of_the_ranges_are_allowed(self, field: str, value: float) -> None:
        assert getattr(SamplingParams(**{field: value}), field) == value  # type: ignore[arg-type]

    def test_a_bias_outside_the_vocabulary_is_refused(self) -> None:
        with pytest.raises(ValueError, match=f"logit_bias: token {VOCAB} is outside"):
            SamplingParams(logit_bias={VOCAB: 1.0}).check(VOCAB)


class Script:
    """Steps that choose given tokens, row by row, and note what they were asked."""

    def __init__(self, tokens: list[list[int]], in_step: bool) -> None:
        self.tokens, self.in_step = tokens, in_step
        self.asked: list[tuple[list[int], list[float]]] = []

    def choose(self, rows: Sequence[int], logits: torch.Tensor, noise: torch.Tensor | None) -> list[int]:
        self.asked.append((list(rows), logits[:, 0].tolist()))
        return [self.tokens[row].pop(0) for row in rows]


class TestSteps:
    """A chain of tokens 5, 6, 7 in two rows, whose nodes are told apart by their first logit: 0, 1, 2."""

    tree = DraftTree(
        tokens=torch.tensor([[5, 6, 7]] * 2),
        parents=torch.tensor([[0, 0, 1]] * 2),
        depths=torch.tensor([[0, 1, 2]] * 2),
        valid=torch.ones(2, 3, dtype=torch.bool),
        scores=torch.zeros(2, 3),
        log_probs=torch.zeros(2, 3),
        max_depth=2,
    )
    logits = torch.zeros(2, 3, 10)
    logits[:, :, 0] = torch.arange(3)
    logits[:, :, 9] = 8.0

    def chosen(self, steps: Script, order: tuple[int, int] = (0, 1)) -> torch.Tensor:
        return choose_in_steps([Place(steps, row) for row in order], self.logits, self.tree, None)

    def test_each_row_is_asked_along_its_own_path(self) -> None:
        steps = Script([[6, 7, 1], [2]], in_step=False)
        chosen = self.chosen(steps)
        assert steps.asked == [([0], [0.0]), ([0], [1.0]), ([0], [2.0]), ([1], [0.0])]
        assert chosen.tolist() == [[6, 7, 1], [2, ~9, ~9]]
        assert walk(self.tree, chosen).num_accepted.tolist() == [2, 0]

    def test_rows_in_step_wait_for_the_one_that_accepts_least(self) -> None:
        """Row 0 would accept both drafts, but nobody was asked behind its first token."""
        steps = Script([[6, 7], [2]], in_step=True)
        chosen = self.chosen(steps)
        assert steps.asked == [([0, 1], [0.0, 0.0])]
        verdict = walk(self.tree, chosen)
        assert (verdict.num_accepted.tolist(), verdict.bonus.tolist()) == ([0, 0], [6, 2])

    def test_rows_have_their_numbers_wherever_they_sit(self) -> None:
        steps = Script([[6, 7, 1], [6, 7, 2]], in_step=True)
        assert self.chosen(steps, order=(1, 0)).tolist() == [[6, 7, 2], [6, 7, 1]]
        assert [rows for rows, _ in steps.asked] == [[0, 1]] * 3

    def test_what_is_not_valid_is_not_followed(self) -> None:
        steps = Script([[6], [6]], in_step=False)
        tree = dataclasses.replace(self.tree, valid=torch.tensor([[True, False, False]] * 2))
        choose_in_steps([Place(steps, row) for row in (0, 1)], self.logits, tree, None)
        assert len(steps.asked) == 2

    def test_noise_is_that_of_the_depth(self) -> None:
        seen: list[torch.Tensor | None] = []

        class Draws(Script):
            def choose(self, rows: Sequence[int], logits: torch.Tensor, noise: torch.Tensor | None) -> list[int]:
                seen.append(noise)
                return super().choose(rows, logits, noise)

        steps = Draws([[6, 7, 1], [6, 7, 2]], in_step=True)
        params = [SamplingParams(temperature=1.0, seed=row, place=Place(steps, row)) for row in (0, 1)]
        sampler = sampler_of(*params, vocab_size=10)
        sampler.reserve([20, 40], 2)
        sampler.choose(self.logits, self.tree, torch.tensor([20, 40]))
        for depth, noise in enumerate(seen):
            rows = [gumbel_rows(row, [start + depth + 1], 10)[0] for row, start in ((0, 20), (1, 40))]
            assert noise is not None and torch.equal(noise, torch.stack(rows))
        assert len(seen) == 3
