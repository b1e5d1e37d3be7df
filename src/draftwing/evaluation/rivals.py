"""Other engines on the same prompts: transformers' own `generate`, and any server with an OpenAI-compatible API.

Servers are asked for completions of token ids, so that no template or tokenizer can make the prompts differ, and for
the plain softmax, whatever sampling they default to.
"""

import json
import time
import urllib.parse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from draftwing.ask import NoAnswer, ask
from draftwing.evaluation.compare import Decode, Decoded

LOOKUP_TOKENS = 10
"""Of transformers' prompt lookup: its documentation's own choice."""
CONNECT_SECONDS, DECODE_SECONDS = 10, 3600
ASKED = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "cache_prompt": False, "stream": False}
"""Of every server. llama.cpp draws from 40 tokens by default, and reads no prompt twice; others ignore what they do not
know."""


def transformers_rivals(model: Any, assistant: Any = None) -> dict[str, Decode]:
    """transformers' `generate` with a stock model: plain, with prompt lookup, and with an assistant model if given."""
    rivals: dict[str, Decode] = {
        "transformers": partial(_generate, model),
        "transformers:prompt_lookup": partial(_generate, model, prompt_lookup_num_tokens=LOOKUP_TOKENS),
    }
    if assistant is not None:
        rivals["transformers:assisted"] = partial(_generate, model, assistant_model=assistant)
    return rivals


def _generate(
    model: Any, prompt: Sequence[int], temperature: float, max_new_tokens: int, seed: int, **how: Any
) -> Decoded:
    ids = torch.tensor([prompt], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    torch.manual_seed(seed)
    begin = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,  # some generation configs set one
        **({"do_sample": False} | sampling),
        **how,
    )
    tokens: list[int] = output[0, ids.shape[1] :].tolist()  # the copy waits for the device
    return Decoded(time.perf_counter() - begin, len(tokens), tokens)


def endpoint_rival(url: str, model: str | None = None) -> dict[str, Decode]:
    """A server at `url` (`http://host:port/v1`) that serves `model`, by default the first it lists.

    Raises:
        ValueError: it cannot be reached, or it does not serve the model.
    """
    url = url.rstrip("/")
    try:
        served = [entry["id"] for entry in _call(f"{url}/models", None, CONNECT_SECONDS)["data"]]
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"against: no OpenAI-compatible server answers at {url}: {error}") from None
    if not served or model not in (None, *served):
        raise ValueError(f"endpoint-model: {url} serves {', '.join(served) or 'nothing'}, not {model}")
    name = f"{model or served[0]} at {urllib.parse.urlsplit(url).netloc}"
    return {name: partial(_complete, f"{url}/completions", model or served[0])}


def _complete(
    url: str, model: str, prompt: Sequence[int], temperature: float, max_new_tokens: int, seed: int
) -> Decoded:
    request = {"model": model, "prompt": list(prompt), "max_tokens": max_new_tokens, "temperature": temperature}
    begin = time.perf_counter()
    answer = _call(url, request | {"seed": seed} | ASKED, DECODE_SECONDS)
    seconds = time.perf_counter() - begin
    try:
        return Decoded(seconds, int(answer["usage"]["completion_tokens"]), text=str(answer["choices"][0]["text"]))
    except (KeyError, IndexError, TypeError) as error:
        raise RuntimeError(f"{url} answered without {error}: {str(answer)[:200]}") from None


def _call(url: str, body: dict[str, Any] | None, timeout: float) -> Any:
    """The JSON answer to a GET, or to a POST of `body`.

    Raises:
        RuntimeError: no answer, an error status (with what the server says), or no JSON.
    """
    try:
        return json.loads(ask(url, body, timeout))
    except (NoAnswer, ValueError) as error:
        raise RuntimeError(str(error)) from None
