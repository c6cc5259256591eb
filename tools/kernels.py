"""Kernels that are forks of one process: what takes long to import is imported once, not for each notebook.

A kernel spends six CPU seconds on torch, transformers and Matplotlib. Each notebook still has a process of its own, in
which nothing was executed: nothing of this repository is imported before a fork. nbval's kernels begin like this, and
those of `make run`, which executes notebooks side by side; those of JupyterLab, of papermill and of a single notebook
begin as they do for everybody.
"""

import gc
import importlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jupyter_client.provisioning import local_provisioner

LIBRARIES = ["ipykernel.kernelapp", "ipywidgets", "pandas", "scipy.stats", "torch", "transformers.modeling_utils"]
LIBRARIES += ["transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "datasets", "transformers.trainer"]
LIBRARIES += ["matplotlib.pyplot", "seaborn"]
ADDRESS = "LLAMA_LONG_KERNELS"  # in the environment: the server's socket


class Fork:
    """A kernel, with what jupyter_client asks of a process; its connection to us is closed when it ends."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], *, env: dict[str, str], cwd: Any = ".", **_streams: Any) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(os.environ[ADDRESS])
        self.connection.sendall(json.dumps([command, os.path.abspath(cwd), env]).encode() + b"\n")
        self.pid = int(self.connection.makefile().readline())

    def poll(self) -> int | None:
        return 0 if select.select([self.connection], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self.connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("kernel", timeout or 0)
        return 0

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_server() -> subprocess.Popen:
    """A process of which kernels are forked; it ends when its standard input does."""
    folder = tempfile.mkdtemp(prefix="kernels-")
    os.environ[ADDRESS] = str(Path(folder, "socket"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ[ADDRESS])
        listener.listen()  # from now on kernels can be asked for, and wait
        command = [sys.executable, __file__, str(listener.fileno())]
        # What is freed is kept: to get and clear the same pages again takes a tenth of reading a long text.
        keeping = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**29)}
        # As ipykernel sets it before a notebook imports Matplotlib, which looks for it then.
        inline = {"MPLBACKEND": os.environ.get("MPLBACKEND") or "module://matplotlib_inline.backend_inline"}
        environment = {**os.environ, **keeping, **inline}
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env=environment,
            start_new_session=True,  # Ctrl-C is for those who asked for kernels
        )


def stop_server(server: subprocess.Popen) -> None:
    """Its standard input ends, and with that it does."""
    server.communicate()
    shutil.rmtree(Path(os.environ.pop(ADDRESS)).parent)


@contextmanager
def serving() -> Iterator[None]:
    """Kernels that are started meanwhile, by this process or by forks of it, are forks of a server."""
    server = None if ADDRESS in os.environ else start_server()
    try:
        with forked():
            yield
    finally:
        if server:
            stop_server(server)


@contextmanager
def forked() -> Iterator[None]:
    """Kernels that are started meanwhile come from the server, if there is one."""
    launch = Fork if ADDRESS in os.environ else local_provisioner.launch_kernel
    with patch.object(local_provisioner, "launch_kernel", launch):
        yield


def become_a_kernel(connection: socket.socket) -> None:
    """Go on as if this process had been started by the command that is asked for."""
    command, folder, environment = json.loads(connection.makefile().readline())
    os.setsid()
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    sys.argv = command[command.index("ipykernel_launcher") :]
    connection.sendall(f"{os.getpid()}\n".encode())
    threading.Thread(target=end_with, args=[connection], daemon=True).start()
    importlib.import_module("ipykernel.kernelapp").launch_new_instance()


def end_with(connection: socket.socket) -> None:
    """A killed process of tests leaves no kernel behind: nothing is sent, so that this waits until it has ended."""
    connection.recv(1)
    os._exit(1)


def wait_for_ended_kernels() -> None:
    """What they have computed is counted as this process'."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def serve(listener: socket.socket, become: Callable[[socket.socket], None] = become_a_kernel) -> None:
    """Fork a kernel, or what else a fork is to `become`, for each connection, until standard input ends."""
    gc.disable()  # nothing that is imported is garbage: to look for some takes a seventh of the time
    logging.disable(logging.WARNING)  # a library that misses another says so, where a notebook would not show it
    for name in LIBRARIES:
        importlib.import_module(name)
    logging.disable(logging.NOTSET)
    gc.freeze()
    gc.enable()
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            become(connection)
            return
        connection.close()
        wait_for_ended_kernels()
    wait_for_ended_kernels()


if __name__ == "__main__":
    del sys.path[0]  # this folder, which is on no kernel's path
    serve(socket.socket(fileno=int(sys.argv[1])))
