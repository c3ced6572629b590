"""Pages of MP5xx, running."""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="MP500",
        title="a task that failed",
        what="A task failed and its restart class, or the number of restarts left, does not let the run go on.",
        why="The message holds what the task said, and what it was waiting for.",
        example="error[MP500]: train@12 failed while waiting for @train ranks 0..1: train on version 12: RuntimeError: ...",
        fix="Mend the cause and continue with `miles-plan resume`. The outputs of the processes are in `logs/`.",
    ),
    Page(
        code="MP501",
        title="a task past its deadline",
        what="A task did not come back within its deadline, which follows from the plan's estimate.",
        why="A wait without an end looks like work. The subject says who was asked for what, `logs/` has the stacks of its "
        "processes.",
        example="error[MP501]: sync@74 failed while waiting for @rollout ranks 0..7: take weights version 74: no answer after "
        "60.0 s",
        fix="Look at the stacks; raise `failures.deadline_factor` if the machine is only slow; then `miles-plan resume`.",
    ),
    Page(
        code="MP502",
        title="rollout and trainer disagree on a log-prob",
        what="For a token sampled with the very weights that the trainer holds, the two log-probs differ by more than the "
        "plan allows.",
        why="The policy gradient is computed for another policy than the one that sampled. The trainer is asked a second time: "
        "where it does not repeat itself, the fault is on its side.",
        example="error[MP502]: old_log_probs@3: rollout and trainer differ by 0.041 in the log-prob of a token, the plan "
        "allows 0",
        fix="Set `precision.alignment` to `corrected` to train with importance weights, or to `off` to only watch the "
        "difference.",
    ),
    Page(
        code="MP503",
        title="rollout and trainer route tokens differently",
        what="The trainer's own router would have chosen other experts than the rollout did, for more pairs of token and "
        "layer than the plan allows.",
        why="Under exact alignment the two are the same function of the same bits: a layer map that is off by one looks "
        "like this.",
        example="error[MP503]: old_log_probs@0: the trainer's own router disagrees with the rollout on 31 of 4,096 (token, "
        "layer) pairs",
        fix="Report it: with the embedded engines this should not happen.",
    ),
    Page(
        code="MP505",
        title="no checkpoint that can be used",
        what="Checkpoints of the run were written, and each one that is left is missing a file or has a file that changed.",
        why="Starting again from the first step in silence would throw the run away.",
        example="error[MP505]: no checkpoint can be used: run/checkpoints/step-000040/rank_00000.safetensors: its content "
        "changed after it was written",
        fix="Put the folder back from a copy, or run the plan again in a new folder.",
    ),
    Page(
        code="MP506",
        title="a run folder that cannot be used",
        what="The folder is in use by another process, already holds a run, or holds none.",
        why="Two runs in one folder would spoil each other.",
        example="error[MP506]: runs/a is in use by process 4711 on node-3, since 2026-11-21 14:32:21",
        fix="Choose another folder with `--run-dir`, or continue the run with `miles-plan resume`.",
    ),
    Page(
        code="MP508",
        title="a file that cannot be written",
        what="The disk is full, or a folder of the run is gone or read-only.",
        why="What was complete before is still complete: files are written aside and renamed.",
        example="error[MP508]: runs/a/checkpoints/.writing-step-000040/rank_00000.safetensors: No space left on device",
        fix="Free space or mend the path, then `miles-plan resume`.",
    ),
    Page(
        code="MP510",
        title="a reward that failed",
        what="The reward function raised, hung, or returned no finite number, and the spec says to stop then.",
        why="A wrong reward trains the wrong policy.",
        example="data: {reward: my_rewards:score, reward_failure: fail}",
        fix="Mend the function, or set `data.reward_failure` to `zero` or `drop`.",
    ),
    Page(
        code="MP511",
        title="a training step that is not finite",
        what="Loss or gradient was NaN or infinite, and the spec says to stop then. The step was not applied.",
        why="One such step applied would leave nothing of the weights.",
        example="failures: {nonfinite: stop}",
        fix="Lower `train.optimizer.lr`, or set `failures.nonfinite` to `skip` or `rollback`.",
    ),
    Page(
        code="MP512",
        title="no prompt with a signal",
        what="Dynamic sampling drew all its rounds and found no prompt whose samples differ in reward.",
        why="A batch without a difference in reward has no gradient.",
        example="rollout: {dynamic_sampling: {enabled: true, max_rounds: 3}}",
        fix="Use prompts of middling difficulty; check that the reward is not constant.",
    ),
    Page(
        code="MP513",
        title="samples older than allowed",
        what="Samples reached the buffer that are older than the plan's staleness bound.",
        why="The plan's edges rule this out, so the plan and the executor disagree.",
        example="error[MP513]: buffer@7: 32 samples are older than 2 versions",
        fix="Report it with the plan file.",
    ),
    Page(
        code="MP520",
        title="engines that could not be started or saved",
        what="A step of the executor's own failed: building engines, loading a checkpoint, the final export.",
        why="The message holds what the engine said.",
        example="error[MP520]: restore: waiting for engines of @train: ValueError: the embedded trainer cannot take this "
        "layout: cp=2 (allowed: 1)",
        fix="Change what it names and compile again, or mend the machine and `miles-plan resume`.",
    ),
)
