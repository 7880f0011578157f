"""The frozen prefix: computed once per image, and kept as cached features.

Imports ``apply`` and what it imports; never ``guard`` or ``proof``. Begin with ``prefix.py``, what can be cached;
``replay.py`` runs a model on cached features, ``boundaries.py`` says where phases cut, ``store.py`` is the folder.
"""
