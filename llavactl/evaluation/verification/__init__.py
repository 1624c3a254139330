"""Verification of exports: a process without llavactl loads an export, and its outputs are compared with the model's.

``images`` chooses the images, ``prompts`` the conversations, ``script`` runs the format's verification script,
``compare`` compares the outputs, and ``verify`` does these steps in order.
"""
