"""Runs benchmarks: a model answers the questions of a task, and the task scores the answers.

From a question to a stored score:

1. ``task.questions()`` (``components/tasks/``) yields ``Question(id, turns, reference, category)``.
2. ``runner.answer_questions`` asks the model in batches and appends each answer to ``eval/answers/TASK-DIGEST.jsonl``.
   With ``--answers FILE``, ``answers.read_answers`` reads the answers instead.
3. ``scoring.Benchmark.score`` joins answers and questions by id; ``task.score`` (or a judge) returns ``Scores``.
4. ``scoring.Benchmark.report`` adds 95 % intervals (``significance``) and makes an ``EvalReport``.
5. ``verbs/evaluate.py`` writes it to ``eval/TASK.json`` with a digest (``identity``), which lets a repeated command
   return the stored result. ``report/`` shows it on the page of the run.
"""
