"""A script that a Python with vLLM runs: it reads a task, and writes a line of JSON for each answer.

It imports nothing of ours. The engine is stepped by hand in one process, so that each step's tokens are seen: the pass
over the prompt brings the first one, and every later step is a cycle.
"""

import json
import os
import sys
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # gibibytes


def main(task_file: str, answers_file: str) -> None:
    """Decode each prompt alone."""
    with open(task_file, encoding="utf-8") as file:
        task = json.load(file)
    import vllm

    model = vllm.LLM(
        model=task["target"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=task["capacity"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        speculative_config={"method": task["method"], "model": task["folder"], "num_speculative_tokens": task["depth"]},
    )
    with open(answers_file, "a", encoding="utf-8") as answers:

        def tell(what: dict[str, Any]) -> None:
            print(json.dumps(what), file=answers, flush=True)

        tell({"version": vllm.__version__})
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=task["num_tokens"])
        for index, prompt in enumerate(task["prompts"]):
            tell(decode(model.llm_engine, str(index), prompt, settings))


def decode(engine: Any, name: str, prompt: list[int], settings: Any) -> dict[str, Any]:
    """A prompt's tokens, and how many each cycle brought."""
    engine.add_request(name, {"prompt_token_ids": prompt}, settings)
    tokens: list[int] = []
    steps = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            so_far = list(output.outputs[0].token_ids)
            if len(so_far) > len(tokens):
                steps.append(len(so_far) - len(tokens))
                tokens = so_far
    return {"tokens": tokens, "cycles": steps[1:]}


if __name__ == "__main__":
    main(*sys.argv[1:])
