from miles_plan.ir.plan import Plan, from_json, to_json
from miles_plan.ir.verify import verify


def test_sample_plans_are_plans_that_the_compiler_could_have_made(any_plan: Plan) -> None:
    verify(any_plan.graph, num_gpus=any_plan.cluster.num_gpus, after="tests")
    assert from_json(to_json(any_plan)) == any_plan
