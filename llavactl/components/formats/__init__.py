"""Export formats: checkpoints that other programs load and write.

Each format converts llavactl's own model folder (``open_model`` and ``save_model`` in ``native.py``)
to its own and back. The model folder of another program's checkpoint refers to large weights in place.
"""
