"""Methods side by side, with nothing kept on disk: completions to watch, and the table of the demo and benchmarks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from draftwing.data.prompts import Prompt
from draftwing.engine.generation import Committed
from draftwing.engine.stopping import TextStream
from draftwing.evaluation.compare import Start, decoder
from draftwing.evaluation.evaluate import Evaluation, PromptSet, Remarks, evaluate
from draftwing.evaluation.figures import ResultRow, result_rows
from draftwing.evaluation.journal import Journal

DRAFTED, CHOSEN = "green", "default"
LEGEND = f"{DRAFTED}: drafted and accepted; the rest is the target's own"


def print_text(console: Console, text: str, style: str = "") -> None:
    """Print generated text as it is: a file or a pipe gets its characters, a terminal its words unbroken."""
    if console.is_terminal:
        console.print(text, style=style, end="", markup=False, emoji=False, highlight=False, soft_wrap=True)
    else:
        console.file.write(text)
        console.file.flush()


def print_stream(console: Console, cycles: Iterator[Committed], tokenizer: Any) -> None:
    """Print one row's tokens as they are committed; the accepted draft tokens in colour (LEGEND)."""
    text = TextStream(tokenizer)
    for committed in cycles:
        for index, token in enumerate(committed.tokens[0]):
            print_text(console, text.push(token), DRAFTED if index < committed.num_accepted[0] else CHOSEN)
    print_text(console, text.flush() + "\n", CHOSEN)


def show_completions(
    console: Console,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    methods: dict[str, Start],
    seed: int = 0,
    **options: Any,
) -> None:
    """Stream the completions of a few prompts, first with the first method and then with the last; seeds count up."""
    if console.is_terminal:
        console.print(LEGEND.capitalize() + ".", style="bold")
    for index, prompt in enumerate(prompts):
        for method in (next(iter(methods)), next(reversed(methods))):
            print_text(console, f"--- {prompt.name}: {method} ---\n", "dim")
            print_text(console, (prompt.text or prompt.messages[0]["content"]) + "\n", "dim")
            generation = methods[method]([prompt.token_ids(tokenizer)], seed=seed + index, **options)
            print_stream(console, generation.cycles(), tokenizer)
            figures = generation.statistics
            speed = figures.num_tokens / figures.total_seconds
            console.print(
                f"{figures.num_tokens} tokens, {figures.num_cycles} target passes, {speed:.0f} tokens/s", style="bold"
            )


def measure(
    methods: Mapping[str, Start],
    prompts: Sequence[Prompt],
    tokenizer: Any,
    temperatures: Sequence[float],
    repeats: int,
    max_new_tokens: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda decodings: None,
) -> list[ResultRow]:
    """An evaluation of methods, `plain` among them, on these prompts; nothing is kept on disk.

    What a method raises ends it.
    """
    decoders = {name: decoder(start) for name, start in methods.items()}
    data = [PromptSet("prompts", prompts)]
    evaluation = Evaluation(
        decoders, data, temperatures, tokenizer, max_new_tokens, seed=seed, repeats=repeats, is_strict=True
    )
    journal, remarks = Journal({}), Remarks()
    evaluate(evaluation, journal, remarks, advance)
    return result_rows(evaluation, journal, remarks, ())


def as_facts(row: ResultRow) -> dict[str, Any]:
    """What the demonstration says of a method at a temperature, JSON-ready."""
    figures = row.figures
    assert figures is not None and figures.acceptance_length is not None and figures.speedup is not None
    return {
        "method": row.method,
        "temperature": row.temperature,
        "tokens_per_second": round(figures.tokens_per_second.value, 2),
        "acceptance_length": round(figures.acceptance_length.value, 3),
        "speedup": round(figures.speedup.value, 3),
        "identical": figures.identical_share == 1,
    }


def as_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The facts as people read them."""
    table = Table(title=title)
    for column in ("method", "temperature", "tokens/s", "tau", "speed-up", "identical"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['temperature']:g}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['acceptance_length']:.2f}",
            f"{row['speedup']:.2f}x",
            "yes" if row["identical"] else "NO",
            end_section=row["method"] == rows[-1]["method"],
        )
    return table
