"""The sandbox's server speaks Piston's protocol, and survives what happens to its own processes."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain_workloads.sandbox.languages import find_runtimes, select_runtime
from tests.sandbox.conftest import require_landlock
from tests.support.processes import await_gone, python, wait_for
from tests.support.sandbox import RunningSandbox, await_idle, running_sandbox, start_sandbox

ECHO = {
    "python": "print(input()[::-1])",
    "c++": """
#include <bits/stdc++.h>
int main() { std::string s; std::cin >> s; std::cout << std::string(s.rbegin(), s.rend()) << std::endl; }
""",
    "bash": "rev",
    "javascript": "console.log([...require('fs').readFileSync('/dev/stdin', 'utf8').trim()].reverse().join(''))",
    "java": """
class Main {
    public static void main(String[] arguments) {
        var line = new java.util.Scanner(System.in).next();
        System.out.println(new StringBuilder(line).reverse());
    }
}
""",
    "rscript": "cat(rev(strsplit(readLines('stdin', 1), '')[[1]]), sep = ''); cat('\\n')",
}


def request(source: str = "print(1)", **fields: Any) -> str:
    return json.dumps({"language": "python", "version": "*", "files": [{"content": source}], **fields})


@pytest.mark.parametrize("language", ECHO)
def test_a_language_that_is_there_runs_and_another_one_is_refused(sandbox: RunningSandbox, language: str) -> None:
    there = [runtime.language for runtime in find_runtimes()]
    if language in there:
        answer = sandbox.execute(ECHO[language], language=language, stdin="abc\n", compile_timeout=60_000)
        assert answer["run"]["stdout"] == "cba\n", answer
        assert answer["language"] == language
        assert ("compile" in answer) == (language == "c++")
    else:
        status, answer = sandbox.post(request(language=language))
        assert status == 400
        assert answer["message"].startswith(f"{language}-* runtime is unknown: there are python-3.")


def test_its_runtimes_are_listed_with_their_aliases(sandbox: RunningSandbox) -> None:
    connection = sandbox.connect()
    connection.request("GET", "/api/v2/runtimes")
    runtimes = json.loads(connection.getresponse().read())
    connection.close()

    assert {"python", "bash"} <= {runtime["language"] for runtime in runtimes}
    assert all(runtime.keys() == {"language", "version", "aliases"} for runtime in runtimes)


def test_an_answer_says_how_a_program_ended(sandbox: RunningSandbox) -> None:
    fine = sandbox.execute("import sys\nprint('out')\nprint('err', file=sys.stderr)")["run"]
    failed = sandbox.execute("raise SystemExit(3)")["run"]
    killed = sandbox.execute("import os\nos.abort()")["run"]
    odd = sandbox.execute("import sys\nsys.stdout.buffer.write(bytes([255, 65]))")["run"]

    assert (fine["stdout"], fine["stderr"], fine["code"], fine["signal"], fine["status"]) == (
        "out\n",
        "err\n",
        0,
        None,
        None,
    )
    assert sorted(fine["output"].split()) == ["err", "out"]
    assert fine["memory"] > 1 << 20
    assert fine["wall_time"] > 0
    assert (failed["code"], failed["signal"], failed["status"]) == (3, None, "RE")
    assert (killed["code"], killed["signal"], killed["status"]) == (None, "SIGABRT", "SG")
    assert odd["stdout"] == "\ufffdA"


def test_what_does_not_compile_is_not_run(sandbox: RunningSandbox) -> None:
    answer = sandbox.execute("int main() { return x; }", language="cpp", compile_timeout=60_000)

    assert answer["compile"]["code"] == 1
    assert "was not declared in this scope" in answer["compile"]["stderr"]
    assert "run" not in answer


def test_files_arguments_and_input_arrive(sandbox: RunningSandbox) -> None:
    files = [
        {
            "name": "main.py",
            "content": "import sys, lib.part\nprint(lib.part.X, sys.argv[1:], len(sys.stdin.read()))\n",
        },
        {"name": "lib/part.py", "content": "X = open('data.bin', 'rb').read()"},
        {"name": "data.bin", "content": base64.b64encode(b"\0\1").decode(), "encoding": "base64"},
    ]

    run = sandbox.execute("", files=files, args=["a b", "--c"], stdin="x" * 3_000_000)["run"]

    assert run["stdout"] == "b'\\x00\\x01' ['a b', '--c'] 3000000\n", run
    ignored = sandbox.execute("print('not read')", stdin="x" * 3_000_000)["run"]
    assert ignored["stdout"] == "not read\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "body: Invalid JSON"),
        (json.dumps({"language": "python", "files": [{"content": "x"}]}), "version: Field required"),
        (request(version="2.x"), "python-2.x runtime is unknown"),
        (request(files=[]), "files: List should have at least 1 item"),
        (request(files=[{"name": "../up", "content": ""}]), "is no name inside the program's folder"),
        (request(files=[{"name": "/etc/x", "content": ""}]), "is no name inside the program's folder"),
        (request(files=[{"name": "x", "content": "!", "encoding": "base64"}]), "is not base64"),
        (request(run_timeout=60_001), "run_timeout: 60001 is not between 0 and 60000"),
        (request(run_memory_limit=1 << 40), "run_memory_limit"),
        (request(run_memory_limit=1 << 20), "no program starts with less than"),
        (request(args=["a\0b"]), "NUL"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_refused(sandbox: RunningSandbox, body: str, message: str) -> None:
    status, answer = sandbox.post(body)

    assert status == 400
    assert message in answer["message"]


def test_a_body_beyond_the_limit_and_another_path_are_refused(sandbox: RunningSandbox) -> None:
    status, answer = sandbox.post(request(stdin="x" * (65 << 20)))
    assert (status, "message" in answer) == (413, True)

    connection = sandbox.connect()
    connection.request("GET", "/api/v2/packages")
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())) == (404, {"message": "404: Not Found"})
    connection.close()


def test_waiting_for_ones_turn_takes_no_time_of_the_program() -> None:
    require_landlock()
    with running_sandbox("--concurrency", "1") as sandbox, ThreadPoolExecutor(1) as pool:
        first = pool.submit(sandbox.execute, "import time\ntime.sleep(3)\nprint('first')")
        wait_for(sandbox.scratch_folders, what="the first program")
        second = sandbox.execute("echo second", language="bash", run_timeout=2500)

        assert first.result()["run"]["stdout"] == "first\n"
        assert second["run"]["stdout"] == "second\n", second


def test_a_guard_that_is_killed_fails_its_job_alone() -> None:
    require_landlock()
    with running_sandbox("--concurrency", "2") as sandbox, ThreadPoolExecutor(1) as pool:
        source = "import os, time\nfor _ in range(3): os.fork()\ntime.sleep(1000)"
        job = pool.submit(sandbox.post, request(source, run_timeout=60_000))
        processes = wait_for(lambda: (found := sandbox.processes())[8:] and found, what="eight processes and a guard")
        os.kill(processes[0], signal.SIGKILL)

        assert job.result() == (500, {"message": "the sandbox failed: the guard ended without a result"})
        await_gone(processes)
        await_idle(sandbox)
        assert sandbox.execute("print(2)")["run"]["stdout"] == "2\n"


def test_a_sandbox_without_its_fork_server_ends(tmp_path: Path) -> None:
    require_landlock()
    process = start_sandbox([], work=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    (fork_server,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

    os.kill(int(fork_server), signal.SIGKILL)

    assert process.wait(timeout=20) == 1


def test_no_sandbox_outlives_a_killed_test(tmp_path: Path) -> None:
    test = subprocess.Popen(
        python(
            f"""
from pathlib import Path
from tests.support.sandbox import start_sandbox
sandbox = start_sandbox((), work=Path({str(tmp_path)!r}))
print(sandbox.pid, sandbox.stdout.readline(), flush=True)
input()
"""
        ),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with test:
        assert test.stdout is not None
        pid, _, line = test.stdout.readline().partition(" ")
        assert line.startswith("listening on ")
        test.kill()
    await_gone([int(pid)])
    assert list(tmp_path.iterdir()) == []


def test_a_sandbox_that_is_killed_takes_its_programs_with_it(tmp_path: Path) -> None:
    require_landlock()
    process = start_sandbox([], work=tmp_path)
    assert process.stdout is not None
    sandbox = RunningSandbox(process, process.stdout.readline().split()[-1], tmp_path)
    with ThreadPoolExecutor(1) as pool:
        source = "import os, time\nos.fork()\ntime.sleep(1000)"
        job = pool.submit(sandbox.post, request(source, run_timeout=60_000))
        processes = wait_for(lambda: (found := sandbox.processes())[2:] and found, what="two processes and a guard")

        process.kill()

        await_gone(processes)
        assert isinstance(job.exception(), OSError | json.JSONDecodeError)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("3.11.2", "*", True),
        ("3.11.2", "3.x", True),
        ("3.11.2", "3.11", True),
        ("3.11.2", "3.12.x", False),
        ("3.11.2", "3.11.2", True),
    ],
)
def test_versions_are_selected_as_piston_does(version: str, wanted: str, fits: bool) -> None:
    runtime = replace(find_runtimes()[0], version=version)
    if fits:
        assert select_runtime((runtime,), "py", wanted) is runtime
    else:
        with pytest.raises(ValueError, match=r"there are python-3\.11\.2"):
            select_runtime((runtime,), "py", wanted)
