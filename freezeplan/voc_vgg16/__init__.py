"""The lecture's experiment alone: its arms and figures, VGG16's head, ``vgg16.npy``, the download, the drawn sample.

Imports ``training``; only ``cli`` imports it. Begin with ``command.py``, which is ``freezeplan run voc_vgg16``.
"""
