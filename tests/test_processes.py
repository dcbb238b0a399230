"""Processes that are started here: what they are told, how they end, and what they never do."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from fastunlearn import distributed
from fastunlearn.distributed import (
    ALONE,
    Failure,
    Processes,
    World,
    device_of,
    launch,
    share_of_cores,
    take_share_of_cores,
    world_of_environment,
)
from fastunlearn.errors import UserError


@pytest.fixture
def as_processes(monkeypatch, tmp_path):
    """``as_processes(body)``: what is started runs this Python code in place of the command."""
    real = subprocess.Popen

    def start(body):
        script = tmp_path / "body.py"
        script.write_text(textwrap.dedent(body))
        monkeypatch.setattr(
            distributed.subprocess, "Popen", lambda command, **options: real([sys.executable, script], **options)
        )

    return start


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


# ---- who this process is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, ALONE),
        ({"RANK": "1"}, ALONE),  # a pod of a cluster, not one of several processes
        ({"RANK": "3", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}, ALONE),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, World(5, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2", "FASTUNLEARN_STORE": "/x"}, World(0, 2, 0, "/x")),
    ],
)
def test_the_environment_says_who_this_is(environment, world, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "FASTUNLEARN_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world_of_environment() == world


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two"}, "whole numbers"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "whole numbers"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 of WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is -1"),
    ],
)
def test_a_launcher_that_makes_no_sense_is_refused(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        world_of_environment()


def test_mistakes_are_told_in_a_pod_that_sets_rank_alone(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    assert "`--forget` is empty" in refused("train", "--forget", " ", "--output", tmp_path / "run")
    assert "at least 2 runs" in refused("compare", "one", "--output", tmp_path / "out")


def test_a_device_that_is_not_there_is_refused():
    import torch

    assert device_of(World(1, 2, 1), "cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA device"):
            device_of(ALONE, "cuda")


# ---- how they end ----------------------------------------------------------------------------------------------------


def test_all_end_well(as_processes):
    as_processes("import os; assert os.environ['WORLD_SIZE'] == '3'")
    assert launch([], 3) is None


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        ("import os, sys, time; sys.exit(5) if os.environ['RANK'] == '1' else time.sleep(60)", Failure(1, 5)),
        (
            "import os, time; os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)",
            Failure(1, -9),
        ),
    ],
)
def test_one_that_fails_ends_the_others(as_processes, body, failure):
    as_processes(body)
    started = time.monotonic()
    assert launch([], 2) == failure
    assert time.monotonic() - started < 20
    assert "process 1" in str(failure)


def test_one_that_stands_still_ends_the_run_within_the_stated_time(as_processes, monkeypatch):
    monkeypatch.setattr(distributed, "_STOPPED_S", 0.5)
    as_processes("import os, signal, time; os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)")
    started = time.monotonic()
    failure = launch([], 2)
    assert failure is not None
    assert failure.standing_still
    assert "stood still" in str(failure)
    assert time.monotonic() - started < 20


def test_they_end_with_the_process_that_started_them(tmp_path):
    """Also where that one is killed and can do nothing any more."""
    body = f"""
    import os, subprocess, sys
    from fastunlearn import distributed
    real = subprocess.Popen
    sleeper = "import os, time; open('{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(300)"
    distributed.subprocess.Popen = lambda command, **options: real([sys.executable, "-c", sleeper], **options)
    distributed.launch([], 2)
    """
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(body)])
    until(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "01"))
    pids = [int((tmp_path / name).read_text()) for name in "01"]
    assert all(alive(pid) for pid in pids)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    until(lambda: not any(alive(pid) for pid in pids))


# ---- what they never do ----------------------------------------------------------------------------------------------


def test_no_module_of_the_working_folder_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("yaml", "torch", "json", "fastunlearn"):
        (tmp_path / f"{name}.py").write_text(f"open('{tmp_path}/pwned', 'w'); raise SystemExit(9)")
    log = tmp_path / "log"
    processes = Processes(["--version"], [1], 2, threads=1, log_of=lambda rank: log)
    assert processes.wait() is None, log.read_text()
    assert not (tmp_path / "pwned").exists()


def test_they_meet_in_a_folder_that_only_their_user_can_read(as_processes, tmp_path):
    as_processes(f"""
    import os
    store = os.environ["FASTUNLEARN_STORE"]
    open("{tmp_path}/told", "w").write(oct(os.stat(os.path.dirname(store)).st_mode)[-3:] + " " + store)
    """)
    assert launch([], 1) is None
    mode, store = (tmp_path / "told").read_text().split()
    assert mode == "700"
    assert not os.path.exists(os.path.dirname(store)), "it goes with them"


def test_no_port_is_opened_but_on_the_loopback_interface(as_processes, tmp_path):
    """Joins a real group of two processes and looks at every socket that listens."""
    as_processes(f"""
    import glob, os, sys, torch
    from fastunlearn.distributed import join, leave, world_of_environment
    world = world_of_environment()
    join(world, torch.device("cpu"))
    assert float(world.sum(torch.ones(1))) == 2
    inodes = {{os.readlink(path) for path in glob.glob("/proc/self/fd/*") if os.path.islink(path)}}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in open("/proc/self/net/" + table).readlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and "socket:[" + fields[9] + "]" in inodes:
                listening.append(fields[1].split(":")[0])
    open("{tmp_path}/" + str(world.rank), "w").write(" ".join(listening))
    world.barrier()
    leave()
    """)
    assert launch([], 2) is None
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    for rank in "01":
        assert set((tmp_path / rank).read_text().split()) <= loopback


# ---- whose cores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "world", "threads"),
    [
        ({}, ALONE, 16),
        ({"LOCAL_SIZE": "2"}, World(0, 2), 8),  # what `deepspeed` sets
        ({"LOCAL_WORLD_SIZE": "4"}, World(5, 8), 4),  # two machines
        ({"LOCAL_WORLD_SIZE": "none"}, World(0, 8), 2),
        ({}, World(0, 32), 1),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "11"}, World(0, 2), 16),  # whoever says how many is obeyed
    ],
)
def test_processes_share_the_cores_of_their_machine(environment, world, threads, monkeypatch):
    import torch

    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    used = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    take_share_of_cores(world)
    assert used[-1] == threads


def test_a_process_of_the_deepspeed_launcher_trains_with_its_share(tmp_path):
    """The launcher itself, which says nothing of threads; its processes stand for ours and say how many they take."""
    pytest.importorskip("deepspeed")
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            sys.path.insert(0, sys.argv[-1])
            from fastunlearn.distributed import take_share_of_cores, world_of_environment
            world = world_of_environment()
            take_share_of_cores(world)
            print(f"threads of {world.rank}: {torch.get_num_threads()}", flush=True)
            """
        )
    )
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name} | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "deepspeed.launcher.launch", "--world_info", _world_info(2)]
    command += ["--master_addr", "127.0.0.1", "--master_port", "29533", "--no_local_rank", str(script)]
    root = os.path.dirname(os.path.dirname(distributed.__file__))
    done = subprocess.run([*command, root], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):
        assert f"threads of {rank}: {share_of_cores(2)}\n" in done.stdout


def _world_info(size):
    """What the launcher is told of hosts and their slots."""
    import base64
    import json

    return base64.urlsafe_b64encode(json.dumps({"localhost": list(range(size))}).encode()).decode()
