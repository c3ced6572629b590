"""The only place of order: each pass with why it stands where it stands."""

from __future__ import annotations

from miles_plan.passes.align_precision import AlignPrecision
from miles_plan.passes.base import Pass
from miles_plan.passes.guard_failures import GuardFailures
from miles_plan.passes.lower_algorithm import LowerAlgorithm
from miles_plan.passes.overlap_rollout import OverlapRollout
from miles_plan.passes.place_parallelism import PlaceParallelism
from miles_plan.passes.plan_memory import PlanMemory
from miles_plan.passes.price_tasks import PriceTasks
from miles_plan.passes.replay_routing import ReplayRoutingPass
from miles_plan.passes.schedule_steps import ScheduleSteps
from miles_plan.passes.sync_weights import SyncWeights
from miles_plan.passes.train_draft import TrainDraft

DEFAULT: tuple[Pass, ...] = (
    LowerAlgorithm(),  # makes the graph that all others rewrite
    PlaceParallelism(),  # everything below asks which engine runs where and in which layout
    AlignPrecision(),  # needs the engines; its corrections and quantisation must exist before samples and weights are rerouted
    ReplayRoutingPass(),  # reads the alignment; its payload counts in memory and time
    TrainDraft(),  # adds a training step and weights to sync, so before both are planned
    OverlapRollout(),  # sets the distance of every weights edge, the draft's included, and refuses colocated overlap
    SyncWeights(),  # its buckets are resident during the sync, so before memory is counted
    PlanMemory(),  # all residents are known; inserts the offloads that make phases fit
    PriceTasks(),  # every task is in the graph and knows its batch
    GuardFailures(),  # deadlines are multiples of prices
    ScheduleSteps(),  # start times need every task and its price
)
