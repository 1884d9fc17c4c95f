"""Runs `imagekiln` command lines in processes of their own without paying for `import torch` and the like each time.

A request is a line of JSON on stdin. `{"start": [arguments], "cwd": ..., "out": ..., "err": ..., "limits": ...}` forks
a child that calls the same `main()` as the console script, and answers its process id; `{"poll": pid}` answers its exit
code (negative for a signal) or null. Nothing is computed before the fork, so a child starts as a fresh process would.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import sys
import traceback

import sklearn.datasets  # noqa: F401  builtin:digits comes from here
import torch
import torch._dynamo  # every first optimizer of a process imports it

from imagekiln import api  # noqa: F401  everything a verb imports late
from imagekiln.cli.main import main

with contextlib.suppress(ImportError):  # an extra; what is named here imports a thousand modules
    from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

torch.set_num_threads(1)


def child(request: dict) -> None:
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.argv = ["imagekiln", *request["start"]]
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    try:
        main()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def poll(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def serve() -> None:
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = poll(request["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
