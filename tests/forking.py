"""Pieces of code in processes of their own that begin with the package imported, which takes longer than they do."""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

# Reads a line of JSON, forks, runs the code in the children, and answers with a line of JSON for each of both.
SERVER = """
import gc
gc.disable()
import atexit, json, os, signal, sys, time, traceback
import numpy, torch, transformers, datasets, peft, accelerate
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from transformers import Trainer, dynamic_module_utils
if len(sys.argv) > 1:
    sys.modules["hf_aselect"] = None
else:
    import hf_aselect, hf_aselect.training.metrics
import huggingface_hub.constants as constants
# Five seconds after each stream's end, lest its threads outlive the process.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1
# What was imported is never looked through again, and stays in memory that the children share.
gc.freeze()
gc.enable()

def run(task):
    os.environ.update(task["environment"])
    for name in task["without"]:
        os.environ.pop(name, None)
    # The client and transformers read it when they are imported.
    if "HF_HOME" in os.environ:
        constants.HF_HOME = os.environ["HF_HOME"]
        constants.HF_HUB_CACHE = os.path.join(constants.HF_HOME, "hub")
        constants.HF_TOKEN_PATH = os.path.join(constants.HF_HOME, "token")
        dynamic_module_utils.HF_MODULES_CACHE = os.path.join(constants.HF_HOME, "modules")
    numpy.random.seed()
    sys.argv = ["-c", *task["words"]]
    try:
        exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    task = json.loads(line)
    children = []
    for rank in range(task["world"]):
        child = os.fork()
        if child == 0:
            output = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if task["world"] > 1:
                task["environment"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = run(task)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    print(json.dumps(children), file=sys.__stdout__, flush=True)
    code = 0
    if task["kill_after"] is not None:
        time.sleep(task["kill_after"])
        ended, status = os.waitpid(children[0], os.WNOHANG)
        if ended:
            children, code = [], os.waitstatus_to_exitcode(status)
        else:
            os.kill(children[0], task["signal"])
    while children:
        child, status = os.wait()
        children.remove(child)
        code = code or os.waitstatus_to_exitcode(status)
        if code:
            # The others might wait for it for ever.
            for other in children:
                os.kill(other, signal.SIGKILL)
    print(json.dumps(code), file=sys.__stdout__, flush=True)
"""
# Runs a script as Python does that is given its path.
SCRIPT = """
import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Running:
    """A piece of code that is at work.

    Args:
        server: The process that forked for it.
        folder: Where it says what it says.
        pids: Its processes.
    """

    def __init__(self, server, folder, pids):
        self.server, self.folder, self.pids = server, folder, pids

    @property
    def has_ended(self):
        """Whether its first process has."""
        try:
            os.kill(self.pids[0], 0)
        except ProcessLookupError:
            return True
        return False

    def kill(self):
        """Kill its processes."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def said(self):
        """All that it has said so far."""
        output = Path(self.folder.name) / "output"
        return output.read_text(encoding="utf-8") if output.exists() else ""

    def wait(self, limit=300):
        """Return its exit status, the first that is not 0 of several processes, and all that it says.

        What has not ended after some seconds is killed: it waits for something that does not come.
        """
        timer = threading.Timer(limit, self.kill)
        timer.start()
        code, said = json.loads(self.server.stdout.readline()), self.said
        timer.cancel()
        self.folder.cleanup()
        return code, said


class Forking:
    """A process that has imported the package, and forks for each piece of code.

    Args:
        environment: Its environment.
        without_us: Whether it can not import it, but all other libraries.
    """

    def __init__(self, environment, without_us=False):
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *["without"] * without_us],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, code, *words, environment=None, world=1, kill_after=None, sign=signal.SIGKILL):
        """Start code with words on its command line; one at a time.

        After some seconds it gets a signal, if asked for. Processes of a `world` find each other as those of torchrun.
        """
        environment = self.environment if environment is None else environment
        if world > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        folder = tempfile.TemporaryDirectory()
        task = {
            "code": code,
            "words": list(map(str, words)),
            "environment": environment,
            "without": [name for name in self.environment if name not in environment],
            "output": str(Path(folder.name) / "output"),
            "world": world,
            "kill_after": kill_after,
            "signal": int(sign),
        }
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return Running(self.process, folder, json.loads(self.process.stdout.readline()))

    def run(self, code, *words, **options):
        """Run code with words on its command line; return its exit status and all that it says. See `start`."""
        return self.start(code, *words, **options).wait()

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@functools.cache
def offline():
    """Return a process for whatever needs no Hub: made once, on the first use, for all tests."""
    given = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    # Several processes share the processor.
    server = Forking({**os.environ, **given, "OMP_WAIT_POLICY": "passive"})
    atexit.register(server.close)
    return server


def _in_group(work, given, rank, port, queue):
    import torch  # not needed by those that only fork

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    queue.put((rank, work(rank, *given)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def in_two_processes(work, *given):
    """What a function of a module returns in each of two processes that share their work, by rank."""
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_in_group, args=(work, given, rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted((queue.get(timeout=300) for _ in processes), key=lambda pair: pair[0])
    for process in processes:
        process.join()
    return [each for _, each in found]
