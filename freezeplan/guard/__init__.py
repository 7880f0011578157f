"""What other code breaks while a model is trained: flags, modes, optimizers, schedulers.

Imports ``apply`` and what it imports; never ``proof`` or ``cache``. Begin with ``checks.py``, which looks at a model
and its optimizers; ``optimizer_hook.py`` sees each step; ``schedulers.py`` names a scheduler that flattened the rates.
"""

from freezeplan.guard.guard import Guard

__all__ = ["Guard"]
