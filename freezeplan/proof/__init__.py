"""Whether a freeze held, afterwards: digests before and after, what moved and the likely cause, deltas.

Imports ``apply`` and what it imports; never ``guard`` or ``cache``. Begin with ``seal.py``; ``causes.py`` compares
values, ``delta.py`` saves what a training changed, ``weights_file.py`` reads files of weights.
"""

from freezeplan.proof.delta import load_delta
from freezeplan.proof.seal import Seal, Verification, compare, take_seal

__all__ = ["Seal", "Verification", "compare", "load_delta", "take_seal"]
