"""Pages of MP2xx, placement and memory: layouts (MP20x), schedules (MP21x), weight sync (MP22x), memory (MP23x)."""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="MP201",
        title="training layout that cannot run",
        what="`train.layout` fixes parallel sizes that do not divide the GPUs, the heads, the layers or the experts, or that "
        "the training engine does not have.",
        why="The engine would refuse them after minutes of start-up, one at a time.",
        example="train: {engine: megatron, layout: {tp: 3}}      # 32 attention heads",
        fix="Change the size that the message names, or leave `layout: auto`.",
    ),
    Page(
        code="MP202",
        title="rollout layout that cannot run",
        what="`rollout.layout` needs more GPUs than there are, does not divide heads or experts, or the engine lacks it.",
        why="Engines would fail to start, or wait for GPUs that never come.",
        example="cluster: {gpu: h200, nodes: 1}\nrollout: {layout: {tp: 16}}",
        fix="Change the size that the message names, or leave `layout: auto`.",
    ),
    Page(
        code="MP203",
        title="split that leaves no GPU to train on",
        what="`placement.rollout_gpus` is the whole cluster or more.",
        why="The trainer would have nowhere to run.",
        example="cluster: {gpu: h200, nodes: 1}\nplacement: {rollout_gpus: 8}",
        fix="Use fewer rollout GPUs, or `placement: colocate`.",
    ),
    Page(
        code="MP204",
        title="micro-batch shorter than the longest sequence",
        what="`train.tokens_per_gpu` times the context parallel size is less than the longest sequence, prompt and response.",
        why="The step that first meets such a sequence would stop, hours into the run.",
        example="rollout: {response_tokens: {max: 16384}}\ntrain: {tokens_per_gpu: 4096, layout: {cp: 2}}",
        fix="Raise `tokens_per_gpu` or `cp`, or lower `response_tokens.max`.",
    ),
    Page(
        code="MP205",
        title="no layout divides the cluster",
        what="No combination of parallel sizes divides both the model and the number of GPUs.",
        why="There is nothing to plan.",
        example="cluster: {gpu: h200, nodes: 1, gpus_per_node: 7}\nrollout: {prompts_per_step: 1, samples_per_prompt: 2}",
        fix="Use a number of GPUs that heads, layers, experts and the batch divide.",
    ),
    Page(
        code="MP206",
        title="model that does not fit the cluster",
        what="Even the layout with the smallest peak, with full recomputation and the optimizer on the host where that is "
        "allowed, needs more memory than a GPU has.",
        why="The run would end in an out-of-memory error, if not in the first step then in the first long batch.",
        example="model: {name: deepseek-v3}\ncluster: {gpu: h200, nodes: 1}",
        fix="Use more GPUs (the message says about how many), or do what the help line says.",
    ),
    Page(
        code="MP207",
        title="engines that fit apart and not together",
        what="Trainer and rollout engines each have layouts that fit, but no pair of them fits the same GPUs.",
        why="Colocated engines share each GPU's memory, also at the moment when weights move between them.",
        example="placement: colocate\nrollout: {memory_fraction: 0.95}",
        fix="Use `placement: disaggregate`, more GPUs, or smaller engines.",
    ),
    Page(
        code="MP210",
        title="overlap on shared GPUs",
        what="The schedule runs rollout and training at the same time, and there is only one GPU for both.",
        why="Engines that share GPUs take turns: one sleeps while the other works, so nothing can overlap.",
        example="cluster: {gpu: h200, nodes: 1, gpus_per_node: 1}\nschedule: {mode: one_step_off}",
        fix="Use more GPUs, or `schedule.mode: synchronous`.",
    ),
    Page(
        code="MP211",
        title="staleness that does not go with the mode",
        what="`schedule.max_staleness` is not what the mode means: one step off is one weight version behind, no more.",
        why="The bound would be either never reached or never kept.",
        example="schedule: {mode: one_step_off, max_staleness: 4}",
        fix="Leave `max_staleness` out, or choose `mode: asynchronous`.",
    ),
    Page(
        code="MP220",
        title="weight transport that cannot connect the engines",
        what="`weight_sync.transport` names a way of moving weights that these engines, placed like this, do not have: shared "
        "memory and CUDA IPC stay inside one node, NCCL needs different GPUs at both ends.",
        why="The first weight update would hang or fail.",
        example="placement: disaggregate\nweight_sync: {transport: cuda_ipc}",
        fix="Use one of the transports that the help line names, or `auto`.",
    ),
    Page(
        code="MP230",
        title="phase that overflows GPU memory",
        what="In one phase of the iteration (generate, log-probs, train, sync) a GPU would hold more than it can.",
        why="Transitions, where both engines are resident, are where colocated runs die.",
        example="placement: colocate\nrollout: {memory_fraction: 0.9}\ntrain: {recompute: none}",
        fix="Shrink the part that the message names: it is the largest of that phase.",
    ),
    Page(
        code="MP231",
        title="phase that overflows host memory",
        what="A node's memory would not hold the processes, the sleeping trainer's states, offloaded states or a save's"
        " staging.",
        why="The operating system, or Ray, kills processes without saying why.",
        example="cluster: {gpu: h200, nodes: 1, host_memory_gib: 256}\nplacement: colocate",
        fix="Use hosts with more memory, `placement: disaggregate`, or keep optimizer state on the GPUs.",
    ),
)
