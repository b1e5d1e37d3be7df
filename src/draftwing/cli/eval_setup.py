"""What `draftwing eval` measures, from its options: mistakes are found before any model is loaded."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from draftwing.api import SpeculativeModel, load
from draftwing.cli.arguments import execution
from draftwing.cli.output import new_console, note
from draftwing.data.benchmarks import load_benchmark
from draftwing.data.prompts import read_prompts, spread
from draftwing.drafts.kinds import default_plan, family_of, resolve_method, serves
from draftwing.drafts.load_draft import resolve_draft
from draftwing.embedded import EMBEDDED_PROMPTS, EMBEDDED_TARGETS, drafts_of
from draftwing.evaluation.compare import Decode, decoder, with_peak
from draftwing.evaluation.evaluate import Evaluation, PromptSet
from draftwing.evaluation.rivals import endpoint_rival, transformers_rivals
from draftwing.evaluation.specs import MethodSpec, WantedMethod
from draftwing.target.load import HUB_OPTIONS, load_stock, resolve_target

EMBEDDED_SAMPLE, LARGEST_SAMPLE = 8, 80
"""Prompts by default: of the embedded ones, and of any other data set at most."""


def read_drafts(options: argparse.Namespace) -> dict[str, str]:
    """The drafts by name; an embedded target's name stands for all of its drafts that are there."""
    given = options.draft or ([options.target] if drafts_of(options.target) else [])
    drafts: dict[str, str] = {}
    for text in given:
        match = re.fullmatch(r"(?:([\w.-]+)=)?(.+)", text)
        if match is None:
            raise ValueError(f"draft: expected [NAME=]DRAFT, got {text!r}")
        name = match[1] or Path(match[2]).name
        embedded = drafts_of(text) if text in EMBEDDED_TARGETS else {}
        more = {draft: draft for draft in embedded} or {name: match[2]}
        if twice := drafts.keys() & more.keys():
            raise ValueError(f"draft: two drafts are called {min(twice)}; name them: NAME={match[2]}")
        drafts |= more
    return drafts


def check_drafts(wanted: Sequence[WantedMethod], drafts: dict[str, str]) -> None:
    """Raise a ValueError for a method of a draft that is not there, or that lacks one."""
    for spec in (item.spec for item in wanted if item.is_required):
        if spec.draft not in (None, *drafts):
            raise ValueError(
                f"methods: {spec}: no draft is called {spec.draft}; there are: {', '.join(drafts) or 'none'}"
            )
        if not drafts and not serves(spec.method, None):
            raise ValueError(f"methods: {spec} needs a draft: --draft [NAME=]DRAFT")


def read_data(options: argparse.Namespace, sources: dict[str, str]) -> list[PromptSet]:
    """The prompts to measure on, from data sets by name and their files; those without one are embedded or benchmarks.

    Raises:
        ValueError: a file that is missing, empty or of another form.
    """
    sets = []
    for name, path in sources.items():
        is_embedded = name == "embedded"
        path = path or (str(EMBEDDED_PROMPTS) if is_embedded else "")
        prompts = read_prompts(path) if path else load_benchmark(name)
        most = EMBEDDED_SAMPLE if is_embedded else LARGEST_SAMPLE
        sets.append(PromptSet(name, spread(prompts, options.num_prompts or most)))
    return sets


def settings_of(
    options: argparse.Namespace, drafts: dict[str, str], wanted: Sequence[WantedMethod], data: Sequence[PromptSet]
) -> dict[str, Any]:
    """What decides the figures: runs with other settings are not mixed."""
    return {
        "target": _stamped(options.target, Path(resolve_target(options.target))),
        "drafts": {name: _stamped(path, resolve_draft(path)) for name, path in drafts.items()},
        "methods": list(dict.fromkeys(str(item.spec) for item in wanted)),
        "against": options.against,
        "assistant": options.assistant,
        "data": {prompts.name: prompts.fingerprint for prompts in data},
        "temperatures": list(options.temperatures),
        "max_new_tokens": options.max_new_tokens,
        "repeats": options.repeats,
        "seed": options.seed,
        "device": options.device,
        "dtype": options.dtype,
        **execution(options),
        "threads": torch.get_num_threads(),
    }


def _stamped(name: str, folder: Path) -> str:
    """A model's name with the time of its weights: one that was trained on is another one."""
    if not folder.exists():  # a target on the hub
        return name
    weights = [file for ending in ("safetensors", "bin", "pt") for file in folder.glob(f"*.{ending}")]
    weights += [folder] if folder.is_file() else []
    newest = max((file.stat().st_mtime for file in weights), default=0.0)  # loading says what is missing
    return f"{name} of {datetime.fromtimestamp(newest, UTC).isoformat(timespec='seconds')}"


def prepare(
    options: argparse.Namespace, drafts: dict[str, str], wanted: Sequence[WantedMethod], data: Sequence[PromptSet]
) -> tuple[dict[str, MethodSpec], Evaluation]:
    """Load the models; the methods by row name, with their plans filled in, and what is to be measured."""
    rivals = _endpoints(options)  # before the models: a server that is not there is found out at once
    more = execution(options) | {"remeasure": options.remeasure}
    draft_dtype = more.pop("draft_dtype")  # of the drafts, which are loaded behind the target
    if draft_dtype and not drafts:
        raise ValueError("draft_dtype: for a draft head, and no draft is loaded")
    with new_console(stderr=True).status("loading models"):
        bare = load(options.target, dtype=options.dtype, device=options.device, **more)
        models = _with_drafts(bare, drafts, draft_dtype, is_named=bool(options.draft))
        device = bare.target.device
        rivals |= {name: with_peak(decode, device) for name, decode in _transformers(options, bare).items()}
    methods: dict[str, MethodSpec] = {}
    decoders: dict[str, Decode] = {}
    for item in wanted:
        for spec, model in _resolve(item, models, bare):
            methods[str(spec)] = replace(spec, plan=spec.plan or default_plan(spec.method))
            start = partial(model.with_method(spec.method).start, **spec.settings)
            decoders.setdefault(str(spec), with_peak(decoder(start), device))
    readers = [family_of(model.method).kind.max_positions(model.draft) for model in models.values()]
    limits = [limit for limit in (bare.target.max_positions, *readers) if limit is not None]
    evaluation = Evaluation(
        decoders,
        data,
        options.temperatures,
        bare.tokenizer,
        options.max_new_tokens,
        rivals,
        min(limits, default=None),
        options.seed,
        options.repeats,
    )
    return methods, evaluation


def _resolve(
    item: WantedMethod, models: dict[str, SpeculativeModel], bare: SpeculativeModel
) -> list[tuple[MethodSpec, SpeculativeModel]]:
    """The drafts that serve a method, one row each; a row names its draft where there are several."""
    spec = item.spec
    if spec.draft is not None:
        if spec.draft not in models:
            raise ValueError(f"methods: {spec}: the draft {spec.draft} is left out, for draft_dtype is for heads alone")
        resolve_method(spec.method, models[spec.draft].draft)
        return [(spec, models[spec.draft])]
    if serves(spec.method, None):
        return [(spec, bare)]
    serving = {name: model for name, model in models.items() if serves(spec.method, model.draft)}
    if item.is_required and not serving:
        raise ValueError(f"methods: none of the drafts ({', '.join(models)}) serves {spec.method}")
    return [(spec if len(serving) == 1 else replace(spec, draft=name), model) for name, model in serving.items()]


def _endpoints(options: argparse.Namespace) -> dict[str, Decode]:
    """The servers to compare with, asked whether they are there."""
    rivals: dict[str, Decode] = {}
    for url in (engine for engine in options.against if engine != "transformers"):
        rivals |= endpoint_rival(url, options.endpoint_model)
    return rivals


def _with_drafts(
    bare: SpeculativeModel, drafts: dict[str, str], draft_dtype: str | None, is_named: bool
) -> dict[str, SpeculativeModel]:
    """The target with each draft; of drafts that nobody has named, those that the dtype is not for are left out."""
    models = {}
    for name, path in drafts.items():
        try:
            models[name] = bare.with_draft(path, draft_dtype=draft_dtype)
        except ValueError as error:
            if is_named or not str(error).startswith("draft_dtype:"):
                raise
            note(f"{name} is left out: {error}", "yellow")
    return models


def _transformers(options: argparse.Namespace, bare: SpeculativeModel) -> dict[str, Decode]:
    if "transformers" not in options.against:
        return {}
    dtype, device = bare.target.dtype, options.device
    assistant = load_stock(options.assistant, dtype, device) if options.assistant else None
    files = {name: value for name, value in execution(options).items() if name in HUB_OPTIONS}
    return transformers_rivals(load_stock(options.target, dtype, device, options.quantize, **files), assistant)
