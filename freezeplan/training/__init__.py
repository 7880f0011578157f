"""Training and measuring a model on photos: data, the loop, and the comparison of plans.

Imports ``api`` and below; knows nothing of the lecture's experiment. Begin with ``train.py``, the plain loop;
``photos.py`` reads data, ``feed.py`` gives images or cached features, ``compare.py`` trains several plans.
"""
