"""``AppliedPlan``: the handle on a plan that is applied to a model. It keeps names, never tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from freezeplan.apply import freeze, phases, processes
from freezeplan.cache.boundaries import Cut, prefix_of
from freezeplan.cache.cached import cached
from freezeplan.cache.features import Features, Images
from freezeplan.cache.items import ImageKeys
from freezeplan.cache.memory import FeatureDtype, Keep
from freezeplan.cache.prefix import Prefix
from freezeplan.errors import ApplyError
from freezeplan.guard import schedulers
from freezeplan.lifetime import ATTRIBUTE, Lifetime
from freezeplan.model import names
from freezeplan.plan.load import load_plan
from freezeplan.proof import delta
from freezeplan.proof.seal import Verification, compare, take_seal


def applied(model: nn.Module) -> AppliedPlan | None:
    """Return the plan that is live on a model, or None.

    Examples:
        >>> applied(nn.Linear(2, 2)) is None
        True
    """
    found = names.unwrap(model).__dict__.get(ATTRIBUTE)
    return found if isinstance(found, AppliedPlan) else None


class AppliedPlan(Lifetime):
    """A plan that is live on a model. ``apply_plan`` makes it.

    It iterates over the optimizer's groups, and as a context manager undoes the plan at the end. Parameters are looked
    up by name at each use, never kept.

    Examples:
        >>> from freezeplan import apply_plan
        >>> from freezeplan.model import create_model
        >>> model = create_model("test_resnet", num_classes=3)
        >>> plan = {"version": 1, "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}
        >>> with apply_plan(model, plan) as live:
        ...     live.seal()
        ...     print(live.verify(), sum(p.requires_grad for p in model.parameters()))
        held: 90 frozen tensors and buffers are bit-identical 2
        >>> all(p.requires_grad for p in model.parameters()), applied(model)
        (True, None)
    """

    def step(
        self,
        *,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
        rewrap: bool = False,
        find_unused: bool = False,
    ) -> bool:
        """Say which epoch comes next; call it before every epoch. A new phase sets flags, gradients and modes.

        Optimizer groups stay as they are, and the state of what is frozen again is kept.

        Args:
            epoch: The epoch that comes next, from 0.
            metrics: What was measured after the one before it, for phases that end at a plateau.
            rewrap: With several processes: the model is wrapped in DistributedDataParallel anew whenever this returns
                True.
            find_unused: With several processes: the model was wrapped with ``find_unused_parameters=True`` while
                everything that any phase trains had ``requires_grad``.

        Returns:
            Whether a new phase has begun.

        Raises:
            ApplyError: If the plan was undone, other code broke it since (see ``check``), a metric is missing, the
                rates need ``attach`` and it was not called, or the phase changes in several processes without one of
                the two promises: the gradients of what is thawed would not be synchronised, and nothing would say so.
                ``fully_shard`` synchronises whatever has a gradient and needs none.

        Examples:
            >>> from freezeplan import apply_plan
            >>> from freezeplan.model import create_model
            >>> model = create_model("test_resnet", num_classes=3)
            >>> rules = [{"role": "body", "frozen": True}]
            >>> phases = [{"name": "head", "until": 1, "rules": rules}, {"name": "all"}]
            >>> plan = {"version": 1, "phases": phases, "rules": [{"match": ".*", "lr_mult": 1}]}
            >>> with apply_plan(model, plan) as live:
            ...     for epoch in range(3):
            ...         print(live.step(epoch=epoch), live.phase, sum(p.requires_grad for p in model.parameters()))
            False head 2
            True all 47
            False all 47
        """
        self._check_live()
        if self._scheduler == "any" and not self._guard.attached:
            raise ApplyError("scheduler='any' multiplies inside optimizer.step()", notes=["applied.attach(optimizer)"])
        if self._guard.closely:
            self._guard.check((), f"seen before epoch {epoch}")
        before = self._part
        moved = phases.advance(self.plan.phases, self._progress, self._epochs, epoch, metrics or {})
        after = self.resolution.parts[phases.phase_at(self.plan.phases, moved, self._epochs)]
        changed = after is not before
        if changed:
            processes.check_phase(self.model, after.phase, promised=rewrap or find_unused)
        self._progress = moved
        if changed:
            self._enter()
        return changed

    def _enter(self) -> None:
        self._cuts = None
        freeze.enter(names.survey(self.model), self._part)
        self._guard.enter_phase()

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Multiply the rates of these optimizers inside each of their steps, for ``scheduler="any"``.

        What a scheduler writes into ``lr`` is the base rate and is never changed, so the ratios hold under warm-ups,
        floors, restarts and OneCycle alike.

        Args:
            *optimizers: All that train this model, made from ``param_groups``. Each gets two hooks, which ``undo``
                takes away. One that holds another (Lookahead, SAM, what accelerate or Lightning prepared) is followed
                to it, and each group is multiplied once, however steps are nested.

        Raises:
            ApplyError: If the plan was applied for another scheduler, is not live, or the optimizers miss a trained
                parameter, multiply already, or torch hooks no step that moves a parameter of the plan.

        Examples:
            >>> from freezeplan import apply_plan
            >>> from freezeplan.model import create_model
            >>> model = create_model("test_resnet", num_classes=3)
            >>> rules = [{"role": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}]
            >>> live = apply_plan(model, {"version": 1, "rules": rules}, scheduler="any")
            >>> optimizer = torch.optim.AdamW(live, lr=1e-3)
            >>> live.attach(optimizer)
            >>> scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        """
        self._check_live()
        self._guard.attach(optimizers)

    def check(self, *optimizers: torch.optim.Optimizer) -> None:
        """Refuse what other code did to the model since the plan was applied, and optimizers that break it.

        Unless the plan was applied with ``guard=False``, the same is checked when an optimizer first steps and, by
        ``step``, before every epoch. Call it with the optimizers, after their schedulers are made, to know it earlier
        and to have a trained parameter named that is in none. No value is read: ``seal`` and ``verify`` do that.

        Args:
            *optimizers: All that train this model; without any, those that were given before.

        Raises:
            ApplyError: With all problems at once. Of the model: parameters lost, added, reshaped; ``requires_grad``
                set, a gradient left, ``.training`` set, or a module no longer held in eval, by other code; reentrant
                checkpointing behind a frozen prefix. Of the optimizers: trained parameters that they miss or hold in an
                outdated form, frozen ones that they hold, nothing to train, rates that a scheduler flattened (it is
                named, with the arguments that would be right) or that are multiplied twice.

        Examples:
            >>> from freezeplan import apply_plan
            >>> from freezeplan.model import create_model
            >>> model = create_model("test_resnet", num_classes=3)
            >>> live = apply_plan(model, {"version": 1, "rules": [{"match": "fc", "lr_mult": 1}],
            ...                           "default": {"lr_mult": 0.5}}, lr=0.1)
            >>> optimizer = torch.optim.SGD(live)
            >>> live.check(optimizer)
            >>> scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
            >>> live.check()  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            freezeplan.errors.ApplyError: OneCycleLR flattened the rates: group 'lr_mult=0.5' has lr 0.004, ...
        """
        self._check_live()
        self._guard.check(optimizers)

    def scheduler_kwargs(self, scheduler: type | str, **arguments: Any) -> dict[str, Any]:
        """Return a torch scheduler's arguments with each absolute rate as a list, so that it keeps the plan's ratios.

        Args:
            scheduler: A class of ``torch.optim.lr_scheduler``, or its name.
            **arguments: Its arguments as for a multiplier of 1.

        Raises:
            ApplyError: If the scheduler has an absolute floor that takes no list, is not known to keep ratios, or the
                plan was applied for another kind of scheduler.

        Examples:
            >>> from freezeplan import apply_plan
            >>> from freezeplan.model import create_model
            >>> model = create_model("test_resnet", num_classes=3)
            >>> rules = [{"role": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.5}]
            >>> live = apply_plan(model, {"version": 1, "rules": rules, "weight_decay": "all"}, lr=0.1)
            >>> live.scheduler_kwargs("OneCycleLR", max_lr=0.1, total_steps=10)
            {'max_lr': [0.05, 0.1], 'total_steps': 10}
        """
        self._check_live()
        if self._scheduler != "torch":
            raise ApplyError(f"this plan was applied with scheduler={self._scheduler!r}, so schedulers take base rates")
        return schedulers.arguments(scheduler, [group.lr_mult for group in self.resolution.groups], arguments)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the training is, as plain data for a checkpoint; the plan is in it, to be compared."""
        return {"plan": self.plan.model_dump(mode="json", exclude_defaults=True), "progress": self._progress.as_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken: the model is put into that phase.

        With several processes call it before the model is wrapped in DistributedDataParallel, which looks at what has
        ``requires_grad`` once.

        Raises:
            ApplyError: If the state belongs to another plan; its name and description may differ.
        """
        self._check_live()
        try:
            given, progress = load_plan(state["plan"]), phases.Progress.from_dict(state["progress"])
        except (KeyError, TypeError) as error:
            raise ApplyError(
                "this is no state of a plan", notes=["applied.load_state_dict takes what applied.state_dict() returned"]
            ) from error
        theirs, ours = (plan.model_dump(exclude={"name", "description"}) for plan in (given, self.plan))
        if differing := [key for key in ours if theirs[key] != ours[key]]:
            raise ApplyError(
                f"this state belongs to another plan than {self.plan.title!r}: they differ in {', '.join(differing)}"
            )
        self._progress = progress
        self._enter()

    def seal(self, *, copy: bool = False) -> None:
        """Store digests (sha256) of what is frozen, parameters and buffers, for ``verify``.

        Of a model in shards (``fully_shard``) the whole values count, and every process calls ``seal`` and ``verify``.

        Args:
            copy: Keep the values too, so that ``verify`` can say by how much something moved; costs their memory.
        """
        self._check_live()
        self._unseal()
        self._seal = take_seal(self.model, self.resolution, copy=copy)

    def verify(self) -> Verification:
        """Compare what is frozen with the seal, bit by bit.

        Returns:
            True in a condition if everything held; otherwise it names what moved and the likely cause. It says so where
            the plan freezes nothing in all of its phases.

        Raises:
            ApplyError: If there is no seal.
        """
        if self._seal is None:
            raise ApplyError("nothing to compare with: no seal was taken", notes=["call seal() before training"])
        return compare(self.model, self.resolution, self._seal, self._guard.optimizers)

    def save_delta(self, path: str | Path) -> None:
        """Write what the training changed into a file that goes onto the base it was made on, and onto no other.

        It holds the trained tensors and moved buffers (safetensors), the plan, the phase, timm's name and version, and
        the digests of all that did not change. ``freezeplan.load_delta(model, path)`` reads it.

        Args:
            path: Where the file goes; it is written under another name and renamed. Where the model is in shards
                (``fully_shard``), every process calls this and the first one writes.

        Raises:
            ApplyError: If the plan is not live, or what was sealed has moved.
            OutputError: If the file cannot be written.

        Examples:
            >>> import tempfile
            >>> from freezeplan import apply_plan
            >>> from freezeplan.model import create_model
            >>> live = apply_plan(create_model("test_resnet", num_classes=3), "linear_probe")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     live.save_delta(Path(folder, "probe.safetensors"))
            ...     print([file.name for file in Path(folder).iterdir()])
            ['probe.safetensors']
        """
        self._check_live()
        if self._seal is not None:
            compare(self.model, self.resolution, self._seal, self._guard.optimizers).check_held()
        delta.save(self.model, self.resolution, self.phase, path)

    def prefix(self, sample: torch.Tensor, *others: torch.Tensor) -> Prefix:
        """Say what of a forward pass is the same for an image in every epoch, and what it would cost to cache.

        Runs the model on two and three images of the sample, under the caller's autocast. Nothing of it changes.

        Args:
            sample: A batch of at least two images as the model gets them, (N, C, H, W), on the model's device.
            *others: Batches of its further images, where the model takes several.

        Returns:
            The calls that can be cached, the bytes of an image that the rest of the pass reads, forward FLOPs of both
            parts, and why other frozen modules cannot; as text it ends with advice.

        Raises:
            ApplyError: If the plan is not live, the sample is no batch, or nothing trained takes part in the answer.

        Examples:
            >>> from freezeplan import apply_plan
            >>> from freezeplan.model import create_model
            >>> live = apply_plan(create_model("test_resnet", num_classes=3), "linear_probe")
            >>> print(live.prefix(torch.zeros(2, 3, 64, 64)))
            cached: global_pool
            384 bytes an image, 0.0078 times the image's 49,152
            32,784,384 of 32,784,960 forward FLOPs an image (100.0%)
        """
        self._check_live()
        return prefix_of(self.model, sample, *others)

    def cached(
        self,
        dataset: Dataset[Any],
        directory: str | Path | None = None,
        *,
        image: ImageKeys | None = None,
        after: Cut | None = None,
        views: int = 1,
        dtype: FeatureDtype = "float32",
        keep: Keep = "auto",
        prepare: nn.Module | None = None,
        batch_size: int = 32,
        device: torch.device | str | None = None,
        workers: int = 0,
        limit: int | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Features | Images, nn.Module]:
        """Compute the features of the frozen layers once for every image, and train on them from then on.

        What is on disk is not computed again. The pass over features is compared with the plain one, bit by bit. With
        phases, call this again when ``step`` returns True; where nothing can be cached it gives the images and the
        model, so that one loop trains every phase. ``freezeplan.cache.cached.cached`` says more of each argument.

        Args:
            dataset: Gives images, (C, H, W) and floating-point, tuples that begin with one, or mappings; always alike.
            directory: Where features are cached; the user's cache folder if not given.
            image: Key of the image in mappings, found by itself if there is one; keys, or places in tuples, of several.
            after: ``features.cut`` of a plan that freezes less: its features are gone on from where they can be.
            views: Number of fixed augmented versions of each image.
            dtype: Of the numbers that are cached.
            keep: Where features are while a model is trained on them.
            prepare: Makes of a batch of raw images, such as bytes, what the model gets.
            batch_size: Images a pass.
            device: Where the passes run; where the model is if not given.
            workers: Processes that read images.
            limit: Bytes that the directory may hold at most.
            seed: Decides the views.
            progress: Is told how many rows have features, and of how many.

        Returns:
            As many items, with features for images; and the module to train on them, of the model's own parameters.

        Raises:
            ApplyError: If nothing can be cached in a plan without phases, the images are not the same each time, an
                argument has no possible value, or the comparison fails.
            FreezePlanError: If the features do not fit, or images differ in shape.

        Examples:
            >>> import tempfile
            >>> from freezeplan import apply_plan
            >>> from freezeplan.model import create_model
            >>> model = create_model("test_resnet", num_classes=3)
            >>> live = apply_plan(model, "linear_probe", lr=0.1)
            >>> images, labels = torch.rand(6, 3, 64, 64), torch.tensor([0, 1, 2] * 2)
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     features, rest = live.cached(torch.utils.data.TensorDataset(images, labels), directory)
            ...     x, y = next(iter(torch.utils.data.DataLoader(features, batch_size=6)))
            >>> tuple(x.shape), torch.allclose(rest.eval()(x), model(images), atol=1e-5)
            ((6, 96), True)
        """
        self._check_live()
        found, run, self._cuts = cached(
            self.model, self.resolution, self._phase_index(), self._cuts, dataset, directory, image=image, after=after,
            views=views, dtype=dtype, keep=keep, prepare=prepare, batch_size=batch_size, device=device, workers=workers,
            limit=limit, seed=seed, progress=progress,
        )  # fmt: skip
        return found, run
