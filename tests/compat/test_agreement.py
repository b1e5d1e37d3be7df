"""One published EAGLE-3 head drafted by our engine and by a straight-line reading of the reference code: same tokens.

The second implementation (after EAGLE's cnets.py) has no caches, no batch and no shared code: for every draft step
it recomputes the whole sequence in plain torch. What both propose is also kept in `agreement.json`; to record it
again after a deliberate change, run this file as a script.

`agreement_llama_cpp.json` holds what llama.cpp (of llama-cpp-python 0.3.36) did with the same models in float32:

    python tests/compat/test_agreement.py FOLDER  # writes the models, with a tokenizer that the converter can read
    python convert_hf_to_gguf.py FOLDER/target --outtype f32 --outfile target.gguf
    python convert_hf_to_gguf.py FOLDER/head --target-model-dir FOLDER/target --outtype f32 --outfile head.gguf
    llama-server -m target.gguf -md head.gguf --spec-type draft-eagle3 --spec-draft-n-max 3 -lv 5

and `-fa off -ctk f32 -ctv f32 -ctkd f32 -ctvd f32`, asked at /completion for `{"prompt": PROMPT, "n_predict": 30,
"temperature": 0, "return_tokens": true}`. The drafts are those of its log ("draft candidate 0"). The converter knows
tokenizers by a hash; where it does not know this one, it must be made to take it for `gpt-2`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import Request, generate, requests_for, tiny_llama
from published import TINY, eagle3_shapes, random_tensors
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from draftwing.drafts.eagle.drafter import EagleDrafter
from draftwing.drafts.eagle.formats import HeadOptions
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.drafts.eagle.save_head import save_head, to_head
from draftwing.drafts.fit import sizes_of
from draftwing.drafts.load_draft import load_draft
from draftwing.engine.drafter import Drafter
from draftwing.engine.tree import DraftTree
from draftwing.target.model import TargetModel

Tensors = dict[str, torch.Tensor]

FIXTURE = Path(__file__).with_name("agreement.json")
LLAMA_CPP = Path(__file__).with_name("agreement_llama_cpp.json")
PROMPT = [5, 17, 33, 2, 60, 41, 9]
NUM_NEW = 30
CHAIN = 3
FEATURES = (2, 4, 5)
"""hidden_states[2], [n // 2], [n - 3] of the target's 8 layers: the reference code's, named nowhere in the file."""
EPS = 1e-5
THETA = 10000.0
"""Not in the file either: the reference training code always uses it."""
CONFIG = {**TINY.values(), "draft_vocab_size": 48, "rms_norm_eps": EPS, "architectures": ["LlamaForCausalLMEagle3"]}


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """RoPE over `x [heads, T, dim]` at positions 0..T-1: dimension i turns with dimension i + dim / 2."""
    half = x.shape[-1] // 2
    frequencies = THETA ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, dim=-1)


def draft_layer(head: Tensors, embedding: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """EAGLE-3's layer over `[T, D]` embeddings of tokens one ahead and states -> `[T, D]`, before the last norm."""
    layer = {name.removeprefix("midlayer."): tensor for name, tensor in head.items()}
    e = rms_norm(embedding, layer["input_layernorm.weight"])
    g = rms_norm(states, layer["hidden_norm.weight"])
    x = torch.cat((e, g), dim=-1)

    def heads(name: str) -> torch.Tensor:
        return (x @ layer[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, TINY.head_dim)).transpose(0, 1)

    groups = TINY.heads // TINY.kv_heads
    queries, keys = rotate(heads("q")), rotate(heads("k")).repeat_interleave(groups, dim=0)
    scores = queries @ keys.transpose(1, 2) / TINY.head_dim**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    attended = (weights @ heads("v").repeat_interleave(groups, dim=0)).transpose(0, 1).flatten(1)
    y = states + attended @ layer["self_attn.o_proj.weight"].T
    z = rms_norm(y, layer["post_attention_layernorm.weight"])
    gate, up = z @ layer["mlp.gate_proj.weight"].T, z @ layer["mlp.up_proj.weight"].T
    return y + (gate * gate.sigmoid() * up) @ layer["mlp.down_proj.weight"].T


def draft_chain(
    head: Tensors, embed: torch.Tensor, features: torch.Tensor, tokens: list[int], forced: list[int] | None = None
) -> tuple[list[int], list[torch.Tensor]]:
    """CHAIN greedy draft tokens after `tokens`, whose last has no feature yet, and the normed output behind each.

    `forced` tokens are read instead of the drafted ones.
    """
    states = features[: len(tokens) - 1] @ head["fc.weight"].T  # slot t: feature t with token t + 1
    ahead = tokens[1:]
    drafted, outputs = [], []
    for step in range(CHAIN):
        output = draft_layer(head, embed[torch.tensor(ahead)], states)[-1]
        outputs.append(rms_norm(output, head["norm.weight"]))
        draft_id = int((outputs[-1] @ head["lm_head.weight"].T).argmax())
        token = draft_id + int(head["d2t"][draft_id])
        drafted.append(token)
        ahead = ahead + [forced[step] if forced else token]
        states = torch.cat((states, output[None]))  # the raw output is fed back; no fc
    return drafted, outputs


@torch.no_grad()
def reference_run(head: Tensors, model: Any) -> tuple[list[int], list[list[int]], list[int]]:
    """The tokens, each cycle's draft, and the tokens that each cycle emits."""
    truth, features = greedy_with_features(model)
    tokens, drafts, emitted = list(PROMPT), [], []
    while len(tokens) < len(PROMPT) + NUM_NEW:
        draft, _ = draft_chain(head, model.get_input_embeddings().weight, features, tokens)
        expected = truth[len(tokens) :]
        num_accepted = next((i for i in range(CHAIN) if draft[i] != expected[i]), CHAIN)
        new = expected[: num_accepted + 1][: len(PROMPT) + NUM_NEW - len(tokens)]
        drafts.append(draft)
        emitted.append(len(new))
        tokens += new
    return tokens[len(PROMPT) :], drafts, emitted


@torch.no_grad()
def greedy_with_features(model: Any) -> tuple[list[int], torch.Tensor]:
    """The target's greedy continuation, from a fresh forward pass for each token, and its three features `[T, 3D]`."""
    tokens = list(PROMPT)
    for _ in range(NUM_NEW + CHAIN):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    hidden = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    return tokens, torch.cat([hidden[index][0] for index in FEATURES], dim=-1)


@torch.no_grad()
def make_target() -> TargetModel:
    """A target of 8 layers; its weights come from a generator here, whatever transformers' initialisation draws."""
    model = tiny_llama(num_hidden_layers=8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.5 * noise)
    return TargetModel(model)


@torch.no_grad()
def make_head(model: Any) -> Tensors:
    """A random head whose output layer is fitted (ridge regression) to every other position, so that it often hits."""
    target_ids = torch.arange(64)[torch.arange(64) % 4 != 3]
    head = random_tensors(eagle3_shapes(TINY), target_ids)
    for name in ("midlayer.self_attn.o_proj.weight", "midlayer.mlp.down_proj.weight"):
        head[name] *= 4  # a layer that adds much to its state, so that a chain's steps differ
    truth, features = greedy_with_features(model)
    draft_id_of = {int(token): index for index, token in enumerate(target_ids)}
    inputs, labels = [], []
    for end in range(len(PROMPT), len(truth) - CHAIN, 2):
        following = truth[end : end + CHAIN]
        _, outputs = draft_chain(head, model.get_input_embeddings().weight, features, truth[:end], forced=following)
        for token, output in zip(following, outputs, strict=True):
            if token in draft_id_of:
                inputs.append(output)
                labels.append(draft_id_of[token])
    x, y = torch.stack(inputs), torch.nn.functional.one_hot(torch.tensor(labels), 48).double()
    head["lm_head.weight"] = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(32), x.T @ y).T.contiguous()
    return head


class RecordingDrafter(EagleDrafter):
    """Keeps what it proposes."""

    drafts: list[list[int]]

    def grow(self, *args: Any, **kwargs: Any) -> DraftTree:
        tree = super().grow(*args, **kwargs)
        self.drafts.append(tree.tokens[0, 1:].tolist())
        return tree


def our_run(
    network: DraftNetwork, target: TargetModel, begun: tuple[int, ...] = ()
) -> tuple[list[int], list[list[int]], float]:
    """The tokens, each cycle's draft, and tokens per cycle. `begun` tokens count as prompt, and as made."""
    drafts: list[list[int]] = []

    def new_drafter(batch_size: int, capacity: int) -> Drafter:
        drafter = RecordingDrafter(network, batch_size, capacity)
        drafter.drafts = drafts
        return drafter

    requests: list[Request] = requests_for([[*PROMPT, *begun]], NUM_NEW - len(begun), eos=())
    generation = generate(target, requests, new_drafter, f"chain:{CHAIN}")
    return generation.outputs[0].tokens, drafts, generation.statistics.acceptance_length


@pytest.fixture(scope="module")
def deep_target() -> TargetModel:
    return make_target()


@pytest.fixture(scope="module")
def head(deep_target: TargetModel) -> Tensors:
    return make_head(deep_target.model)


@pytest.fixture
def folder(head: Tensors, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(head, tmp_path / "model.safetensors")
    return tmp_path


def test_our_drafts_are_the_reference_drafts(deep_target: TargetModel, head: Tensors, folder: Path) -> None:
    tokens, drafts, emitted = reference_run(head, deep_target.model)
    ours = our_run(load_draft(str(folder), deep_target), deep_target)
    assert ours == (tokens, drafts, len(tokens) / len(emitted))


def test_they_agree_after_our_own_files_too(deep_target: TargetModel, head: Tensors, folder: Path) -> None:
    network = load_draft(str(folder), deep_target)
    _, drafts, _ = reference_run(head, deep_target.model)
    for head_format in ("eagle3", "speculators"):
        written = folder / head_format
        save_head(to_head(network, head_format), written, sizes_of(deep_target))  # type: ignore[arg-type]
        assert our_run(load_draft(str(written), deep_target), deep_target)[1] == drafts


def test_drafts_are_the_recorded_ones(deep_target: TargetModel, head: Tensors, folder: Path) -> None:
    recorded = json.loads(FIXTURE.read_text(encoding="utf-8"))
    tokens, drafts, acceptance_length = our_run(load_draft(str(folder), deep_target), deep_target)
    assert tokens == recorded["tokens"]
    assert drafts == recorded["drafts"]
    assert acceptance_length == len(recorded["tokens"]) / len(recorded["emitted"])


def test_llama_cpp_drafts_the_same(deep_target: TargetModel, head: Tensors, folder: Path) -> None:
    """Its pass over the prompt emits a token, which it drafts on from; ours is given that token."""
    recorded = json.loads(LLAMA_CPP.read_text(encoding="utf-8"))
    first, *following = recorded["tokens"]
    ours = our_run(load_draft(str(folder), deep_target), deep_target, begun=(first,))
    assert ours == (following, recorded["drafts"], len(following) / len(recorded["drafts"]))


def test_the_comparison_is_worth_something(deep_target: TargetModel, head: Tensors) -> None:
    """Some drafts are accepted, some are not, and the map of the draft vocabulary moves most ids."""
    _, drafts, emitted = reference_run(head, deep_target.model)
    assert len(set(emitted)) > 1
    assert NUM_NEW / len(emitted) > 1.3
    assert len({tuple(draft) for draft in drafts}) > 10
    assert sum(len(set(draft)) > 1 for draft in drafts) > 10  # the state that is fed back matters
    assert head["d2t"].count_nonzero() > 30


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [({"rope_theta": 100.0}, {}), ({}, {"aux_layers": (1, 3, 4)}), ({"norm_output": True}, {})],
    ids=["rope_theta", "aux_layers", "norm_output"],
)
def test_a_misread_option_would_show(
    changes: dict[str, Any], overrides: dict[str, Any], deep_target: TargetModel, head: Tensors, folder: Path
) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    _, drafts, _ = reference_run(head, deep_target.model)
    assert our_run(load_draft(str(folder), deep_target, options=HeadOptions(**overrides)), deep_target)[1] != drafts


def write_models(folder: Path) -> None:
    """The target, with a tokenizer of a character for each id, and the head, in float32."""
    target = make_target()
    head = make_head(target.model)
    alphabet = ["Ċ", *map(chr, range(ord("!"), ord("_"))), "AB"]  # a line feed, 62 characters, and one merge
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(alphabet)}, [("A", "B")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "target")
    model = target.model.float()
    model.config.eos_token_id = model.generation_config.eos_token_id = 0  # it never comes
    model.save_pretrained(folder / "target")
    (folder / "head").mkdir()
    (folder / "head" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    stored = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in head.items()}
    save_file(stored, folder / "head" / "model.safetensors")


def record() -> None:
    model = make_target().model
    tokens, drafts, emitted = reference_run(make_head(model), model)
    FIXTURE.write_text(json.dumps({"tokens": tokens, "drafts": drafts, "emitted": emitted}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_models(Path(sys.argv[1])) if len(sys.argv) > 1 else record()
