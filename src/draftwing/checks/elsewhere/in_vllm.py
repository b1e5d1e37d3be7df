"""A script that a Python with vLLM runs: it reads a job, and writes a line of JSON for each answer.

It imports nothing of ours. The engine is stepped by hand in one process, so that each step's tokens are seen: the pass
over the prompt brings the first one, and every later step is a cycle.
"""

import json
import os
import sys
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # gibibytes


def main(job_file: str, answers_file: str) -> None:
    """Decode each prompt alone."""
    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    import vllm

    model = vllm.LLM(
        model=job["target"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=job["capacity"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        speculative_config={"method": job["method"], "model": job["folder"], "num_speculative_tokens": job["depth"]},
    )
    with open(answers_file, "a", encoding="utf-8") as answers:

        def tell(what: dict[str, Any]) -> None:
            print(json.dumps(what), file=answers, flush=True)

        tell({"version": vllm.__version__})
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=job["num_tokens"])
        for index, prompt in enumerate(job["prompts"]):
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
