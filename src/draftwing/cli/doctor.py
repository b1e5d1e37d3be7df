"""`draftwing doctor`: why acceptance is low, and which option cures it."""

import argparse
import json

from draftwing.cli.arguments import DRAFTS, TARGETS, add_device, add_head_options, head_options, positive, temperature
from draftwing.cli.output import new_console

SUMMARY = "Say why acceptance is low: try the known faults of heads and settings, and name the one that explains it."
EXAMPLES = """examples:
  draftwing doctor --target tiny --draft tiny
  draftwing doctor --target path/to/model --draft path/to/head --prompts prompts.jsonl --json
  draftwing doctor --target path/to/model --draft path/to/head --aux-layers 2,16,29   # is it right now?"""
EXIT_STATUS = "Exit status: 0 if no fault was found, 1 if one was, 2 if the draft cannot be loaded."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.description = f"{SUMMARY}\n{EXIT_STATUS}"
    parser.add_argument("--target", required=True, help=TARGETS)
    parser.add_argument("--draft", required=True, help=DRAFTS)
    add_device(parser)
    parser.add_argument("--prompts", help="a JSONL file with prompt, messages or turns (default: the embedded ones)")
    parser.add_argument("--num-prompts", type=positive, default=8, help="how many of them at most (default: 8)")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="per prompt (default: 64)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default)")
    add_head_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from draftwing.intervals import FEWEST_PROMPTS

    if options.num_prompts < FEWEST_PROMPTS:
        raise ValueError(
            f"num-prompts: expected at least {FEWEST_PROMPTS}, fewer tell nothing, got {options.num_prompts}"
        )
    from rich.progress import Progress

    from draftwing.api import load
    from draftwing.data.prompts import has_chat_template, read_prompts
    from draftwing.doctor.diagnosis import as_report, decode_prompts, examine
    from draftwing.doctor.trials import Patient, StepCount
    from draftwing.embedded import EMBEDDED_PROMPTS

    file = options.prompts or EMBEDDED_PROMPTS
    prompts = read_prompts(file)[: options.num_prompts]
    if len(prompts) < FEWEST_PROMPTS:
        raise ValueError(f"prompts: expected at least {FEWEST_PROMPTS}, fewer tell nothing; {file} has {len(prompts)}")
    model = load(options.target, None, options.dtype, options.device)
    try:
        patient = Patient(options.draft, model.target, head_options(options), model.tokenizer)
    except ValueError:
        show_misfit(options.draft, options.target)
        raise
    with Progress(console=new_console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        steps = StepCount(
            lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
        )
        text = decode_prompts(patient, prompts, model.tokenizer, options.temperature, options.max_new_tokens, steps)
        clues = patient.clues(options.target, max(transcript.longest for transcript in text.transcripts))
        if any(prompt.messages for prompt in prompts) and not has_chat_template(model.tokenizer):
            clues.append("the target's tokenizer has no chat template, so chat prompts were given raw")
        diagnosis = examine(patient, text, clues, steps)
    if options.json:
        print(json.dumps(diagnosis.as_dict()))
    else:
        console = new_console()
        console.print(as_report(diagnosis))
        console.print(diagnosis.verdict.sentence, style="bold", markup=False, highlight=False, soft_wrap=True)
    return int(diagnosis.verdict.is_fault)


def show_misfit(draft: str, target: str) -> None:
    """What `draftwing inspect` says of a draft that does not fit its target, if it can read it."""
    from draftwing.drafts.inspect_draft import inspect_draft, report_table

    report = inspect_draft(draft, target)
    if report.problems:
        new_console(stderr=True).print(report_table(report))
