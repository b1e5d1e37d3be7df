"""Other engines: transformers' own `generate`, and a small OpenAI-compatible server in this process."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from conftest import EOS, VOCAB_SIZE, requests_for, run
from transformers import LlamaForCausalLM

from draftwing.evaluation.rivals import endpoint_rival, transformers_rivals
from draftwing.target.model import TargetModel


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Transformers decodes with it."""
    return stock_target


@contextmanager
def server(answers: dict[str, tuple[int, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Serves fixed answers by path: its URL, and the bodies that were posted."""
    posted: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, answer = answers.get(self.path, (404, {"error": "no such path"}))
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.do_GET()

        def log_message(self, format: str, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", posted
        http.shutdown()
        thread.join()


MODELS = {"/v1/models": (200, {"data": [{"id": "first"}, {"id": "second"}]})}
COMPLETION = {"choices": [{"text": " world"}], "usage": {"completion_tokens": 3}}
ASK = {"temperature": 0.5, "max_new_tokens": 3, "seed": 7}


def test_a_server_is_asked_for_completions_of_token_ids() -> None:
    with server(MODELS | {"/v1/completions": (200, COMPLETION)}) as (url, posted):
        ((name, decode),) = endpoint_rival(url + "/").items()
        decoded = decode([1, 2], **ASK)
        ((named, _),) = endpoint_rival(url, "second").items()
    host = url.removeprefix("http://").removesuffix("/v1")
    assert (name, named) == (f"first at {host}", f"second at {host}")
    assert (decoded.num_tokens, decoded.text, decoded.tokens, decoded.statistics) == (3, " world", None, None)
    assert decoded.seconds > 0
    (body,) = posted
    assert body == {
        "model": "first", "prompt": [1, 2], "max_tokens": 3, "temperature": 0.5, "seed": 7, "stream": False,
        "top_p": 1.0, "top_k": -1, "min_p": 0.0, "cache_prompt": False,
    }  # fmt: skip


def test_llama_server_is_read() -> None:
    """What llama.cpp's server (of llama-cpp-python 0.3.36) said, with an EAGLE-3 head, when asked for 8 tokens."""
    models = {
        "models": [{"name": "tiny-f32.gguf", "model": "tiny-f32.gguf", "type": "model"}],
        "object": "list",
        "data": [{"id": "tiny-f32.gguf", "aliases": ["tiny-f32.gguf"], "object": "model", "owned_by": "llamacpp"}],
    }
    completion = {
        "choices": [{"text": "QUENCES.", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "created": 1795268316,
        "model": "tiny-f32.gguf",
        "system_fingerprint": "b1-0c1e570",
        "object": "text_completion",
        "usage": {
            "completion_tokens": 6,  # the end token is one of them, as in ours
            "prompt_tokens": 4,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "id": "chatcmpl-1czqjVVD01KSILFxExAAiiFaXNLLpWVn",
        "timings": {"cache_n": 0, "prompt_n": 4, "predicted_n": 6, "draft_n": 9, "draft_n_accepted": 2},
    }
    with server({"/v1/models": (200, models), "/v1/completions": (200, completion)}) as (url, _):
        ((name, decode),) = endpoint_rival(url).items()
        decoded = decode([3, 199, 40, 41], temperature=0.0, max_new_tokens=8, seed=0)
    assert name.startswith("tiny-f32.gguf at 127.0.0.1:")
    assert (decoded.num_tokens, decoded.text) == (6, "QUENCES.")


def test_llama_server_says_why_it_refuses() -> None:
    refused = {
        "code": 400,
        "message": "request (1500 tokens) exceeds the available context size (1024 tokens), try increasing it",
        "type": "exceed_context_size_error",
    }
    with server(MODELS | {"/v1/completions": (400, {"error": refused})}) as (url, _):
        (decode,) = endpoint_rival(url).values()
        with pytest.raises(RuntimeError, match=r"status 400: .*exceeds the available context size \(1024 tokens\)"):
            decode([1], **ASK)
    loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    with server({"/v1/models": (503, loading)}) as (url, _), pytest.raises(ValueError, match=r"503.*Loading model"):
        endpoint_rival(url)


def test_a_server_that_is_not_there_or_another_kind_is_refused() -> None:
    with server(MODELS) as (url, _), pytest.raises(ValueError, match="serves first, second, not third"):
        endpoint_rival(url, "third")
    with (
        server({"/v1/models": (200, {"models": []})}) as (url, _),
        pytest.raises(ValueError, match="against: no OpenAI"),
    ):
        endpoint_rival(url)
    with server({}) as (url, _), pytest.raises(ValueError, match="status 404"):
        endpoint_rival(url)
    with pytest.raises(ValueError, match=r"no OpenAI-compatible server answers at http://127\.0\.0\.1:9"):
        endpoint_rival("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": "too long"}), "status 400.*too long"),
        ((200, b"<html>"), "Expecting value"),
        ((200, {"choices": [{"text": "a"}]}), "without 'usage'"),
        ((200, {"choices": [], "usage": {"completion_tokens": 1}}), "answered without"),
    ],
)
def test_what_a_server_says_wrong_is_told(answer: tuple[int, Any], message: str) -> None:
    with server(MODELS | {"/v1/completions": answer}) as (url, _):
        (decode,) = endpoint_rival(url).values()
        with pytest.raises(RuntimeError, match=message):
            decode([1], **ASK)


@pytest.fixture(scope="module")
def stock(target: TargetModel) -> LlamaForCausalLM:
    """`target`'s weights as transformers runs them."""
    config = type(target.model.config).from_dict(target.model.config.to_dict())
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").double().eval()
    model.load_state_dict(target.model.state_dict())
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 0
    model.generation_config.repetition_penalty = 1.3  # must not count: plain decoding does not know it
    return model


def test_transformers_says_what_plain_decoding_says(target: TargetModel, stock: LlamaForCausalLM) -> None:
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4]]
    expected = run(target, requests_for(prompts))
    rivals = transformers_rivals(stock, assistant=stock)
    assert list(rivals) == ["transformers", "transformers:prompt_lookup", "transformers:assisted"]
    for name, decode in rivals.items():
        decoded = [decode(prompt, temperature=0.0, max_new_tokens=24, seed=0) for prompt in prompts]
        assert [one.tokens for one in decoded] == expected, name
        assert [one.num_tokens for one in decoded] == [len(tokens) for tokens in expected]


def test_transformers_samples_with_the_seed(stock: LlamaForCausalLM) -> None:
    decode = transformers_rivals(stock)["transformers"]
    outputs = [decode([1, 2, 3], temperature=1.0, max_new_tokens=20, seed=seed).tokens for seed in (0, 0, 1)]
    assert outputs[0] == outputs[1] != outputs[2]
    assert all(0 <= token < VOCAB_SIZE for token in outputs[2] or [])
    assert torch.initial_seed() == 1
