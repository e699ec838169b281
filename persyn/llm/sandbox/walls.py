"""The walls around untrusted code, which a process puts around itself; none needs root.

- `limits`:   resource limits on memory, CPU time, file sizes and open files.
- `landlock`: Landlock; files may be read only below a few folders, none may be written.
- `seccomp`:  a list of the permitted system calls. What is not on it fails: network, processes, execution of programs,
              signals to others, changes to files (also of their permissions and times), other processes' memory.

Used in child processes that import nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
from collections.abc import Callable, Collection, Sequence

WALLS = ("limits", "landlock", "seccomp")
#: What a missing wall lets code do, and how to get the wall.
REMEDIES = {
    "limits": ("use any amount of memory", "needs Linux"),
    "landlock": (
        "read files",
        "needs Linux 5.13 or later with Landlock among /sys/kernel/security/lsm and, in a container, a seccomp profile "
        "that permits it, as those of current Docker and Podman do",
    ),
    "seccomp": (
        "use the network, start processes, send signals and change files",
        "needs Linux and the library libseccomp: apt install libseccomp2, or dnf install libseccomp",
    ),
}

#: The exit code of a child that cannot put up its walls.
NO_WALL = 96

_OPEN_FILES = 64
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

#: The numbers of Landlock's system calls are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
#: Rights on files by Landlock's version: how many of its first bits the kernel knows.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
#: TCP's bind and connect (version 4); signals and abstract sockets outside (version 6).
_NETWORK, _SCOPES = 0b11, 0b11

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_MASKED_EQUAL = 7
_INT = 0xFFFFFFFF

#: System calls that act on nothing but the process itself and what it has open.
_PERMITTED = (
    "read readv pread64 write writev pwrite64 close lseek fstat stat lstat newfstatat statx access faccessat "
    "faccessat2 readlink readlinkat getcwd getdents64 dup dup2 dup3 pipe pipe2 poll ppoll select pselect6 "
    "epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 recvfrom sendto shutdown "
    "mmap munmap mremap mprotect madvise brk membarrier arch_prctl "
    "rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall exit exit_group "
    "futex set_robust_list set_tid_address rseq sched_yield sched_getaffinity "
    "nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage getrandom "
    "getpid getppid gettid getuid geteuid getgid getegid getpgrp uname sysinfo"
)

#: (argument, mask, value): the call is permitted if the argument has the value under the mask.
_Condition = tuple[int, int, int]
_WRITES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD, _AF_UNIX, _SOCK_STREAM, _SOCKET_KIND = 0x10000, 1, 1, 0xF
_FCNTL = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
_IOCTL = (0x5401, 0x5413, 0x5421, 0x5450, 0x5451, 0x541B)  # TCGETS, TIOCGWINSZ, FIONBIO, FIONCLEX, FIOCLEX, FIONREAD
#: System calls that are permitted with these arguments only; each list of conditions is one way.
_RESTRICTED: dict[str, list[list[_Condition]]] = {
    "open": [[(1, _WRITES, os.O_RDONLY)]],
    "openat": [[(2, _WRITES, os.O_RDONLY)]],
    "clone": [[(0, _CLONE_THREAD, _CLONE_THREAD)]],
    "fcntl": [[(1, _INT, command)] for command in _FCNTL],
    "ioctl": [[(1, _INT, command)] for command in _IOCTL],
    # Only to read the process's own limits.
    "prlimit64": [[(0, _INT, 0), (2, 2**64 - 1, 0)]],
    # Connected to itself, as asyncio has one; a datagram socket could send to others.
    "socketpair": [[(0, _INT, _AF_UNIX), (1, _SOCKET_KIND, _SOCK_STREAM)]],
}


class NoWall(Exception):
    """A wall cannot be put up; the message says why."""


def enclose(memory_mb: int, cpu_seconds: int, *, without: Collection[str] = ()) -> dict[str, str]:
    """Put up the walls around this process, for good.

    memory_mb:   address space in MiB.
    cpu_seconds: of all its threads.
    without:     walls that may be missing.
    Returns the missing walls with the reasons; raises `NoWall` if another one is missing.
    """
    build: dict[str, Callable[[], None]] = {
        "limits": lambda: _limit(memory_mb, cpu_seconds),
        "landlock": _restrict_files,
        "seccomp": _restrict_calls,
    }
    missing = {}
    for name in WALLS:
        try:
            build[name]()
        except (OSError, ValueError, AttributeError) as error:
            if name not in without:
                raise NoWall(f"{name}: {error}") from error
            missing[name] = str(error)
    return missing


def _limit(memory_mb: int, cpu_seconds: int) -> None:
    memory = memory_mb * 2**20
    for limit, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the process must not outlive the one that ends it in time


def readable() -> list[str]:
    """The folders and files that the code may read: Python's library and what it needs from the system."""
    libraries = [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/urandom"]
    return [path for path in (*libraries, os.path.dirname(os.__file__), *system) if os.path.exists(path)]


def _restrict_files() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    version = _must(libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG))
    files = (1 << _FILE_RIGHTS.get(version, max(_FILE_RIGHTS.values()))) - 1
    handled = [files] + [_NETWORK] * (version >= 4) + [_SCOPES] * (version >= 6)
    attributes = (ctypes.c_uint64 * len(handled))(*handled)
    ruleset = _must(libc.syscall(_CREATE_RULESET, attributes, ctypes.sizeof(attributes), 0))
    for path in readable():
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        _must(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(_Beneath(rights, place)), 0))
        os.close(place)
    _must(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


class _Beneath(ctypes.Structure):
    """Linux's `struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _Comparison(ctypes.Structure):
    """libseccomp's `struct scmp_arg_cmp`."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("mask", ctypes.c_uint64), ("value", ctypes.c_uint64))


def _restrict_calls() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Comparison))
    ]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    calls = library.seccomp_init(_ERRNO | errno.EPERM)

    def add(action: int, name: str, conditions: Sequence[_Condition] = ()) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # not every architecture has every call
            compared = [_Comparison(arg, _MASKED_EQUAL, mask, value) for arg, mask, value in conditions]
            some = (_Comparison * len(compared))(*compared)
            _succeed(library.seccomp_rule_add_array(calls, action, number, len(compared), some), name)

    for name in _PERMITTED.split():
        add(_ALLOW, name)
    for name, ways in _RESTRICTED.items():
        for conditions in ways:
            add(_ALLOW, name, conditions)
    add(_ERRNO | errno.ENOSYS, "clone3")  # its flags are not visible here; libraries then use clone
    _succeed(library.seccomp_load(calls), "load")


def _prctl(option: int, value: int) -> None:
    _must(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0))


def _must(result: int) -> int:
    """Raise `OSError` for a system call that failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _succeed(result: int, what: str) -> None:
    """Raise `OSError` for a call of libseccomp that failed."""
    if result < 0:
        raise OSError(-result, f"libseccomp: {what}: {os.strerror(-result)}")
