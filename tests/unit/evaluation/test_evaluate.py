"""The evaluation's loop on invented methods: both turns, sameness, failures, stops and resumes; and its figures."""

from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from draftwing.charts import LETTER, as_words, bar_chart, line_chart
from draftwing.data.prompts import Prompt, as_prompt
from draftwing.engine.statistics import Statistics
from draftwing.evaluation import evaluate as evaluate_module
from draftwing.evaluation.compare import Decoded
from draftwing.evaluation.evaluate import Evaluation, PromptSet, Remarks, evaluate
from draftwing.evaluation.figures import ResultRow, ablations, acceptance_rates, figures_of, n_alpha, result_rows
from draftwing.evaluation.journal import Journal, Run
from draftwing.evaluation.report import Report, as_html, as_tables, published_figures, remarks
from draftwing.evaluation.specs import MethodSpec
from draftwing.intervals import Interval

SETTINGS = {"target": "t"}


class Letters:
    """A tokenizer of one token per character."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool, **options: bool) -> str:
        return "".join(map(chr, tokens))


class Method:
    """Answers with the prompt's last characters, in capitals; keeps what it was asked."""

    def __init__(self, seconds: float = 1.0, accepted: Sequence[int] = (), wrong: bool = False) -> None:
        self.seconds, self.accepted, self.wrong = seconds, accepted, wrong
        self.asked: list[str] = []
        self.seeds: list[int] = []
        self.fails_at: BaseException | None = None
        self.fails_after = 0

    def __call__(self, prompt: Sequence[int], temperature: float, max_new_tokens: int, seed: int) -> Decoded:
        text = "".join(map(chr, prompt))
        if self.fails_at is not None and len(self.asked) >= self.fails_after:
            raise self.fails_at
        self.asked.append(text)
        self.seeds.append(seed)
        answer = text.strip().upper()[-max_new_tokens:]
        tokens = [ord(letter) for letter in answer]
        counts = Statistics()
        for accepted in self.accepted or [0] * len(tokens):
            counts.count_cycle(accepted, 3 if self.accepted else 0, accepted + 1)
        counts.num_tokens = len(tokens)
        return Decoded(self.seconds, len(tokens), tokens[::-1] if self.wrong else tokens, statistics=counts)


def prompt_sets() -> list[PromptSet]:
    rows = [
        {"question_id": 1, "category": "a", "turns": ["one", "and"]},
        {"question_id": 2, "category": "b", "turns": ["two"]},
    ]
    return [PromptSet("d", [as_prompt(row, "here") for row in rows]), PromptSet("e", [Prompt("only", text="three")])]


def evaluation(methods: dict[str, Any], **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {"data": prompt_sets(), "temperatures": (0.0, 1.0), "tokenizer": Letters()}
    return Evaluation(methods, **(settings | {"max_new_tokens": 9} | changes))


def measured(what: Evaluation, journal: Journal | None = None, chains: Sequence[str] = ()) -> list[ResultRow]:
    journal, left = journal or Journal(SETTINGS), Remarks()
    evaluate(what, journal, left)
    return result_rows(what, journal, left, chains)


def test_a_second_turn_follows_plain_decodings_answer_for_all_methods() -> None:
    plain, wrong = Method(), Method(wrong=True)
    rows = measured(evaluation({"plain": plain, "wrong": wrong}, temperatures=(0.0,)))
    second = "one\n\nONE\n\nand\n\n"
    assert second in plain.asked
    assert second in wrong.asked
    shares = {(row.data, row.method): row.figures and row.figures.identical_share for row in rows}
    assert shares == {("d", "plain"): 1.0, ("d", "wrong"): 0.0, ("e", "plain"): 1.0, ("e", "wrong"): 0.0}


def test_methods_take_turns_on_each_prompt_with_its_seed() -> None:
    asked: list[str] = []

    class Noted(Method):
        def __call__(self, *arguments: Any, **options: Any) -> Decoded:
            asked.append(self.name)
            return super().__call__(*arguments, **options)

    methods = {"plain": Noted(), "fast": Noted()}
    for name, method in methods.items():
        method.name = name  # type: ignore[attr-defined]
    measured(evaluation(methods, temperatures=(0.0,), repeats=2, seed=5))
    # A warm-up for each data set; then every turn twice, in turn.
    assert asked == ["plain", "fast"] * (1 + 2 * 3) + ["plain", "fast"] * (1 + 2)
    assert methods["fast"].seeds == [5, *[5] * 4, *[6] * 2, 5, *[5] * 2]


def test_a_method_that_raises_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    broken = Method()
    broken.fails_at, broken.fails_after = RuntimeError("out of memory"), 2
    what = evaluation({"plain": Method(), "broken": broken, "fine": Method()}, temperatures=(0.0,))
    rows = {(row.data, row.method): row for row in measured(what, Journal(SETTINGS, tmp_path))}
    assert "RuntimeError: out of memory (prompt 1)" in (rows["d", "broken"].failure or "")
    assert len(rows["d", "broken"].runs) == 1
    assert len(rows["d", "fine"].runs) == rows["d", "fine"].num_expected == 3
    broken.fails_at = None  # mended: the next call does what is missing
    rows = {(row.data, row.method): row for row in measured(what, Journal(SETTINGS, tmp_path))}
    assert rows["d", "broken"].failure is None
    assert len(rows["d", "broken"].runs) == 3


def test_what_plain_decoding_gives_later_is_compared_with_what_was_there(tmp_path: Path) -> None:
    """Plain decoding fails once; the next call finds what differs from it."""
    plain, methods = Method(), {"same": Method(), "wrong": Method(wrong=True)}
    plain.fails_at, plain.fails_after = RuntimeError("out of memory"), 2
    what = evaluation({"plain": plain} | methods, temperatures=(0.0,), data=prompt_sets()[::-1])
    measured(what, Journal(SETTINGS, tmp_path))
    plain.fails_at = None
    for _ in range(2):  # and once more, from what was written
        rows = {(row.data, row.method): row.figures for row in measured(what, Journal(SETTINGS, tmp_path))}
        shares = {method: [figures and figures.identical_share for (_, name), figures in rows.items() if name == method]
                  for method in methods}  # fmt: skip
        assert shares == {"same": [1.0, 1.0], "wrong": [0.0, 0.0]}


def test_without_plains_answer_there_is_no_second_turn() -> None:
    plain = Method()
    plain.fails_at = RuntimeError("no")
    what, left = evaluation({"plain": plain, "other": Method()}, temperatures=(0.0,)), Remarks()
    journal = Journal(SETTINGS)
    evaluate(what, journal, left)
    assert [(skip.name, skip.turn) for skip in left.skipped] == [("1", 2)]
    rows = {row.method: row for row in result_rows(what, journal, left, ()) if row.data == "d"}
    assert rows["other"].figures is not None
    assert rows["other"].figures.speedup is None
    assert rows["other"].figures.identical_share is None


def test_a_stopped_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    expected = [row.as_dict() for row in measured(evaluation({"plain": Method(), "fast": Method(0.5)}))]
    fast = Method(0.5)
    fast.fails_at, fast.fails_after = KeyboardInterrupt(), 4
    with pytest.raises(KeyboardInterrupt):
        measured(evaluation({"plain": Method(), "fast": fast}), Journal(SETTINGS, tmp_path))
    num_before = len(Journal(SETTINGS, tmp_path).runs)
    assert num_before == 2 * 3  # three turns of both methods
    plain, fast = Method(), Method(0.5)
    journal = Journal(SETTINGS, tmp_path)
    rows = measured(evaluation({"plain": plain, "fast": fast}), journal)
    assert [row.as_dict() for row in rows] == expected
    assert len(plain.asked) + len(fast.asked) == len(journal.runs) - num_before + 2 * 3  # and warm-ups of three cells
    plain, fast = Method(), Method(0.5)
    measured(evaluation({"plain": plain, "fast": fast}), Journal(SETTINGS, tmp_path))
    assert not plain.asked + fast.asked, "nothing is left to do"


def test_prompts_that_do_not_fit_are_skipped_and_listed() -> None:
    long = PromptSet("f", [Prompt("long", text="x" * 30), Prompt("empty"), Prompt("short", text="x")])
    chat = PromptSet("g", [as_prompt({"question_id": "grows", "turns": ["one", "two"]}, "here")])
    what, left, journal = (
        evaluation({"plain": Method()}, data=[long, chat], max_positions=16),
        Remarks(),
        Journal(SETTINGS),
    )
    evaluate(what, journal, left)
    assert [(skip.name, skip.turn, skip.reason) for skip in left.skipped] == [
        ("long", 1, "30 tokens and 9 new ones would pass 16 positions"),
        ("empty", 1, "the prompt is empty"),
        ("grows", 2, "15 tokens and 9 new ones would pass 16 positions"),
    ]
    assert [row.num_expected for row in result_rows(what, journal, left, ())] == [1, 1, 1, 1]


def test_a_turn_that_is_too_long_at_one_temperature_is_expected_at_the_other() -> None:
    class Longer(Method):
        def __call__(self, prompt: Sequence[int], temperature: float, max_new_tokens: int, seed: int) -> Decoded:
            return super().__call__(prompt, temperature, max_new_tokens if temperature else 1, seed)

    rows = measured(evaluation({"plain": Longer()}, max_positions=22))
    assert [(row.temperature, row.num_expected, len(row.runs)) for row in rows if row.data == "d"] == [
        (0.0, 3, 3),
        (1.0, 2, 2),
    ]


def test_an_empty_prompt_is_not_what_methods_are_warmed_up_with() -> None:
    plain = Method()
    data = [PromptSet("d", [Prompt("empty"), Prompt("full", text="one")])]
    measured(evaluation({"plain": plain}, data=data, temperatures=(0.0,)))
    assert plain.asked == ["one"] * 2
    measured(evaluation({"plain": plain}, data=[PromptSet("d", [Prompt("empty")])]))
    assert plain.asked == ["one"] * 2


def test_on_a_gpu_the_longest_prompt_warms_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "has_gpu", lambda: True)
    plain, texts = Method(), ("three", "one", "seventeen")
    measured(evaluation({"plain": plain}, data=[PromptSet("d", [Prompt(text, text=text) for text in texts])],
                        temperatures=(0.0,)))  # fmt: skip
    assert plain.asked == ["one", "seventeen", *texts]


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "has_gpu", lambda: False)


def test_progress_reaches_the_number_of_decodings() -> None:
    long = PromptSet("f", [as_prompt({"turns": ["x" * 30, "y"]}, "long"), *prompt_sets()[0].prompts])
    what, done = evaluation({"plain": Method(), "b": Method()}, data=[long], max_positions=30, repeats=2), []
    evaluate(what, Journal(SETTINGS), Remarks(), done.append)
    assert sum(done) == what.num_decodings == 5 * 2 * 2 * 2


def test_sampled_output_of_other_engines_is_not_compared() -> None:
    what = evaluation({"plain": Method()}, rivals={"server": Method(wrong=True)})
    shares = {(row.temperature, row.method): row.figures and row.figures.identical_share
              for row in measured(what) if row.data == "e"}  # fmt: skip
    assert shares == {(0.0, "plain"): 1.0, (0.0, "server"): 0.0, (1.0, "plain"): 1.0, (1.0, "server"): None}


def test_an_engine_that_gives_text_is_compared_by_text() -> None:
    def says(text: str) -> Any:
        return lambda prompt, **options: Decoded(2.0, len(text), text=text)

    what = evaluation({"plain": Method()}, rivals={"same": says("THREE"), "other": says("3")}, data=prompt_sets()[1:])
    rows = {row.method: row for row in measured(what) if row.temperature == 0}
    figures = {name: row.figures for name, row in rows.items()}
    assert figures["same"] is not None
    assert figures["other"] is not None
    assert (figures["same"].identical_share, figures["other"].identical_share) == (1.0, 0.0)
    assert figures["same"].speedup is not None
    assert figures["same"].speedup.value == 0.5
    assert figures["other"].speedup is not None
    assert figures["other"].speedup.value == pytest.approx((1 / 2) / (5 / 1))  # tokens/s, not seconds
    assert figures["same"].acceptance_length is None
    assert rows["same"].stage_seconds == {}


@pytest.mark.parametrize("text", [" A b", "A b"])
def test_other_engines_may_show_a_first_space(text: str) -> None:
    """As a server does for SentencePiece's tokens, whose decoder eats it."""

    class Pieces(Letters):
        def decode(self, tokens: Sequence[int], skip_special_tokens: bool, **options: bool) -> str:
            return "".join({0: " A", 1: " b"}[token] for token in tokens).removeprefix(" ")

    methods = {"plain": lambda *_, **options: Decoded(1.0, 2, [0, 1])}
    server = {"server": lambda *_, **options: Decoded(1.0, 2, text=text)}
    what = evaluation(methods, rivals=server, tokenizer=Pieces(), data=prompt_sets()[1:], temperatures=(0.0,))
    (figures,) = [row.figures for row in measured(what) if row.method == "server"]
    assert figures is not None and figures.identical_share == 1.0


def slow_rates(chains: Sequence[int], depth: int) -> list[float]:
    """Acceptance on chains by definition: of the chains whose first n tokens were accepted, those with one more."""
    rates = []
    for n in range(depth):
        reached = [accepted for accepted in chains if accepted >= n]
        if reached:
            rates.append(sum(accepted > n for accepted in reached) / len(reached))
    return rates


@pytest.mark.parametrize("chains", [[0, 1, 3, 3, 2], [0, 0], [3], [1, 1, 0]])
def test_n_alpha_is_acceptance_given_that_n_drafted_tokens_were(chains: list[int]) -> None:
    what = evaluation({"plain": Method(), "chain": Method(accepted=chains), "tree": Method(accepted=chains)})
    rows = {row.method: row for row in measured(what, chains=["chain"])}
    assert rows["chain"].n_alpha == pytest.approx(slow_rates(chains, 3))
    assert [rate.rate for rate in rows["chain"].acceptance_rate if rate.num_reached] == rows["chain"].n_alpha
    assert rows["tree"].n_alpha is None
    assert rows["plain"].acceptance_rate == []


def a_run(prompt: int, **changes: Any) -> Run:
    values: dict[str, Any] = {"data": "d", "temperature": 0.0, "prompt": prompt, "turn": 1, "method": "m", "name": "n"}
    values |= {"category": "", "num_prompt_tokens": 1, "num_tokens": 8, "seconds": 2.0, "num_cycles": 4.0}
    values |= {"accepted_at": [], "reached_at": [], "stages": {}, "peak_bytes": None, "identical": True}
    return Run(**(values | {"tokens": [], "text": None} | changes))


def test_rates_add_up_runs_of_different_depths() -> None:
    runs = [a_run(0, accepted_at=[3], reached_at=[4]), a_run(1, accepted_at=[1, 1], reached_at=[4, 1])]
    assert [(rate.rate, rate.num_reached) for rate in acceptance_rates(runs)] == [(0.5, 8), (1.0, 1)]
    assert n_alpha(acceptance_rates(runs)) == [0.5, 1.0]


def test_counts_are_those_of_one_repeat() -> None:
    """ "Of so many cycles" must not grow with `repeats`; a method whose cycles vary counts their mean."""

    class Varying(Method):
        def __call__(self, *arguments: Any, **options: Any) -> Decoded:
            self.accepted = [3] if len(self.asked) % 2 else [1, 1]
            return super().__call__(*arguments, **options)

    for repeats in (1, 2, 4):
        methods = {"plain": Method(), "chain": Method(accepted=[1, 2]), "varying": Varying()}
        what = evaluation(methods, data=prompt_sets()[1:], temperatures=(0.0,), repeats=repeats)
        rows = {row.method: row for row in measured(what)}
        assert [rate.num_reached for rate in rows["chain"].acceptance_rate] == [2, 2, 1]
        if repeats > 1:
            assert [rate.num_reached for rate in rows["varying"].acceptance_rate] == [1.5, 1.5, 0.5]
    html = as_html(report_of(evaluation({"plain": Method(), "eagle3": Method(accepted=[1, 2])}, repeats=2), Remarks()))
    assert "1.00 (2)" in html
    assert "(2.0)" not in html


def test_speedups_are_over_the_turns_that_both_have() -> None:
    plain = [a_run(0, seconds=8.0, num_cycles=8.0), a_run(1, seconds=80.0), a_run(0, turn=2, seconds=8.0)]
    figures = figures_of([a_run(0), a_run(0, turn=2)], plain)
    assert figures is not None
    assert figures.speedup is not None
    assert figures.speedup.value == 4.0
    assert (figures.tokens_per_second.value, figures.num_turns) == (4.0, 2)
    assert figures.acceptance_length is not None
    assert figures.acceptance_length.value == 2.0


def test_figures_by_category_are_those_of_its_prompts() -> None:
    rows = measured(evaluation({"plain": Method(), "fast": Method(0.5)}, temperatures=(0.0,)))
    by_category = {(row.data, row.method): row.by_category for row in rows}
    assert {name: part.num_turns for name, part in by_category["d", "fast"].items()} == {"a": 2, "b": 1}
    assert by_category["d", "fast"]["a"].speedup is not None
    assert by_category["d", "fast"]["a"].speedup.value == 2.0
    assert by_category["e", "fast"] == {}


class Tags(HTMLParser):
    """Collects a page's text, and asserts that its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "|"


def report_of(what: Evaluation, left: Remarks, **changes: Any) -> Report:
    journal = Journal(SETTINGS)
    evaluate(what, journal, left)
    rows = result_rows(what, journal, left, ["eagle3:chain:3"])
    specs = {name: MethodSpec.parse(name, ("plain", "eagle3")) for name in what.methods}
    report = Report(
        "a <title>", rows, ablations(rows, specs), left.skipped, [], "process RSS", SETTINGS, {"torch": "x"}
    )
    return replace(report, **changes)


def test_the_page_holds_the_figures_and_is_well_formed() -> None:
    broken = Method()
    broken.fails_at = ValueError("a <reason>")
    methods = {"plain": Method(), "eagle3:chain:3": Method(0.5, [1, 2]), "eagle3:tree:2x2x4": Method(0.25, [3])}
    left = Remarks()
    report = report_of(evaluation(methods | {"eagle3": broken}, max_positions=20), left)
    tags = Tags()
    tags.feed(as_html(report))
    assert tags.open == []
    for expected in (
        "a <title>",
        "a <reason>",
        "4.00 [4.00, 4.00]",
        "tree against chain",
        "n-alpha",
        "Published",
        "FAILED",
    ):
        assert expected in tags.text, expected
    assert "tau against temperature" in tags.text
    assert any("failed: ValueError" in line for line in remarks(report))
    assert len(as_tables(report).renderables) == 1 + 2 * 2


def test_an_ablation_is_a_ratio_on_the_same_prompts() -> None:
    methods = {"plain": Method(), "eagle3:chain:3": Method(0.5, [1, 2]), "eagle3:tree:2x2x4": Method(0.25, [3])}
    found = report_of(evaluation(methods), Remarks()).ablations
    assert {(one.data, one.temperature) for one in found} == {("d", 0.0), ("d", 1.0), ("e", 0.0), ("e", 1.0)}
    assert {one.speed_ratio.value for one in found} == {2.0}
    assert {one.acceptance_length_ratio.value for one in found} == {2.0}  # one cycle against two


def test_a_page_of_nothing_is_still_a_page() -> None:
    what = evaluation({"plain": Method()}, max_positions=1)
    tags = Tags()
    tags.feed(as_html(report_of(what, Remarks())))
    assert tags.open == []
    assert "skipped" in tags.text


def test_published_figures_are_those_of_the_data_sets() -> None:
    figures = published_figures(["gsm8k"])
    assert {figure.data for figure in figures} == {"gsm8k"}
    (one,) = (f for f in figures if (f.target, f.method, f.temperature) == ("Vicuna 13B", "EAGLE-3", 0.0))
    assert (one.speedup, one.acceptance_length) == (5.32, 6.29)
    assert {figure.data for figure in published_figures(["mine"])} == {"mt_bench"}
    assert all(1 < f.acceptance_length < 9 and f.source for f in published_figures(["mean", "mt_bench", "alpaca"]))


def test_one_repeat_that_differs_is_not_identical() -> None:
    class Moody(Method):
        def __call__(self, *arguments: Any, **options: Any) -> Decoded:
            self.wrong = not self.wrong and len(self.asked) > 0  # wrong in the first of the two repeats
            return super().__call__(*arguments, **options)

    rows = measured(evaluation({"plain": Method(), "moody": Moody()}, data=prompt_sets()[1:], repeats=2))
    shares = {row.method: row.figures and row.figures.identical_share for row in rows if row.temperature == 0}
    assert shares == {"plain": 1.0, "moody": 0.0}


def test_there_is_no_noise_to_know_at_temperature_0() -> None:
    plan = "eagle3:tree:2x2x4"
    methods = {"plain": Method(), plan: Method(0.5, [3]), f"{plan}+uncoupled": Method(0.5, [3])}
    found = report_of(evaluation(methods), Remarks()).ablations
    assert {(one.what, one.temperature) for one in found} == {("drafting without the target's noise", 1.0)}


def test_charts_are_images_of_their_own() -> None:
    """XML with a namespace, a font and a box: they draw as files too."""
    charts = [bar_chart({"a <b>": Interval(2, 1, 3)}, mark=1.0), line_chart({"a <b>": [(0, 1), (1, 2)]}, "x", "y")]
    for chart in charts:
        image = ElementTree.fromstring(chart)
        assert image.tag == "{http://www.w3.org/2000/svg}svg"
        assert image.get("font-family")
        assert image.get("viewBox") == f"0 0 {image.get('width')} {image.get('height')}"
        assert "a <b>" in [text.text for text in image.iter("{http://www.w3.org/2000/svg}text")]


def test_a_bar_chart_without_bars_says_so() -> None:
    assert bar_chart({}, mark=1.0) == "<p>Nothing was measured.</p>"


NARROW = (0.9, 0.00079, 123456.0, -0.000123, -5.0)
LONG = "eagle1@tiny-eagle1-of-yesterday:tree:10x7x60+uncoupled+ngram"


def boxes(chart: str) -> list[tuple[float, float]]:
    """Where each text begins and ends, for letters as wide as they can be, in pixels from the image's left edge."""
    found = []
    for text in ElementTree.fromstring(chart).iter("{http://www.w3.org/2000/svg}text"):
        width, x = LETTER * len(text.text or ""), float(text.get("x") or 0)
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor") or ""]
        found.append((left, left + width))
    return found


@pytest.mark.parametrize("value", NARROW)
def test_no_text_of_a_chart_is_cut_off(value: float) -> None:
    lines = line_chart({LONG: [(20, value), (14475, 2 * value)]}, "step", "")
    bars = bar_chart({LONG: Interval(abs(value), 0, abs(value))}, mark=3 * abs(value))
    for chart in (lines, bars):
        width = float(ElementTree.fromstring(chart).get("width") or 0)
        assert min(left for left, _ in boxes(chart)) >= 0
        assert max(right for _, right in boxes(chart)) <= width
    assert f"{2 * value * (1.05 if value > 0 else 1):.3g}" in lines, "the axis reaches the values"


def test_a_curve_leaves_out_what_is_no_number() -> None:
    chart = line_chart({"loss": [(1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0)]}, "step", "")
    assert "nan" not in chart
    assert "inf" not in chart
    assert line_chart({"loss": [(1, float("nan"))]}, "step", "") == ""


def test_settings_are_shown_in_words() -> None:
    settings = {"drafts": {"a": "a of today", "b": None}, "methods": ["plain", "eagle3"], "capture": True, "seed": 0}
    assert [as_words(value) for value in settings.values()] == ["a: a of today, b: ", "plain, eagle3", "yes", "0"]
    page = as_html(report_of(evaluation({"plain": Method()}), Remarks(), settings=settings))
    assert "a: a of today" in page
    assert "plain, eagle3" in page
    assert not any(sign in page.split("How it was measured")[1] for sign in ("{", "[", "&#x27;", "None", "True"))
