"""Measure a draft without running its target again.

What a target says does not depend on the draft. So it is decoded plainly once, with its features kept, and the cycles
that any drafter would have gone through are replayed over the tokens: the real drafters, plans and acceptance rule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from draftwing.engine.drafter import PREFILL_CHUNK, Drafter, NoDrafter, Ranking
from draftwing.engine.engine import NewDrafter, Request
from draftwing.engine.generation import start_generation
from draftwing.engine.readback import Array
from draftwing.engine.sampling import Sampler, SamplingParams, log_probabilities
from draftwing.engine.tree_plan import TreePlan
from draftwing.target.model import TargetModel

MOST_TOKENS = 4096
"""Rows times their length that are replayed at once, unless there are more to begin with."""
SHORTEST_PART = 4
"""Positions of a part, whose prompt is read anew."""
LEAST_LOG_PROB = -10.0
"""Less is not told apart: a token that the draft lacks, an overflow."""


@dataclass(frozen=True)
class Transcript:
    """What a target said to B prompts.

    Attributes:
        tokens: of each row, the prompt's and then the new ones; `num_prompt` of them are the prompt's.
        features: by the hidden state's number, `[S - 1, D]` of each row: at every token but the last. On the host.
        sampling: how each row's tokens were chosen.
        vocab_size: the target's.
    """

    tokens: list[list[int]]
    num_prompt: list[int]
    features: dict[int, list[torch.Tensor]]
    sampling: list[SamplingParams]
    vocab_size: int

    @property
    def longest(self) -> int:
        return max(map(len, self.tokens))

    def misplaced(self) -> "Transcript":
        """The same tokens with each row's features in reverse order: a draft that reads them is misled."""
        features = {layer: [rows.flip(0) for rows in values] for layer, values in self.features.items()}
        return replace(self, features=features)


@dataclass(frozen=True)
class Trace:
    """What chains drafted at each of a row's n positions would have come to.

    Attributes:
        positions: `[n]` of the roots.
        num_accepted: `[n]` draft tokens that would have been accepted.
        log_probs: `[n, depth]` that the draft gives the true tokens behind the root, each given those before it; at
            least LEAST_LOG_PROB, NaN behind the end.
    """

    positions: Array
    num_accepted: Array
    log_probs: Array

    def cycles(self) -> tuple[Array, Array]:
        """The cycles of decoding: the roots' indices into `positions`, and how many tokens each emits."""
        index, indices, emitted = 0, [], []
        while index < len(self.positions):
            indices.append(index)
            emitted.append(min(int(self.num_accepted[index]) + 1, len(self.positions) - index))
            index += emitted[-1]
        return np.array(indices), np.array(emitted)


class _Listener(NoDrafter):
    """A drafter that drafts nothing and keeps the features that it is shown."""

    by_seat = ("_rows",)

    def __init__(self, feature_layers: tuple[int, ...], num_seats: int) -> None:
        self.feature_layers = feature_layers
        self.rows: list[list[torch.Tensor]] = []  # in the order in which they were seated
        self._rows = np.empty(num_seats, dtype=object)

    def begin(self, seat: int, token: int) -> None:
        self._rows[seat] = []
        self.rows.append(self._rows[seat])

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        if features is not None:
            for pieces, piece, count in zip(self._rows, features.cpu(), num_new.tolist(), strict=True):
                pieces.append(piece[:count])


def transcribe(target: TargetModel, requests: Sequence[Request], feature_layers: Sequence[int]) -> Transcript:
    """Decode requests plainly, keeping the target's features at these hidden_states indices."""
    listener = _Listener(tuple(feature_layers), len(requests))
    generation = start_generation(target, requests, lambda *_: listener, TreePlan.off()).run()
    tokens = [[*request.prompt, *row.tokens] for request, row in zip(requests, generation.outputs, strict=True)]
    features: dict[int, list[torch.Tensor]] = {layer: [] for layer in feature_layers}
    for pieces, ids in zip(listener.rows, tokens, strict=True):
        if feature_layers:
            parts = torch.cat(pieces)[: len(ids) - 1].split(target.hidden_size, dim=-1)
            for layer, part in zip(feature_layers, parts, strict=True):
                features[layer].append(part)
    lengths = [len(request.prompt) for request in requests]
    return Transcript(tokens, lengths, features, [request.sampling for request in requests], target.vocab_size)


@dataclass(frozen=True)
class _Part:
    """A stretch of a row's roots, from `start` to before `stop`. A row's parts are replayed side by side."""

    row: int
    start: int
    stop: int


def _parts(transcript: Transcript) -> list[_Part]:
    """All rows in parts: as few steps as rows of MOST_TOKENS allow, since a step costs hardly more for more rows."""
    num_tokens = len(transcript.tokens) * transcript.longest
    is_sampled = any(params.temperature > 0 for params in transcript.sampling)
    num_parts = 1 if is_sampled else max(1, MOST_TOKENS // num_tokens)  # noise takes memory for each row
    parts = []
    for row, (tokens, num_prompt) in enumerate(zip(transcript.tokens, transcript.num_prompt, strict=True)):
        length = max(SHORTEST_PART, math.ceil((len(tokens) - num_prompt) / num_parts))
        end = len(tokens) - 1
        parts += [_Part(row, start, min(start + length, end)) for start in range(num_prompt - 1, end, length)]
    return parts


class _Script:
    """Parts as padded batches on a device: `tokens [B, S]` (-1 behind the end), `features [B, S, F]`."""

    def __init__(
        self, transcript: Transcript, parts: Sequence[_Part], drafter: Drafter, dtype: torch.dtype, device: torch.device
    ) -> None:
        def padded(rows: Sequence[torch.Tensor], value: float) -> torch.Tensor:
            chosen = [rows[part.row] for part in parts]
            return torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=value)

        self.tokens = padded([torch.tensor(row) for row in transcript.tokens], -1).to(device)
        self.features = None
        if drafter.feature_layers:
            values = [padded(transcript.features[layer], 0.0) for layer in drafter.feature_layers]
            self.features = torch.cat(values, dim=-1).to(device, dtype)

    def tokens_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Tokens at `positions [B, N]`, -1 behind the end."""
        known = self.tokens.gather(1, positions.clamp(max=self.tokens.shape[1] - 1))
        return torch.where(positions < self.tokens.shape[1], known, -1)

    def features_at(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Features at `positions [B, N]`; behind the end, any."""
        if self.features is None:
            return None
        index = positions.clamp(max=self.features.shape[1] - 1)[..., None]
        return self.features.gather(1, index.expand(-1, -1, self.features.shape[-1]))


class _Prompter:
    """Ranks candidates so that a chain follows the script, and notes what the draft itself would have said.

    A true token that the draft cannot say ends the chain: the levels behind it count as badly as it does.
    """

    def __init__(self, script: _Script, rank: Ranking) -> None:
        self._script, self._rank = script, rank
        self._goes_on: torch.Tensor | None = None
        self.is_best: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> torch.Tensor:
        true = self._script.tokens_at(positions)  # [B, 1]
        ids = torch.arange(logits.shape[-1], device=logits.device) if target_ids is None else target_ids
        is_true = ids == true[..., None]
        _, best = self._rank(logits, positions, target_ids).topk(1)
        self.is_best.append(is_true.gather(-1, best).flatten())
        knows = is_true.any(-1)
        self._goes_on = knows if self._goes_on is None else self._goes_on & knows
        said = log_probabilities(logits).masked_fill(~is_true, -torch.inf).amax(-1)
        said = torch.where(self._goes_on, said, LEAST_LOG_PROB).nan_to_num(LEAST_LOG_PROB).clamp(min=LEAST_LOG_PROB)
        self.log_probs.append(said.masked_fill(true < 0, torch.nan).flatten())
        return is_true.float()


@torch.inference_mode()
def replay(
    transcript: Transcript, new_drafter: NewDrafter, depth: int, dtype: torch.dtype, device: torch.device
) -> list[Trace]:
    """What chains of this depth, drafted at every position of a transcript by a drafter of this dtype, come to."""
    parts, plan = _parts(transcript), TreePlan.chain(depth)
    drafter = new_drafter(len(parts), transcript.longest + plan.num_nodes + 1)
    script = _Script(transcript, parts, drafter, dtype, device)
    sampler = Sampler.of([transcript.sampling[part.row] for part in parts], transcript.vocab_size, device, depth)
    roots, ends = (torch.tensor([getattr(part, name) for part in parts], device=device) for name in ("start", "stop"))
    for seat, token in enumerate(script.tokens[:, 0].tolist()):
        drafter.begin(seat, token)
    for start in range(0, int(roots.max()), PREFILL_CHUNK):
        positions = torch.arange(start, min(start + PREFILL_CHUNK, int(roots.max())), device=device)
        positions = positions.expand(len(parts), -1)
        num_valid = (roots - start).clamp(0, positions.shape[1])
        drafter.observe(script.tokens_at(positions + 1).clamp(min=0), script.features_at(positions), num_valid)
        drafter.catch_up(positions.shape[1])
    notes = []
    while (roots < ends).any():
        sampler.reserve(roots.tolist(), depth)
        drafter.bound = int(roots.max())
        prompter = _Prompter(script, sampler.rank)
        tree = drafter.grow(script.tokens_at(roots[:, None]).squeeze(1), plan, prompter)
        num_accepted = (torch.stack(prompter.is_best, 1) & tree.valid[:, 1:]).cumprod(1).sum(1)
        notes.append((roots < ends, roots, num_accepted, torch.stack(prompter.log_probs, 1)))
        step = roots[:, None]
        drafter.observe(script.tokens_at(step + 1).clamp(min=0), script.features_at(step), (roots < ends).long())
        drafter.catch_up(1)
        roots = (roots + 1).minimum(ends)
    is_real, *columns = (torch.stack(column, 1).numpy(force=True) for column in zip(*notes, strict=True))
    pieces = [(part.row, [column[index][is_real[index]] for column in columns]) for index, part in enumerate(parts)]
    rows = ([piece for its_row, piece in pieces if its_row == row] for row in range(len(transcript.tokens)))
    return [Trace(*map(np.concatenate, zip(*row, strict=True))) for row in rows]
