import pytest

from miles_plan.rewards.exact_match import exact_match


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("46", "46", 1.0),
        ("46\n", "46", 1.0),
        (" 46", "46 ", 1.0),
        ("46 ", "4 6", 0.0),
        ("046", "46", 0.0),
        ("", "46", 0.0),
        ("46\ufffd", "46", 0.0),
    ],
)
def test_only_the_answer_scores(response, answer, reward):
    assert exact_match("", response, answer, {}) == reward
