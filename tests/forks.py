"""Commands in forks of one process: what takes them eight CPU seconds to import is imported once, not for each.

Each still has a process, a folder, variables and an output of its own, and so have the kernels that it starts. Only
libraries are imported before a fork, and what makes kernels of forks (`tools.kernels`). Run as a script, this file is
that one process.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess

from tools import kernels

LIBRARIES = ["papermill", "transformers.models.auto.modeling_auto"]


class Forks:
    """What runs `python -m MODULE ...` in a folder."""

    def __init__(self, address: str, folder: Path, environment: dict[str, str]) -> None:
        self.address, self.folder, self.environment = address, folder, environment

    def run(self, *command: str, **variables: str) -> CompletedProcess:
        """A command's status and output, once it has ended; `variables` besides the environment of all."""
        with tempfile.TemporaryDirectory() as kept, socket.socket(socket.AF_UNIX) as connection:
            environment = {**self.environment, kernels.ADDRESS: self.address, **variables}
            connection.connect(self.address)
            connection.sendall(json.dumps([command, str(self.folder), environment, kept]).encode() + b"\n")
            while connection.recv(1):
                pass
            out, err, status = (Path(kept, name) for name in ("out", "err", "status"))
            return CompletedProcess(command, int(status.read_text()), out.read_text(), err.read_text())


@contextmanager
def forks(folder: Path, environment: dict[str, str], *more: str) -> Iterator[Forks]:
    """A process that has imported the libraries, and `more`, in an environment: commands in a folder are its forks."""
    with tempfile.TemporaryDirectory(prefix="forks-") as kept, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address := str(Path(kept, "socket")))
        listener.listen()
        command = [sys.executable, __file__, str(listener.fileno()), *more]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], env=environment, start_new_session=True
        ) as server:
            yield Forks(address, folder, environment)
            server.communicate()  # its standard input ends, and with that it does


def become_a_command(connection: socket.socket) -> None:
    """Go on as if this process had been started by what is asked for, a command or a kernel."""
    if b"ipykernel_launcher" in connection.recv(1000, socket.MSG_PEEK):
        kernels.become_a_kernel(connection)
        return
    (module, *arguments), folder, environment, kept = json.loads(connection.makefile().readline())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = [module, *arguments]
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(kept, name), os.O_WRONLY | os.O_CREAT), number)
    status = 0
    try:
        with kernels.forked():
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    Path(kept, "status").write_text(str(status))
    os._exit(status)


if __name__ == "__main__":
    del sys.path[0]  # this folder, which is on no command's path
    kernels.LIBRARIES += LIBRARIES + sys.argv[2:]
    kernels.serve(socket.socket(fileno=int(sys.argv[1])), become_a_command)
