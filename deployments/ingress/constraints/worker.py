"""The process that checks constraints, so that a hostile one costs neither an event loop nor the ingress its memory:

    python -m deployments.ingress.constraints.worker

It serves the socket that is its standard input: frames of a length (4 bytes, big-endian) and a packed message, answered
in order. checker.py is the other end. Each check runs in a fork, which the kernel ends at its limit of CPU
time or memory, wherever in llguidance it is; this process keeps the tokenizers and says what happened.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import traceback
from pathlib import Path

import msgspec

from deployments.contracts import CheckedConstraint, ConstraintCheck, OutputCheck, pack
from deployments.ingress.constraints.grammar import ModelGrammars
from deployments.ingress.constraints.limits import CHECK_CPU_S, MEMORY_BYTES, OUTPUTS_CPU_S, LoadModel

__all__ = ["main"]

_OUT_OF_MEMORY = 3
"""Exit status where Python noticed it."""
_MAX_MODELS = 4
"""Tokenizers that are kept."""
_NICENESS = 4
"""Beside the ingress's: an engine on the same host takes its steps before a check is gone on with."""


def main() -> None:
    os.nice(_NICENESS)
    models: dict[str, ModelGrammars] = {}
    with socket.socket(fileno=os.dup(0)) as connection, connection.makefile("rb") as stream:
        while len(head := stream.read(4)) == 4:
            message = msgspec.msgpack.decode(
                stream.read(int.from_bytes(head)), type=LoadModel | ConstraintCheck | OutputCheck
            )
            if isinstance(message, LoadModel):
                _load(models, message.folder)
                _send(connection, message)
            else:
                _in_a_fork(connection, models[message.folder], message)


def _send(connection: socket.socket, answer: msgspec.Struct) -> None:
    data = pack(answer)
    connection.sendall(len(data).to_bytes(4) + data)


def _in_a_fork(connection: socket.socket, grammars: ModelGrammars, message: ConstraintCheck | OutputCheck) -> None:
    """Answers. Ends this process, and so the connection, if the fork was ended by somebody else."""
    cpu_s = CHECK_CPU_S if isinstance(message, ConstraintCheck) else OUTPUTS_CPU_S
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _limit_memory()
            signal.setitimer(signal.ITIMER_PROF, cpu_s)  # whose signal ends the process, whatever it is at
            answer = grammars.check(message) if isinstance(message, ConstraintCheck) else grammars.conforming(message)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(connection, answer)
            status = 0
        except MemoryError:
            status = _OUT_OF_MEMORY
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return
    if isinstance(message, ConstraintCheck) and status == -signal.SIGPROF:
        excess = f"It takes more than {CHECK_CPU_S:g} s to check"
    elif isinstance(message, ConstraintCheck) and status in (_OUT_OF_MEMORY, -signal.SIGABRT, -signal.SIGSEGV):
        excess = f"It takes more than {MEMORY_BYTES // 2**20} MiB of memory to check, or nests too deeply"
    else:
        raise SystemExit(f"a check ended with status {status}")
    advice = "Make it smaller or simpler: fewer properties, labels or alternatives, or smaller repetitions."
    _send(connection, CheckedConstraint(message=f"{excess}. {advice}"))


def _limit_memory() -> None:
    """Of this process, from what it has."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _load(models: dict[str, ModelGrammars], folder: str) -> None:
    if folder in models:
        models[folder] = models.pop(folder)  # the last used
        return
    while len(models) >= _MAX_MODELS:
        del models[next(iter(models))]
    models[folder] = ModelGrammars(Path(folder))


if __name__ == "__main__":
    main()
