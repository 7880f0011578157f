"""A training of a few lines that has those of timm's train.py beside which ``docs/trainers/timm.md`` puts its own."""

import os

import torch
from timm import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs


def main(args, loader):
    model = create_model(args.model, num_classes=args.num_classes)

    optimizer = create_optimizer_v2(
        model,
        **optimizer_kwargs(cfg=args),
        **args.opt_kwargs,
    )

    output_dir = args.output
    os.makedirs(output_dir, exist_ok=True)
    lr_scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=len(loader))
    start_epoch = args.start_epoch
    seen = []
    try:
        for epoch in range(start_epoch, num_epochs):
            model.train()
            for images, labels in loader:
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            eval_metrics = {"top1": args.scores[epoch]}
            latest_metric = eval_metrics["top1"]
            seen.append([parameter.requires_grad for parameter in model.parameters()])

            if lr_scheduler is not None:
                # step LR for next epoch
                lr_scheduler.step(epoch + 1, latest_metric)

    except KeyboardInterrupt:
        pass
    return model, optimizer, seen
