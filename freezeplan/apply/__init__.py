"""A ``Resolution`` onto a model: flags, modes, optimizer groups, new values, phases, rates inside a step.

Imports ``resolve`` and ``model``. Nothing else in the core decides what a model trains. Begin with ``freeze.py``; then
``phases.py`` (progress to phase, pure), ``processes.py`` (what DistributedDataParallel would not synchronise) and
``lr_multiplier.py`` (rates inside ``optimizer.step()``).
"""
