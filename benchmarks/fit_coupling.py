"""How far a head is from its target: fits the constants of `Sampler.rank` on traces, and says what bounds acceptance.

    python benchmarks/fit_coupling.py --draft tiny --threads 1 --output fit.json

The target decodes the prompts plainly; at every position the head drafts along the tokens that follow, so that all
nodes of a trace have accepted ancestors. A form turns the head's log-probabilities, the noise and T into scores; its
constants minimise the mean negative log-likelihood of the target's draws under the scores' softmax, for one temperature
or for all together. Draws outside of a draft vocabulary cannot be drafted; they are counted as `outside` and left out
of the likelihood.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from draftwing.api import SpeculativeModel, load
from draftwing.data.prompts import read_prompts
from draftwing.drafts.eagle.drafter import EagleDrafter
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.engine.noise import gumbel
from draftwing.engine.sampling import log_probabilities
from draftwing.engine.tree_plan import TreePlan
from draftwing.provenance import write_record


@dataclass(frozen=True)
class Trace:
    """M nodes whose ancestors were all accepted, at one temperature.

    Attributes:
        draft, noise: `[M, Vd]` the head's log-probabilities and the target's noise, over the draft's tokens.
        drawn: `[M]` draft id of the target's draw; -1 if it is outside of the draft vocabulary.
        entropy: `[M]` of the target's distribution at this temperature, in nats.
        overlap: `[M]` sum of min(target, draft) probabilities at this temperature: no draw of one token that is coupled
            to the target's agrees with it more often.
        same_best: `[M]` whether the target and the head have the same likeliest token.
    """

    temperature: float
    draft: torch.Tensor
    noise: torch.Tensor
    drawn: torch.Tensor
    entropy: torch.Tensor
    overlap: torch.Tensor
    same_best: torch.Tensor

    def at(self, nodes: torch.Tensor) -> "Trace":
        """Some of the nodes, by index or mask."""
        return Trace(self.temperature, *(getattr(self, field.name)[nodes] for field in fields(self)[1:]))


@dataclass(frozen=True)
class Bounds:
    """What a head can reach on its target's own text at one temperature, as means over nodes.

    `agreement` is how often `argmax(log q / T + g)` is the target's draw, `greedy_agreement` the same of the two
    likeliest tokens, on the same text.
    """

    temperature: float
    num_nodes: int
    outside: float
    entropy: float
    greedy_agreement: float
    overlap: float
    agreement: float


@dataclass(frozen=True)
class Fit:
    """A form with its constants; by temperature the NLL (nats) and how often the draw is among the best 1 and 4."""

    form: str
    fitted_on: str
    constants: dict[str, float]
    nll: dict[str, float]
    top_1: dict[str, float]
    top_4: dict[str, float]


Parameters = torch.Tensor
"""`[P]` logarithms, so that every fitted constant is positive."""


@dataclass(frozen=True)
class Form:
    """Scores `[M, Vd]` from a trace and parameters; `initial` has one logarithm per named constant."""

    name: str
    score: Callable[[Trace, Parameters], torch.Tensor]
    constants: tuple[str, ...] = ()


def warped(trace: Trace) -> torch.Tensor:
    return (trace.draft / trace.temperature).log_softmax(-1)


def mixed(trace: Trace, coupled: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Log of a mixture of the coupled scores' softmax and the head's warped distribution."""
    weight = weight.clamp(max=0.99)
    return torch.logaddexp(coupled.log_softmax(-1) + (1 - weight).log(), warped(trace) + weight.log())


def marginal_kept(trace: Trace, x: Parameters) -> torch.Tensor:
    """Sharpened so that the draws over all noise follow q at T = 1: a sum of Gumbels is wider than its parts."""
    scale = x[0].exp()
    return ((1 + scale**2).sqrt() * trace.draft + trace.temperature * trace.noise) / scale


FORMS = (
    Form("log q (uncoupled)", lambda t, x: t.draft),
    Form("log q / T (uncoupled, warped)", lambda t, x: warped(t)),
    Form("log q / T + g", lambda t, x: warped(t) + t.noise),
    Form("(log q / T + g) / s", lambda t, x: (warped(t) + t.noise) / x[0].exp(), ("s",)),
    Form("T (log q / T + g) / s", lambda t, x: (t.draft + t.temperature * t.noise) / x[0].exp(), ("s",)),
    Form("marginal kept", marginal_kept, ("s",)),
    Form(
        "T (c log q / T + g) / s",
        lambda t, x: (x[0].exp() * t.draft + t.temperature * t.noise) / x[1].exp(),
        ("c", "s"),
    ),
    Form(
        "mixture of T (log q / T + g) / s and q",
        lambda t, x: mixed(t, (t.draft + t.temperature * t.noise) / x[0].exp(), x[1].exp()),
        ("s", "weight"),
    ),
)


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    model = load(options.target, draft=options.draft, dtype="float32")
    prompts = [prompt.token_ids(model.tokenizer) for prompt in read_prompts(options.prompts)]
    traces, bounds = [], []
    for temperature in options.temperatures:
        trace = record(model, prompts, temperature, options)
        bounds.append(bounds_of(trace))
        traces.append(trace.at(trace.drawn >= 0))
    fits = []
    for form in FORMS:
        if form.constants:
            fits += [fit(form, [trace]) for trace in traces]
        fits.append(fit(form, traces))
    print_tables(bounds, fits, options)
    if options.output:
        rows = {"bounds": [asdict(row) for row in bounds], "fits": [asdict(row) for row in fits]}
        write_record(options.output, rows, vars(options))
    return 0


@torch.inference_mode()
def record(
    model: SpeculativeModel, prompts: Sequence[list[int]], temperature: float, options: argparse.Namespace
) -> Trace:
    """A trace of `options.num_nodes` random nodes (seeded) of the target's continuations of the prompts."""
    seeds = [options.seed + row for row in range(len(prompts))]
    settings = {"temperature": temperature, "seed": seeds, "max_new_tokens": options.max_new_tokens}
    plain = model.with_method("plain").start(prompts, **settings).run()
    nodes = []
    for prompt, output, seed in zip(prompts, plain.outputs, seeds, strict=True):
        nodes += trace_row(model, prompt, output.tokens, temperature, seed, options.depth)
    columns = [torch.stack([getattr(node, field.name) for node in nodes]) for field in fields(Trace)[1:]]
    picks = torch.randperm(len(nodes), generator=torch.Generator().manual_seed(0))[: options.num_nodes]
    return Trace(temperature, *columns).at(picks)


def trace_row(
    model: SpeculativeModel, prompt: list[int], new_tokens: list[int], temperature: float, seed: int, depth: int
) -> list[Trace]:
    """One row's nodes, without the dimension M: at every position a chain along the tokens that follow."""
    assert model.draft is not None
    target, tokens = model.target, torch.tensor([prompt + new_tokens])
    length = tokens.shape[1]
    steps = torch.arange(length)
    drafter = EagleDrafter(model.draft, 1, length + depth + 2)
    causal = (steps[:, None] >= steps)[None]
    output = target.forward_tree(
        tokens, steps[None], causal, target.new_cache(1, length), feature_layers=drafter.feature_layers
    )
    assert output.features is not None
    recorder = Recorder(tokens[0], output.logits[0], temperature, seed)
    drafter.observe(tokens[:, 1 : len(prompt)], output.features[:, : len(prompt) - 1], torch.tensor([len(prompt) - 1]))
    drafter.catch_up(len(prompt) - 1)
    for root in range(len(prompt) - 1, length - 1):
        recorder.is_on_text = True
        drafter.grow(tokens[:, root], TreePlan.chain(depth), recorder)
        drafter.observe(tokens[:, root + 1 : root + 2], output.features[:, root : root + 1], torch.tensor([1]))
        drafter.catch_up(1)
    return recorder.nodes


class Recorder:
    """A ranking that records each node and leads the draft along `tokens [S]`, as far as it has words for them."""

    def __init__(self, tokens: torch.Tensor, target_logits: torch.Tensor, temperature: float, seed: int) -> None:
        self.nodes: list[Trace] = []
        self.is_on_text = True
        self._tokens, self._temperature = tokens, temperature
        self._target = log_probabilities(target_logits)
        self._noise = gumbel(torch.tensor(seed), torch.arange(len(tokens)), torch.arange(target_logits.shape[-1]))

    def __call__(self, logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> torch.Tensor:
        position = int(positions)
        self.is_on_text &= position < len(self._tokens)
        if not self.is_on_text:
            return logits
        ids = torch.arange(logits.shape[-1]) if target_ids is None else target_ids
        drawn = (ids == self._tokens[position]).int()
        draft, target = log_probabilities(logits)[0, 0], self._target[position - 1]
        self.nodes.append(
            Trace(
                temperature=self._temperature,
                draft=draft,
                noise=self._noise[position, ids],
                drawn=torch.where(drawn.any(), drawn.argmax(), -1),
                entropy=torch.special.entr((target / self._temperature).softmax(-1)).sum(),
                overlap=torch.minimum(
                    (target / self._temperature).softmax(-1)[ids], (draft / self._temperature).softmax(-1)
                ).sum(),
                same_best=ids[draft.argmax()] == target.argmax(),
            )
        )
        self.is_on_text = bool(drawn.any())
        return drawn[None, None].float()


def bounds_of(trace: Trace) -> Bounds:
    agrees = (trace.draft / trace.temperature + trace.noise).argmax(-1) == trace.drawn
    return Bounds(
        temperature=trace.temperature,
        num_nodes=len(trace.drawn),
        outside=mean(trace.drawn < 0),
        entropy=mean(trace.entropy),
        greedy_agreement=mean(trace.same_best),
        overlap=mean(trace.overlap),
        agreement=mean(agrees),
    )


def mean(values: torch.Tensor) -> float:
    return float(values.float().mean())


def nll(form: Form, traces: Sequence[Trace], parameters: Parameters) -> torch.Tensor:
    """Mean over temperatures of the mean negative log-likelihood of the draws."""
    losses = [cross_entropy(form.score(trace, parameters), trace.drawn) for trace in traces]
    return torch.stack(losses).mean()


def fit(form: Form, traces: Sequence[Trace]) -> Fit:
    """The constants that minimise the likelihood's loss (L-BFGS from 0.9), and the form's figures with them."""
    parameters = torch.full((len(form.constants),), 0.9).log().requires_grad_()
    if form.constants:
        optimizer = torch.optim.LBFGS([parameters], max_iter=20, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nll(form, traces, parameters)
            loss.backward()
            return loss

        optimizer.step(closure)
    found = parameters.detach()
    best = {trace.temperature: form.score(trace, found).topk(4).indices == trace.drawn[:, None] for trace in traces}
    return Fit(
        form=form.name,
        fitted_on="all" if len(traces) > 1 else f"T = {traces[0].temperature:g}",
        constants=dict(zip(form.constants, found.exp().tolist(), strict=True)),
        nll={f"{trace.temperature:g}": float(nll(form, [trace], found)) for trace in traces},
        top_1={f"{temperature:g}": mean(hits[:, 0]) for temperature, hits in best.items()},
        top_4={f"{temperature:g}": mean(hits.any(-1)) for temperature, hits in best.items()},
    )


def print_tables(bounds: Sequence[Bounds], fits: Sequence[Fit], options: argparse.Namespace) -> None:
    console = Console(width=150)
    reached = Table(title=f"What the head {options.draft} can reach on its target's text")
    for name in (field.name for field in fields(Bounds)):
        reached.add_column(name.replace("_", " "), justify="right")
    for row in bounds:
        reached.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in astuple(row)))
    console.print(reached)
    forms = Table(title="Negative log-likelihood of the target's draws (share among the best 1 / 4), by temperature")
    for name in ("scores", "fitted on", "constants", *(f"T = {temperature:g}" for temperature in options.temperatures)):
        forms.add_column(name)
    for result in fits:
        keys = [f"{temperature:g}" for temperature in options.temperatures]
        cells = [
            f"{result.nll[key]:.3f} ({result.top_1[key]:.2f} / {result.top_4[key]:.2f})" if key in result.nll else ""
            for key in keys
        ]
        constants = ", ".join(f"{name} {value:.2f}" for name, value in result.constants.items())
        forms.add_row(result.form, result.fitted_on, constants, *cells)
    console.print(forms)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--draft", default="tiny")
    parser.add_argument("--prompts", type=Path, default=EMBEDDED_PROMPTS)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.3, 0.7, 1.0, 1.3])
    parser.add_argument("--seed", type=int, default=1000, help="of the first prompt; not one that benchmarks use")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3, help="of the traced chains (default: 3)")
    parser.add_argument("--num-nodes", type=int, default=1500, help="at each temperature (default: 1500)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
