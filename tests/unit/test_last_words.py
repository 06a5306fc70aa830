"""What a rollout server leaves as its message, of errors as vLLM logs them."""

from __future__ import annotations

import logging
import logging.config
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain_workloads import rollout_plugin
from posttrain_workloads.last_words import describe_error

NO_ROOM = "To serve at least one request, 8 GiB KV cache is needed"


@pytest.fixture
def message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The message of a server in which the plugin is."""
    file = tmp_path / "termination-log"
    file.write_text("")
    monkeypatch.setenv("POSTTRAIN_TERMINATION", str(file))
    monkeypatch.setenv("POSTTRAIN_LISTEN", "0.0.0.0:8000")
    factory = logging.getLogRecordFactory()
    rollout_plugin.tell_the_cause()
    yield file
    logging.setLogRecordFactory(factory)


def log(message: str, error: Exception) -> None:
    """Log an error as vLLM does."""
    try:
        raise error
    except Exception:
        logging.getLogger("vllm.v1.engine.core").exception(message)


def test_the_first_error_that_ends_the_server_is_its_message(message: Path) -> None:
    log("WorkerProc hit an exception.", ValueError("which the server survives"))
    logging.getLogger("vllm.v1.engine.core").error("EngineCore failed to start.")
    assert message.read_text() == ""

    log("WorkerProc failed to start.", ValueError(NO_ROOM))
    log("EngineCore failed to start.", Exception("WorkerProc initialization failed. See stack trace for root cause."))
    assert message.read_text() == f"WorkerProc failed to start: ValueError: {NO_ROOM}\n"


def test_it_is_known_in_a_forked_process_that_configures_its_logging_anew(message: Path) -> None:
    def fail(number: int) -> None:
        logging.config.dictConfig(
            {"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {"handlers": [], "propagate": False}}}
        )
        log("WorkerProc failed to start.", ValueError(f"{number} of {number}"))
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=fail, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    (line,) = message.read_text().splitlines()
    assert line in {f"WorkerProc failed to start: ValueError: {number} of {number}" for number in range(8)}


def test_a_trainer_with_vllm_inside_keeps_its_own_message(message: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTTRAIN_LISTEN")
    before = logging.getLogRecordFactory()
    rollout_plugin.tell_the_cause()
    assert logging.getLogRecordFactory() is before


def test_vllm_goes_on_to_its_end_where_the_message_cannot_be_written(message: Path) -> None:
    message.unlink()
    message.mkdir()
    log("EngineCore failed to start.", ValueError(NO_ROOM))


def test_an_error_is_told_by_its_first_lines_and_by_what_it_was_raised_for() -> None:
    many = RuntimeError("CUDA error: out of memory\n" + "\n".join(f"hint {number}" for number in range(9)))
    assert describe_error(many) == "RuntimeError: CUDA error: out of memory\nhint 0\nhint 1\nhint 2"
    many.__cause__ = OSError("none left\nat all")
    assert (
        describe_error(many) == "RuntimeError: CUDA error: out of memory\nhint 0\nhint 1\nraised for OSError: none left"
    )


def test_an_assertion_without_a_word_is_told_by_its_place() -> None:
    with pytest.raises(AssertionError) as caught:
        exec(compile("assert 2 % 3 == 0", "layer.py", "exec"))
    assert describe_error(caught.value) == "AssertionError (layer.py:1: )"
