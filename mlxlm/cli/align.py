"""`mlxlm align`: teach a model what is preferred, or what can be checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxlm.cli import options as opt
from mlxlm.cli.align_flags import ALIGN_FLAGS
from mlxlm.cli.finetune import end_early, values_of
from mlxlm.cli.flags import with_flags

if TYPE_CHECKING:
    from mlxlm.alignment import Outcome
    from mlxlm.distributed import Joined


@with_flags(ALIGN_FLAGS)
def align(
    model: opt.ModelOrShipped = None,
    adapter_path: opt.AdapterOutput = None,
    config: opt.ConfigFile = None,
    resume: opt.Resume = False,
    mesh: opt.MeshFlag = None,
    **flags: Any,
) -> None:
    """Align a model with preferences or rewards, and show what changed.

    Rows are {"prompt", "chosen", "rejected"}, {"prompt", "ranked"} (best first), for kto {"prompt", "completion",
    "label"} with true or false, and for rollouts {"prompt"} with whatever the reward asks for.
    Numbers before and after are of the test rows, where there are none of the validation rows.
    Ctrl-C saves a checkpoint; --resume goes on from there.
    """
    given = {"model": model, "adapter_path": adapter_path, **flags}
    given = {name: value for name, value in given.items() if value is not None}
    with opt.joined(mesh, axes=("dp",)) as group:
        outcome = _run(given, config, resume, group)
    folder = outcome.settings.tuning.adapter_path
    if outcome.stopped:
        end_early("align", outcome.result, folder)
    if group.first:
        _show(outcome)


def _run(given: dict[str, Any], config: str | None, resume: bool, group: Joined) -> Outcome:
    """The run that flags and file ask for, done.  group: the processes that share it."""
    from mlxlm.alignment import AlignSettings
    from mlxlm.alignment import align as run
    from mlxlm.alignment.run import SETTINGS
    from mlxlm.training import Console, MetricsFile
    from mlxlm.training.tracking import reporter

    settings = AlignSettings.from_json(values_of(given, config, resume, SETTINGS))
    folder = settings.tuning.folder
    console = Console()
    outside = [reporter(name, folder) for name in settings.tuning.report_to]
    reporters = [console, MetricsFile(folder), *outside]
    say = console.on_message if group.first else (lambda text: None)
    return run(settings, reporters if group.first else [], resume=resume, say=say, joined=group)


def _show(outcome: Outcome) -> None:
    """The numbers before and after, and a few answers."""
    from mlxlm.training.finetune.answers import brief
    from mlxlm.training.reporters import duration

    print(f"{f'of {outcome.measured_on} rows':20}{'before':>12}{'after':>12}")
    for name, value in outcome.after.items():
        before = outcome.before.get(name)
        print(f"{name.replace('_', ' '):20}{'' if before is None else f'{before:.4g}':>12}{value:>12.4g}")
    for prompt, old, new in outcome.answers:
        print(f"\n{brief(prompt, 100)}\n  before  {brief(old, 100)}\n  after   {brief(new, 100)}")
    settings, result, counts = outcome.settings, outcome.result, outcome.counts
    best = "" if result.best_step is None else f", best at {result.best_step}"
    print(
        f"\ntrained   {counts.trainable:,} of {counts.total:,} parameters, {result.step} steps{best}, "
        f"{duration(outcome.seconds)}, peak memory {outcome.memory / 1e9:.2f} GB\n"
        f"saved in  {settings.tuning.adapter_path}"
    )
