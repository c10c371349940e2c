"""Saved states that outlive their engine: what was acknowledged is found again and goes on as if nothing had been."""

import resource
import time
from pathlib import Path

import pytest

from server.component_settings import StateCacheConfig
from server.engine import saved_files
from server.engine.engine import Engine
from server.engine.saved_files import FOLDER
from server.engine.state_file import read_state, write_state
from server.errors import SettingsError
from server.types import Refusal, RefusalReason, StateAction, StateInfo
from tests.engine.driving import FIXTURES, Answer, Driver, engine_config, random_prompt

VOCAB = 512
GREEDY: dict[str, object] = {"temperature": 0.0, "ignore_eos": True}
MiB = 1 << 20


def make_driver(folder: Path | None, name: str = "base", *, host_bytes: int = 64 * MiB, **changes: object) -> Driver:
    device, overlap = changes.pop("mode", ("cpu", False))  # type: ignore[misc]
    cache = StateCacheConfig(gpu_bytes=64 * MiB, host_bytes=host_bytes, folder=folder, disk_bytes=64 * MiB)
    cache = StateCacheConfig() if folder is None else changes.pop("cache", cache)  # type: ignore[assignment]
    return Driver(Engine(engine_config(FIXTURES / name, device=device, state_cache=cache, **changes), overlap=overlap))


def run(driver: Driver, prompt: list[int], **options: object) -> Answer:
    request = driver.submit([prompt], **(GREEDY | options))  # type: ignore[arg-type]
    assert request not in driver.rejected, driver.rejected[request]
    driver.run()
    return driver.answers[request, 0]


def absorbed(driver: Driver) -> int:
    return driver.engine.stats().prompt_tokens


def listed(driver: Driver, tenant: str = "") -> list[StateInfo]:
    told = driver.command(StateAction.LIST, tenant=tenant)
    assert isinstance(told, list)
    return told


def files(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).iterdir())


MODES = pytest.mark.parametrize(
    "mode",
    [
        pytest.param(("cpu", False), id="cpu-in-step"),
        pytest.param(("cpu", True), id="cpu-overlapped"),
        pytest.param(("cuda", True), id="cuda", marks=pytest.mark.gpu),
    ],
)


@MODES
@pytest.mark.parametrize(
    ("name", "state_dtype"), [("base", "float32"), ("conv", "float32"), ("gqa", "bfloat16"), ("base", "int8")]
)
def test_a_state_goes_on_after_a_restart(name: str, state_dtype: str, mode: tuple[str, bool], tmp_path: Path) -> None:
    cold = make_driver(None, name, mode=mode, state_dtype=state_dtype)
    # States of fewer bits are rounded where pieces end: who goes on without an interruption gets the same.
    steady = make_driver(tmp_path / "steady", name, mode=mode, state_dtype=state_dtype)
    folder = tmp_path / "states"
    transcript, reference = random_prompt(50, VOCAB, 1), None
    for turn in range(3):
        driver = make_driver(folder, name, mode=mode, state_dtype=state_dtype)
        if reference is not None:
            assert listed(driver) == [reference], "ids, names, times, all of it"
        new = random_prompt(turn * 5, VOCAB, 100 + turn)
        before = absorbed(driver)
        prompt = transcript if reference is None else new
        options = {"state": None if reference is None else "talk", "save": True, "name": "talk", "max_tokens": 18}
        answer = run(driver, prompt, **options)
        assert absorbed(driver) - before == (50 if reference is None else len(new))
        transcript = transcript if reference is None else transcript + new
        assert answer.token_ids == run(steady, prompt, **options).token_ids
        if state_dtype == "float32":
            assert answer.token_ids == cold.complete(transcript, max_tokens=18, **GREEDY).token_ids
        transcript = transcript + answer.token_ids
        reference = answer.state
        assert reference is not None and reference.num_tokens == len(transcript)
        driver.engine.close()
        assert [path.name for path in files(folder)] == [f"{reference.id}.safetensors"], "the older one is deleted"


def test_states_lie_in_their_files_only_and_come_back(tmp_path: Path) -> None:
    one = make_driver(None).engine._runner.parked_bytes
    driver, cold = make_driver(tmp_path, host_bytes=2 * one), make_driver(None)
    saved = []
    for seed in range(8):
        prompt = random_prompt(40, VOCAB, seed)
        answer = run(driver, prompt, save=True, max_tokens=4)
        assert answer.state is not None
        saved.append((answer.state.id, prompt + answer.token_ids))
    for number, (reference, transcript) in enumerate(saved * 2):
        before = absorbed(driver)
        answer = run(driver, [7, number], state=reference, max_tokens=5)
        assert absorbed(driver) - before == 2 and answer.cached_tokens == 44
        assert answer.token_ids == cold.complete([*transcript, 7, number], max_tokens=5, **GREEDY).token_ids
    for reference, _ in saved:
        assert isinstance(driver.command(StateAction.DELETE, reference), list)
    assert files(tmp_path) == [] and listed(driver) == []
    assert driver.engine._reuse is not None
    assert driver.engine._reuse.held()["saved"] == (0, 0)
    driver.engine.close()


def test_forks_have_files_of_their_own(tmp_path: Path) -> None:
    driver = make_driver(tmp_path)
    prompt = random_prompt(40, VOCAB, 1)
    first = run(driver, prompt, save=True, name="a", max_tokens=4)
    assert isinstance(driver.command(StateAction.FORK, "a", name="b"), list)
    assert isinstance(driver.command(StateAction.DELETE, "a"), list)
    driver.engine.close()
    again = make_driver(tmp_path)
    assert [state.name for state in listed(again)] == ["b"]
    answer = run(again, [9], state="b", max_tokens=5)
    assert absorbed(again) == 1
    cold = make_driver(None)
    assert answer.token_ids == cold.complete([*prompt, *first.token_ids, 9], max_tokens=5, **GREEDY).token_ids
    again.engine.close()


def test_tenants_keep_what_is_theirs(tmp_path: Path) -> None:
    driver = make_driver(tmp_path)
    for tenant in ("alice", "bob"):
        run(driver, random_prompt(20, VOCAB, 1), tenant=tenant, save=True, name="x", max_tokens=2)
    driver.engine.close()
    again = make_driver(tmp_path)
    (alices,), (bobs,) = listed(again, "alice"), listed(again, "bob")
    assert alices.id != bobs.id and listed(again, "carol") == []
    assert isinstance(again.command(StateAction.DESCRIBE, bobs.id, tenant="alice"), Refusal)
    again.engine.close()


def test_what_is_no_state_of_this_model_is_left_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    driver = make_driver(tmp_path)
    for seed in range(7):
        run(driver, random_prompt(20, VOCAB, seed), save=True, name=f"s{seed}", ttl=9999.0, max_tokens=2)
    driver.engine.close()
    torn, flipped, misnamed, foreign, newer, expired, good = (
        tmp_path / FOLDER / f"{state.id}.safetensors"
        for state in sorted(listed(driver), key=lambda state: state.name or "")
    )
    content = torn.read_bytes()
    torn.write_bytes(content[: len(content) // 2])
    content = flipped.read_bytes()
    flipped.write_bytes(content.replace(b'"name": "s1"', b'"name": "s7"'))
    misnamed.rename(misnamed.with_name("state-0.safetensors"))
    for path, changes in ((foreign, {"model": "another"}), (expired, {"expires": repr(time.time() - 1)})):
        parts, metadata = read_state(path, None)
        write_state(path, parts, metadata | changes)
    newer.write_bytes(newer.read_bytes().replace(b"gale-state-1", b"gale-state-9"))
    (tmp_path / FOLDER / "state-1.safetensors.7.tmp").write_bytes(b"half")

    again = make_driver(tmp_path)
    assert [state.name for state in listed(again)] == ["s6"]
    again.engine.close()
    assert {path.name for path in files(tmp_path)} == {
        f"{torn.name}.damaged",
        f"{flipped.name}.damaged",
        "state-0.safetensors.damaged",
        foreign.name,
        newer.name,
        good.name,
    }
    for path in (torn, flipped, newer):
        assert path.name in caplog.text
    assert again.engine._keeping.files is not None
    assert again.engine._keeping.files.skipped == {"damaged": 3, "layout": 1, "model": 1}
    one = good.stat().st_size
    left = again.engine.stats().saved.skipped_bytes
    assert (left["layout"], left["model"]) == (newer.stat().st_size, foreign.stat().st_size)
    assert 2 * one < left["damaged"] < 3 * one
    # With its own model, a state is there again.
    other = make_driver(tmp_path, "conv")
    assert listed(other) == []
    other.engine.close()
    last = make_driver(tmp_path)
    assert [state.name for state in listed(last)] == ["s6"]
    last.engine.close()


def test_files_that_are_not_used_take_their_part_of_the_disk(tmp_path: Path) -> None:
    one = make_driver(None).engine._runner.parked_bytes
    cache = StateCacheConfig(host_bytes=one, folder=tmp_path, disk_bytes=12 * one)
    driver = make_driver(tmp_path, cache=cache)
    for seed in range(4):
        run(driver, random_prompt(20, VOCAB, seed), save=True, max_tokens=2)
    driver.engine.close()
    for path in files(tmp_path)[:3]:
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        again = make_driver(tmp_path, cache=cache)
        stats = again.engine.stats().saved
        assert stats.states == 1 and stats.skipped["damaged"] == 3, "those of earlier starts, too"
        taken = 0
        while (request := again.submit([[5, taken]], save=True, name=str(taken), max_tokens=1)) not in again.rejected:
            again.run()
            taken += 1
        assert taken == 1, "half of the disk is for six states and what else lies among them"
        assert "bytes of files that this server does not use" in again.rejected[request].message
        for seed in range(9):
            run(again, random_prompt(60, VOCAB, seed), max_tokens=2)
        again.engine._reuse._store._writer.submit(int).result()  # type: ignore[union-attr]
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 12 * one + 10 * 4096
        assert isinstance(again.command(StateAction.DELETE, "0"), list)
        again.engine.close()
    for path in files(tmp_path):
        if path.suffix == ".damaged":
            path.unlink()
    again = make_driver(tmp_path, cache=cache)
    for seed in range(4):
        run(again, random_prompt(20, VOCAB, seed), save=True, max_tokens=2)
    again.engine.close()


def test_a_snapshot_that_is_damaged_later_is_absorbed_again(tmp_path: Path) -> None:
    driver, cold = make_driver(tmp_path), make_driver(None)
    prompt = random_prompt(40, VOCAB, 1)
    first = run(driver, prompt, save=True, name="a", max_tokens=4)
    driver.engine.close()
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1  # of a tensor
    path.write_bytes(content)
    again = make_driver(tmp_path)
    for expected in (45, 0):
        before = absorbed(again)
        answer = run(again, [9], state="a", max_tokens=5)
        assert answer.token_ids == cold.complete([*prompt, *first.token_ids, 9], max_tokens=5, **GREEDY).token_ids
        assert absorbed(again) - before <= expected
    again.engine.close()


@pytest.mark.parametrize("mode", [("cpu", False), ("cpu", True)])
@pytest.mark.parametrize("rooms", [(1, 8), (0, 8), (2, 0)])
def test_a_burst_of_saves_loses_no_snapshot(
    tmp_path: Path, mode: tuple[str, bool], rooms: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the disk is and however little memory there is: who saves waits, and nobody else does."""
    one = make_driver(None).engine._runner.parked_bytes
    host, spare = rooms
    cache = StateCacheConfig(host_bytes=host * one, folder=tmp_path, disk_bytes=(60 + spare) * one)
    driver, cold = make_driver(tmp_path, cache=cache, mode=mode), make_driver(None)
    quick = saved_files.write_state

    def slow(*args: object, **options: object) -> object:
        time.sleep(0.01)
        return quick(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(saved_files, "write_state", slow)
    kinds: list[dict[str, object]] = [
        {"max_tokens": 5},
        {"max_tokens": 0},
        {"max_tokens": 3, "n": 2},
        {"max_tokens": 0, "n": 2},
        {"max_tokens": 9, "stop_token_ids": tuple(range(3, VOCAB, 7))},
    ]
    asked = {}
    for seed in range(20):
        prompt = random_prompt(30 + seed, VOCAB, seed)
        asked[driver.submit([prompt], save=True, **(GREEDY | kinds[seed % len(kinds)]))] = prompt  # type: ignore[arg-type]
    bystander = driver.submit([random_prompt(9, VOCAB, 99)], max_tokens=4, priority=-1, **GREEDY)
    driver.run()
    assert len(driver.answers[bystander, 0].token_ids) == 4
    assert driver.engine.scheduler.allocator.num_used == 0
    driver.engine.close()
    again = make_driver(tmp_path, cache=cache, mode=mode)
    saved = 0
    for (request, _), answer in driver.answers.items():
        if request == bystander:
            continue
        assert answer.state is not None, answer.unsaved
        _, metadata = read_state(tmp_path / FOLDER / f"{answer.state.id}.safetensors", None)
        assert metadata["num_absorbed"] == metadata["num_tokens"] == str(answer.state.num_tokens)
        transcript = asked[request] + answer.token_ids[: answer.state.num_tokens - len(asked[request])]
        before = absorbed(again)
        more = run(again, [], state=answer.state.id, max_tokens=3)
        assert absorbed(again) == before
        assert more.token_ids == cold.complete(transcript, max_tokens=3, **GREEDY).token_ids
        saved += 1
    assert saved == 28
    again.engine.close()


@pytest.mark.parametrize("mode", [("cpu", False), ("cpu", True)])
def test_a_full_disk_refuses_and_nothing_else_suffers(tmp_path: Path, mode: tuple[str, bool]) -> None:
    driver = make_driver(tmp_path, mode=mode)
    prompt = random_prompt(20, VOCAB, 1)
    run(driver, prompt, save=True, name="kept", max_tokens=2)
    before = listed(driver)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        request = driver.submit([prompt], save=True, name="kept", max_tokens=3, **GREEDY)
        other = driver.submit([prompt], max_tokens=3, **GREEDY)
        driver.run()
        refused = driver.command(StateAction.FORK, "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be saved: File too large" in (driver.answers[request, 0].unsaved or "")
    assert driver.answers[request, 0].state is None
    assert len(driver.answers[other, 0].token_ids) == 3
    assert isinstance(refused, Refusal) and refused.reason is RefusalReason.NOT_WRITTEN
    assert listed(driver) == before, "the name stays with the state that had it"
    assert len(files(tmp_path)) == 1
    assert driver.engine._states is not None and not driver.engine._states._reserved.total()
    run(driver, prompt, save=True, name="kept", max_tokens=2)
    assert listed(driver) != before
    driver.engine.close()


def test_what_nobody_has_thought_of_ends_a_request_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(tmp_path)
    prompt = random_prompt(20, VOCAB, 1)
    with monkeypatch.context() as broken:
        broken.setattr(saved_files, "write_state", lambda *_, **__: 1 // 0)
        request = driver.submit([prompt], save=True, name="a", max_tokens=3, **GREEDY)
        driver.run()
    assert "could not be saved: ZeroDivisionError" in (driver.answers[request, 0].unsaved or "")
    assert listed(driver) == [] and driver.engine._states is not None and not driver.engine._states._reserved.total()
    run(driver, prompt, save=True, name="a", max_tokens=2)
    assert [state.name for state in listed(driver)] == ["a"]
    driver.engine.close()


def test_one_server_per_folder(tmp_path: Path) -> None:
    driver = make_driver(tmp_path)
    with pytest.raises(SettingsError, match="in use by another server"):
        make_driver(tmp_path)
    driver.engine.close()
    make_driver(tmp_path).engine.close()


def test_saved_states_take_room_of_the_disk(tmp_path: Path) -> None:
    one = make_driver(None).engine._runner.parked_bytes
    cache = StateCacheConfig(host_bytes=one, folder=tmp_path, disk_bytes=8 * one)
    driver = make_driver(tmp_path, cache=cache)
    saved = 0
    for seed in range(12):
        request = driver.submit([random_prompt(20, VOCAB, seed)], save=True, max_tokens=2, **GREEDY)
        driver.run()
        saved += request not in driver.rejected
        if request in driver.rejected:
            assert driver.rejected[request].reason is RefusalReason.STATES_FULL
    assert 2 <= saved <= 4 and len(listed(driver)) == saved
    assert driver.engine._reuse is not None
    driver.engine._reuse._store._writer.submit(int).result()
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert taken <= 8 * one + 20 * 4096
    driver.engine.close()


def test_files_are_read_to_memory_that_is_kept(tmp_path: Path) -> None:
    """Whichever state is read next, what was read before stays what it was; and what is too large finds room, too."""
    folder = tmp_path / "states"
    driver = make_driver(folder)
    prompts = [random_prompt(40 + 7 * number, VOCAB, number) for number in range(4)]
    for number, prompt in enumerate(prompts):
        run(driver, prompt, save=True, name=f"{number}", max_tokens=3)
    driver.engine.close()
    steady = make_driver(tmp_path / "steady")
    for number, prompt in enumerate(prompts):
        run(steady, prompt, save=True, name=f"{number}", max_tokens=3)
    # No tier of memory keeps a state, so each use reads its file.
    driver = make_driver(folder, host_bytes=0)
    store = driver.engine._reuse.store  # type: ignore[union-attr]
    kept = store._read_memory
    assert kept is not None and len(kept) == 2
    for turn, number in enumerate((0, 1, 2, 3, 1, 0, 3)):
        new = [5 + turn, number]
        expected = run(steady, new, state=f"{number}", max_tokens=9)
        before = absorbed(driver)
        assert run(driver, new, state=f"{number}", max_tokens=9).token_ids == expected.token_ids
        assert absorbed(driver) - before == 2
        assert sum(store.read_seconds.snapshot().counts) == turn + 1
    assert len(kept) == 2, "whoever has gone on from a state gives the memory back"
    driver.engine.close()
