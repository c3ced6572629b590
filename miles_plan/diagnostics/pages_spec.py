"""Pages of MP1xx, the spec.

MP10x: reading files; MP11x: YAML; MP12x: single fields; MP13x: rules between fields; MP14x: things that the spec names;
MP15x: what an algorithm needs; MP16x: what the spec says in vain.
"""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

_READING = (
    Page(
        code="MP101",
        title="file cannot be read",
        what="A spec file, or a file that its `base:` names, does not exist, is no regular file, or may not be read.",
        why="Nothing can be checked without it.",
        example="base: ../common/cluster.yaml   # no such file",
        fix="Correct the path. A path in `base:` is relative to the file that names it.",
    ),
    Page(
        code="MP102",
        title="file is not UTF-8 text",
        what="The file holds bytes that are not UTF-8, or control characters that YAML forbids (NUL and its like).",
        why="Guessing an encoding would change names and numbers silently.",
        example="name: caf\\xe9   # Latin-1 bytes",
        fix="Save the file as UTF-8. A byte order mark at the start is accepted.",
    ),
    Page(
        code="MP103",
        title="spec exceeds a size limit",
        what="The file is larger than 1 MiB, nested deeper than 64 levels, or holds more than 100,000 values once its "
        "aliases are expanded.",
        why="A job spec is under a page; a document of this size is a mistake or an attack (an alias bomb of 450 bytes "
        "expands to a billion values).",
        example="a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]   # ... and so on",
        fix="Move data (prompts, histograms) into a file of its own and name the file in the spec.",
    ),
    Page(
        code="MP104",
        title="base file cannot be layered",
        what="`base:` is neither a path nor a list of paths, leads back to a file that is being read, or is nested too deep.",
        why="Layers are applied in order, base first; a circle has no first.",
        example="# a.yaml\nbase: b.yaml\n# b.yaml\nbase: a.yaml",
        fix="Break the circle: put what both files share into a third file that names neither.",
    ),
    Page(
        code="MP105",
        title="override cannot be read",
        what="An argument of `--set` is not of the form `path.to.field=value`.",
        why="An override that is dropped silently would make the run differ from what you asked for.",
        example="miles-plan check spec.yaml --set rollout.temperature 0.7",
        fix="Write `--set rollout.temperature=0.7`. The value is YAML: quote it for the shell where it holds spaces.",
    ),
)

_YAML = (
    Page(
        code="MP110",
        title="YAML syntax error",
        what="The file is not well-formed YAML.",
        why="The parser cannot tell what was meant.",
        example="model: {name: qwen3-30b-a3b",
        fix="Look at the place named and just before it: an unclosed bracket or quote, a tab used for indentation, a missing "
        "space after `:`, or lines of one mapping that do not start in the same column.",
    ),
    Page(
        code="MP111",
        title="duplicate key",
        what="A mapping has the same key twice.",
        why="Most YAML readers keep the last one silently, so an edit to the first has no effect.",
        example="train:\n  tokens_per_gpu: 8192\n  tokens_per_gpu: 16384",
        fix="Keep one of the two.",
    ),
    Page(
        code="MP112",
        title="YAML feature that specs do not use",
        what="The file uses a tag (`!!python/object`, `!include`), a merge key (`<<`), a directive (`%YAML`), a second "
        "document (`---`), or a key that is not a plain word.",
        why="Tags can run code in other readers; merge keys, directives and several documents make it unclear where a value "
        "comes from.",
        example="train:\n  <<: *defaults\n  engine: torch",
        fix="Use `base:` to share settings between files; an alias (`*name`) may still stand for a whole value.",
    ),
    Page(
        code="MP113",
        title="alias inside its own anchor",
        what="An alias refers to the value that it stands in, or to an anchor that was not defined before it.",
        why="The value would contain itself.",
        example="layout: &a {stage_layers: [*a]}",
        fix="Define the anchor before, on a value that does not hold the alias.",
    ),
)

_FIELDS = (
    Page(
        code="MP120",
        title="unknown key",
        what="The spec has no field of this name at this place.",
        why="A key that is accepted and ignored is the costliest mistake in practice: the run is not what the file says.",
        example="rollout:\n  temprature: 0.7",
        fix="Use the name that the message suggests, or see `miles-plan explain --field rollout` for the fields of a section.",
    ),
    Page(
        code="MP121",
        title="missing key",
        what="A field that has no default is not given.",
        why="There is no value that would be right for every job.",
        example="rollout:\n  prompts_per_step: 32   # response_tokens is missing",
        fix="Add the field. `miles-plan explain --field PATH` says what it means.",
    ),
    Page(
        code="MP122",
        title="value of the wrong type",
        what='The value has another type than the field: text for a number, a list for a mapping, `true` for 1, `"8"` for 8.',
        why="Conversions hide mistakes: `tp: true` would become 1, and `nodes: 1.5` would lose half a node.",
        example='train:\n  layout: {tp: "8"}',
        fix="Write the value in the form that the message names. Numbers stand without quotes; `1e-6` is a number here, "
        "`no` and `on` are text.",
    ),
    Page(
        code="MP123",
        title="value out of range",
        what="A number or text lies outside what the field allows, or is not finite.",
        why="The value would fail later, on the cluster, or give a plan that cannot be.",
        example="rollout:\n  top_p: 1.5",
        fix="Choose a value in the range that the message names.",
    ),
    Page(
        code="MP124",
        title="not one of the choices",
        what="The field takes one of a few words, and this is none of them.",
        why="Guessing would run another algorithm or engine than you named.",
        example="algorithm: {kind: gpro}",
        fix="Use one of the words that the message lists.",
    ),
    Page(
        code="MP125",
        title="spec version not supported",
        what="`version` is not a version of the spec language that this program reads (it reads 1).",
        why="Fields may mean something else in another version.",
        example="version: 2",
        fix="Install the miles-plan that reads this version, or port the spec: `miles-plan schema` prints what 1 holds.",
    ),
)

_RULES = (
    Page(
        code="MP130",
        title="exactly one is needed",
        what="Of a set of fields exactly one must be given, and none or several are.",
        why="With none there is nothing to use; with several it is unclear which one wins.",
        example="model: {name: qwen3-8b, checkpoint: /models/qwen3-8b}",
        fix="Keep one. When the other comes from a `base:` file, set it to `null`.",
    ),
    Page(
        code="MP131",
        title="settings exclude each other",
        what="Two settings are each valid but cannot hold together.",
        why="One of them would have to be ignored.",
        example="algorithm: {kind: grpo, kl_loss_coef: 0.01, kl_reward_coef: 0.01}",
        fix="Drop one of the two that the message names.",
    ),
    Page(
        code="MP132",
        title="numbers that contradict each other",
        what="Values that must be ordered are not: a mean above the maximum, an upper clip below the lower, a warm-up longer "
        "than the run.",
        why="The plan would be priced for a job that cannot exist.",
        example="response_tokens: {max: 1024, mean: 3500}",
        fix="The message shows both numbers; correct the one that is wrong.",
    ),
    Page(
        code="MP133",
        title="setting that another one needs or rules out",
        what="A field is absent that the algorithm or another field needs, or given although the algorithm has no use for it.",
        why="An absent one cannot be guessed; one that is not used would be ignored silently.",
        example="algorithm: {kind: grpo, critic: {lr: 1e-5}}   # grpo has no critic",
        fix="Add or remove the setting, or choose the algorithm that uses it.",
    ),
    Page(
        code="MP134",
        title="batch that does not divide",
        what="prompts_per_step x samples_per_prompt is not a multiple of updates_per_rollout, or sft is to take several "
        "samples of an example that has one answer.",
        why="An uneven split would drop or repeat samples.",
        example="algorithm: {updates_per_rollout: 2}\nrollout: {prompts_per_step: 5, samples_per_prompt: 3}   # 15 samples",
        fix="Change one of the three numbers; the message shows the product.",
    ),
)

_NAMES = (
    Page(
        code="MP140",
        title="model not in the catalog",
        what="`model.name` is not a name of the catalog.",
        why="Its layers and sizes are unknown, so it can be neither planned nor priced.",
        example="model: {name: qwen3-30b}",
        fix="Use a name that `miles-plan models` lists, or give `model.hf_config` or `model.checkpoint`.",
    ),
    Page(
        code="MP141",
        title="GPU not in the catalog",
        what="`gpu` is not a name of the catalog.",
        why="Its memory, speed and links are unknown.",
        example="cluster: {gpu: h2000}",
        fix="Use a name that `miles-plan gpus` lists.",
    ),
    Page(
        code="MP142",
        title="file named in the spec not found",
        what="A file or directory that the spec names does not exist, or is not of the kind the field needs.",
        why="The run would fail when it first opens it, which may be hours later.",
        example="data: {prompts: data/dapo.jsonl}   # no such file",
        fix="Correct the path. A relative path is relative to the spec file that names it; `~` is not expanded.",
    ),
    Page(
        code="MP143",
        title="model configuration cannot be used",
        what="The Hugging Face configuration that `hf_config`, `checkpoint` or `architecture` gives is no JSON mapping, lacks "
        "a size, or has an impossible one.",
        why="The model's layers and sizes decide memory, time and layouts.",
        example="model: {architecture: {model_type: qwen3, hidden_size: -1}}",
        fix="Correct the key that the message names.",
    ),
    Page(
        code="MP144",
        title="reward not found",
        what="`data.reward` is neither a built-in reward nor a function that can be found: the module is not on this machine's "
        "path, or has no such name. The module is looked at, never imported.",
        why="A misspelt reward fails at the first scored sample. A module that is only installed on the cluster is fine.",
        example="data: {reward: my_rewards:scroe}",
        fix="Correct the name, or ignore the warning if the module exists only where the job runs.",
    ),
    Page(
        code="MP145",
        title="hardware profile that cannot be used",
        what="The file of `cluster.profile` (or `--profile`) is no hardware profile, is one of another GPU, holds a value that "
        "no machine gives, or two files are named for one kind of GPU.",
        why="Every time and every memory figure of the plan would be priced for a machine that is not there.",
        example="cluster: {gpu: h200, profile: b200.json}   # a profile of b200",
        fix="Write one with `miles-plan calibrate` on that machine, or leave the field out: profiles ship for most GPUs.",
    ),
    Page(
        code="MP146",
        title="file of lengths cannot be used",
        what="The file that `rollout.response_tokens.histogram` names is in no form that is read, or holds no positive length.",
        why="The rollout is simulated over these lengths, and the micro-batches are packed from them.",
        example='rollout: {response_tokens: {max: 8192, histogram: lengths.json}}   # holds {"lengths": []}',
        fix='Write `{"lengths": [...]}`, `{"edges": [...], "counts": [...]}` (one edge more than counts), or a number a line.',
    ),
)

_USE = (
    Page(
        code="MP150",
        title="group of one sample",
        what="The algorithm, or dynamic sampling, compares the samples of one prompt, and there is only one.",
        why="The advantage of each sample is measured against the others of its prompt: of a single one it is always zero.",
        example="algorithm: {kind: grpo}\nrollout: {prompts_per_step: 32, samples_per_prompt: 1}",
        fix="Use at least 2 samples (8 is usual), or an algorithm that compares across prompts: reinforce_plus_plus, ppo.",
    ),
    Page(
        code="MP160",
        title="setting that nothing reads",
        what="A field is set in the spec, and no pass or backend looked at it while this job was compiled.",
        why="A setting that is accepted and does nothing is worse than an error: you would believe it is in force.",
        example="algorithm: {kind: grpo, gae_lambda: 0.95}   # only ppo has GAE",
        fix="Remove it, or check that the part it belongs to is in use.",
    ),
)

PAGES: tuple[Page, ...] = (*_READING, *_YAML, *_FIELDS, *_RULES, *_NAMES, *_USE)
