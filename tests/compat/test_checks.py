"""Exported folders in other engines: what is compared, and engines that are missing, end, hang or read a head wrong.

The engines are stand-ins here, a package called vllm and a server, which give what they are told to; `make engines`
runs the real ones.
"""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file, save_file
from test_agreement import write_models

from draftwing.api import load
from draftwing.checks.agreement import EngineAnswer, compare, drafts_agree
from draftwing.checks.check_export import Check, CheckRequest, check_export, decode_here, written_for
from draftwing.checks.engine_process import EngineProcess, EngineTask
from draftwing.checks.find_engine import Checker, find_checker
from draftwing.checks.llama_server import cycles_of, llama_session
from draftwing.checks.vllm import vllm_session
from draftwing.cli import main
from draftwing.data.prompts import Prompt
from draftwing.drafts.export_draft import export_draft

VLLM = """
import json, os
from types import SimpleNamespace as Some
__version__ = "0.32.0"
SamplingParams = Some
class LLM:
    def __init__(self, **options):
        if os.environ.get("FAKE_FAILURE"):
            raise RuntimeError(os.environ["FAKE_FAILURE"])
        assert options["dtype"] == "float32" and options["speculative_config"]["num_speculative_tokens"] == 3
        self.llm_engine, self.answers = self, json.load(open(os.environ["FAKE_ANSWERS"]))
        self.steps = []
    def add_request(self, name, prompt, settings):
        assert settings.temperature == 0 and prompt["prompt_token_ids"]
        answer, end = self.answers[int(name)], 0
        for size in [1, *answer["cycles"]]:
            end += size
            self.steps += [answer["tokens"][:end]] * 2  # a step may bring nothing
    def has_unfinished_requests(self):
        return bool(self.steps)
    def step(self):
        return [Some(outputs=[Some(token_ids=self.steps.pop(0))])]
"""
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if os.environ.get("FAKE_FAILURE"):
    sys.exit(os.environ["FAKE_FAILURE"])
answers = json.load(open(os.environ["FAKE_ANSWERS"]))
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.say({"build_info": "b1"})
    def do_POST(self):
        odd = os.environ.get("FAKE_ODD")
        if odd == "gone":
            print("a bad head", flush=True)
            os._exit(7)
        if odd == "refused":
            return self.say({"error": {"message": "no such slot"}}, 500)
        if odd == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "99")
            self.end_headers()
            return self.wfile.write(b"{")
        if odd == "noise":
            return self.wfile.write(b"noise\\n")
        if odd is not None:
            return self.say(odd)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0 and not body["cache_prompt"]
        answer = answers[self.server.asked // 2]
        self.server.asked += 1
        if not body.get("stream"):
            return self.say({"tokens": answer["tokens"]})
        counts, accepted = [{}], 0
        for cycle, size in enumerate(answer["cycles"], 1):
            accepted += size - 1
            counts += [{"draft_n": 3 * cycle, "draft_n_accepted": accepted}] * size
        self.say("".join(f"data: {json.dumps({'timings': count})}\\n\\n" for count in counts) + "data: [DONE]\\n\\n")
    def say(self, what, status=200):
        text = (what if isinstance(what, str) else json.dumps(what)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.asked = 0
server.serve_forever()
"""
SESSIONS = {"vllm": vllm_session, "llama-server": llama_session}


@pytest.fixture(autouse=True)
def _logs_lie_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed keeps its log."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Programs of stand-ins that answer what is in the file named by FAKE_ANSWERS."""
    (tmp_path / "vllm.py").write_text(VLLM)
    (tmp_path / "server.py").write_text(f"#!{sys.executable}\n{textwrap.dedent(SERVER)}")
    (tmp_path / "server.py").chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAKE_ANSWERS", str(tmp_path / "answers.json"))
    return {"vllm": Path(sys.executable), "llama-server": tmp_path / "server.py"}


def tell(answers: list[EngineAnswer]) -> None:
    Path(os.environ["FAKE_ANSWERS"]).write_text(json.dumps([vars(answer) for answer in answers]))


def task(folder: Path, **changes: Any) -> EngineTask:
    facts = {"target_gguf": folder / "target.gguf", "method": "eagle3", "prompts": [[5, 6, 7], [8, 9]]}
    return EngineTask(
        **{"folder": folder, "target": "t", "num_tokens": 8, "depth": 3, "seconds": 30.0, **facts, **changes}
    )


OURS = EngineAnswer([7, 1, 2, 3, 4, 5, 6, 8, 9, 10], [3, 1, 4, 1])


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (OURS, (10, None, 3, 3)),  # the last cycle may be cut by the end
        (EngineAnswer(OURS.tokens, [1, 2, 1, 4, 1]), (10, None, 3, 2)),  # the first accepts less, then they meet
        (EngineAnswer(OURS.tokens, [1] * 9), (10, None, 3, 1)),
        (EngineAnswer([7, 1, 2, 3, 4, 99], [3, 2]), (5, 5, 1, 1)),  # nothing is said of what comes behind other text
        (EngineAnswer(OURS.tokens[:-2], [3, 1, 3]), (8, 8, 2, 2)),
    ],
)
def test_what_two_answers_have_in_common(theirs: EngineAnswer, expected: tuple[Any, ...]) -> None:
    row = compare("p", OURS, theirs)
    assert (row.num_tokens, row.parted_at, row.num_compared, row.num_equal) == expected
    assert row.tokens_agree == (expected[1] is None)


def test_the_token_that_ends_a_text_may_be_kept_or_not() -> None:
    kept, dropped = EngineAnswer([7, 1, 2, 0], [3]), EngineAnswer([7, 1, 2], [3])
    assert compare("p", kept, dropped, end_tokens=(0, 1)).tokens_agree
    assert not compare("p", kept, dropped).tokens_agree


def test_a_few_cycles_may_round_another_way() -> None:
    row = compare("p", OURS, OURS)
    many = dataclasses.replace(row, num_compared=100, num_equal=98)
    assert drafts_agree([row]) and drafts_agree([many])
    assert not drafts_agree([dataclasses.replace(many, num_equal=97)])
    assert not drafts_agree([dataclasses.replace(row, num_compared=0, num_equal=0)]), "nothing was compared"


def test_cycles_by_a_servers_counts() -> None:
    counts = [{}, *[{"draft_n": 3, "draft_n_accepted": 2}] * 2, {"draft_n": 6, "draft_n_accepted": 2}]
    counts += [{"draft_n": 9, "draft_n_accepted": 5}]
    assert cycles_of(counts, depth=3) == [3, 1, 4]
    assert cycles_of([*counts, {"draft_n": 10, "draft_n_accepted": 5}], depth=3) == [3, 1, 4, 1], "cut by the end"


def test_a_cycle_that_a_character_hides_ends_the_list() -> None:
    """Tokens that end within a character are not in the stream: two cycles between these counts look like one."""
    pairs = ((3, 2), (9, 4), (12, 7))
    first, hidden, later = ({"draft_n": num, "draft_n_accepted": accepted} for num, accepted in pairs)
    assert cycles_of([{}, first, hidden, later], depth=3) == [3]
    assert cycles_of([{}, hidden, later], depth=3) == [], "before the first count, too"
    assert cycles_of([], depth=3) == []


@pytest.mark.parametrize("name", SESSIONS)
def test_answers_of_an_engine(name: str, engines: dict[str, Path], tmp_path: Path) -> None:
    given = [OURS, EngineAnswer([4, 4], [1])]
    tell(given)
    with SESSIONS[name](engines[name], task(tmp_path)) as session:
        assert session.version == {"vllm": "0.32.0", "llama-server": "b1"}[name]
        assert list(session.answers) == given


@pytest.mark.parametrize("name", SESSIONS)
def test_an_engine_that_ends_says_why(
    name: str, engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILURE", "no such head")
    says = r"^check: .* ended with status 1; its last lines: .*no such head \(log: "
    with pytest.raises(ValueError, match=says), SESSIONS[name](engines[name], task(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ("gone", r"ended with status 7; its last lines: .*a bad head"),
        ("refused", r"does not answer at /completion: status 500: .*no such slot"),
        ("cut", r"does not answer at /completion: IncompleteRead"),
        ("noise", r"does not answer at /completion: BadStatusLine: noise"),
        ("{}", r"answers at /completion without tokens: {}"),
        ('{"error": "no memory"}', r"answers at /completion: .*no memory"),
        ("[1]", r"answers at /completion: \[1\]"),
        ("no JSON", r"answers at /completion: no JSON"),
    ],
)
def test_an_odd_answer_is_told(
    odd: str, says: str, engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell([])
    monkeypatch.setenv("FAKE_ODD", odd)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which is not asked
    with (
        pytest.raises(ValueError, match=f"^check: llama-server {says}"),
        llama_session(engines["llama-server"], task(tmp_path)) as session,
    ):
        next(session.answers)


def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^check: cannot start .*none: No such file"):
        EngineProcess("engine", [tmp_path / "none"], 1).__enter__()
    assert not [*tmp_path.glob("draftwing-*")], "no log of nothing"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


RUNS_ENGINE = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup make test` would have it ignore
from draftwing.checks.engine_process import EngineProcess
with EngineProcess("engine", ["sleep", "60"], 60) as process:
    print(process._process.pid, flush=True)
    process.until(lambda: None)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_engine_ends_with_the_process_that_started_it(number: signal.Signals) -> None:
    """In a program of one's own as on the command line."""
    program = Forked(RUNS_ENGINE)
    engine = int(program.first_line())
    os.kill(engine, 0)
    program.send_signal(number)
    assert program.wait() == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


def test_signals_that_somebody_handles_stay_theirs() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with EngineProcess("engine", ["sleep", "60"], 5):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_hangs_is_told_and_ended() -> None:
    children = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    engine = EngineProcess("engine", [sys.executable, "-S", "-c", children], 0.3)
    says = r"engine did not answer within 0.3 s \(--check-seconds\)"
    with pytest.raises(ValueError, match=says) as caught, engine as process:
        process.until(lambda: None)
    assert process._process.poll() is not None
    log = Path(str(caught.value).rpartition("(log: ")[2].rstrip(")"))
    assert log.is_file(), "what failed can be read"
    with EngineProcess("engine", [sys.executable, "-S", "-c", ""], 5) as process:
        pass
    assert not process.log.exists()


def test_where_engines_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vllm").mkdir()  # a folder of that name is not the package
    for name in ("DRAFTWING_VLLM_PYTHON", "DRAFTWING_SPECULATORS_PYTHON", "DRAFTWING_LLAMA_SERVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^check: vllm: not installed where it was looked for; .*DRAFTWING_VLLM_PY"):
        find_checker("vllm")
    with pytest.raises(ValueError, match=r"llama-server: not installed .* path of the server .*make engines"):
        find_checker("llama.cpp")
    assert find_checker("sglang") == Checker("transformers", Path(sys.executable))
    place = tmp_path / "build/engines/llama.cpp/bin/llama-server"
    place.parent.mkdir(parents=True)
    place.touch(0o755)
    assert find_checker("llama.cpp") == Checker("llama-server", place)
    monkeypatch.setenv("DRAFTWING_LLAMA_SERVER", sys.executable)
    assert find_checker("llama.cpp").at == Path(sys.executable)
    assert find_checker("llama.cpp", str(place)).at == place
    assert find_checker("vllm", sys.executable) == Checker("transformers", Path(sys.executable))
    monkeypatch.setenv("DRAFTWING_VLLM_PYTHON", "nowhere")
    with pytest.raises(ValueError, match="DRAFTWING_VLLM_PYTHON: no such program: nowhere"):
        find_checker("vllm")
    with pytest.raises(ValueError, match="no such program: nowhere"):
        find_checker("vllm", "nowhere")
    with pytest.raises(ValueError, match="has no vllm and no speculators"):
        find_checker("speculators", sys.executable)
    with pytest.raises(ValueError, match="is not a Python that runs"):
        find_checker("vllm", str(place))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with a tokenizer, and its head as vLLM reads it."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    export_draft(str(folder / "head"), str(folder / "target"), "vllm", folder / "vllm", verifier="org/it")
    return folder


def request(models: Path, folder: Path, at: Path) -> CheckRequest:
    prompts = [Prompt("first", text="%1A"), Prompt("second", text="KLM")]
    return CheckRequest(folder, "vllm", str(models / "target"), Checker("vllm", at), prompts, num_tokens=24)


@pytest.fixture(scope="module")
def right_answers(models: Path) -> list[EngineAnswer]:
    model = load(str(models / "target"), draft=str(models / "vllm"), dtype="float32")
    return list(decode_here(model, [model.tokenizer(text)["input_ids"] for text in ("%1A", "KLM")], 24))


def test_a_check_compares_prompt_by_prompt(
    models: Path, right_answers: list[EngineAnswer], engines: dict[str, Path], tmp_path: Path
) -> None:
    tell(right_answers)
    said: list[str] = []
    check = check_export(request(models, models / "vllm", engines["vllm"]), said.append)
    assert not check.problems and check.as_dict()["agrees"]
    assert [row.prompt for row in check.rows] == ["first", "second"]
    assert all(row.num_tokens == 24 and row.num_equal == row.num_compared > 3 for row in check.rows)
    assert said[-1] == "2 of 2 prompts"


def test_what_reads_a_head_wrong_is_found(
    models: Path, right_answers: list[EngineAnswer], engines: dict[str, Path], tmp_path: Path
) -> None:
    """Two readers of d2t, one of which is off by one: the tokens are the same, the drafts are not."""
    tell(right_answers)
    broken = tmp_path / "broken"
    export_draft(str(models / "head"), str(models / "target"), "vllm", broken)
    tensors = load_file(broken / "model.safetensors")
    ids = tensors["d2t"] + torch.arange(48)
    ids = (ids + 1) % 64
    tensors["d2t"], tensors["t2d"] = ids - torch.arange(48), torch.zeros(64, dtype=torch.bool).index_fill_(0, ids, True)
    save_file(tensors, broken / "model.safetensors")
    check = check_export(request(models, broken, engines["vllm"]))
    assert all(row.tokens_agree for row in check.rows)
    assert len(check.problems) == 1 and check.problems[0].startswith("drafts: ")
    tell([dataclasses.replace(answer, tokens=[*answer.tokens[:5], 3, *answer.tokens[6:]]) for answer in right_answers])
    check = check_export(request(models, models / "vllm", engines["vllm"]))
    assert check.problems[0] == "first: other tokens from new token 5 on"


def test_a_loader_reads_what_was_written(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers', on a folder that was exported before; what it reads otherwise is found."""
    command = ["export", str(models / "vllm"), "--check", sys.executable]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert found["checker"] == "transformers" and found["loaded"]["num_fields"] > 10 and found["agrees"]
    changed = tmp_path / "changed"
    export_draft(str(models / "head"), str(models / "target"), "eagle", changed)
    values = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))
    checker = Checker("transformers", Path(sys.executable))
    asked = CheckRequest(changed, "eagle", "t", checker, [], reference=models / "vllm")
    assert check_export(asked).problems == ["rms_norm_eps: it reads something else"]


SPECULATORS = """
import json, os
from types import SimpleNamespace as Some
from safetensors.torch import load_file
class SpeculatorModel:
    @staticmethod
    def from_pretrained(folder):
        tensors = load_file(folder + "/model.safetensors")
        tensors |= {"embed_tokens.weight": tensors["fc.weight"]}  # the target's
        config = json.load(open(folder + "/config.json"))
        if os.environ.get("FAKE_FAULTS"):
            tensors |= {"fc.bias": tensors["fc.weight"][0], "fc.weight": tensors["fc.weight"] + 1}
            del tensors["norm.weight"], config["draft_vocab_size"]
        return Some(state_dict=lambda: tensors, config=Some(to_dict=lambda: config))
"""


def test_every_tensor_that_a_loader_has_is_compared(
    models: Path, engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that the file lacks and that stays random there; but not those that are the target's."""
    (tmp_path / "speculators.py").write_text(SPECULATORS)
    (tmp_path / "speculators-0.9.0.dist-info").mkdir()
    (tmp_path / "speculators-0.9.0.dist-info/METADATA").write_text("Name: speculators\nVersion: 0.9.0\n")
    folder = tmp_path / "folder"
    export_draft(str(models / "head"), str(models / "target"), "speculators", folder)
    asked = CheckRequest(folder, "speculators", "t", Checker("speculators", Path(sys.executable)), [])
    check = check_export(asked)
    assert check.version == "0.9.0" and not check.problems
    assert check.loaded is not None and check.loaded.num_tensors == len(load_file(folder / "model.safetensors"))
    monkeypatch.setenv("FAKE_FAULTS", "1")
    wrong = check_export(asked).loaded
    assert wrong is not None
    assert wrong.differing[0] == "draft_vocab_size" and wrong.differing[-1] == "fc.bias"
    assert sorted(wrong.differing[1:-1]) == ["fc.weight", "norm.weight"]


def test_a_check_that_compared_no_cycle_says_so() -> None:
    short = compare("p", EngineAnswer([7], []), EngineAnswer([7], []))
    check = Check("vllm", "vllm", "1", [short])
    assert check.problems == ["drafts: no cycle could be compared; take prompts with longer answers (--prompts)"]
    assert check.conclusion == f"does not agree: {check.problems[0]}"


def test_the_command_says_what_is_missing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRAFTWING_VLLM_PYTHON", raising=False)
    head, target, out = str(models / "head"), str(models / "target"), tmp_path / "out"
    for command, says in [
        ([head], "output: name the folder"),
        ([str(tmp_path / "none"), "--check"], "is no folder that was exported"),
        ([head, "--check"], "to: "),
        ([head, "--output", str(out)], "target: needed"),
        ([head, "--to", "vllm", "--target", target, "--output", str(out), "--check"], "check: vllm: not installed"),
        ([head, "--to", "llama.cpp", "--target", target, "--check", sys.executable], "target_gguf: "),
    ]:
        assert main(["export", *command]) == 2
        assert says in capsys.readouterr().err
        assert not out.exists(), "nothing is written for an engine that cannot check it"
    assert written_for(models / "vllm") == ("vllm", "org/it")
