"""`draftwing doctor`: faults planted in the embedded heads are named, the advice cures them, good heads are let be."""

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SLOW
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import draftwing
from draftwing.api import SpeculativeModel
from draftwing.cli import build_parser, main
from draftwing.cli.arguments import head_options
from draftwing.data.prompts import Prompt, read_prompts
from draftwing.doctor.diagnosis import (
    Diagnosis,
    Text,
    as_chat,
    as_flags,
    as_raw,
    conclude,
    decode_prompts,
    examine,
)
from draftwing.doctor.replay import Transcript, transcribe
from draftwing.doctor.suspects import head_suspects
from draftwing.doctor.trials import Finding, Patient, StepCount, compare
from draftwing.drafts.eagle.formats import HeadOptions
from draftwing.drafts.fit import Tensors
from draftwing.drafts.load_draft import read_draft_files, resolve_draft
from draftwing.embedded import EMBEDDED, EMBEDDED_PROMPTS
from draftwing.engine.engine import Request
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import StopRule
from draftwing.intervals import Interval
from draftwing.layers import DraftConfig
from draftwing.target.model import TargetModel

NUM_NEW = 12
LINEAR = {"rope_type": "linear", "factor": 64.0}


@pytest.fixture(scope="module")
def model() -> SpeculativeModel:
    return draftwing.load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return read_prompts(EMBEDDED_PROMPTS)[2:8]


@pytest.fixture(scope="module")
def transcript(model: SpeculativeModel, prompts: list[Prompt]) -> Transcript:
    """What the target says, decoded once for all cases, with the features of every layer."""
    return transcribe_rows(model, [prompt.token_ids(model.tokenizer) for prompt in prompts])


@pytest.fixture(scope="module")
def more(model: SpeculativeModel, prompts: list[Prompt]) -> Transcript:
    """Longer answers, for the mildest faults."""
    return transcribe_rows(model, [prompt.token_ids(model.tokenizer) for prompt in prompts], num_new=48)


def transcribe_rows(
    model: SpeculativeModel, rows: list[list[int]], num_new: int = NUM_NEW, **sampling: Any
) -> Transcript:
    stop = StopRule(num_new, model.target.eos_token_ids)
    requests = [Request(row, SamplingParams(seed=seed, **sampling), stop) for seed, row in enumerate(rows)]
    return transcribe(model.target, requests, (*range(model.target.num_layers + 1), -1))


def diagnose(folder: Path | str, target: TargetModel, transcript: Transcript, **options: Any) -> Diagnosis:
    shown: list[tuple[int, int]] = []
    steps = StepCount(lambda what, done, total: shown.append((done, total)))
    diagnosis = examine(Patient(str(folder), target, HeadOptions(**options)), Text([transcript]), [], steps)
    done, total = shown[-1]
    assert done + 1 == total, "the last step is the last of those that were expected"
    return diagnosis


def tau_of(name: Path | str, target: TargetModel, transcript: Transcript, cure: Any = None) -> float:
    """tau with what the doctor advises, given as a user gives it: the head's options on loading, others later."""
    cure = dict(cure or {})
    loading = {name: cure.pop(name) for name in tuple(cure) if name in HeadOptions.__dataclass_fields__}
    traces = Patient(str(name), target, HeadOptions(**loading)).traces([transcript], cure)
    return compare("", "", traces, traces).tau.value


# Faults. Each changes config.json's values or the tensors of a good head in place.

Damage = Callable[[dict[str, Any], Tensors], None]


@dataclass(frozen=True)
class Fault:
    damage: Damage
    says: str
    cure: dict[str, Any]
    head: str = "tiny"
    is_mild: bool = False


def set_values(**changes: Any) -> Damage:
    def damage(values: dict[str, Any], tensors: Tensors) -> None:
        values.update(changes)

    return damage


def set_rope(**parameters: Any) -> Damage:
    return set_values(rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | parameters)


def set_layers(*ids: int) -> Damage:
    key = "eagle_aux_hidden_state_layer_ids"
    return set_values(**{"eagle_config": {key: list(ids)}, key: [layer + 1 for layer in ids]})


def both(*damages: Damage) -> Damage:
    def damage(values: dict[str, Any], tensors: Tensors) -> None:
        for one in damages:
            one(values, tensors)

    return damage


def add_norms(*sizes: tuple[str, int]) -> Damage:
    def damage(values: dict[str, Any], tensors: Tensors) -> None:
        tensors.update({f"{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in sizes})

    return damage


def absolute_d2t(values: dict[str, Any], tensors: Tensors) -> None:
    """Absolute ids that could be offsets too: those of the vocabulary's lower half, and no t2d that tells."""
    ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    kept = (ids < 2048).nonzero().squeeze(1)
    tensors["d2t"], tensors["lm_head.weight"] = ids[kept], tensors["lm_head.weight"][kept].clone()
    values["draft_vocab_size"] = len(kept)
    del tensors["t2d"]


RIGHT_LAYERS = (2, 6, 11)
FAULTS = {
    "aux-layers-low": Fault(
        set_layers(0, 4, 9), "feature layers are one too low", {"aux_layers": RIGHT_LAYERS}, is_mild=True
    ),
    "aux-layers-high": Fault(
        set_layers(2, 6, 11), "feature layers are one too high", {"aux_layers": RIGHT_LAYERS}, is_mild=True
    ),
    "rope-theta": Fault(set_rope(rope_theta=100.0), "rope_theta is not 100", {"rope_theta": 10000.0}),
    "rope-scaling": Fault(set_rope(**LINEAR), "trained without rope_scaling", {"rope_scaling": {}}, is_mild=True),
    "norm-output": Fault(set_values(norm_output=True), "norm_output is false, not true", {"norm_output": False}),
    "norm-before-residual": Fault(
        set_values(norm_before_residual=True), "norm_before_residual is false", {"norm_before_residual": False}
    ),
    "fc-norm": Fault(
        add_norms(*((f"fc_norm.{index}", 256) for index in range(3))), "fc_norm's tensors", {"fc_norm": False}
    ),
    "norm-before-fc": Fault(add_norms(("input_norm", 768)), "norm_before_fc's tensors", {"norm_before_fc": False}),
    "d2t": Fault(absolute_d2t, "d2t holds absolute", {"d2t": "absolute"}),
    "two-at-once": Fault(
        both(set_layers(0, 4, 9), set_values(norm_output=True)),
        "norm_output is false, not true and the feature layers are one too low",
        {"aux_layers": RIGHT_LAYERS, "norm_output": False},
        is_mild=True,
    ),
    "eagle1-rope-scaling": Fault(
        set_rope(**LINEAR), "trained without rope_scaling", {"rope_scaling": {}}, "tiny-eagle1"
    ),
}


SIBLINGS = ("aux-layers-low", "aux-layers-high", "rope-scaling", "norm-before-residual", "norm-before-fc")
"""Faults whose like is tried by another one."""


def write_head(folder: Path, name: str, damage: Damage) -> Path:
    """The embedded head `name` with damage done to it."""
    values, tensors = read_draft_files(resolve_draft(name))
    damage(values, tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, id=name, marks=SLOW if name in SIBLINGS else ()) for name, fault in FAULTS.items()]
)
def test_a_planted_fault_is_named_and_the_advice_cures_it(
    fault: Fault, model: SpeculativeModel, transcript: Transcript, more: Transcript, tmp_path: Path
) -> None:
    transcript = more if fault.is_mild else transcript
    folder = write_head(tmp_path, fault.head, fault.damage)
    diagnosis = diagnose(folder, model.target, transcript)
    verdict = diagnosis.verdict
    assert verdict.is_fault
    assert fault.says in verdict.sentence
    assert verdict.cure == fault.cure
    assert verdict.sentence.count(".\n") == 0
    cured = tau_of(folder, model.target, transcript, verdict.cure)
    assert cured > diagnosis.loaded.tau.value
    if "d2t" not in fault.cure:  # that file has lost half of its vocabulary for good
        assert cured == pytest.approx(tau_of(fault.head, model.target, transcript), rel=1e-6)


@pytest.mark.parametrize("name", ["tiny", "tiny-eagle1"])
def test_nothing_is_wrong_with_a_good_head(name: str, model: SpeculativeModel, transcript: Transcript) -> None:
    diagnosis = diagnose(name, model.target, transcript)
    assert not diagnosis.verdict.is_fault
    assert diagnosis.verdict.sentence.startswith("Nothing is wrong")
    assert diagnosis.verdict.cure == {}
    assert diagnosis.loaded.tau.value > 1.5
    assert Patient(name, model.target).clues("tiny", transcript.longest) == []


def forget(values: dict[str, Any], tensors: Tensors) -> None:
    """An untrained head: random weights."""
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensors[name] = (torch.randn(tensor.shape) * tensor.float().std()).to(tensor.dtype)


def change_basis(values: dict[str, Any], tensors: Tensors) -> None:
    """A head for another target: what it reads as features, and its embedding, mean other things."""
    torch.manual_seed(0)
    weight = tensors["fc.weight"]
    tensors["fc.weight"] = weight[:, torch.randperm(weight.shape[1])].contiguous()
    if "embed_tokens.weight" in tensors:
        tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:, torch.randperm(256)].contiguous()


@pytest.mark.parametrize("damage", [forget, change_basis])
@pytest.mark.parametrize("name", ["tiny", "tiny-eagle1"])
def test_a_head_that_no_option_cures(
    name: str, damage: Damage, model: SpeculativeModel, transcript: Transcript, tmp_path: Path
) -> None:
    folder = write_head(tmp_path, name, damage)
    verdict = diagnose(folder, model.target, transcript).verdict
    assert verdict.is_fault
    assert "untrained, or was made for another target" in verdict.sentence
    assert verdict.cure == {}
    clues = Patient(str(folder), model.target).clues("tiny", transcript.longest)
    assert [clue.startswith("the file's embedding is not the target's") for clue in clues] == [True] * (name != "tiny")


def spoil(values: dict[str, Any], tensors: Tensors) -> None:
    tensors["norm.weight"][3] = torch.nan


def test_a_broken_file_is_named(model: SpeculativeModel, transcript: Transcript, tmp_path: Path) -> None:
    folder = write_head(tmp_path, "tiny", spoil)
    verdict = diagnose(folder, model.target, transcript).verdict
    assert verdict.is_fault
    assert verdict.sentence == "Fault: the draft's norm.weight: holds NaN or infinity; fetch or train it anew."


def overflow(values: dict[str, Any], tensors: Tensors) -> None:
    """The same function in exact arithmetic, with numbers too large for float16 on the way."""
    tensors["midlayer.mlp.up_proj.weight"] = tensors["midlayer.mlp.up_proj.weight"].float() * 2**14
    tensors["midlayer.mlp.down_proj.weight"] = tensors["midlayer.mlp.down_proj.weight"].float() / 2**14


def test_an_overflow_in_float16_is_named(model: SpeculativeModel, prompts: list[Prompt], tmp_path: Path) -> None:
    half = draftwing.load("tiny", dtype="float16")
    transcript = transcribe_rows(half, [prompt.token_ids(half.tokenizer) for prompt in prompts[:4]], num_new=6)
    assert not Text([transcript]).overflows
    verdict = diagnose(write_head(tmp_path, "tiny", overflow), half.target, transcript).verdict
    assert verdict.cure == {"dtype": "float32"}
    assert "overflow in float16" in verdict.sentence
    for features in transcript.features.values():
        features[0][0, 0] = torch.inf
    verdict = diagnose("tiny", half.target, transcript).verdict
    assert "the target's features overflow in float16" in verdict.sentence


@pytest.mark.slow
def test_a_draft_window_is_advised_past_the_lengths_of_training(model: SpeculativeModel, tmp_path: Path) -> None:
    """The embedded head was trained on 192 tokens, its target on 512; these prompts have 650."""
    untold = write_head(tmp_path, "tiny", set_values(trained_length=None))
    rows = [prompt.token_ids(model.tokenizer) for prompt in read_prompts(EMBEDDED_PROMPTS)]
    before = (list(itertools.chain(*rows)) * 2)[:600]
    transcript = transcribe_rows(model, [before + row for row in rows[2:7]], num_new=12)
    diagnosis = diagnose(untold, model.target, transcript)
    assert diagnosis.verdict.cure == {"draft_window": 128}
    assert "worse past the lengths that it was trained on" in diagnosis.verdict.sentence
    assert set(diagnosis.positions) == {"512-1023"}


def test_the_replay_is_what_decoding_does(model: SpeculativeModel, prompts: list[Prompt]) -> None:
    """tau is not a proxy: the engine goes through the very same cycles, greedy and sampled."""
    exact = draftwing.load("tiny", "tiny", dtype="float64")
    rows = [prompt.token_ids(exact.tokenizer) for prompt in prompts[:3]]
    for temperature in (0.0, 1.0):
        transcript = transcribe_rows(exact, rows, temperature=temperature)
        traces = Patient("tiny", exact.target).traces([transcript], {})
        generation = exact.start(
            rows, plan="chain:5", temperature=temperature, max_new_tokens=NUM_NEW, seed=[0, 1, 2]
        ).run()
        assert [tokens[n:] for tokens, n in zip(transcript.tokens, transcript.num_prompt, strict=True)] == [
            output.tokens for output in generation.outputs
        ]
        assert sum(len(trace.cycles()[1]) for trace in traces) == generation.statistics.num_cycles
        assert sum(trace.cycles()[1].sum() for trace in traces) == generation.statistics.num_tokens


def test_sampled_text_is_harder_and_no_fault(model: SpeculativeModel, prompts: list[Prompt]) -> None:
    patient = Patient("tiny", model.target)
    text = decode_prompts(patient, prompts[:4], model.tokenizer, 1.5, NUM_NEW, StepCount())
    assert set(text.otherwise) == {"temperature 0", "without the chat template"}
    verdict = examine(patient, text, [], StepCount()).verdict
    assert not verdict.is_fault
    assert "at temperature 0: sampled text is harder" in verdict.sentence


def test_few_prompts_do_not_tell(model: SpeculativeModel, prompts: list[Prompt]) -> None:
    transcript = transcribe_rows(model, [prompt.token_ids(model.tokenizer) for prompt in prompts[:2]], num_new=8)
    verdict = diagnose("tiny", model.target, transcript).verdict
    assert not verdict.is_fault
    assert verdict.sentence.startswith("Too few prompts to tell: 2,")


def finding(name: str, tau: float, gain: Interval, evidence: Interval | None = None) -> Finding:
    return Finding(name, "something is wrong", Interval(tau, tau, tau), gain, evidence, {"norm_output": True})


LOADED = Finding("as loaded", "", Interval(1.6, 1.5, 1.7), Interval(1, 1, 1))
NO_CURE = Finding("", "", Interval(1.6, 1.5, 1.7), Interval(1, 1, 1))


def test_a_template_that_the_prompts_lack_is_a_fault_only_if_tau_is_far_better_with_it() -> None:
    name = "through the chat template"
    far = conclude(LOADED, NO_CURE, True, [finding(name, 3.6, Interval(2.25, 1.8, 2.6))], [])
    assert far.is_fault
    assert "--chat" in far.sentence
    near = conclude(LOADED, NO_CURE, True, [finding(name, 2.6, Interval(1.6, 1.4, 1.8))], [])
    assert near.sentence.startswith("Nothing is wrong")
    uncertain = conclude(LOADED, NO_CURE, True, [finding(name, 3.6, Interval(2.25, 0.9, 2.6))], [])
    assert uncertain.sentence.startswith("Nothing is wrong")


def test_in_doubt_whether_a_head_reads_features_only_a_hopeless_one_is_called_untrained() -> None:
    assert conclude(LOADED, NO_CURE, None, [], []).sentence.startswith(
        "Too few prompts to tell whether the draft reads"
    )
    hopeless = Finding("as loaded", "", Interval(1.1, 1.0, 1.2), Interval(1, 1, 1))
    assert "untrained" in conclude(hopeless, NO_CURE, None, [], []).sentence
    assert "untrained" in conclude(LOADED, NO_CURE, False, [], []).sentence


@pytest.mark.parametrize(
    ("gain", "evidence", "is_thin"),
    [
        (Interval(1.17, 1.0, 1.75), Interval(0.9, 0.78, 1.07), True),  # tau is better, the probability undecided
        (Interval(1.05, 0.9, 1.2), Interval(1.04, 0.97, 1.1), True),
        (Interval(1.05, 0.9, 1.35), Interval(0.94, 0.84, 1.02), False),  # not as probable as a cure makes the tokens
        (Interval(0.9, 0.8, 0.99), Interval(1.01, 0.97, 1.05), False),  # tau is worse
    ],
)
def test_nothing_is_wrong_only_if_every_variant_is_ruled_out(gain: Interval, evidence: Interval, is_thin: bool) -> None:
    verdict = conclude(LOADED, NO_CURE, True, [], [finding("norm_output=True", 1.6 * gain.value, gain, evidence)])
    assert not verdict.is_fault
    assert verdict.sentence.startswith(
        "Too few prompts to tell" if is_thin else "Nothing is wrong: a tau of 1.60 (1.50"
    )


def test_what_the_figures_suggest_without_proof_asks_for_more_prompts() -> None:
    suggestive = finding("norm_output=True", 1.9, Interval(1.2, 0.9, 1.5), Interval(1.1, 0.95, 1.3))
    verdict = conclude(LOADED, NO_CURE, True, [], [suggestive])
    assert not verdict.is_fault
    assert verdict.sentence.startswith("Too few prompts to tell whether something is wrong")


def test_raw_prompts_are_tried_through_the_template(model: SpeculativeModel, prompts: list[Prompt]) -> None:
    raw = [prompt for prompt in prompts if prompt.text][:2]
    patient = Patient("tiny", model.target)
    text = decode_prompts(patient, raw, model.tokenizer, 0.0, 4, StepCount())
    assert set(text.otherwise) == {"temperature 1", "through the chat template"}
    (transcript,) = text.otherwise["through the chat template"]
    assert transcript.tokens[0][: transcript.num_prompt[0]] == as_chat(raw[0]).token_ids(model.tokenizer)
    assert as_raw(as_chat(raw[0])) == raw[0]


@pytest.mark.parametrize(
    ("scale", "sentence"), [(0.0, "Nothing is wrong"), (10.0, "untrained, or was made for another target")]
)
def test_draft_models(
    scale: float, sentence: str, model: SpeculativeModel, transcript: Transcript, tmp_path: Path
) -> None:
    """The target drafts for itself, and then with noise on its weights."""
    twin = AutoModelForCausalLM.from_pretrained(EMBEDDED / "target")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += scale * torch.randn_like(parameter) * parameter.std()
    twin.save_pretrained(tmp_path)
    assert sentence in diagnose(tmp_path, model.target, transcript).verdict.sentence


def test_suspects_follow_from_the_target_and_the_head(model: SpeculativeModel) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    target = SimpleNamespace(config=SimpleNamespace(rope_parameters=rope), num_layers=12, dtype=torch.float32)
    config = Patient("tiny", model.target).draft.config

    def tried(config: DraftConfig, longest: int = 100) -> list[dict[str, Any]]:
        return [dict(suspect.options) for suspect in head_suspects(config, HeadOptions(), {}, target, longest)]  # type: ignore[arg-type]

    scaling = {"rope_type": "llama3", "factor": 8.0}
    assert {"rope_scaling": scaling} in tried(config)
    assert {"rope_theta": 500000.0, "rope_scaling": scaling} in tried(config)
    assert {"rope_theta": 10000.0} not in tried(config)  # as loaded
    assert {"aux_layers": (2, 6, 9)} in tried(config)  # the default for 12 layers
    last = dataclasses.replace(config, aux_layers=(2, 6, 12))
    assert {"aux_layers": (3, 7, 13)} not in tried(last)
    unknown = dataclasses.replace(config, trained_length=None, max_position_embeddings=2000)
    assert {"draft_window": 512} in tried(unknown, longest=1000)
    assert {"draft_window": 1024} not in tried(unknown, longest=1000)
    short = dataclasses.replace(config, trained_length=200)
    assert {"draft_window": 128} in tried(short, longest=1000)
    assert {"draft_window": 512} not in tried(short, longest=1000)
    assert {"draft_window": 1024} in tried(short, longest=1000), "all: it may bear more than it was trained on"


@pytest.mark.parametrize("cure", [{}, *(fault.cure for fault in FAULTS.values()), {"rope_scaling": LINEAR}])
def test_the_advised_flags_are_what_the_commands_take(cure: dict[str, Any]) -> None:
    words = shlex.split(as_flags(cure))
    for command in (["generate", "--prompt", "x"], ["plan"], ["doctor"]):
        options = build_parser().parse_args([*command, "--target", "tiny", "--draft", "tiny", *words])
        assert head_options(options).given == cure


def test_the_command_reports_for_people_and_machines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_head(tmp_path, "tiny", set_values(norm_before_residual=True, max_position_embeddings=16))
    common = ("doctor", "--target", "tiny", "--draft", str(folder), "--num-prompts", "4", "--max-new-tokens", "8")
    assert main((*common, "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["cure"] == {"norm_before_residual": False}
    assert report["flags"] == "--no-norm-before-residual"
    assert report["loaded"]["tau"]["low"] <= report["loaded"]["tau"]["value"] <= report["loaded"]["tau"]["high"]
    assert {finding["name"] for finding in report["findings"]} >= {"norm_output=True", "rope_theta=500000.0"}
    assert any("max_position_embeddings is 16" in clue for clue in report["clues"])
    assert main((*common, *report["flags"].split())) == 0
    shown = capsys.readouterr().out
    assert "misplaced features" in shown
    assert "Note: max_position_embeddings is 16" in shown
    assert shown.splitlines()[-1].startswith("Nothing is wrong: a tau of ")


def test_too_few_prompts_are_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ("doctor", "--target", "nowhere", "--draft", "tiny")
    assert main((*common, "--num-prompts", "2")) == 2
    assert "error: num-prompts: expected at least 4, fewer tell nothing, got 2" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert main((*common, "--prompts", str(tmp_path / "p.jsonl"))) == 2
    assert re.search(r"error: prompts: expected at least 4, .* has 2", capsys.readouterr().err)


def test_a_draft_that_does_not_load_is_shown_as_inspect_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def shrink(values: dict[str, Any], tensors: Tensors) -> None:
        tensors["norm.weight"] = tensors["norm.weight"][:100].clone()
        del tensors["midlayer.hidden_norm.weight"]

    folder = write_head(tmp_path, "tiny", shrink)
    assert main(("doctor", "--target", "tiny", "--draft", str(folder))) == 2
    error = capsys.readouterr().err
    assert error.count("does not fit") == 2
    assert error.rstrip().splitlines()[-1].startswith("error: midlayer.hidden_norm.weight: missing")


def test_d2t_that_can_only_be_absolute_is_an_error_with_a_hint(model: SpeculativeModel, tmp_path: Path) -> None:
    def make_absolute(values: dict[str, Any], tensors: Tensors) -> None:
        tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))

    folder = write_head(tmp_path, "tiny", make_absolute)
    with pytest.raises(ValueError, match=r"d2t: .* pass d2t='absolute' \(--d2t absolute\)"):
        draftwing.load("tiny", str(folder))
    read = Patient(str(folder), model.target, HeadOptions(d2t="absolute")).draft
    right = Patient("tiny", model.target).draft
    assert torch.equal(read.vocab.target_ids, right.vocab.target_ids)
    with pytest.raises(ValueError, match=r"d2t: .* pass d2t='offsets'"):
        draftwing.load("tiny", "tiny", d2t="absolute")


def test_options_that_a_head_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="norm_output: only EAGLE-3 heads have it"):
        draftwing.load("tiny", "tiny-eagle1", norm_output=True)
    with pytest.raises(ValueError, match="d2t: expected offsets or absolute, got 'relative'"):
        draftwing.load("tiny", "tiny", d2t="relative")
    with pytest.raises(ValueError, match=r"input_norm.weight: missing"):
        draftwing.load("tiny", "tiny", norm_before_fc=True)
