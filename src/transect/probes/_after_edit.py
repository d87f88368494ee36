"""What the probes that edit models share of labelled texts and of training after the edit."""

from dataclasses import replace

from transect.after_edit import Transfer
from transect.effects import Effects
from transect.probes._on_labels import Accuracies, Labels, LabelState
from transect.probes._on_text import Continued, Text, TextState
from transect.probes.base import Setting, SplitRule
from transect.results import Row

AfterState = LabelState | TextState
Found = Accuracies | Continued


def after_edit(
    transfer: Transfer | None, setting: Setting, cases: int, direct: int, fresh: bool
) -> Labels | Text | None:
    """The trainings asked for, of so many edited models; the first `direct` of them cost something without training."""
    if transfer is None:
        return None
    if transfer.on_text:
        return Text(transfer, setting, cases)
    return Labels(transfer, setting, cases, direct, fresh)


def found_of(trained: Labels | Text, state: AfterState, effects: Effects) -> list[tuple[str, Found]]:
    """What there is to say of each stage, with what stands behind the variant of its rows."""
    if isinstance(trained, Text):
        assert isinstance(state, TextState)
        return list(trained.found(state, effects))
    assert isinstance(state, LabelState)
    return list(trained.found(state))


def split_for(transfer: Transfer | None) -> SplitRule | None:
    """Training on text needs documents that are not scored."""
    return SplitRule() if transfer is not None and transfer.on_text else None


def work_of(trained: Labels | Text | None) -> float:
    """Operations of all trainings: two for each weight and token."""
    if trained is None:
        return 0.0
    module = trained.setting.view.base if isinstance(trained, Labels) else trained.setting.view.model
    return 2.0 * sum(parameter.numel() for parameter in module.parameters()) * sum(trained.trainings())


def behind(row: Row, stage: str) -> Row:
    """The row with its stage behind its variant, as in `pairs/continued`."""
    return replace(row, variant=f"{row.variant}{stage}")
