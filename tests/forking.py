"""Pieces of code in processes of their own that begin with the package imported, which takes longer than they do."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Reads a line of JSON, forks, runs the code in the child, and answers with a line of JSON.
SERVER = """
import json, os, signal, sys, time, traceback
import torch, transformers, datasets, peft
import hf_aselect, hf_aselect.training.metrics
import huggingface_hub.constants as constants

def run(task):
    os.environ.update(task["environment"])
    for name in task["without"]:
        os.environ.pop(name, None)
    # The client reads it when it is imported.
    constants.HF_HOME = os.environ["HF_HOME"]
    constants.HF_HUB_CACHE = os.path.join(constants.HF_HOME, "hub")
    constants.HF_TOKEN_PATH = os.path.join(constants.HF_HOME, "token")
    sys.argv = ["-c", *task["words"]]
    try:
        exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open(task["output"], os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = run(task)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    ended = 0
    if task["kill_after"] is not None:
        time.sleep(task["kill_after"])
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, task["signal"])
    if not ended:
        _, status = os.waitpid(child, 0)
    answer = {"code": os.waitstatus_to_exitcode(status)}
    print(json.dumps(answer), file=sys.__stdout__, flush=True)
"""


class Forking:
    """A process that has imported the package, and forks for each piece of code.

    Args:
        environment: Its environment.
    """

    def __init__(self, environment):
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, code, *words, environment, kill_after=None, sign=signal.SIGKILL):
        """Run code with words on its command line; return its exit status and all that it says.

        After some seconds it gets a signal, if asked for.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            task = {
                "code": code,
                "words": list(map(str, words)),
                "environment": environment,
                "without": [name for name in self.environment if name not in environment],
                "output": str(output),
                "kill_after": kill_after,
                "signal": int(sign),
            }
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
            return answer["code"], output.read_text(encoding="utf-8")

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
