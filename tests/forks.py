"""Fresh interpreters that share what takes long to load: forks of one process that has other libraries, not kvscope.

A fork differs from a new process in what Python reads at its start alone: ``PYTHONPATH``, ``PYTHONIOENCODING``, the
locale and the like. Tests of these start a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

SERVER = """
import importlib, json, os, sys, tempfile, traceback
for library in sys.argv[1:]:
    importlib.import_module(library)
for line in sys.stdin:
    asked = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv[1:] = asked["arguments"]
            os.environ.update(asked["environment"])
            os.chdir(asked["folder"])
            status = 0
            try:
                exec(asked["code"], {"__name__": "__main__"})
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read().decode() for file in (out, err)]
    print(json.dumps([status, *texts]), flush=True)
"""


class Forks:
    """A process that has loaded libraries, and runs code in forks of itself."""

    def __init__(self, *libraries: str) -> None:
        command = [sys.executable, "-c", SERVER, *libraries]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self, code: str, *arguments: str, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Return what the code printed in a fork, and its status; the environment is added to that of this process."""
        asked = {
            "code": code,
            "arguments": arguments,
            "environment": dict(environment or {}),
            "folder": str(folder or Path.cwd()),
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        status, out, err = json.loads(self.process.stdout.readline())
        return subprocess.CompletedProcess(code, status, out, err)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.process:  # closes the pipes, at which the process ends, and waits for it
            pass
