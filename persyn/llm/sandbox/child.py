"""A child process of the sandbox, which does the job that a file descriptor has as JSON.

It puts up its walls before it runs anything of the job. A role is a module of this package: `program` runs code as a
script; `subject` loads code and does with it what the referee asks for; `referee` runs the tests and reports each
outcome; `probe` tries the walls. They import nothing but the standard library, and little of it, because each process
pays for it.
"""

from __future__ import annotations

import builtins
import json
import os
import site
import sys
from importlib import import_module
from typing import Any

from persyn.llm.sandbox import walls


def main(descriptor: int) -> None:
    """Do the job in the file of this descriptor, behind walls."""
    with os.fdopen(descriptor) as file:
        job = json.load(file)
    site.setquit()  # `exit` and `quit`, which are missing without site's packages
    work = import_module(f"persyn.llm.sandbox.{job['role']}").work  # behind the walls it cannot be read
    sys.path.pop()
    sys.argv[:] = [""]
    sys.set_int_max_str_digits(0)
    os.environ.clear()
    try:
        missing = walls.enclose(job["memory_mb"], job["cpu_seconds"], without=job["without"])
    except walls.NoWall as error:
        sys.stderr.write(str(error))
        sys.exit(walls.NO_WALL)
    if os.getppid() != job["parent"]:  # it has ended before this process asked to end with it
        sys.exit("the parent has ended")
    work(job, missing)


def run(code: str, name: str, namespace: dict[str, Any]) -> None:
    """Execute code as a module of this name in a namespace."""
    namespace |= {"__name__": name, "__builtins__": builtins}
    exec(compile(code, "response.py", "exec", dont_inherit=True), namespace)  # noqa: S102 - behind walls
