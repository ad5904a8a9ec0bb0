"""Runs each command in a process of its own, forked from one that has imported everything.

Reads lines of JSON, ``{"arguments": .., "folder": .., "seconds": ..}``, and answers each with a line
``{"code": .., "out": .., "err": ..}``; the code is negative for a signal, None for a command that did not
end. Nothing is computed before a fork: threads do not survive it.
"""

import json
import os
import signal
import sys
import tempfile
import time

from fasttower import cli, pipeline, report
from fasttower.commands import evaluate, export, info, recommend, similar

IMPORTED = (cli, pipeline, report, evaluate, export, info, recommend, similar)


def child(request, out, err):
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(request["folder"])
    try:
        code = cli.main([os.fsdecode(bytes(argument, "latin-1")) for argument in request["arguments"]])
    except SystemExit as stop:  # of --help
        code = stop.code or 0
    except BaseException:  # a traceback is what is looked for
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer(request):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if not process:
            child(request, out, err)
        until, code = time.monotonic() + request["seconds"], None
        while time.monotonic() < until:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.002)
        else:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return {"code": code, "out": texts[0], "err": texts[1]}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()
