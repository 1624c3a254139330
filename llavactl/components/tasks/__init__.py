"""Benchmarks: their questions, and the scores of answers.

Every task (see ``llavactl.core.protocols.Task``) reads the published files of its benchmark. ``questions`` yields
``Question(id, turns, reference, category)``; ``score`` parses each answer into a prediction and compares it with the
reference. Shared parts: ``image_questions`` (user turns with images, prompt checks), ``judging`` (requests to a judge
and their verdicts), ``coco_synonyms`` and ``vqa_normalization``.
"""
