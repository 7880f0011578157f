"""Training and measuring arms of any experiment: data, settings, loop, measures, results, report.

Imports ``api`` and below; knows nothing of the lecture. Begin with ``settings.py``, then ``train.py``, the plain loop.
"""
