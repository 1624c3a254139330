"""Export formats: checkpoints that other programs load and write.

Each format converts llavactl's own model folder (``llavactl.json``, ``connector.safetensors``; see ``model/folder.py``)
to its own and back. The model folder of another program's checkpoint refers to large weights in place.
"""
