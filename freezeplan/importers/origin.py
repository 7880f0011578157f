"""Whose file it is, by its keys: so that no importer takes another tool's file for one of its own that says nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from freezeplan.errors import PlanError
from freezeplan.importers.paramwise import KNOWN, NEED_A_MODEL, UNSAYABLE
from freezeplan.importers.python_config import SECTIONS

PLAN, SCHEDULE, CONFIG, ARGUMENTS = "plan", "finetuning-scheduler", "mmengine", "timm"
_NAMES = {
    PLAN: "a plan of freezeplan",
    SCHEDULE: "a schedule of finetuning-scheduler",
    CONFIG: "a config of mmengine",
    ARGUMENTS: "the arguments of timm's train.py",
}
_PARAMWISE = ("paramwise_cfg", *KNOWN, *NEED_A_MODEL, *UNSAYABLE)
_TRAIN_PY = """
aa amp amp_dtype amp_impl aot_autograd apex_amp aug_repeats aug_splits batch_size bce_loss bce_pos_weight bce_sum
bce_target_thresh bn_eps bn_momentum bn_tf channels_last checkpoint_hist class_map clip_grad clip_mode color_jitter
color_jitter_prob config cooldown_epochs crop_pct cutmix cutmix_minmax data data_dir dataset dataset_download
dataset_trust_remote_code decay_epochs decay_milestones decay_rate device device_modules dist_bn distill_loss_weight
distributed dr drop drop_block drop_connect drop_path epoch_repeats epochs eval_metric experiment fast_norm fuser
gaussian_blur_prob gp grad_accum_steps grad_checkpointing grayscale_prob head_init_bias head_init_scale hflip img_size
in_chans initial_batch_size initial_checkpoint input_img_mode input_key input_size interpolation jsd jsd_loss
kd_distill_type kd_loss_type kd_model_name kd_student_feature_dim kd_teacher_feature_dim kd_temperature
kd_token_distill_type layer_decay layer_decay_min_scale layer_decay_no_opt_scale local_rank log_interval log_wandb lr
lr_base lr_base_scale lr_base_size lr_cycle_decay lr_cycle_limit lr_cycle_mul lr_k_decay lr_noise lr_noise_pct
lr_noise_std mean min_lr mixup mixup_elem mixup_mode mixup_off_epoch mixup_prob mixup_switch_prob model model_dtype
model_ema model_ema_decay model_ema_force_cpu model_ema_warmup model_kwargs momentum naflex_loader naflex_loss_scale
naflex_max_seq_len naflex_patch_size_probs naflex_patch_sizes naflex_patchify_channels_first naflex_train_seq_lens
native_amp no_aug no_ddp_bb no_prefetcher no_resume_opt num_classes num_gpu opt opt_betas opt_eps opt_kwargs output
patience_epochs pin_mem prefetcher pretrained pretrained_path rank ratio recount recovery_interval remode reprob
resplit resume save_images scale sched sched_on_updates seed smoothing split_bn start_epoch std sync_bn
synchronize_step target_key task_loss_weight torchcompile torchcompile_mode torchscript train_batch_sizes
train_batches_per_epoch train_crop_mode train_img_sizes train_interpolation train_num_samples train_size_probs
train_size_random_mix train_size_schedule train_size_schedule_spread train_split train_steps_per_epoch tta
use_multi_epochs_loader val_interval val_num_samples val_split validation_batch_size validation_batch_size_multiplier
variable_batch_loss_scale vflip wandb_project wandb_resume_id wandb_tags warmup_epochs warmup_lr warmup_prefix
weight_decay worker_seeding workers world_size
"""
OPTIONS = frozenset(_TRAIN_PY.split())
"""The arguments of timm's ``train.py``, of any version up to timm 1.0."""


def check_origin(data: Any, path: Path, own: str) -> None:
    """Refuse a file that is another tool's, or a plan.

    Args:
        data: What is in it.
        path: Its name, for the error.
        own: The format that it was given as.

    Raises:
        PlanError: Naming what it looks like, and the command for that.

    Examples:
        >>> check_origin({"layer_decay": 0.65, "lr": 1e-3}, Path("args.yaml"), "timm")
        >>> check_origin({"version": 1, "rules": []}, Path("a.yaml"), "mmengine")
        Traceback (most recent call last):
        ...
        freezeplan.errors.PlanError: a.yaml: expected a config of mmengine; this looks like a plan of freezeplan
          there is nothing to import: freezeplan show a.yaml MODEL reads it as it is
    """
    found = _origin(data, path)
    if found is None or found == own:
        return
    note = f"freezeplan import {found} {path}"
    if found == PLAN:
        note = f"there is nothing to import: freezeplan show {path} MODEL reads it as it is"
    raise PlanError(f"expected {_NAMES[own]}; this looks like {_NAMES[found]}", where=str(path), notes=[note])


def mostly_timms(names: Collection[object]) -> bool:
    """Return whether at least half of some names are arguments of timm's ``train.py``; of no names none is.

    Examples:
        >>> mostly_timms(["lr", "opt", "own_option"]), mostly_timms(["learning_rate"]), mostly_timms([])
        (True, False, False)
    """
    return 0 < len(names) <= 2 * sum(name in OPTIONS for name in names)


def _origin(data: Any, path: Path) -> str | None:
    """The format that a file looks like; None if it looks like none."""
    if path.suffix.lower() == ".py" and path.is_file():
        return CONFIG
    if not isinstance(data, Mapping) or not data:
        return None
    if isinstance(data.get("rules"), list):
        return PLAN
    if all(str(key).isdigit() for key in data):
        return SCHEDULE
    if any(isinstance(data.get(key), Mapping) for key in SECTIONS) or any(key in data for key in _PARAMWISE):
        return CONFIG
    return ARGUMENTS if len(data) > 1 and mostly_timms(data) else None  # ``model`` alone may be anybody's
