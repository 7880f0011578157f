"""The lecture's experiment: arms, published figures, VGG16's head, ``vgg16.npy``, the download, the sample, the report.

Imports ``training``; only ``cli`` imports it. Begin with ``command.py``, which is ``freezeplan run voc_vgg16``.
"""
