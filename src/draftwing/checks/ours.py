"""What draftwing decodes with an exported folder, as engines do: greedy chains, no lookups, the whole text read."""

from collections.abc import Iterator

from draftwing.api import SpeculativeModel, load
from draftwing.checks.engine_task import EngineAnswer, EngineTask
from draftwing.drafts.kinds import family_of


def decode_here(model: SpeculativeModel, task: EngineTask) -> Iterator[EngineAnswer]:
    """An answer for each prompt. The first token is decoded plainly: engines have it before they draft."""
    takes = family_of(task.method).takes
    read_all = {"ngram": False, "draft_window": task.capacity}
    drafting = {"plan": f"chain:{task.depth}"} | {name: read_all[name] for name in takes}
    for prompt in task.prompts:
        plain = model.generate([prompt], max_new_tokens=1, plan="off", return_dict_in_generate=True)
        tokens = list(plain.tokens[0])  # type: ignore[union-attr]
        cycles: list[int] = []
        if tokens[-1] not in model.target.eos_token_ids:
            for committed in model.stream([[*prompt, *tokens]], max_new_tokens=task.num_tokens - 1, **drafting):
                cycles.append(len(committed.tokens[0]))
                tokens += committed.tokens[0]
        yield EngineAnswer(tokens, cycles)


def load_here(task: EngineTask, draft: str) -> SpeculativeModel:
    """The target and the draft, in float32."""
    return load(task.target, draft=draft, dtype="float32", method=task.method)
