"""What trainings that follow each other share: a model and the features of its frozen part."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from freezeplan import AppliedPlan
from freezeplan.applied_plan import applied
from freezeplan.apply.frozen import frozen_values
from freezeplan.cache.boundaries import Cut
from freezeplan.cache.independence import same
from freezeplan.training.feed import Feed


@dataclass
class Shared:
    """What the trainings so far have left for the next one, all on the same images."""

    plan: str = ""
    """Name of the last plan."""
    model: nn.Module | None = None
    """As its last training left it."""
    feeds: dict[str, Feed] = field(default_factory=dict)
    """What it was fed with, under the name of its phase. A plan without phases has one feed, under the empty name;
    features of later phases depend on what was trained, so others have none."""
    after: Cut | None = None
    """Where the features of an earlier plan were cut."""

    def model_for(self, plan: str, fresh: nn.Module) -> nn.Module:
        """Return the model of a training: the last one's, where what it was fed with is right for the new one too.

        Args:
            plan: Name of the plan.
            fresh: A model as the training starts from it.

        Returns:
            The last model with the values of ``fresh``, if it had the same plan, and what is frozen has the same values
            in both; else ``fresh``.
        """
        live = None if self.model is None else applied(self.model)
        if live is not None and self.plan == plan and self.feeds and _same_frozen(live, fresh):
            live.undo()
            live.model.load_state_dict(fresh.state_dict())
            return live.model
        cuts = [feed.cut for feed in self.feeds.values() if feed.cut is not None]
        self.after = cuts[0] if cuts else self.after
        self.plan, self.model, self.feeds = plan, fresh, {}
        return fresh


def _same_frozen(live: AppliedPlan, fresh: nn.Module) -> bool:
    pairs = zip(frozen_values(live.model, live.resolution), frozen_values(fresh, live.resolution), strict=True)
    return all(len(ours) == len(theirs) and all(map(same, ours, theirs)) for (_, ours), (_, theirs) in pairs)
