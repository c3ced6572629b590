import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from miles_plan.rewards.outcome import RewardItem
from miles_plan.rewards.pool import RewardPool
from miles_plan.rewards.registry import RewardError, locate
from miles_plan.rewards.worker_link import PoolLimits

HERE = str(Path(__file__).parent)
ROOT = Path(__file__).parents[2]
LIMITS = PoolLimits(deadline_s=1.0)


def item(response, group=0):
    return RewardItem("p", response, "a", {}, group)


def open_pool(function, *, workers=2, limits=LIMITS):
    return RewardPool(locate(f"sample_rewards:{function}", [HERE]), workers=workers, limits=limits, search_path=[HERE])


PF_EXITING = 0x4  # of a process's flags
SIGKILL_PENDING = 1 << (signal.SIGKILL - 1)  # of its pending signals


def descendants(process):
    """Living processes below one, by /proc. One that is ending, or is killed and only has to be woken to end, runs nothing any
    more, however long the kernel takes over it: half a minute was seen."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                pending = [int(line.split()[1], 16) for line in (entry / "status").open() if line[:6] in ("SigPnd", "ShdPnd")]
            except OSError:
                continue
            killed = any(each & SIGKILL_PENDING for each in pending)
            if fields[0] not in "ZX" and not int(fields[6]) & PF_EXITING and not killed:
                parents[int(entry.name)] = int(fields[1])
    found, more = set(), {process}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def what_is_left(pool, keeper):
    """What processes that should be gone are doing, and what the pool thinks, a line each."""
    lines = [f"{number}: {link.state}, {len(link.run)} calls" for number, link in pool.links.items()]
    for process in sorted(descendants(keeper)):
        fields = [process]
        for name in ("stat", "wchan", "cmdline"):
            with contextlib.suppress(OSError):
                fields.append(Path(f"/proc/{process}/{name}").read_text()[:160])
        lines.append(" | ".join(map(str, fields)))
    return "\n".join(lines)


def alive(processes):
    found = set()
    for each in processes:
        with contextlib.suppress(OSError):  # it may end while it is read
            if Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.add(each)
    return found


def gone(processes, within_s=30.0):
    deadline = time.monotonic() + within_s
    while (left := alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not left


def settled(process, at_least):
    """The processes below one, once there are so many and they stay the same for a while."""
    deadline, before = time.monotonic() + 10, set()
    while time.monotonic() < deadline:
        found = descendants(process)
        if len(found) >= at_least and found == before:
            return found
        before = found
        time.sleep(0.1)
    raise AssertionError(f"{before} below {process}, {at_least} expected")


@pytest.fixture(scope="module")
def pool():
    """Its deadline is for rewards that never end; others must not meet it on a busy machine."""
    with open_pool("trouble", limits=PoolLimits(deadline_s=20, memory_bytes=1 << 28)) as opened:
        yield opened


@pytest.fixture(scope="module")
def impatient():
    with open_pool("trouble", limits=PoolLimits(deadline_s=1.0)) as opened:
        yield opened


def test_scores_come_back_in_order():
    with open_pool("length", workers=3) as pool:
        responses = ["x" * (i % 17) for i in range(200)]
        for _ in range(2):
            assert [outcome.score for outcome in pool.outcomes([item(each) for each in responses])] == [
                len(each) for each in responses
            ]
        assert pool.outcomes([]) == []


@pytest.mark.parametrize(
    ("response", "reason", "detail"),
    [
        ("raise", "raised", "ZeroDivisionError: division by zero ("),
        ("raise in str", "raised", "OddError"),
        ("exit", "raised", "SystemExit: 3"),
        ("interrupt", "died", "killed by SIGINT"),
        ("_exit", "died", "ended with code 7"),
        ("segfault", "died", "killed by SIGSEGV"),
        ("kill", "died", "killed by SIGKILL (out of memory?)"),
        ("nan", "not_finite", "returned nan"),
        ("infinity", "not_finite", "returned -inf"),
        ("huge", "not_finite", "returned 1e+300"),
        ("huge int", "not_finite", "returned inf"),
        ("none", "wrong_type", "returned None, not a number"),
        ("string", "wrong_type", "returned a str, not a number"),
        ("list", "wrong_type", "returned a list, not a number"),
        ("complex", "wrong_type", "returned a complex, not a number"),
        ("dict without", "wrong_type", "without 'reward'"),
        ("dict nan", "not_finite", "'format' is nan"),
        ("print much", "too_much_output", "printed more than 1,048,576 bytes"),
        ("many parts", "too_much_output", "more than a MiB"),
        ("memory", "raised", "MemoryError"),
        ("exhaust", "raised", "MemoryError"),
        ("recurse", "raised", "RecursionError"),
        ("leave", "left_processes", "left 1 processes running"),
        ("leave in session", "left_processes", "left 1 processes running"),
        ("escape", "left_processes", "left 1 processes running"),
        ("close", "died", ""),
        ("write", "died", "its messages make no sense"),
    ],
)
def test_trouble_is_named_and_costs_its_own_sample_only(pool, response, reason, detail):
    assert_trouble(pool, response, reason, detail)


@pytest.mark.parametrize("response", ["spin", "sleep", "ignore signals", "stop", "leave and hang"])
def test_what_hangs_is_killed_at_its_deadline(impatient, response):
    assert_trouble(impatient, response, "deadline", "killed after 1.")


def assert_trouble(pool, response, reason, detail):
    """One bad sample among good ones: it is named, they are scored, and nothing that it started is left."""
    keeper = pool._keeper.process.pid
    outcomes = pool.outcomes([item("1.5"), item("2"), item(response), item("-1"), item("0.5")])
    assert [outcome.score for outcome in outcomes] == [1.5, 2.0, outcomes[2].score, -1.0, 0.5]
    assert (outcomes[2].reason, detail in outcomes[2].detail) == (reason, True), outcomes[2]
    assert [outcome.score for outcome in pool.outcomes([item("7")] * 4)] == [7.0] * 4
    deadline = time.monotonic() + 30  # a machine may stand still for some seconds
    while len(descendants(keeper)) > 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(descendants(keeper)) <= 2, what_is_left(pool, keeper)  # the two workers


@pytest.mark.parametrize(
    ("response", "score", "parts"),
    [("true", 1.0, {}), ("int", 3.0, {}), ("dict", 0.5, {"format": 1.0}), ("tool", 0.75, {}), ("fork", 1.0, {})],
)
def test_what_is_allowed(pool, response, score, parts):
    (outcome,) = pool.outcomes([item(response)])
    assert (outcome.score, outcome.parts, outcome.reason) == (score, parts, None)


def test_a_copy_of_the_worker_ends_before_it_can_answer():
    with open_pool("trouble", workers=1, limits=PoolLimits(deadline_s=20)) as pool:
        for _ in range(3):
            outcomes = pool.outcomes([item("fork"), *(item(str(i)) for i in range(20))])
            assert [outcome.score for outcome in outcomes] == [1.0, *range(20)]
            assert len(descendants(pool._keeper.process.pid)) == 1


def test_what_a_failing_reward_printed_is_kept(pool):
    (outcome,) = pool.outcomes([item("print")])
    assert outcome.reason == "raised"
    assert outcome.output == "hello from the reward\n"


def test_many_hangs_at_once_are_killed_in_parallel(impatient):
    start = time.monotonic()
    outcomes = impatient.outcomes([item("sleep"), item("1")] * 4)
    assert [outcome.reason for outcome in outcomes] == ["deadline", None] * 4
    assert time.monotonic() - start < 4  # seconds one after the other, half of it with two workers


def test_every_item_may_end_its_process(pool):
    assert {outcome.reason for outcome in pool.outcomes([item("_exit")] * 20)} == {"died"}


def test_a_fork_bomb_is_gone_after_its_deadline():
    with open_pool("trouble", limits=PoolLimits(deadline_s=0.05)) as pool:
        assert [outcome.reason for outcome in pool.outcomes([item("fork bomb")])] == ["deadline"]
        keeper, deadline = pool._keeper.process.pid, time.monotonic() + 30
        while len(descendants(keeper)) > 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(descendants(keeper)) <= 2


def test_a_group_reward_sees_all_samples_of_a_prompt():
    with open_pool("group_mean") as pool:
        items = [item("aa", 1), item("b", 2), item("aaaa", 1), item("bbb", 2)]
        assert [outcome.score for outcome in pool.outcomes(items)] == [-1.0, -1.0, 1.0, 1.0]
        items = [item("short", 1), item("x", 1), item("word", 2), item("hang", 3), item("x", 3), item("x", 4)]
        outcomes = pool.outcomes(items)
        assert [outcome.reason for outcome in outcomes] == [
            "wrong_count",
            "wrong_count",
            "wrong_type",
            "deadline",
            "deadline",
            None,
        ]
        assert outcomes[0].detail == "returned 1 scores for 2 items"


@pytest.mark.parametrize(
    ("function", "message"),
    [("two_arguments", "a reward takes (prompt, response, answer, metadata)"), ("NOT_A_FUNCTION", "a int is no function")],
)
def test_what_is_no_reward_is_refused_at_the_start(function, message):
    with pytest.raises(RewardError) as caught:
        open_pool(function)
    assert message in str(caught.value)
    assert f"sample_rewards:{function} cannot be loaded" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("print('before'); raise OSError('no licence')\ndef f(p, r, a, m): ...", "OSError: no licence"),
        ("import time; time.sleep(600)\ndef f(p, r, a, m): ...", "not imported within"),
        ("import os; os._exit(9)\ndef f(p, r, a, m): ...", "ended with code 9"),
        ("import nowhere\ndef f(p, r, a, m): ...", "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_an_error_with_its_reason(tmp_path, source, message):
    (tmp_path / "broken_reward.py").write_text(source)
    limits = PoolLimits(deadline_s=1, startup_s=0.5)
    with pytest.raises(RewardError) as caught:
        RewardPool(locate("broken_reward:f", [str(tmp_path)]), workers=1, limits=limits, search_path=[str(tmp_path)])
    assert message in str(caught.value)
    assert ("it printed: before" in str(caught.value)) == ("before" in source)


def test_a_module_that_stops_loading_in_mid_run_fails_its_items_and_ends(tmp_path):
    module = tmp_path / "fading_reward.py"
    module.write_text("import os\ndef f(p, r, a, m): os._exit(1)\n")
    pool = RewardPool(locate("fading_reward:f", [str(tmp_path)]), workers=1, limits=LIMITS, search_path=[str(tmp_path)])
    with pool:
        module.write_text("raise OSError('the disk is gone')")
        outcomes = pool.outcomes([item("")] * 5)
    assert {outcome.reason for outcome in outcomes} == {"died"}
    assert "can no longer be loaded: OSError: the disk is gone" in outcomes[-1].detail


def test_the_death_of_the_keeper_costs_the_items_at_hand_and_no_more():
    with open_pool("trouble", limits=PoolLimits(deadline_s=20)) as pool:
        keeper = pool._keeper.process.pid
        workers = descendants(keeper)
        killer = subprocess.Popen([sys.executable, "-c", f"import time, os; time.sleep(0.3); os.kill({keeper}, 9)"])
        outcomes = pool.outcomes([item("sleep"), item("1"), item("2")])
        killer.wait()
        assert outcomes[0].reason == "died"
        assert "keeper" in outcomes[0].detail
        assert gone(workers)
        assert [outcome.score for outcome in pool.outcomes([item("1"), item("2")])] == [1.0, 2.0]


def test_closing_leaves_no_process():
    pool = open_pool("trouble")
    pool.outcomes([item("1")] * 4)
    below = descendants(pool._keeper.process.pid) | {pool._keeper.process.pid}
    assert len(below) >= 2
    pool.close()
    pool.close()
    assert not alive(below)
    with pytest.raises(ValueError, match="is closed"):
        pool.outcomes([item("1")])


OWNER = """
    import os, sys, threading
    sys.path.insert(0, {root!r})
    from miles_plan.rewards.outcome import RewardItem
    from miles_plan.rewards.pool import RewardPool
    from miles_plan.rewards.registry import locate
    from miles_plan.rewards.worker_link import PoolLimits

    def work():
        global pool
        located = locate("sample_rewards:trouble", [{here!r}])
        pool = RewardPool(located, workers=2, limits=PoolLimits(deadline_s=60), search_path=[{here!r}])
    thread = threading.Thread(target=work)  # the thread that starts the keeper ends: nothing may hang on it
    thread.start()
    thread.join()
    if {fork}:
        if os.fork() == 0:  # a copy of the owner that lives on, with all its descriptors
            import time
            time.sleep(30)
            os._exit(0)
    assert pool.outcomes([RewardItem("", "1", "", {{}})])[0].score == 1.0
    print("ready", pool._keeper.process.pid, flush=True)
    pool.outcomes([RewardItem("", "leave and hang", "", {{}}), RewardItem("", "spin", "", {{}})])
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fork", [False, True])
def test_no_process_outlives_its_owner(end, fork):
    source = textwrap.dedent(OWNER).format(root=str(ROOT), here=HERE, fork=fork)
    owner = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert owner.stdout is not None
    keeper = int(owner.stdout.readline().split()[1])
    below = settled(keeper, at_least=3) | {keeper}  # two workers and the process that one left
    copies = descendants(owner.pid) - below
    owner.send_signal(end)
    owner.wait()
    owner.stdout.close()
    try:
        assert gone(below)
    finally:
        for copy in copies:
            os.kill(copy, signal.SIGKILL)


def test_a_keeper_imports_neither_torch_nor_numpy():
    with open_pool("length", workers=1) as pool:
        for process in descendants(pool._keeper.process.pid) | {pool._keeper.process.pid}:
            maps = Path(f"/proc/{process}/maps").read_text()
            assert "torch" not in maps
            assert "numpy" not in maps
