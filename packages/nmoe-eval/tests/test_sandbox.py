"""Programs that try to get out, to stay, or to take everything: each is contained, and the next one runs."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nmoe.eval.sandbox as sandbox_module
import pytest
from nmoe.eval.errors import SandboxUnavailableError
from nmoe.eval.sandbox import Limits, Sandbox, tree, usage

LIMITS = Limits(wall_s=6.0, cpu_s=2, memory_bytes=256 << 20, processes=16, file_bytes=1 << 20, disk_bytes=4 << 20)
SECRET = "7f3a-not-for-others"


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox.open(LIMITS)
    except SandboxUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["confined", "unsafe"])
def either(request):
    """With bubblewrap where there is one, and without."""
    return Sandbox.open(LIMITS, unsafe_exec=True) if request.param == "unsafe" else request.getfixturevalue("sandbox")


@pytest.fixture(autouse=True)
def goes_on(request):
    """After whatever a program did, the next one runs, soon, and nothing of the first is left."""
    yield
    if "sandbox" in request.fixturenames and (still := request.node.funcargs.get("sandbox")) is not None:
        assert still.run("print('still here')").stdout == "still here\n"
        assert list(tree(os.getpid())) == [os.getpid()]


def attempt(sandbox, program, *names, **values):
    """Runs a program with values in it."""
    head = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    return sandbox.run("import os, sys, time, socket, subprocess\n" + head + program)


# ---- what a program may do -------------------------------------------------------------------------------------------


def test_a_program_runs_with_the_standard_library(either):
    done = either.run("import math, json\nprint(json.dumps({'π': math.floor(math.pi)}, ensure_ascii=False))")
    assert (done.end, done.exit_code, done.stdout, done.stderr, done.ok) == ("exit", 0, '{"π": 3}\n', "", True)


@pytest.mark.parametrize(
    ("program", "code"),
    [("1/0", 1), ("import sys; sys.exit(7)", 7), ("import os; os._exit(3)", 3), ("syntax error", 1),
     ("import os; os.kill(os.getpid(), 9)", 137), ("import ctypes; ctypes.string_at(0)", 139)],
)  # fmt: skip
def test_how_a_program_ends_is_told(either, program, code):
    done = either.run(program)
    assert (done.end, done.exit_code, done.ok) == ("exit", code, False)


def test_threads_processes_and_files_are_there_within_limits(sandbox):
    done = attempt(
        sandbox,
        "import threading\nthread = threading.Thread(target=print, args=('thread',))\nthread.start()\nthread.join()\n"
        "print(subprocess.run(['/bin/sh', '-c', 'echo child'], capture_output=True, text=True).stdout)\n"
        "open('f', 'w').write('file')\nprint(os.getcwd(), open('/tmp/f').read(), sys.stdin.read())",
    )
    assert done.stdout.split() == ["thread", "child", "/tmp", "file"], done.stderr


def test_a_long_program_and_much_output_pass_whole(either):
    line = "x" * 1000
    program = "\n".join(f"print('{line}')" for _ in range(400))
    done = either.run(program)
    assert done.stdout == (line + "\n") * 400


def test_programs_run_side_by_side(sandbox):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda i: sandbox.run(f"open('/tmp/x', 'x'); print({i})"), range(12)))
    assert [each.stdout for each in done] == [f"{i}\n" for i in range(12)]


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_the_home_folder_cannot_be_read(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    inside_home = Path.home() / ".nmoe-sandbox-test"
    try:
        inside_home.write_text(SECRET)
        done = attempt(
            sandbox,
            "for path in paths:\n    try:\n        print(open(path).read())\n    except OSError as error:\n"
            "        print(error.errno)\n"
            "walk = os.walk(os.path.dirname(paths[1]))\n"
            "print([name for _, _, names in walk for name in names if 'nmoe-sandbox' in name])",
            paths=[str(secret), str(inside_home), "/etc/shadow", f"/proc/{os.getpid()}/environ", "/proc/self/environ"],
        )
    finally:
        inside_home.unlink(missing_ok=True)
    assert done.stdout.split("\n")[:-1] == ["2"] * 5 + ["[]"], done.stderr


def test_the_environment_is_empty(either, monkeypatch):
    monkeypatch.setenv("NMOE_TOKEN", SECRET)
    assert either.run("import os; print(dict(os.environ))").stdout == "{}\n"
    inherited = either.run("import subprocess; print(subprocess.run(['/usr/bin/env'], capture_output=True))").stdout
    assert SECRET not in inherited


def test_no_open_file_of_the_evaluator_is_handed_on(either, tmp_path):
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        done = either.run(
            "import os\nfor n in range(3, 100):\n    try:\n        os.write(n, b'x')\n        print(n)\n"
            "    except OSError:\n        pass"
        )
    assert (tmp_path / "open").read_text() == ""
    assert done.stdout == ""


# ---- the network -----------------------------------------------------------------------------------------------------


def test_no_socket_reaches_out(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0nmoe-sandbox-test")
        abstract.listen()
        done = attempt(
            sandbox,
            "for kind, address in ((socket.AF_INET, ('127.0.0.1', port)), (socket.AF_INET, ('1.1.1.1', 53)),\n"
            "                      (socket.AF_UNIX, '\\0nmoe-sandbox-test')):\n"
            "    try:\n        socket.socket(kind).connect(address)\n        print('connected')\n"
            "    except OSError as error:\n        print('refused')",
            port=server.getsockname()[1],
        )
    assert done.stdout.split() == ["refused"] * 3, done.stderr


# ---- taking everything -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bomb",
    ["while True: os.fork()",
     "while True:\n    try: subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
     "    except OSError: pass",
     "import threading\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
     "    except RuntimeError: pass"],
    ids=["forks", "programs", "threads"],
)  # fmt: skip
def test_a_fork_bomb_is_ended(sandbox, bomb):
    began = time.monotonic()
    done = attempt(sandbox, bomb)
    # Where the kernel counts (the evaluator is not root), it refuses more, and time ends the rest.
    assert done.end in ("processes", "wall time") or not done.ok
    assert time.monotonic() - began < LIMITS.wall_s + 3


def test_memory_of_a_process_is_bounded(either):
    done = either.run("held = []\nwhile True: held.append(bytearray(1 << 20))")
    assert done.end == "memory" or "MemoryError" in done.stderr


def test_memory_of_all_processes_together_is_bounded(either):
    done = attempt(
        either, "for _ in range(8):\n    if os.fork() == 0: break\nheld = b'x' * (100 << 20)\ntime.sleep(60)"
    )
    assert done.end == "memory"


def test_memory_that_belongs_to_no_process_is_refused(sandbox):
    done = attempt(
        sandbox,
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "try: os.memfd_create('x')\nexcept PermissionError: print('refused')\n"
        "print(libc.shmget(0, 1 << 30, 0o1600), libc.unshare(0x10000000), libc.unshare(0x10020000))",
    )
    assert done.stdout.split() == ["refused", "-1", "-1", "-1"], done.stderr


def test_the_disk_cannot_be_filled(sandbox):
    """Wherever a file can be made, no more than the room of /tmp is written, and nothing outside of it changes."""
    done = attempt(
        sandbox,
        "total, made = 0, set()\n"
        "for top, folders, _ in os.walk('/'):\n"
        "    for number in range(32):\n"
        "        try:\n"
        "            with open(os.path.join(top, f'fill{number}'), 'wb', buffering=0) as file:\n"
        "                made.add(top)\n"
        "                while True: total += file.write(bytes(1 << 18))\n"
        "        except OSError as error:\n"
        "            if top not in made: break\n"
        "print(sorted(made), total)",
    )
    made, _, total = done.stdout.strip().rpartition(" ")
    assert made == "['/tmp']", done
    assert LIMITS.file_bytes <= int(total) <= LIMITS.disk_bytes


def test_a_file_has_a_largest_size(either):
    done = either.run("import signal\nf = open('x', 'wb', buffering=0)\nwhile True: f.write(bytes(1 << 16))")
    assert not done.ok
    assert "File too large" in done.stderr


def test_endless_output_is_cut(either):
    done = either.run("while True: print('x' * 1000)")
    assert done.end == "output"
    assert len(done.stdout) == LIMITS.output_bytes


# ---- harming the evaluator -------------------------------------------------------------------------------------------


def test_no_process_outside_can_be_signalled(sandbox):
    witness = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        done = attempt(
            sandbox,
            "pids = [os.getppid(), 1, evaluator, witness, *range(2, 5000)]\n"
            "for pid in pids:\n    try:\n        if pid != os.getpid(): os.kill(pid, 9)\n    except OSError: pass\n"
            "try: os.kill(-1, 9)\nexcept OSError: pass\nprint('alive')",
            evaluator=os.getpid(),
            witness=witness.pid,
        )
        assert witness.poll() is None
        assert done.end == "exit"
    finally:
        witness.kill()
        witness.wait()


# ---- staying ---------------------------------------------------------------------------------------------------------

_DAEMON = """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for _ in range(2):
    if os.fork(): break
    os.setsid()
else:
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(300)", marker])
"""


def running(marker):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in path.read_text():
                found.append(path)
        except OSError:
            pass
    return found


@pytest.mark.parametrize("then", ["while True: time.sleep(1)", "time.sleep(0.3)", "time.sleep(0.3); os._exit(1)"])
def test_nothing_outlives_a_program(sandbox, then):
    marker = f"marker-{os.getpid()}-{time.monotonic_ns()}"
    done = attempt(sandbox, _DAEMON + then, marker=marker)
    assert done.end == ("wall time" if "while" in then else "exit")
    assert done.seconds < LIMITS.wall_s + 1
    assert running(marker) == []


def test_a_sandbox_dies_with_its_evaluator(sandbox, tmp_path):
    marker = f"marker-{os.getpid()}-{time.monotonic_ns()}"
    program = (
        f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(300)', '{marker}'])"
    )
    script = tmp_path / "evaluator.py"
    script.write_text(
        f"from nmoe.eval.sandbox import Limits, Sandbox\nSandbox.open(Limits(wall_s=300)).run({program!r})"
    )
    with subprocess.Popen([sys.executable, script]) as evaluator:
        deadline = time.monotonic() + 20
        while not [path for path in running(marker) if path.parent.name != str(evaluator.pid)]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        evaluator.kill()
    deadline = time.monotonic() + 5
    while running(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(marker) == []


def test_a_busy_process_is_ended_by_its_cpu_time(either):
    done = either.run("while True: pass")
    assert (done.end, done.exit_code) == ("exit", 137)
    assert LIMITS.cpu_s - 0.5 < done.seconds


def test_without_bubblewrap_children_are_found_and_ended():
    marker = f"marker-{os.getpid()}-{time.monotonic_ns()}"
    unsafe = Sandbox.open(Limits(wall_s=1.0), unsafe_exec=True)
    program = "import subprocess, sys, time\nfor _ in range(3): subprocess.Popen([sys.executable, '-c', 'import time; "
    done = unsafe.run(program + f"time.sleep(300)', {marker!r}])\ntime.sleep(60)")
    assert done.end == "wall time"
    deadline = time.monotonic() + 5
    while running(marker) and time.monotonic() < deadline:  # a killed process takes a moment to go
        time.sleep(0.01)
    assert running(marker) == []


# ---- is there one at all? --------------------------------------------------------------------------------------------


def fake(folder, monkeypatch, text):
    path = folder / "bwrap"
    path.write_text(text)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_without_bubblewrap_programs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailableError, match=r"(?s)bubblewrap.*--unsafe-exec"):
        Sandbox.open()


def test_a_bubblewrap_that_may_not_work_is_refused_with_its_reason(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    with pytest.raises(SandboxUnavailableError, match="No permissions to create new namespace"):
        Sandbox.open()


def test_a_bubblewrap_that_confines_nothing_is_refused(tmp_path, monkeypatch):
    python = os.path.realpath(sys._base_executable)
    fake(tmp_path, monkeypatch, f'#!/bin/sh\nwhile [ "$1" != "{python}" ]; do shift; done\nexec "$@"\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SandboxUnavailableError, match=r"it reached .*the home folder.*the evaluator"):
        Sandbox.open()


@pytest.mark.parametrize(
    ("without", "reached"),
    [(("--unshare-pid",), "the evaluator"), (("--unshare-net",), "the network"), (("--remount-ro", "/"), "a file in /"),
     (("--remount-ro", "/dev"), "a file in /dev")],
)  # fmt: skip
def test_a_missing_part_of_the_confinement_is_seen(sandbox, monkeypatch, without, reached):
    if reached == "the network" and not [name for _, name in socket.if_nameindex() if name != "lo"]:
        pytest.skip("this machine has no network itself")
    whole = list(sandbox.command[:-1])
    spelled = [f"--unshare-{each}" for each in ("user", "ipc", "pid", "net", "uts")]
    place = whole.index("--unshare-all")
    whole[place : place + 1] = spelled
    start = next(i for i in range(len(whole)) if tuple(whole[i : i + len(without)]) == without)
    del whole[start : start + len(without)]
    monkeypatch.setattr(sandbox_module, "_confinement", lambda bwrap, limits: iter(whole))
    with pytest.raises(SandboxUnavailableError, match=f"it reached .*{reached}"):
        Sandbox.open(LIMITS)


def test_usage_counts_all_that_descend():
    alone_threads, alone_memory = usage(os.getpid())
    child = (
        "import subprocess, sys, time\nif len(sys.argv) < 4:\n    subprocess.Popen([sys.executable, '-c', sys.argv[1], "
    )
    child += "*sys.argv[1:], 'x'])\nheld = b'x' * (20 << 20)\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", child, child, "x"], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.readline()
        threads, memory = usage(os.getpid())
        found = list(tree(os.getpid()))
        for pid in found[1:]:
            os.kill(pid, 9)
    assert (len(found), threads) == (3, alone_threads + 2)
    assert memory - alone_memory > 40 << 20
    assert shutil.which("sh") is not None
