"""``gale bench``: what it sends, when, and what it makes of the answers, against a server that plays a script."""

import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clients.bench.metrics import Run, figures, good, percentile
from clients.bench.protocol import Answer
from clients.bench.report import print_results
from clients.bench.workload import (
    Lengths,
    Ramp,
    arrivals,
    passages,
    random_conversations,
    shared_prefixes,
)
from server import cli
from tests.unit.scripted_http import ScriptedServer, scripted_server

INFINITY = float("inf")


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (25.0, 0.2)])
def test_intervals_have_the_rate_and_the_burstiness(burstiness: float, spread: float) -> None:
    moments = arrivals(random.Random(0), 4001, 50.0, burstiness)
    assert moments[0] == 0 and moments[-1] == pytest.approx(80.0)
    intervals = [later - earlier for earlier, later in pairwise(moments)]
    assert min(intervals) >= 0
    # The coefficient of variation of a gamma distribution of this shape.
    assert statistics.stdev(intervals) / statistics.fmean(intervals) == pytest.approx(spread, rel=0.1)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert list(arrivals(random.Random(0), 3, INFINITY, 1.0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_begins_and_ends_at_its_rates(strategy: Any) -> None:
    moments = arrivals(random.Random(0), 2001, Ramp(strategy, 10.0, 100.0), 1000.0)
    first = statistics.fmean(later - earlier for earlier, later in pairwise(moments[:50]))
    last = statistics.fmean(later - earlier for earlier, later in pairwise(moments[-50:]))
    assert first == pytest.approx(1 / 10, rel=0.1)
    assert last == pytest.approx(1 / 100, rel=0.1)


def test_workloads_are_drawn_from_their_seed() -> None:
    def draw(seed: int) -> Any:
        return random_conversations(random.Random(seed), 5, Lengths(20, 0.5), Lengths(8, 0.0))

    assert draw(1) == draw(1) != draw(2)
    for conversation in draw(1):
        [turn] = conversation.turns
        assert 10 <= len(turn.prompt) <= 30 and turn.max_tokens == 8


def test_shared_prefixes_are_shared_and_their_ends_are_not() -> None:
    conversations = shared_prefixes(random.Random(0), 30, 3, 100, Lengths(10, 0.0), Lengths(8, 0.0), text=False)
    prompts = [conversation.turns[0].prompt for conversation in conversations]
    assert {len(prompt) for prompt in prompts} == {110}
    assert len({tuple(prompt[:100]) for prompt in prompts}) == 3
    assert len({tuple(prompt[100:]) for prompt in prompts}) == 30


def test_passages_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one two three four five")
    for conversation in passages(random.Random(0), 9, path, Lengths(7, 0.0), Lengths(8, 0.0)):
        assert conversation.turns[0].prompt in " ".join(["one two three four five"] * 3)
    path.write_text(" \n")
    with pytest.raises(ValueError, match="no words"):
        passages(random.Random(0), 1, path, Lengths(7, 0.0), Lengths(8, 0.0))


def test_percentiles_are_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    values = sorted(random.Random(0).uniform(0, 9) for _ in range(37))
    for share in (0, 1, 50, 90, 99, 99.9, 100):
        assert percentile(values, share) == pytest.approx(numpy.percentile(values, share))


def test_figures_by_hand() -> None:
    answers = [
        Answer(sent=0.0, first=0.1, ended=1.1, gaps=[0.5, 0.5], chunks=3, prompt_tokens=7, output_tokens=3),
        Answer(sent=0.5, first=0.8, ended=2.0, gaps=[1.2], chunks=2, prompt_tokens=5, output_tokens=2),
        Answer(sent=0.6, ended=0.7, error="503: full"),
    ]
    result = figures(Run("s", "m", INFINITY, None, "resend", answers, 2.0), limits={"ttft": 200.0}, percentiles=[99.0])
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (12, 5)
    assert result["request_throughput"] == 1.0 and result["output_throughput"] == 2.5
    assert result["total_token_throughput"] == 8.5
    assert result["request_goodput"] == 0.5
    assert result["mean_ttft_ms"] == pytest.approx(200) and result["median_ttft_ms"] == pytest.approx(200)
    assert result["mean_tpot_ms"] == pytest.approx((500 + 1200) / 2)
    assert result["median_itl_ms"] == pytest.approx(500) and result["p99_itl_ms"] == pytest.approx(1186)
    assert result["mean_e2el_ms"] == pytest.approx(1300)
    assert result["max_concurrent_requests"] == 2
    # By seconds: 0.1, 0.6 and 0.8; 1.1 and 2.0 are others'.
    assert result["max_output_tokens_per_s"] == pytest.approx(3)
    assert result["errors"] == ["", "", "503: full"]


def test_goodput_wants_every_limit_met() -> None:
    answer = Answer(sent=0.0, first=0.1, ended=1.1, output_tokens=11)
    assert good(answer, {"ttft": 101, "tpot": 101, "e2el": 1101})
    for broken in ({"ttft": 99}, {"tpot": 99}, {"e2el": 1099}):
        assert not good(answer, {"ttft": 101, "tpot": 101, "e2el": 1101} | broken)


# Against a server that plays a script.


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


def bench(server: ScriptedServer, *flags: str) -> int:
    return cli.main(["bench", "--base-url", server.url, "--num-prompts", "4", "--num-warmups", "0", *flags])


def results(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_of_completions(scripted: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    assert bench(scripted, "--random-input-len", "9", "--random-output-len", "3", "--output", str(out)) == 0
    assert len(scripted.bodies) == 4
    for body in scripted.bodies:
        assert body["model"] == "scripted" and body["max_tokens"] == 3 and body["ignore_eos"] is True
        assert len(body["prompt"]) == 9
    result = results(out)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (4, 0, 12)
    assert result["input_lens"] == [4, 4, 4, 4]
    assert "Requests completed" in capsys.readouterr().out


def test_chat_sends_messages_and_history(scripted: ScriptedServer) -> None:
    flags = ("--backend", "openai-chat", "--dataset-name", "multi-turn", "--num-turns", "2", "--max-concurrency", "1")
    assert bench(scripted, *flags, "--num-prompts", "1", "--random-input-len", "2") == 0
    first, second = (body["messages"] for body in scripted.bodies)
    assert [message["role"] for message in first] == ["user"]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[0] == first[0] and second[1]["content"] == "abc"


def test_a_conversation_of_completions_grows(scripted: ScriptedServer) -> None:
    assert bench(scripted, "--dataset-name", "multi-turn", "--num-turns", "2", "--num-prompts", "1") == 0
    first, second = (body["prompt"] for body in scripted.bodies)
    assert second.startswith(f"{first}abc ")


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_turns_go_on_from_states(scripted: ScriptedServer, backend: str, tmp_path: Path) -> None:
    scripted.script = "states"
    out = tmp_path / "run.json"
    flags = ("--backend", backend, "--dataset-name", "multi-turn", "--num-turns", "3", "--num-prompts", "1")
    assert bench(scripted, *flags, "--history", "resend,state", "--output", str(out)) == 0
    resent, by_state = scripted.bodies[:3], scripted.bodies[3:]
    assert not any("state" in body or "save_state" in body for body in resent)
    name = by_state[0]["save_state"]
    # The last turn has nobody behind it, and the state goes with the conversation.
    assert [(body.get("state"), body.get("save_state")) for body in by_state] == [
        (None, name),
        (name, name),
        (name, None),
    ]
    assert scripted.deleted == [f"/v1/states/{name}"]
    if backend == "openai":
        first, second, third = (body["prompt"] for body in by_state)
        assert not first.startswith(" ") and second[0] == third[0] == " "
        assert len(resent[2]["prompt"]) > 2 * len(third)
    else:
        assert [len(body["messages"]) for body in resent] == [1, 3, 5]
        assert [len(body["messages"]) for body in by_state] == [1, 1, 1]
    assert [(run["history"], run["turns"]) for run in results(out)] == [("resend", [0, 1, 2]), ("state", [0, 1, 2])]


def test_a_server_without_states_is_not_measured_by_them(
    scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--dataset-name", "multi-turn", "--history", "state")
    assert bench(scripted, *flags) == 1
    assert "404" in capsys.readouterr().err and not scripted.bodies


def test_a_state_that_was_not_saved_is_a_failure(scripted: ScriptedServer, tmp_path: Path) -> None:
    scripted.script = "forgetful"
    out = tmp_path / "run.json"
    assert bench(scripted, "--dataset-name", "multi-turn", "--history", "state", "--output", str(out)) == 1
    assert all("saves no state" in error for error in results(out)["errors"]) and len(scripted.bodies) == 4


@contextmanager
def running(server: ScriptedServer, *flags: str) -> Iterator["subprocess.Popen[str]"]:
    """``gale bench`` in a process of its own."""
    command = [sys.executable, "-m", "server", "bench", "--base-url", server.url, "--num-warmups", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_bodies(server: ScriptedServer, number: int) -> None:
    deadline = time.monotonic() + 60
    while len(server.bodies) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_complete_is_reported_when_it_is_stopped(scripted: ScriptedServer, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    # The second run would take hours.
    with running(scripted, "--request-rate", "1000,0.001", "--num-prompts", "3", "--output", str(out)) as process:
        wait_for_bodies(scripted, 4)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
        assert process.returncode == 130
    assert "stopped; the runs before this one are reported" in errors and "Requests completed" in shown
    assert (results(out)["completed"], results(out)["request_rate"]) == (3, 1000.0)


def test_a_run_that_is_stopped_leaves_no_state(scripted: ScriptedServer) -> None:
    scripted.script = "states, then stall"
    flags = ("--dataset-name", "multi-turn", "--num-turns", "3", "--num-prompts", "2", "--history", "state")
    with running(scripted, *flags) as process:
        wait_for_bodies(scripted, 4)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "nothing is reported" in errors
    assert set(scripted.deleted) == {f"/v1/states/{body['save_state']}" for body in scripted.bodies}


def test_every_run_has_prompts_of_its_own(scripted: ScriptedServer) -> None:
    assert bench(scripted, "--max-concurrency", "1,2", "--num-warmups", "2", "--random-input-len", "6") == 0
    prompts = [tuple(body["prompt"]) for body in scripted.bodies]
    warmups, first, second = prompts[:2], set(prompts[2:6]), set(prompts[6:])
    assert len(first) == len(second) == 4 and not first & second
    assert len(set(warmups)) == 1 and not set(warmups) & (first | second)
    bodies = scripted.bodies[:]
    assert bench(scripted, "--max-concurrency", "1,2", "--num-warmups", "2", "--random-input-len", "6") == 0
    assert scripted.bodies[len(bodies) :][2:6] == bodies[2:6], "the seed says which"


def test_sampling_and_notes_of_a_run(scripted: ScriptedServer, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    sampling = ("--temperature", "0.7", "--top-p", "0.9", "--top-k", "5", "--input-len", "3", "--output-len", "7")
    notes = ("--metadata", "tp=1", "card=H100", "--burstiness", "2", "--output", str(out))
    assert bench(scripted, *sampling, *notes) == 0
    for body in scripted.bodies:
        assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (0.7, 0.9, 5, 7)
        assert "min_p" not in body and len(body["prompt"]) == 3
    result = results(out)
    assert (result["tp"], result["card"], result["backend"], result["burstiness"]) == ("1", "H100", "openai", 2.0)
    assert datetime.strptime(result["date"], "%Y%m%d-%H%M%S").year > 2000


def test_only_the_latencies_that_are_asked_for_are_shown(
    scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(scripted, "--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,75") == 0
    shown = capsys.readouterr().out
    assert "Time to first token" in shown and "Inter-token" not in shown
    assert "p75" in shown and "p50" not in shown, "that is the median"


def test_a_server_that_is_not_there_yet_is_waited_for() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--ready-check-timeout-sec", "60", "--num-prompts", "2", "--num-warmups", "0"]
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(cli.main, ["bench", "--base-url", f"http://127.0.0.1:{port}", *flags])
        time.sleep(1.0)
        with scripted_server(port) as late:
            assert code.result(120) == 0
            assert len(late.bodies) == 2


def test_keys_and_further_fields_are_sent(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    assert bench(scripted, "--extra-body", '{"top_k": 7}', "--no-ignore-eos") == 0
    assert set(scripted.keys) == {"Bearer sesame"}
    assert scripted.bodies[0]["top_k"] == 7 and "ignore_eos" not in scripted.bodies[0]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("refuse", "400: 'max_tokens' is too large"),
        ("fail", "the engine died"),
        ("cut", "without [DONE]"),
    ],
)
def test_failures_are_told(
    scripted: ScriptedServer, script: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.script = script
    out = tmp_path / "run.json"
    assert bench(scripted, "--output", str(out)) == 1
    assert "4 x failed" in (shown := capsys.readouterr().out) and message in shown
    assert results(out)["failed"] == 4


def test_a_first_request_that_fails_ends_it(scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.script = "refuse"
    assert bench(scripted, "--num-warmups", "1") == 1
    assert len(scripted.bodies) == 1
    assert "fails a first request: 400" in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--base-url", "http://127.0.0.1:1"]) == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err


def test_every_setting_is_a_run_and_servers_take_turns(scripted: ScriptedServer, tmp_path: Path) -> None:
    with scripted_server() as other:
        out = tmp_path / "run.json"
        flags = ("--max-concurrency", "1,2", "--request-rate", "100,200", "--output", str(out))
        assert bench(scripted, "--compare", scripted.url, other.url, *flags) == 0
    assert [(r["request_rate"], r["max_concurrency"], r["completed"]) for r in results(out)] == [
        (rate, most, 4) for rate in (100.0, 200.0) for most in (1, 2) for _ in range(2)
    ]
    assert len(scripted.bodies) == len(other.bodies) == 16
    assert [body["prompt"] for body in scripted.bodies[:4]] == [body["prompt"] for body in other.bodies[:4]]


def test_two_servers_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    def result(server: str, seconds: float) -> dict[str, Any]:
        answer = Answer(sent=0.0, first=0.1 * seconds, ended=seconds, gaps=[0.5], prompt_tokens=7, output_tokens=3)
        run = Run(server, "m", INFINITY, None, "resend", [answer], seconds)
        return figures(run, limits={}, percentiles=[99.0])

    pair = [result("first.example.org:8000", 1.0), result("second.example.org:8000", 2.0)]
    print_results(Console(width=80), pair * 2, [99.0], ["ttft", "e2el"])
    shown = capsys.readouterr().out
    assert shown.count("Requests completed") == 2, "a pair of runs is as much as fits"
    assert all(len(line) <= 80 for line in shown.splitlines())
    rows = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()]
    found = {row[0]: row[1:] for row in rows}
    assert found["Requests completed"] == ["1", "1"]
    assert found["Output tokens/s"] == ["3.0", "1.5", "0.50x"]
    assert found["p99"] == ["1,000.00", "2,000.00", "2.00x"], "of the end-to-end latency, which comes last"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--request-rate", "0"], "must be above 0"),
        (["--num-prompts", "0"], "must be at least 1"),
        (["--goodput", "speed:3"], "expected NAME:MILLISECONDS"),
        (["--extra-body", "[]"], "expected a JSON object"),
        (["--ramp-up-strategy", "linear"], "go together"),
        (["--dataset-name", "text"], "go together"),
        (["--header", "nothing"], "expected KEY=VALUE"),
        (["--history", "telepathy"], "'telepathy' is not one of resend, state"),
        (["--history", "state"], "takes --dataset-name multi-turn"),
        (["--percentile-metrics", "speed"], "'speed' is not one of ttft"),
        (["--report", "curves.pdf"], ".png or a .html"),
        (["--output", "nowhere/run.json"], "there is no folder"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_flags_that_cannot_work(flags: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["bench", *flags])
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_help_lists_the_flags_of_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    shown = capsys.readouterr().out
    wanted = "base-url model num-prompts request-rate burstiness max-concurrency random-input-len random-output-len"
    for flag in (wanted + " goodput seed output").split():
        assert f"--{flag} " in shown
