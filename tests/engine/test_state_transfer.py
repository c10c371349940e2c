"""States that travel between engines as files: exactly, or with a clear refusal."""

import json
import random
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from server.component_settings import StateCacheConfig
from server.engine import saved_files, state_transfer
from server.engine.state_file import read_header, read_state, write_state
from server.types import FinishReason, Refusal, RefusalReason, StateAction, StateCommand, StateInfo, pack_tokens
from tests.engine.driving import CLIENT, Driver, random_prompt
from tests.engine.test_saved_files import GREEDY, VOCAB, MiB, absorbed, listed, run
from tests.engine.test_saved_files import make_driver as make

KEY = b"sixteen bytes or more"


def make_driver(name: str = "base", *, key: bytes | None = None, shared: bool = False, **changes: Any) -> Driver:
    cache = StateCacheConfig(gpu_bytes=64 * MiB, host_bytes=64 * MiB, signing_key=key, shared=shared)
    return make(Path(), name, **{"cache": cache, **changes})


def download(driver: Driver, state: str, path: Path, tenant: str = "") -> StateInfo:
    told = driver.command(StateAction.DOWNLOAD, state, tenant=tenant, path=path)
    assert isinstance(told, list), told
    return told[0]


def upload(driver: Driver, path: Path, tenant: str = "", **options: Any) -> list[StateInfo] | Refusal:
    return driver.command(StateAction.UPLOAD, tenant=tenant, path=path, **options)


def uploaded(driver: Driver, path: Path, **options: Any) -> StateInfo:
    told = upload(driver, path, **options)
    assert isinstance(told, list), told
    return told[0]


def saved(driver: Driver, path: Path, *, length: int = 60, seed: int = 1, **options: Any) -> list[int]:
    """The transcript of a state that has been downloaded to a file."""
    prompt = random_prompt(length, VOCAB, seed)
    answer = run(driver, prompt, save=True, max_tokens=9, **options)
    assert answer.state is not None
    download(driver, answer.state.id, path, options.get("tenant", ""))
    return prompt + answer.token_ids


MODES = pytest.mark.parametrize(
    "mode", [("cpu", False), pytest.param(("cuda", True), marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)


@MODES
@pytest.mark.parametrize(
    ("name", "state_dtype"), [("base", "float32"), ("conv", "float32"), ("gqa", "bfloat16"), ("base", "int8")]
)
def test_another_engine_goes_on_exactly(name: str, state_dtype: str, mode: tuple[str, bool], tmp_path: Path) -> None:
    ours, theirs = (make_driver(name, mode=mode, state_dtype=state_dtype) for _ in range(2))
    transcript = saved(ours, tmp_path / "a")
    (mine,) = listed(ours)
    state = uploaded(theirs, tmp_path / "a", name="moved", ttl=77.0)
    assert (state.name, state.num_tokens, state.nbytes) == ("moved", len(transcript), mine.nbytes)
    assert state.expires - state.created == pytest.approx(77)
    for new in ([], [5, 6, 7]):
        answer = run(theirs, new, state="moved", max_tokens=12)
        assert answer.token_ids == run(ours, new, state=mine.id, max_tokens=12).token_ids
        assert answer.cached_tokens == len(transcript)
    assert absorbed(theirs) == 3
    if state_dtype == "float32":
        cold = make(None, name, mode=mode)
        assert answer.token_ids == cold.complete([*transcript, 5, 6, 7], max_tokens=12, **GREEDY).token_ids


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    driver = make_driver(key=KEY)
    transcript = saved(driver, tmp_path / "a", tenant="alice", name="book", turn="assistant")
    parts, metadata = read_state(tmp_path / "a", None, key=KEY)
    assert parts["transcript"].tolist() == transcript
    assert {"recurrent", "logits"} <= parts.keys()
    assert (metadata["tenant"], metadata["name"], metadata["turn"]) == ("alice", "book", "assistant")
    assert metadata["num_tokens"] == metadata["num_absorbed"] == str(len(transcript))
    assert "id" not in metadata and "expires" not in metadata
    first = download(driver, "book", tmp_path / "b", "alice")
    assert first.digest == metadata["digest"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), "a state has one content"
    told = driver.command(StateAction.DOWNLOAD, "book", tenant="bob", path=tmp_path / "c")
    assert isinstance(told, Refusal) and told.reason is RefusalReason.UNKNOWN_STATE
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("source", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "int8"])
def test_other_types_of_states(source: str, target: str, tmp_path: Path) -> None:
    ours, theirs = make_driver(state_dtype=source), make_driver(state_dtype=target)
    transcript = saved(ours, tmp_path / "a")
    told = upload(theirs, tmp_path / "a", name="a")
    sizes = {"float32": 4, "bfloat16": 2, "int8": 1}
    if sizes[source] > sizes[target]:
        assert isinstance(told, Refusal) and told.code == "state_needs_conversion"
        assert "would have to round" in told.message
        told = upload(theirs, tmp_path / "a", name="a", convert=True)
    assert isinstance(told, list), told
    before = absorbed(theirs)
    answer = run(theirs, [5], state="a", max_tokens=1, logprobs=0)
    assert absorbed(theirs) - before == 1
    exact = make(None).complete([*transcript, 5], max_tokens=1, logprobs=5, **GREEDY)
    known = dict(zip(exact.logprobs[0].top_ids, exact.logprobs[0].top, strict=True))
    assert answer.logprobs[0].sampled == pytest.approx(known[answer.token_ids[0]], abs=0.05)


def test_a_state_that_was_given_up_has_to_be_absorbed_again(tmp_path: Path) -> None:
    driver = make_driver()
    transcript = saved(driver, tmp_path / "a")
    (state,) = listed(driver)
    assert driver.engine._states is not None and driver.engine._reuse is not None
    entry = driver.engine._states.find("", state.id).entry  # type: ignore[union-attr]
    driver.engine._reuse._cache.tiers.drop(entry)  # type: ignore[arg-type]
    told = driver.command(StateAction.DOWNLOAD, state.id, path=tmp_path / "b")
    assert isinstance(told, Refusal) and told.reason is RefusalReason.NOT_ABSORBED
    run(driver, [], state=state.id, max_tokens=0)
    download(driver, state.id, tmp_path / "b")
    theirs = make_driver()
    uploaded(theirs, tmp_path / "b", name="b")
    cold = make(None).complete(transcript, max_tokens=9, **GREEDY)
    assert run(theirs, [], state="b", max_tokens=9).token_ids == cold.token_ids


def test_a_state_that_is_deleted_while_it_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver()
    saved(driver, tmp_path / "a", name="mine")
    monkeypatch.setattr(state_transfer, "read_snapshot", lambda *_: None)
    path = str(tmp_path / "b")
    command = StateCommand(request_id=99, tenant="", action=StateAction.DOWNLOAD, state="mine", path=path)
    driver.engine.command(CLIENT, command)
    assert isinstance(driver.command(StateAction.DELETE, "mine"), list)
    driver.run()
    assert driver.rejected[99].reason is RefusalReason.UNKNOWN_STATE


def refused(driver: Driver, path: Path, code: str, because: str) -> None:
    told = upload(driver, path)
    assert isinstance(told, Refusal) and told.reason is RefusalReason.BAD_FILE, told
    assert told.code == code and because in told.message, told
    assert listed(driver) == [] and not driver.engine._states._reserved.total()  # type: ignore[union-attr]


def test_what_is_refused(tmp_path: Path) -> None:
    driver = make_driver()
    good = tmp_path / "good"
    saved(make_driver(), good)
    content = good.read_bytes()
    path = tmp_path / "bad"
    rng = random.Random(0)
    for number in [*rng.sample(range(len(content)), 60), 0, 7, 8, 9]:
        path.write_bytes(content[:number])
        refused(driver, path, "state_invalid", "")
    for position in rng.sample(range(len(content)), 100):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        told = upload(driver, path)
        if isinstance(told, list):  # a blank of the padding
            assert content[position] == ord(" ")
            driver.command(StateAction.DELETE, told[0].id)
    path.write_bytes(content + b"more")
    refused(driver, path, "state_invalid", "longer than its tensors")
    path.write_bytes(b"\x80\x04\x95" + content)
    refused(driver, path, "state_invalid", "not a state")
    nested = b"[" * 500_000
    path.write_bytes(len(nested).to_bytes(8, "little") + nested)
    refused(driver, path, "state_invalid", "no JSON")
    twice = b'{"__metadata__":{},"__metadata__":{}}'
    path.write_bytes(len(twice).to_bytes(8, "little") + twice)
    refused(driver, path, "state_invalid", "no JSON")
    path.write_bytes(content.replace(b"gale-state-1", b"gale-state-9"))
    refused(driver, path, "state_layout_unknown", "gale-state-9")
    # Whole and unchanged, but made up.
    parts, metadata = read_state(good, None)

    def rewritten(changes: dict[str, torch.Tensor | None], **said: str) -> Path:
        tensors = {name: tensor for name, tensor in (parts | changes).items() if tensor is not None}
        write_state(path, tensors, metadata | said)
        return path

    refused(driver, rewritten({}, model="0" * 32), "state_of_another_model", "belongs to the model")
    saved(make_driver("conv"), path)
    refused(driver, path, "state_of_another_model", "belongs to the model")
    refused(driver, rewritten({"recurrent": parts["recurrent"] * torch.inf}), "state_invalid", "not finite")
    refused(driver, rewritten({"logits": parts["logits"] * torch.nan}), "state_invalid", "not finite")
    refused(driver, rewritten({"recurrent": parts["recurrent"][1:].clone()}), "state_invalid", "of another model")
    refused(driver, rewritten({"recurrent": parts["recurrent"].half()}), "state_invalid", "of another model")
    for shape in ((), (5,), (2, 3, 4), (1 << 39, 2, 0), (1 << 39, 0)):  # the last ones take no bytes
        halves = torch.zeros(shape, dtype=torch.int16)
        refused(driver, rewritten({"recurrent": halves}), "state_invalid", "of another model")
        refused(driver, rewritten({"logits": halves}), "state_invalid", "of another model")
    layers, *sizes = parts["recurrent"].shape
    halves = torch.zeros((layers, 2, *sizes), dtype=torch.int16)
    halves[1, 0, 1, 3, 5] = 0x7FC0
    refused(driver, rewritten({"recurrent": halves}), "state_invalid", "not finite")
    halves.zero_()[1, 1, 1, 3, 5] = -1  # below zero: as one number, not a number
    refused(driver, rewritten({"recurrent": halves}), "state_invalid", "not finite")
    refused(driver, rewritten({"recurrent": None}), "state_invalid", "holds no recurrent")
    refused(driver, rewritten({"extra": torch.zeros(3)}), "state_invalid", "holds extra")
    refused(driver, rewritten({"scales": torch.zeros(2, 2, 32)}), "state_invalid", "scales")
    refused(driver, rewritten({"logits": torch.zeros(VOCAB + 1)}), "state_invalid", "of another model")
    refused(driver, rewritten({"transcript": None}), "state_invalid", "no transcript")
    other = parts["transcript"].clone()
    other[3] += 1
    refused(driver, rewritten({"transcript": other}), "state_invalid", "not the one that was saved")
    for token in (-1, VOCAB):
        other[3] = token
        digest = sha256(pack_tokens(other.tolist())).hexdigest()
        made_up = rewritten({"transcript": other}, transcript_sha256=digest)
        refused(driver, made_up, "state_invalid", "none of this model")
    refused(driver, rewritten({}, num_folded="3", num_absorbed="60"), "state_invalid", "no ring that holds them")
    refused(driver, rewritten({}, num_absorbed="9999"), "state_invalid", "do not fit")
    refused(driver, rewritten({}, num_absorbed="x"), "state_invalid", "incomplete")
    refused(driver, rewritten({}, turn="\ud800"), "state_invalid", "no text")
    refused(driver, rewritten({}, turn="x" * 2000), "state_invalid", "too long")
    refused(driver, rewritten({}, turn="oracle"), "state_invalid", "turn")
    refused(driver, rewritten({"\ud800": torch.zeros(3)}), "state_invalid", "no text")
    refused(driver, rewritten({"x" * 2000: torch.zeros(3)}), "state_invalid", "too long")
    # And nothing of all this has hurt.
    assert uploaded(driver, good).num_tokens == 69


def test_what_would_grow_or_overflow_is_refused(tmp_path: Path) -> None:
    """Finite numbers, of which folding, or rounding to a smaller type, would make infinities."""
    good, path = tmp_path / "good", tmp_path / "bad"
    saved(make_driver(state_dtype="bfloat16"), good)
    parts, metadata = read_state(good, None)
    assert int(metadata["num_absorbed"]) > int(metadata["num_folded"]), "nothing waits in the ring"
    driver = make_driver()
    write_state(path, parts | {"ring_decays": torch.full_like(parts["ring_decays"], 1e30)}, metadata)
    refused(driver, path, "state_invalid", "above 0")
    huge = {"ring_keys": torch.full_like(parts["ring_keys"], 3e38), "ring_values": parts["ring_values"] * 1e30}
    write_state(path, parts | huge, metadata)
    refused(driver, path, "state_invalid", "not finite")
    uploaded(driver, good)


def test_huge_numbers_hurt_nobody_else(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    transcript = saved(make_driver(), good)
    parts, metadata = read_state(good, None)
    parts["recurrent"] = torch.full_like(parts["recurrent"], 3e38)
    write_state(bad, parts, metadata)
    honest = make(None).complete([*transcript, 5], max_tokens=9, **GREEDY).token_ids
    driver = make_driver()
    uploaded(driver, bad, name="bad")
    uploaded(driver, good, name="good")
    poisoned = driver.submit([[5]], state="bad", max_tokens=9, **GREEDY)
    fine = driver.submit([[5]], state="good", max_tokens=9, **GREEDY)
    driver.run()
    assert driver.answers[fine, 0].token_ids == honest
    assert driver.answers[poisoned, 0].finish_reason is FinishReason.ERROR
    # Nor whoever gets the slot behind it.
    assert [run(driver, [5], state="good", max_tokens=9).token_ids for _ in range(3)] == [honest] * 3


def test_signatures(tmp_path: Path) -> None:
    signed, unsigned, otherwise = tmp_path / "signed", tmp_path / "unsigned", tmp_path / "otherwise"
    transcript = saved(make_driver(key=KEY), signed)
    saved(make_driver(), unsigned)
    saved(make_driver(key=KEY + b"!"), otherwise)
    driver = make_driver(key=KEY)
    refused(driver, unsigned, "state_signature_invalid", "not signed")
    refused(driver, otherwise, "state_signature_invalid", "signed with another key")
    # Whoever changes it cannot sign it.
    parts, metadata = read_state(signed, None)
    parts["recurrent"][0, 0, 0, 0] += 1
    forged = tmp_path / "forged"
    write_state(forged, parts, metadata)
    content = forged.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert "signature" not in header["__metadata__"]
    header["__metadata__"]["signature"] = metadata["signature"]
    packed = json.dumps(header).encode()
    forged.write_bytes(len(packed).to_bytes(8, "little") + packed + content[read_header(forged).start :])
    refused(driver, forged, "state_signature_invalid", "signed with another key, or changed")
    uploaded(driver, signed, name="a")
    # It is as good as one of our own: others begin there, too.
    run(driver, [*transcript, 5], max_tokens=1)
    assert absorbed(driver) == 1
    for signature in ("\ud800", "\u00e9"):
        header["__metadata__"]["signature"] = signature
        packed = json.dumps(header).encode()
        forged.write_bytes(len(packed).to_bytes(8, "little") + packed + content[read_header(unsigned).start :])
        told = upload(driver, forged)
        assert isinstance(told, Refusal) and told.reason is RefusalReason.BAD_FILE
    # Without a key, signatures are nobody's business.
    uploaded(make_driver(), signed)


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_not_signed_poisons_nobody(shared: bool, tmp_path: Path) -> None:
    """A made-up state is continued by whoever names it, and found by no prompt, not even by the same user's."""
    parts_of = tmp_path / "good"
    transcript = saved(make_driver(), parts_of)
    parts, metadata = read_state(parts_of, None)
    parts["recurrent"] = torch.randn(parts["recurrent"].shape, generator=torch.Generator().manual_seed(0))
    write_state(tmp_path / "bad", parts, metadata)
    folder = tmp_path / "states"
    cache = StateCacheConfig(host_bytes=64 * MiB, folder=folder, disk_bytes=64 * MiB, shared=shared)
    driver, cold = make_driver(cache=cache), make(None)
    uploaded(driver, tmp_path / "bad", tenant="eve", name="bad")
    honest = cold.complete([*transcript, 5, 6], max_tokens=9, **GREEDY).token_ids

    def poisoned() -> list[int]:
        """Goes on from it, leaves states behind, saves another one, which is poisoned, too."""
        answer = run(driver, [5, 6], state="bad", tenant="eve", save=True, name="worse", max_tokens=9)
        driver.command(StateAction.FORK, "worse", tenant="eve", name="fork")
        return answer.token_ids

    lies = poisoned()
    assert lies != honest
    for _ in range(2):
        for tenant in ("eve", "alice"):
            assert run(driver, [*transcript, 5, 6], tenant=tenant, max_tokens=9).token_ids == honest
            whole = [*transcript, 5, 6, *lies]
            assert run(driver, whole, tenant=tenant, max_tokens=3).token_ids == (
                cold.complete(whole, max_tokens=3, **GREEDY).token_ids
            )
        assert isinstance(driver.command(StateAction.DESCRIBE, "bad", tenant="alice"), Refusal)
        assert run(driver, [5, 6], state="bad", tenant="eve", max_tokens=9).token_ids == lies
        # So it is after a restart.
        driver.engine.close()
        driver = make_driver(cache=cache)
    driver.engine.close()


def test_limits_hold_for_uploads(tmp_path: Path) -> None:
    saved(make_driver(), tmp_path / "a")
    cache = StateCacheConfig(host_bytes=64 * MiB, max_saved_per_key=1)
    driver = make_driver(cache=cache)
    uploaded(driver, tmp_path / "a", tenant="a")
    told = upload(driver, tmp_path / "a", tenant="a")
    assert isinstance(told, Refusal) and told.reason is RefusalReason.STATES_LIMIT
    uploaded(driver, tmp_path / "a", tenant="b")
    short = make_driver(max_model_len=50)
    refused(short, tmp_path / "a", "state_invalid", "longer than 50 tokens (--max-model-len)")


def test_a_burst_of_uploads_loses_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_driver()
    transcripts = {number: saved(source, tmp_path / str(number), seed=number) for number in range(8)}
    one = source.engine._runner.parked_bytes
    cache = StateCacheConfig(host_bytes=one, folder=tmp_path / "states", disk_bytes=40 * one)
    driver, cold = make_driver(cache=cache), make(None)
    quick = saved_files.write_state

    def slow(*args: Any, **options: Any) -> object:
        time.sleep(0.02)
        return quick(*args, **options)

    monkeypatch.setattr(saved_files, "write_state", slow)
    for number in transcripts:
        path = str(tmp_path / str(number))
        command = StateCommand(request_id=number, tenant="", action=StateAction.UPLOAD, state="", path=path)
        driver.engine.command(CLIENT, command)
    driver.run()
    for number, transcript in transcripts.items():
        assert number in driver.told, driver.rejected
        before = absorbed(driver)
        request = driver.submit([[]], state=driver.told[number][0].id, max_tokens=3, **GREEDY)
        driver.run()
        assert absorbed(driver) == before
        expected = cold.complete(transcript, max_tokens=3, **GREEDY)
        assert driver.answers[request, 0].token_ids == expected.token_ids
    driver.engine.close()


def test_every_part_travels(tmp_path: Path) -> None:
    """A file holds what the pool holds of a slot, whatever that is."""
    driver = make_driver("conv", state_dtype="int8")
    saved(driver, tmp_path / "a", length=21)
    pool = driver.engine._runner.pool_layout
    header = read_header(tmp_path / "a")
    assert header.parts.keys() - {"transcript"} == pool.keys()
    assert all(header.parts[name] == part for name, part in pool.items())


def test_figures(tmp_path: Path) -> None:
    cache = StateCacheConfig(host_bytes=64 * MiB, folder=tmp_path / "states", disk_bytes=64 * MiB)
    driver = make_driver(cache=cache)
    saved(driver, tmp_path / "a", name="a")
    uploaded(driver, tmp_path / "a", name="b")
    driver.command(StateAction.FORK, "a", name="c")
    driver.command(StateAction.FORK, "a", name="d", ttl=1e-9)
    run(driver, [5], state="a", max_tokens=1)
    driver.command(StateAction.DELETE, "c")
    figures = driver.engine.stats().saved
    operations = {"save": 1, "restore": 1, "fork": 2, "delete": 1, "expire": 1, "upload": 1, "download": 1}
    assert figures.states == 2 and figures.operations == operations
    assert figures.snapshots == {"device": 0, "host": 2, "disk": 0, "saved": 0}
    assert figures.snapshots_bytes["host"] == 2 * listed(driver)[0].nbytes
    assert figures.nbytes == sum(path.stat().st_size for path in (tmp_path / "states" / "saved").iterdir())
    assert {name: sum(one.counts) for name, one in figures.seconds.items()} == {
        name: operations[name] for name in ("save", "fork", "upload", "download")
    }
    assert figures.failed == 0 and figures.skipped == {"damaged": 0, "layout": 0, "model": 0}
    driver.engine.close()
    again = make_driver(cache=cache)
    figures = again.engine.stats().saved
    assert figures.states == 2 and figures.snapshots == {"device": 0, "host": 0, "disk": 0, "saved": 2}
    again.engine.close()


def test_what_is_refused_is_no_restore(tmp_path: Path) -> None:
    driver = make(tmp_path, cache=StateCacheConfig(host_bytes=64 * MiB, max_saved=1))
    run(driver, random_prompt(20, VOCAB, 1), save=True, name="a", max_tokens=2)
    request = driver.submit([[5]], state="a", save=True, max_tokens=1)
    driver.run()
    assert driver.rejected[request].reason is RefusalReason.STATES_FULL
    assert driver.engine.stats().saved.operations["restore"] == 0
