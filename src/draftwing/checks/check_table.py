"""What a check found, as people read it."""

from rich.table import Table

from draftwing.checks.check_export import Check


def as_table(check: Check) -> Table:
    """A line for each prompt, or for what a loader read."""
    table = Table(title=f"{check.checker} {check.version}")
    if check.loaded is not None:
        table.add_column("fields and tensors", justify="right")
        table.add_column("read as written", justify="right")
        table.add_row(str(check.loaded.num_read), str(check.loaded.num_read - len(check.loaded.differing)))
        return table
    table.add_column("prompt")
    for name in ("tokens", "same", "cycles here", "there", "compared", "equal"):
        table.add_column(name, justify="right")
    for row in check.rows:
        parted = "all" if row.tokens_agree else f"up to {row.parted_at}"
        cells = (row.num_tokens, parted, row.num_cycles, row.their_cycles, row.num_compared, row.num_equal)
        table.add_row(row.prompt, *map(str, cells))
    return table


def verdict(check: Check) -> str:
    """What the table says, in a sentence."""
    if check.problems:
        return f"does not agree: {'; '.join(check.problems)}"
    if check.loaded is not None:
        return f"agrees: {check.checker} reads {check.loaded.num_fields} fields and {check.loaded.num_tensors} tensors"
    tokens, compared = sum(row.num_tokens for row in check.rows), sum(row.num_compared for row in check.rows)
    equal = sum(row.num_equal for row in check.rows)
    return f"agrees: the same {tokens} tokens, and as many drafted tokens accepted in {equal} of {compared} cycles"
