"""What a prepared folder holds, in figures, a small plot, and samples coloured by what is supervised."""

from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from draftwing.data.chat_template import Example
from draftwing.data.examples import count_supervised
from draftwing.data.prepared import SPLITS, Prepared

DRAFT_VOCAB_SIZES = (8192, 16384, 32768, 65536)
PERCENTILES = (50, 90, 99, 100)
NUM_BINS = 10
BAR_WIDTH = 40


@dataclass(frozen=True)
class DataStatistics:
    """Figures of the training and held-out documents together. Lengths are in tokens, shares between 0 and 1."""

    rows: int
    rejected: int
    split: int
    cut: int
    unsupervised: int
    documents: int
    held_out_documents: int
    tokens: int
    supervised_tokens: int
    length_percentiles: dict[int, int]
    length_histogram: dict[int, int]
    """Documents by length, under the upper end of each bin."""
    distinct_tokens: int
    """Different tokens that are supervised."""
    coverage: dict[int, float]
    """The share of supervised tokens that are among the so many most frequent ones."""

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / max(1, self.tokens)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"supervised_share": self.supervised_share}


def summarise(prepared: Prepared, vocab_size: int) -> DataStatistics:
    """Count a prepared folder."""
    splits = {split: prepared.examples(split) for split in SPLITS}
    lengths = torch.tensor([length for examples in splits.values() for length in examples.lengths])
    counts = torch.stack([count_supervised(examples, vocab_size) for examples in splits.values()]).sum(0)
    by_frequency = counts.sort(descending=True).values.cumsum(0)
    total = int(by_frequency[-1])
    sizes = [size for size in DRAFT_VOCAB_SIZES if size < vocab_size] or [vocab_size // 4, vocab_size // 2]
    ordered = lengths.sort().values
    step = -(-int(ordered[-1]) // NUM_BINS)
    bins = torch.bincount((lengths - 1) // step, minlength=1)
    return DataStatistics(
        **asdict(prepared.counts),
        documents=len(splits["train"]),
        held_out_documents=len(splits["held_out"]),
        tokens=int(lengths.sum()),
        supervised_tokens=total,
        length_percentiles={p: int(ordered[-(-p * len(ordered) // 100) - 1]) for p in PERCENTILES},
        length_histogram={(index + 1) * step: int(count) for index, count in enumerate(bins)},
        distinct_tokens=int((counts > 0).sum()),
        coverage={size: int(by_frequency[size - 1]) / max(1, total) for size in sizes},
    )


def as_tables(statistics: DataStatistics) -> list[Table]:
    """The figures for people."""
    figures = Table("figure", "value", title="Prepared data")
    values = statistics.as_dict()
    for name in ("rows", "rejected", "split", "cut", "unsupervised", "documents", "held_out_documents", "tokens"):
        figures.add_row(name.replace("_", " "), f"{values[name]:,}")
    figures.add_row("supervised", f"{statistics.supervised_share:.1%} of the tokens")
    percentiles = [f"{p}%: {length:,}" for p, length in statistics.length_percentiles.items()]
    figures.add_row("length percentiles", "  ".join(percentiles))
    figures.add_row("distinct supervised tokens", f"{statistics.distinct_tokens:,}")
    for size, share in statistics.coverage.items():
        figures.add_row(f"draft vocabulary of {size:,} covers", f"{share:.2%}")
    plot = Table("tokens up to", "documents", "", title="Lengths")
    most = max(statistics.length_histogram.values())
    for upper, count in statistics.length_histogram.items():
        plot.add_row(f"{upper:,}", f"{count:,}", "█" * -(-count * BAR_WIDTH // most))
    return [figures, plot]


def as_coloured_text(example: Example, tokenizer: Any) -> Text:
    """A document, what the model is trained to say in green and the rest dimmed."""
    text = Text()
    pairs = zip(example.loss_mask.tolist(), example.input_ids.tolist(), strict=True)
    for supervised, run in groupby(pairs, itemgetter(0)):
        text.append(tokenizer.decode([token for _, token in run]), style="green" if supervised else "dim")
    return text
