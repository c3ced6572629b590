from __future__ import annotations

from pathlib import Path

import pytest

from miles_plan.kernels.cuda import toolchain
from miles_plan.kernels.cuda.toolchain import assembly_digest, keyed


def test_the_digest_follows_what_emits_instructions_and_nothing_else(tmp_path: Path) -> None:
    emitter, other = tmp_path / "a.py", tmp_path / "b.py"
    emitter.write_text("\n@inline\ndef f():\n    return 'mov'\n")
    other.write_text("x = 1\n")
    before = assembly_digest(tmp_path)
    other.write_text("x = 2\n")
    assert assembly_digest(tmp_path) == before
    emitter.write_text("\n@inline\ndef f():\n    return 'add'\n")
    assert assembly_digest(tmp_path) != before


@pytest.mark.skipif(not toolchain.HAVE_GLUON, reason="needs Triton with Gluon")
def test_a_kernel_is_kept_under_another_key_when_the_assembly_it_may_use_changes() -> None:
    from triton.experimental import gluon

    def kernel(x: object) -> None:
        pass

    keys = [keyed(gluon.jit, digest)(kernel).cache_key for digest in ("one", "two", "one")]
    assert keys[0] == keys[2] != keys[1]
    assert keyed(gluon.jit, "one")(do_not_specialize=["x"])(kernel).cache_key == keys[0]


@pytest.mark.skipif(not toolchain.HAVE_GLUON, reason="needs Triton with Gluon")
def test_the_package_s_kernels_carry_it() -> None:
    from miles_plan.kernels.cuda.attention_kernel import attention_kernel

    assert attention_kernel.src.endswith(assembly_digest(Path(toolchain.__file__).parent))
