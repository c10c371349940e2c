"""lm-evaluation-harness, ``local-completions``, on small tasks: its numbers are the model's own.

What the harness reports is compared with float64 log-probabilities of the same token ids, computed without the
server (``reference.py``), and with the greedy texts that the server gives to another client.
"""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import lm_eval
import pytest
import yaml
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from tests.clients.conftest import KEY, MODEL
from tests.e2e.running import PYTHON, RunningServer

REPOSITORY = Path(__file__).parents[2]
CLASSICS = REPOSITORY / "server" / "assets" / "classics-11m"
TOLERANCE = 1e-3

QUESTIONS = [
    ("The old man looked at the", [" sea", " of", " carburettor"], 0),
    ("She opened the door and", [" sang quantum chromodynamics", " went out", " the the"], 1),
    ("It was a dark and stormy", [" night", " algebra", " teapot"], 0),
    ("The king drew his", [" modem", " sword", " seventeen"], 1),
    ("He had never been in", [" love before", " verb spoon", " \u00e9t\u00e9 na\u00efve"], 0),
    ("\u201cWhere are you going?\u201d", [" said the boy", " \u4e16\u754c", " ,,,,"], 0),
]
TEXTS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea.",
    "Na\u00efve caf\u00e9s of 1920 had 37 tables; none was free.",
]
PROMPTS = ["The old man looked at the sea and", "Once upon a time there was", "She opened the letter, and"]


class Recording(LocalCompletionsAPI):
    """Keeps what was asked and what was understood."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[list[int], list[int], float, bool]] = []

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        results = super()._loglikelihood_tokens(requests, **options)
        for (_, context, answer), result in zip(requests, results, strict=True):
            self.seen.append((context, answer, *result))
        return results


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, server: RunningServer) -> TaskManager:
    """The tasks, as a user would write them: a YAML file and a JSONL file each."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [(prompt, greedy_text(server, prompt)) for prompt in PROMPTS]
    add_task(
        folder,
        "gale_choice",
        [{"text": text, "choices": choices, "label": label} for text, choices, label in QUESTIONS],
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_choice="choices",
        doc_to_target="label",
        target_delimiter="",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    add_task(
        folder,
        "gale_rolling",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    )
    add_task(
        folder,
        "gale_until",
        [{"text": prompt, "target": text} for prompt, text in texts],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{target}}",
        generation_kwargs={"until": ["\n", "."], "max_gen_toks": 20, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    return TaskManager(include_path=str(folder), include_defaults=False)


def add_task(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": 1}, **fields}
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({**task, "dataset_kwargs": {"data_files": {"test": str(data)}}})
    )


def greedy_text(server: RunningServer, prompt: str) -> str:
    """What another client gets for the request of ``gale_until``; its prompt is tokenized without BOS."""
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"prompt": prompt, "add_special_tokens": False}
    tokens = httpx.post(f"{server.base_url}/tokenize", json=body, headers=headers).json()["tokens"]
    body = {"prompt": tokens, "temperature": 0, "max_tokens": 20, "stop": ["\n", ".", "</s>"]}
    answer = httpx.post(f"{server.base_url}/v1/completions", json=body, headers=headers, timeout=60).json()
    return answer["choices"][0]["text"]


@pytest.fixture(
    params=[
        {"tokenizer_backend": "auto", "batch_size": 1, "num_concurrent": 4},
        {"tokenizer_backend": "huggingface", "tokenizer": str(CLASSICS), "batch_size": 4},
        {"tokenizer_backend": "huggingface", "tokenizer": str(CLASSICS), "batch_size": 1, "add_bos_token": True},
    ],
    ids=["the server's tokenizer, concurrent", "local tokenizer, batches", "with BOS"],
)
def model(request: pytest.FixtureRequest, server: RunningServer) -> Recording:
    return Recording(
        model=MODEL,
        base_url=f"{server.base_url}/v1/completions",
        header={"Authorization": f"Bearer {KEY}"},
        auth_token=KEY,
        max_length=512,
        **request.param,
    )


def evaluate(model: Recording, tasks: TaskManager, name: str) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(model=model, tasks=[name], task_manager=tasks, bootstrap_iters=0)
    return {key.partition(",")[0]: value for key, value in results["results"][name].items()}


def reference(token_lists: list[list[int]]) -> list[dict[str, Any]]:
    command = [PYTHON, "-m", "tests.clients.reference"]
    done = subprocess.run(
        command, input=json.dumps(token_lists), capture_output=True, text=True, cwd=REPOSITORY, timeout=170, check=True
    )
    return json.loads(done.stdout)


def check_against_reference(model: Recording, record: Callable[[str, object], None]) -> list[float]:
    """Every log-likelihood of the harness beside the model's own; returns the latter."""
    own: list[float] = []
    worst = 0.0
    answers = reference([context + answer for context, answer, *_ in model.seen])
    for (context, answer, logprob, greedy), expected in zip(model.seen, answers, strict=True):
        first = len(context) - 1
        own.append(sum(expected["logprobs"][first:]))
        assert len(expected["logprobs"]) - first == len(answer)
        worst = max(worst, abs(logprob - own[-1]))
        assert greedy == all(expected["greedy"][first:])
    record("largest difference of a log-likelihood", f"{worst:.1e}")
    assert worst < TOLERANCE
    return own


def test_loglikelihood(model: Recording, tasks: TaskManager, record_property: Callable[[str, object], None]) -> None:
    results = evaluate(model, tasks, "gale_choice")
    own = iter(check_against_reference(model, record_property))
    right = right_norm = 0
    for _, choices, label in QUESTIONS:
        logprobs = [next(own) for _ in choices]
        right += max(range(3), key=logprobs.__getitem__) == label
        right_norm += max(range(3), key=lambda i: logprobs[i] / len(choices[i])) == label
    assert results["acc"] == pytest.approx(right / len(QUESTIONS), abs=TOLERANCE)
    assert results["acc_norm"] == pytest.approx(right_norm / len(QUESTIONS), abs=TOLERANCE)
    assert right > len(QUESTIONS) / 2, "the model is better than chance"
    record_property("acc", f"{results['acc']:.3f}")


def test_loglikelihood_rolling(
    model: Recording, tasks: TaskManager, record_property: Callable[[str, object], None]
) -> None:
    results = evaluate(model, tasks, "gale_rolling")
    total = sum(check_against_reference(model, record_property))
    bits = -total / sum(len(text.encode()) for text in TEXTS) / math.log(2)
    assert results["bits_per_byte"] == pytest.approx(bits, abs=TOLERANCE)
    record_property("bits per byte", f"{results['bits_per_byte']:.4f}")


def test_generate_until(model: Recording, tasks: TaskManager) -> None:
    if model.add_bos_token:
        pytest.skip("the texts to compare with were made without BOS")
    assert evaluate(model, tasks, "gale_until")["exact_match"] == 1.0
