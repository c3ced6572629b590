import sys

import pytest

from miles_plan.rewards.registry import BUILT_IN, RewardError, load_built_in, locate

SOURCE = """
raise SystemExit("this module was run")
def score(prompt, response, answer, metadata): ...
if True:
    from os.path import join as other
    try:
        alias = wrapped = score
    except NameError:
        fallback_score = 1
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    package = tmp_path / "my_package" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "my_package" / "__init__.py").write_text("raise SystemExit('this package was run')")
    (package / "deep.py").write_text(SOURCE)  # `inner` has no __init__: a namespace inside a package
    (tmp_path / "loose" / "further").mkdir(parents=True)
    (tmp_path / "loose" / "further" / "leaf.py").write_text("from somewhere import *")
    (tmp_path / "torn.py").write_text("def score(:\n")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "my_rewards:score", "my_rewards:other", "my_rewards:alias", "my_rewards:wrapped", "my_rewards:fallback_score",
        "my_package.inner.deep:score", "loose.further.leaf:anything", "math:sqrt", "json.decoder:JSONDecoder",
    ],
)  # fmt: skip
def test_a_reward_is_found_without_running_its_module(folder, name):
    before = set(sys.modules)
    located = locate(name, [str(folder)])
    assert (located.module, located.function) == tuple(name.split(":"))
    assert not {module for module in set(sys.modules) - before if module.split(".")[0] in ("my_rewards", "my_package", "loose")}
    assert not located.built_in
    if located.file.startswith(str(folder)):
        assert len(located.sha256) == 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_mach", "no built-in reward 'exact_mach'; did you mean 'exact_match'?"),
        ("my_reward:score", "no module 'my_reward' in this machine; did you mean 'my_rewards'?"),
        ("my_rewards:scores", "/my_rewards.py: has no 'scores'; did you mean 'score'?"),
        ("my_package.iner.deep:score", "no module 'iner' in package 'my_package'"),
        ("my_package.inner.deeper:score", "no module 'deeper' in package 'my_package.inner'; did you mean 'deep'? (looked for"),
        ("my_rewards.inner:score", "no module 'inner' in package 'my_rewards'"),
        ("loose.further:score", "'loose.further' is a folder without a module in it"),
        ("torn:score", "/torn.py:1: does not parse: invalid syntax"),
        ("my_rewards:", "is no entry point"),
        (":score", "is no entry point"),
        ("a/b:score", "is no entry point"),
        ("my_rewards:score:more", "is no entry point"),
        ("..my_rewards:score", "is no entry point"),
    ],
)
def test_what_cannot_be_found_is_named_with_what_is_near(folder, name, message):
    with pytest.raises(RewardError) as caught:
        locate(name, [str(folder)])
    assert message in str(caught.value)


def test_what_is_built_in_is_located_and_loaded():
    for name in BUILT_IN:
        located = locate(name)
        assert located.built_in
        assert load_built_in(located)("2+2=", "4", "4", {}) == 1.0
        assert load_built_in(located)("2+2=", "5", "4", {}) == 0.0


def test_a_users_reward_is_never_loaded_into_this_process(folder):
    with pytest.raises(ValueError, match="runs in a worker"):
        load_built_in(locate("my_rewards:score", [str(folder)]))
