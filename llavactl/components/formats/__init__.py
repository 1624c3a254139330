"""Layouts of a finished model on disk: what other programs load, and what they have written.

Each turns llavactl's own model folder (``llavactl.json``, ``connector.safetensors``; see ``model/folder.py``)
into its layout and back. Large weights that a foreign folder holds stay there: the folder made of it names them.
"""
