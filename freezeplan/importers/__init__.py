"""Plans from the settings of other tools, and from a model that was frozen by hand.

Imports ``plan``, ``model`` and ``resolve``. Begin with ``imported.py``, what each ``read`` returns; then one module for
each tool: ``timm_args.py``, ``finetuning_scheduler.py``, ``mmengine.py``. ``infer.py`` reads a model.
"""
