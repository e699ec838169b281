"""Code cannot leave its sandbox, ends in its time, and cannot decide the outcome of its tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from persyn.llm.sandbox import box
from persyn.llm.sandbox.box import CannotTest, Limits
from tests.run_files import write_run

missing = box.missing_walls(256)
pytestmark = pytest.mark.skipif(bool(missing), reason=f"this host lacks walls: {missing}")
LIMITS = Limits(timeout_seconds=30, memory_mb=256)
HASTY = Limits(timeout_seconds=1, memory_mb=256)

#: A script with attempts that must all be refused; it prints those that were not.
ESCAPES = """
import ctypes, errno, fcntl, mmap, os, platform, resource, signal, socket, subprocess
folder = input()
secret, outside, parent = f"{folder}/secret", f"{folder}/new", os.getppid()
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
        raise OSError("refused")
def datagram():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.sendto(b"x", "/dev/log")
escapes = {
    "read": lambda: open(secret).read(),
    "read through a link": lambda: (os.symlink(secret, "/tmp/persyn-link"), open("/tmp/persyn-link").read()),
    "read another's environment": lambda: open(f"/proc/{parent}/environ").read(),
    "read own memory": lambda: open("/proc/self/mem", "rb"),
    "read passwd": lambda: open("/etc/passwd").read(),
    "list": lambda: os.listdir(folder),
    "environment": lambda: os.environ["PATH"],
    "write": lambda: open(outside, "w"),
    "append": lambda: open(secret, "a"),
    "write to null": lambda: open("/dev/shm/persyn", "w"),
    "truncate while reading": lambda: os.open(secret, os.O_RDONLY | os.O_TRUNC),
    "temporary file": lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR),
    "grow the standard input": lambda: os.write(0, b"x"),
    "mkdir": lambda: os.mkdir(outside),
    "symlink": lambda: os.symlink(secret, outside),
    "link": lambda: os.link(secret, outside),
    "fifo": lambda: os.mkfifo(outside),
    "rename": lambda: os.rename(secret, outside),
    "unlink": lambda: os.unlink(secret),
    "chmod": lambda: os.chmod(secret, 0),
    "chmod by descriptor": lambda: os.fchmod(os.open(os.__file__, os.O_RDONLY), 0o600),
    "chown": lambda: os.chown(secret, 1, 1),
    "utime": lambda: os.utime(secret),
    "setxattr": lambda: os.setxattr(secret, "user.x", b"1"),
    "flags of a file": lambda: fcntl.ioctl(os.open(os.__file__, os.O_RDONLY), 0x40086602, b"\\0" * 8),
    "chdir": lambda: os.chdir(folder),
    "chroot": lambda: os.chroot(folder),
    "fork": os.fork,
    "subprocess": lambda: subprocess.run(["/bin/true"]),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "tcp": lambda: socket.create_connection(("127.0.0.1", 22), timeout=1),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "datagram": datagram,
    "kill": lambda: os.kill(parent, 0),
    "kill the group": lambda: os.killpg(0, signal.SIGTERM),
    "signal by owner of a pipe": lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, parent),
    "lease": lambda: fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK),
    "session": os.setsid,
    "group": lambda: os.setpgid(0, 0),
    "limits of another": lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (1, 1)),
    "own limits": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
    "affinity of another": lambda: os.sched_setaffinity(parent, {0}),
    "priority of another": lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
    "survive the parent": lambda: must(libc.prctl(1, 0, 0, 0, 0)),
    "traceable": lambda: must(libc.prctl(0x59616d61, -1, 0, 0, 0)),
    "memory": lambda: bytearray(300 * 2**20),
    "shared memory": lambda: mmap.mmap(-1, 300 * 2**20),
}
calls = {"fork": 57, "vfork": 58, "clone3": 435, "ptrace": 101, "process_vm_readv": 310, "memfd_create": 319,
         "unshare": 272, "mount": 165, "setns": 308, "keyctl": 250, "io_uring_setup": 425, "bpf": 321, "creat": 85,
         "perf_event_open": 298, "pidfd_open": 434, "tgkill": 234, "shmget": 29, "openat2": 437, "execveat": 322,
         "open_by_handle_at": 304, "userfaultfd": 323, "sendmsg": 46, "name_to_handle_at": 303, "setsid": 112,
         "fallocate": 285, "ioprio_set": 251, "mlock": 149, "truncate": 76, "pidfd_send_signal": 424}
if platform.machine() == "x86_64":
    for name, number in calls.items():
        escapes[f"call {name}"] = lambda number=number: must(libc.syscall(number, 0, 0, 0, 0, 0, 0))
for name, attempt in escapes.items():
    try:
        attempt()
    except (OSError, MemoryError, ValueError, KeyError):
        continue
    print("escaped:", name)
print("done")
"""


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    before = _children()
    yield
    assert _children() <= before


def _children() -> set[str]:
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found.update((task / "children").read_text().split())
    return found


def run(code: str, given: str = "", limits: Limits = LIMITS) -> tuple[str, str]:
    return box.run_program(code, given, limits)


def outcomes(code: str, *tests: str, limits: Limits = LIMITS, setup: str = "") -> list[str | None]:
    return box.run_tests(code, box.Tests(tests=list(tests), setup=setup), limits, stop_early=False)


def test_nothing_leaves_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSYN_DATABASE_URL", "postgresql://me:password@here/store")
    secret = tmp_path / "secret"
    secret.write_text("key")
    secret.chmod(0o644)
    before = secret.stat()

    output, failure = run(ESCAPES, str(tmp_path))

    assert (output.split("\n")[:-1], failure) == (["done"], "")
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]
    assert secret.read_text() == "key"
    assert (secret.stat().st_mode, secret.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)",
        "import signal, time\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except: pass\n"
        "time.sleep(60)",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    ],
)
def test_a_script_ends_in_its_time(code: str) -> None:
    began = time.monotonic()
    assert run(code, limits=HASTY)[1]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("while True: print('x' * 1000)", "more than 1,048,576 bytes of output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "more than 1,048,576 bytes of output"),
        ("x = [0]\nwhile True: x += x", "exit code 1: MemoryError"),
        ("import ctypes\nctypes.string_at(0)", "ended by SIGSEGV"),
        ("import sys\nsys.exit(96)", "exit code 96"),
    ],
)
def test_a_script_that_takes_too_much_fails(code: str, failure: str) -> None:
    assert failure in run(code)[1]


def test_a_script_can_use_the_standard_library_and_threads() -> None:
    code = """
import asyncio, decimal, hashlib, json, math, random, re, sys, threading, collections
thread = threading.Thread(target=print, args=("from a thread",)); thread.start(); thread.join()
async def later():
    await asyncio.sleep(0)
    return hashlib.sha256(input().encode()).hexdigest()[:4]
print(asyncio.run(later()), sys.argv, __name__)
exit()
"""
    assert run(code, "text\n") == ("from a thread\n982d [''] __main__\n", "")


_WRITE = """
import json, os, struct
def add(a, b):
    for said in SAID:
        data = json.dumps(said).encode()
        for n in range(64):
            try: os.write(n, struct.pack("!I", len(data)) + data)
            except OSError: pass
    return 5
"""
#: Code that is wrong and claims to be right about `add(2, 2)`.
FORGERIES = {
    "an object that equals everything": """
class Yes:
    def __eq__(self, other): return True
    __ne__ = __lt__ = __gt__ = lambda self, other: False
    __sub__ = __rsub__ = __abs__ = __float__ = lambda *x: 0
def add(a, b): return Yes()
""",
    "a number that equals everything": """
class Yes(int):
    def __eq__(self, other): return True
def add(a, b): return Yes(5)
""",
    "a list that contains everything": """
class Yes(list):
    def __contains__(self, other): return True
    __eq__ = __contains__
def add(a, b): return Yes()
""",
    "ending the process as if all went well": "import os\ndef add(a, b): os._exit(0)",
    "ending it while loading": "import os\nos._exit(0)",
    "leaving": "import sys\ndef add(a, b): sys.exit(0)",
    "other built-in functions": """
import builtins
class Fine(Exception): pass
builtins.AssertionError = Fine
builtins.abs = builtins.len = abs = lambda *x: 0
class math: isclose = fabs = lambda *x: 0
def add(a, b): return 5
""",
    "the caller's frames and all objects in memory": """
import gc, sys
def add(a, b):
    frame = sys._getframe().f_back
    texts = [str(each) for each in gc.get_objects() if isinstance(each, (str, tuple, list, dict))]
    while frame:
        texts += [str(frame.f_globals), str(frame.f_locals)]
        frame = frame.f_back
    return 4 if any("add(2" + chr(44) + " 2)" in text for text in texts) else 5
""",
    "verdicts in all pipes": _WRITE.replace("SAID", "({'tests': 0}, {'failure': None})"),
    "another answer than the one asked for": _WRITE.replace("SAID", "(['done', True, [[], 4], {}],)"),
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_code_cannot_decide_the_outcome_of_its_tests(code: str) -> None:
    tests = "assert add(2, 2) == 4", "assert add(2, 2) in [4] or abs(add(2, 2) - 4) < 1 or math.isclose(add(2, 2), 4)"
    assert None not in outcomes(code, *tests)


def test_each_test_ends_in_its_time_and_the_others_run() -> None:
    code = "def add(a, b):\n while a == 0: pass\n return a + b"
    began = time.monotonic()
    found = outcomes(code, "assert add(1, 2) == 3", "assert add(0, 1) == 1", "assert add(2, 2) == 4", limits=HASTY)
    assert found == [None, "not done in time", None]
    assert time.monotonic() - began < 10


CODE = """
import math
from collections import Counter, defaultdict, namedtuple
from decimal import Decimal
LIMIT = 7
Point = namedtuple("Point", "x y")
def sort(items): items.sort()
def apply(f, x): return f(x)
def half(x): yield x / 2
def fail(x): raise ValueError(f"{x} is bad")
def area(r): return math.pi * r
def plain(): return Counter("aab"), {1: (2, {3})}, Decimal("0.10"), b"x", 10**5000, float("inf"), "\\ud800", Point(1, 2)
def kind(x, of): return isinstance(x, of)
def tally(counts, x): counts[x] += 1
def turn(queue): queue.append(queue.popleft())
def grouped(): groups = defaultdict(list); groups[1].append(2); return groups
class Stack(list):
    def push(self, x): self.append(x)
class Vec:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
    def __lt__(self, other): return self.x < other.x
    def __add__(self, other): return Vec(self.x + other.x)
    def __iadd__(self, other): self.x += other.x; return self
    def __abs__(self): return abs(self.x)
    def __int__(self): return self.x
    def __bool__(self): return self.x != 0
    def __enter__(self): return self
    def __exit__(self, *error): self.x = 0
class Box:
    def __init__(self): self.items = {"a": 1}
    def __getitem__(self, key): return self.items[key]
    def __delitem__(self, key): del self.items[key]
    def __iter__(self): return iter(self.items)
class Place:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
"""
TESTS = {
    "a changed argument": "items = [[2], [1]]\nfirst = items[1]\nsort(items)\nassert items == [[1], [2]]",
    "a function as argument": "assert apply(lambda x: x + 1, 3) == 4",
    "a generator": "assert list(half(3)) == [1.5]\nassert next(half(1)) == 0.5",
    "an exception": "try:\n fail(3)\n assert False\nexcept ValueError as error:\n assert str(error) == '3 is bad'",
    "an object": "s = Stack()\ns.push(3)\nassert s.pop() == 3\nassert len(s) == 0\nassert isinstance(s, Stack)",
    "equal objects": "p = Place(1)\np.x = 5\nassert p.x == 5\nassert p == Place(5) != Place(6)",
    "arithmetic of objects": "assert Vec(1) + Vec(2) == Vec(3)\nv = w = Vec(1)\nv += Vec(4)\nassert w.x == 5",
    "the order of objects": "assert Vec(1) < Vec(2)\nassert [v.x for v in sorted([Vec(2), Vec(1)])] == [1, 2]",
    "objects as numbers": "assert abs(Vec(-2)) == 2 and int(Vec(3)) == 3\nassert Vec(1) and not Vec(0)",
    "a context": "with Vec(3) as v:\n assert v.x == 3\nassert v.x == 0",
    "items of an object": "b = Box()\nassert 'a' in b\ndel b['a']\nassert 'a' not in b",
    "objects in containers": "assert Vec(1) in [Vec(2), Vec(1)]\nassert 3 in Stack([3]) and 4 not in Stack([3])",
    "an object that compares by identity": "assert Box() != 5 and Box() != None and [Box()] != [1]",
    "attributes of every object": "assert vars(Vec(1)) == {'x': 1} and half.__doc__ is None",
    "a class as argument": "assert kind(1, int) and not kind('a', int)",
    "other changed arguments": "from collections import Counter, deque\nc, q = Counter('a'), deque([1, 2, 3], 3)\n"
    "tally(c, 'a')\nturn(q)\nassert c == {'a': 2} and q == deque([2, 3, 1])",
    "a dict with defaults": "from collections import defaultdict\nd = defaultdict(int)\ntally(d, 'x')\n"
    "assert d == {'x': 1} and d['y'] == 0\ng = grouped()\nassert g == {1: [2]} and g[5] == []",
    "a module that the code imports": "assert math.isclose(area(2), 6.2831853, rel_tol=1e-6)",
    "a constant": "assert LIMIT == 7",
    "plain values": "assert plain()[:-1] == (\n {'a': 2, 'b': 1}, {1: (2, {3})}, Decimal('0.1'), b'x', 10**5000, "
    "float('inf'), '\\ud800')\nassert plain()[-1] == (1, 2)\nassert plain()[-1].y == 2\nassert plain()[0]['c'] == 0",
}


def test_tests_see_what_they_would_see_in_the_same_process() -> None:
    found = outcomes(CODE, *TESTS.values(), setup="from decimal import Decimal")
    assert dict(zip(TESTS, found, strict=True)) == dict.fromkeys(TESTS)


def test_a_function_may_have_the_name_of_a_built_in_one() -> None:
    assert outcomes("def sum(a, b): return a + b", "assert sum(10, 15) == 25") == [None]


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("def add(a, b): return a - b", "AssertionError: wrong"),
        ("def other(): pass", "NameError: name 'add' is not defined"),
        ("def add(a, b", "the code cannot be loaded: SyntaxError"),
        ("def add(a, b): return bytearray(2**30)", "MemoryError"),
        ("import ctypes\ndef add(a, b): return ctypes.string_at(0)", "the code ended its process"),
    ],
)
def test_a_failure_says_why(code: str, failure: str) -> None:
    (found,) = outcomes(code, "assert add(1, 2) == 3, 'wrong'")
    assert failure in (found or "")


@pytest.mark.parametrize(
    ("tests", "entry_point", "reason"),
    [
        (["assert 1 == 1"], None, "unreadable_tests: the tests use nothing of the code"),
        (["assert add(1"], None, "unreadable_tests: SyntaxError"),
        (["import numpy\nassert add(1)"], None, "unsupported_tests: the tests import numpy"),
        (["try:\n add(1)\nexcept Mine:\n pass"], None, "unsupported_tests: the tests catch Mine"),
        (["add(1)\nexit()"], None, "unsupported_tests: the tests end their process"),
        (["class A: pass\nassert add(A())"], None, "unsupported_tests: the tests pass an object of type A"),
        (["assert add(Exception)"], None, "unsupported_tests: the tests pass an object of type type"),
        ("def check(candidate): assert candidate(1)", None, "no entry_point"),
        ("def helper(): assert add(1)", None, "unreadable_tests: the tests contain no assert"),
    ],
)
def test_tests_that_cannot_be_run_are_no_failure_of_the_code(
    tests: list[str] | str, entry_point: str | None, reason: str
) -> None:
    with pytest.raises(CannotTest) as error:
        box.run_tests("def add(x): return x", box.Tests(tests=tests, entry_point=entry_point), LIMITS, stop_early=False)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "test",
    [
        "Vec(1) + 1 == 2",
        "1 + Vec(1) == 2",
        "Vec(2) == 2",
        "[Vec(2)] == [2]",
        "Vec(1) < 2",
        "2 in Vec(1)",
        "copy.copy(Vec(1))",
    ],
)
def test_a_test_that_only_the_code_could_decide_fails_and_is_not_left_out(test: str) -> None:
    code = CODE + "Vec.__radd__ = lambda self, x: self.x + x\nVec.__contains__ = lambda self, x: True\n"
    (failure,) = outcomes(code, f"try:\n assert {test}\nexcept Exception:\n pass")
    assert (failure or "").startswith("the test ")
    assert "object of the code" in (failure or "")


def test_the_tests_of_a_response_end_in_their_time_together() -> None:
    code = "import time\ndef wait(seconds): time.sleep(seconds)"
    limits = Limits(timeout_seconds=30, total_seconds=4, memory_mb=256)
    began = time.monotonic()
    assert outcomes(code, "wait(0)", "wait(30)", "wait(0)", limits=limits) == [None, box.LATE, box.OVER]
    assert time.monotonic() - began < 10


HELPED = "from math import floor\ndef twice(x): return 2 * x\nclass Box:\n    x = 3\n"


def test_code_and_tests_have_what_the_prompt_defines_before_the_function() -> None:
    tests = box.Tests(
        preamble=HELPED, tests="def check(f):\n assert f(twice(1.5)) == twice(3) and Box().x == 3", entry_point="f"
    )
    assert box.run_tests("def f(x): return floor(twice(x))", tests, LIMITS, stop_early=False) == [None]
    cheat = "def twice(x): return 0\ndef f(x): return 0"
    assert box.run_tests(cheat, tests, LIMITS, stop_early=False) == ["AssertionError"]


@pytest.mark.parametrize(
    ("preamble", "cheat", "test"),
    [
        ("from math import isclose", "def isclose(*a, **k): return True", "isclose(f(1), 2)"),
        ("from math import *", "def isclose(*a, **k): return True", "isclose(f(1), 2)"),
        ("EPS = 1e-6", "EPS = 1e9", "abs(f(1) - 2) < EPS"),
    ],
)
def test_the_tests_use_the_imports_and_constants_of_the_prompt_not_those_of_the_code(
    preamble: str, cheat: str, test: str
) -> None:
    tests = box.Tests(preamble=preamble, tests=f"def check(f):\n assert {test}", entry_point="f")
    assert box.run_tests("def f(x): return x + 1", tests, LIMITS, stop_early=False) == [None]
    assert box.run_tests(f"{cheat}\ndef f(x): return 0", tests, LIMITS, stop_early=False) == ["AssertionError"]


@pytest.mark.parametrize(("preamble", "error"), [("import numpy", "ModuleNotFoundError"), ("return", "SyntaxError")])
def test_what_the_prompt_defines_and_cannot_be_loaded_is_no_failure_of_the_code(preamble: str, error: str) -> None:
    tests = box.Tests(preamble=preamble, tests="def check(f): assert f(1)", entry_point="f")
    with pytest.raises(CannotTest, match=f"the code in the prompt cannot be loaded: {error}"):
        box.run_tests("def f(x): return x", tests, LIMITS, stop_early=False)


def test_what_no_object_of_the_code_does_fails_as_it_would_in_one_process() -> None:
    found = outcomes(
        CODE, "assert half(2) == [1.0]", "half(2) + 1", "half(2) < 1", "with Vec(1) as v:\n assert v.x == 2"
    )
    assert [str(failure).partition(":")[0] for failure in found] == [
        *("AssertionError", "TypeError", "TypeError", "AssertionError")
    ]


def test_where_a_wall_is_missing_nothing_is_run_unless_it_may_be_missing(tmp_path: Path) -> None:
    """As in a container whose seccomp profile does not know Landlock."""
    file = write_run(tmp_path)
    file.write_text(file.read_text().replace('kind = "fake"', 'kind = "code"', 1))
    script = """
import ctypes, errno, sys
from pathlib import Path
from persyn.errors import HostLacks
from persyn.llm.protocols import ModelSpec
from persyn.llm.sandbox import box
from persyn.llm.scorers import code
from persyn.runs import run_file
from persyn.runs.checks import host
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
profile = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))
library.seccomp_rule_add_array(profile, 0x00050000 | errno.ENOSYS, 444, 0, None)
assert library.seccomp_load(profile) == 0
try:
    code.load(ModelSpec("code", ""), lambda: None)
except HostLacks as error:
    print(error)
for whose, finding in host.check(run_file.read(Path(sys.argv[1]))):
    print(whose, finding.level, finding.message)
accepted = {"unsafe_without": ["landlock"]}
print(code.load(ModelSpec("code", "", options=accepted), lambda: None).version)
limits = box.Limits(timeout_seconds=30, memory_mb=256)
print(box.run_program("print(1)", "", limits))
"""
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False)
    refused, found, version, *rest = done.stdout.splitlines()
    assert "code could read files, because landlock needs Linux 5.13" in refused
    assert "accept the risk with unsafe_without = ['landlock']" in refused
    assert found == f"quality code error {refused}"
    assert version.startswith("python 3")
    assert rest == []
    assert "HostLacks: the sandbox for code does not hold" in done.stderr
