"""A warp's rows reach memory whole and in their places: the instructions, carried out for its thirty-two lanes."""

from __future__ import annotations

import re

import pytest

from miles_plan.kernels.cuda.whole_rows import writing

LANES = range(32)
Values = dict[str, list[int]]  # of a register, in each lane


def carried_out(text: str, operands: dict[str, list[int]]) -> dict[int, int]:
    """The 32-bit words in memory, by address, once a warp has gone through the instructions."""
    memory: dict[int, int] = {}
    registers: Values = dict(operands)

    def value(name: str, lane: int) -> int:
        return int(name) if re.fullmatch(r"-?\d+", name) else registers[name][lane]

    for line in text.strip("{} ").split(";"):
        found = re.match(r"\s*(?:@(!?)(\w+)\s+)?([\w.:]+)\s+(.*)", line)
        if not found or found[3] == ".reg":
            continue
        negated, guard, op, rest = found.groups()
        names = [name.strip("[]{} ") for name in rest.split(",")]
        lanes = [lane for lane in LANES if guard is None or bool(registers[guard][lane]) != bool(negated)]
        if op == "st.global.v4.b32":
            for lane in lanes:
                assert registers[names[0]][lane] % 16 == 0
                memory |= {registers[names[0]][lane] + 4 * i: registers[name][lane] for i, name in enumerate(names[1:])}
            continue
        before = registers.get(names[0], [0] * len(LANES))
        after = {lane: result(op, [[value(name, at) for name in names[1:]] for at in LANES], lane) for lane in lanes}
        registers[names[0]] = [after.get(lane, before[lane]) for lane in LANES]
    return memory


def result(op: str, given: list[list[int]], lane: int) -> int:
    """What an instruction computes in a lane from what every lane gives it."""
    a, b, c = (*given[lane], 0, 0)[:3]
    if op.startswith("shfl"):
        return given[lane ^ b][0]
    if op.startswith("movmatrix"):  # of eight rows, each two elements in four lanes, the transpose
        low, high = (given[4 * (2 * (lane % 4) + half) + lane // 8][0] >> lane // 4 % 2 * 16 & 0xFFFF for half in range(2))
        return high << 16 | low
    if op.startswith("sh"):
        return a << b if op.startswith("shl") else a >> b
    kind = ".".join(op.split(".")[: 3 if op.startswith("setp.lt.and") else 2 if op.startswith("setp") else 1])
    of_kind = {
        "mov": a, "cvt": a, "add": a + b, "mul": a * b, "and": a & b, "selp": a if c else b,
        "setp.ne": a != b, "setp.lt": a < b, "setp.lt.and": a < b and bool(c),
    }  # fmt: skip
    return int(of_kind[kind])


@pytest.mark.parametrize(("piece", "count"), [(16, 5), (16, 7), (32, 3), (32, 5), (64, 3)])
@pytest.mark.parametrize(("rows", "columns"), [(1000, 4096), (41, 4096), (1000, 72)])
def test_a_warps_rows_reach_memory_whole(piece: int, count: int, rows: int, columns: int) -> None:
    row, col, stride, base = 32, 16, 4104, 1 << 33
    each = piece // 2
    results, pairs = each // 2, each // 2 * count

    def pair(row: int, col: int) -> int:
        return row << 16 | col

    operands = {}
    for i in range(pairs):  # `wgmma`'s layout
        at = [(row + lane // 4 + 8 * (i % 2), col + i // 2 * 8 + lane % 4 * 2) for lane in LANES]
        operands[f"${results + i}"] = [pair(*place) for place in at]
    scalars = [[base] * 32, [stride] * 32, [col] * 32, [rows] * 32, [columns] * 32]
    own = [[row + lane // 4 for lane in LANES], [lane % 4 * 2 for lane in LANES]]
    operands |= {f"${results + pairs + each * i}": values for i, values in enumerate(scalars + own)}
    written = carried_out(writing(each, count), operands)
    assert written == {
        base + 2 * (r * stride + c): pair(r, c)
        for r in range(row, min(row + 16, rows))
        for c in range(col, min(col + piece * count, columns), 2)
    }
