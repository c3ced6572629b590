"""Rewards that do what users' rewards do. Not a test module: workers import it, the tests never do."""

import math
import os
import signal
import subprocess
import sys
import time


def length(prompt, response, answer, metadata):
    return float(len(response))


def with_parts(prompt, response, answer, metadata):
    return {"reward": 1.0, "format": 0.5} if response != "bare" else 0.25


def trouble(prompt, response, answer, metadata):
    """Whatever the response names."""
    return TROUBLE[response]() if response in TROUBLE else float(response)


def group_mean(items):
    if items[0].response == "short":
        return [0.0]
    if items[0].response == "hang":
        time.sleep(600)
    if items[0].response == "word":
        return "abc"
    mean = sum(len(item.response) for item in items) / len(items)
    return [len(item.response) - mean for item in items]


def two_arguments(prompt, response):
    return 0.0


NOT_A_FUNCTION = 3


def spin():
    while True:
        pass


def print_much():
    for _ in range(1 << 14):
        print("x" * (1 << 16))
    return 1.0


def fork_and_return():
    os.fork()
    return 1.0


def leave_process(**options):
    subprocess.Popen(["sleep", "600"], **options)
    return 1.0


def escape():
    """A grandchild in a session of its own whose parent is gone."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    return 1.0


def leave_and_hang():
    escape()
    spin()


def fork_bomb():
    while True:
        os.fork()


def recurse(n=0):
    return recurse(n + 1)


def deep_stack():
    """Overflows the C stack: no exception, a segmentation fault."""
    os.kill(os.getpid(), signal.SIGSEGV)


def raise_in_str():
    class OddError(Exception):
        def __str__(self):
            raise ValueError

    raise OddError


def close_everything():
    os.closerange(0, 100)
    return 1.0


def write_everywhere():
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b"[nonsense\n")
        except OSError:
            continue
    return 1.0


def tool():
    done = subprocess.run([sys.executable, "-c", "print(0.75)"], capture_output=True, text=True, check=True)
    return float(done.stdout)


TROUBLE = {
    "raise": lambda: 1 / 0,
    "raise in str": raise_in_str,
    "exit": lambda: sys.exit(3),
    "interrupt": lambda: signal.raise_signal(signal.SIGINT),
    "_exit": lambda: os._exit(7),
    "segfault": deep_stack,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "spin": spin,
    "sleep": lambda: time.sleep(600),
    "ignore signals": lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)), time.sleep(600)),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "nan": lambda: math.nan,
    "infinity": lambda: -math.inf,
    "huge": lambda: 1e300,
    "huge int": lambda: 10**5000,
    "none": lambda: None,
    "string": lambda: "1.0",
    "list": lambda: [1.0],
    "complex": lambda: 1j,
    "true": lambda: True,
    "int": lambda: 3,
    "dict": lambda: {"reward": 0.5, "format": 1},
    "dict without": lambda: {"format": 1.0},
    "dict nan": lambda: {"reward": 1.0, "format": math.nan},
    "print": lambda: print("hello from the reward") or 1 / 0,
    "print much": print_much,
    "memory": lambda: len(bytearray(1 << 40)),
    "recurse": recurse,
    "fork": fork_and_return,
    "leave": leave_process,
    "leave in session": lambda: leave_process(start_new_session=True),
    "escape": escape,
    "leave and hang": leave_and_hang,
    "fork bomb": fork_bomb,
    "close": close_everything,
    "write": write_everywhere,
    "tool": tool,
    "many parts": lambda: {"reward": 1.0} | {f"part{i}": 1.0 for i in range(70_000)},
    "exhaust": lambda: [bytearray(1 << 26) for _ in range(1 << 20)],
}
