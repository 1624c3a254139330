"""Evaluation during training (``evaluate_every``): scores of tasks, and answers to the questions of fixed samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llavactl.chat.assistant import Assistant
from llavactl.core.errors import RecipeError
from llavactl.core.paths import json_text, write_atomic
from llavactl.core.registry import registry
from llavactl.core.suggest import suggest
from llavactl.evaluation.periodic import (
    FixedFeatures,
    TaskAnswers,
    answer,
    periodic_benchmarks,
    score_names,
    scores,
    task_images,
)
from llavactl.features import LiveFeatures
from llavactl.features.checked_encoder import load_encoder
from llavactl.model.generate import Sampling
from llavactl.report.examples import example
from llavactl.report.optional import optional_output
from llavactl.teaching.budgeted import ask_function
from llavactl.training.collective import on_main, together
from llavactl.training.sample_answers import answer_samples, answers_file, shown_samples
from llavactl.training.sharding import root_gathered

if TYPE_CHECKING:
    from llavactl.core.protocols import Ask
    from llavactl.core.schema import Sample
    from llavactl.data.split import DataSplit
    from llavactl.evaluation.scoring import Benchmark
    from llavactl.features import FeatureReader
    from llavactl.model.build import ModelBundle
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.sections import Eval
    from llavactl.recipe.stages import TrainingStage
    from llavactl.training.run import Run
    from llavactl.training.sample_answers import AnsweredSample


@dataclass(frozen=True)
class EvaluationAnswers:
    """Answers to the questions of tasks, and to those of samples."""

    tasks: TaskAnswers
    samples: Sequence[AnsweredSample]


@dataclass(frozen=True)
class PeriodicEvaluation:
    """Evaluates ``assistant``, the model in training; see ``training.run.Evaluation``.

    ``samples`` are answered besides the questions of ``benchmarks``. ``settings`` limit batches and answers.
    """

    assistant: Assistant
    benchmarks: Sequence[Benchmark]
    samples: Sequence[Sample]
    settings: Eval

    def answers(self, run: Run, stopped: Callable[[], bool]) -> EvaluationAnswers | None:
        """The answers to all questions and, in the main process, to the samples.

        The processes share the questions. If the model is sharded, they share each forward pass instead, so all of them
        answer the same questions.
        """
        sharded, main = run.placement.sharded, run.accelerator.is_main_process
        part = (0, 1) if sharded else (run.accelerator.process_index, run.accelerator.num_processes)
        limit = self.settings.max_new_tokens
        sampling = Sampling(max_new_tokens=limit)

        def answer_part() -> EvaluationAnswers | None:
            tasks = answer(
                self.benchmarks, self.assistant, self.settings.batch_size, sampling, part=part, stopped=stopped
            )
            if tasks is None:
                return None
            samples = answer_samples(self.assistant, self.samples, limit) if main or sharded else []
            return EvaluationAnswers(tasks, samples)

        with root_gathered(self.assistant.model):
            # A process that waits for others in a layer can't receive their errors.
            parts = [answer_part()] if sharded else together(answer_part)
        finished = [part for part in parts if part is not None]
        if len(finished) < len(parts):
            return None
        tasks = {
            benchmark.name: {key: value for each in finished for key, value in each.tasks[benchmark.name].items()}
            for benchmark in self.benchmarks
        }
        return EvaluationAnswers(tasks, finished[0].samples)

    def scores(self, run: Run, step: int, answers: EvaluationAnswers) -> Mapping[str, float]:
        """The scores of ``answers``; the answers to the samples are written to a file."""
        return on_main(lambda: self._scores(run, step, answers))

    def _scores(self, run: Run, step: int, answers: EvaluationAnswers) -> dict[str, float]:
        if answers.samples:
            file = answers_file(run.folder, step)
            with optional_output(file):
                rows = [example(file.parent, each.turns, each.reference, each.answer) for each in answers.samples]
                write_atomic(file, json_text(rows, indent=2))

        def ask(benchmark: Benchmark) -> Ask | None:
            journal = run.folder / "judge" / f"{benchmark.name}.replies.sqlite"
            return ask_function(benchmark.judge, journal) if benchmark.judge else None

        return scores(self.benchmarks, answers.tasks, ask)


def periodic_evaluation(
    recipe: Recipe, stage: TrainingStage, features: FeatureReader, bundle: ModelBundle, data: DataSplit, device: str
) -> PeriodicEvaluation | None:
    """The evaluation during ``stage``, with the images of its tasks encoded on ``device``; None without one.

    Raises:
        LlavactlError: a task or an image can't be read, or ``restore_best`` names a score that the task doesn't have.
    """
    settings, section = stage.settings.evaluate_every, f"stage{stage.number}.evaluate_every"
    if settings is None:
        return None
    benchmarks = periodic_benchmarks(settings.tasks, section)
    _check_score(stage, benchmarks)
    samples = shown_samples(data, settings.samples)
    arrays = {image: features.arrays(image) for sample in samples for image in sample.images}
    if images := task_images(benchmarks):
        live = live_features(recipe, stage, features, device)
        arrays |= {image: live.arrays(image) for image in images}
    # Without a limit, as in `llavactl eval`: prompts aren't truncated.
    encoding = replace(data.train.encoding, max_length=None)
    assistant = Assistant(bundle.model, encoding, FixedFeatures(arrays), stage.settings.image_order)
    return PeriodicEvaluation(assistant, benchmarks, samples, recipe.eval)


def live_features(recipe: Recipe, stage: TrainingStage, features: FeatureReader, device: str) -> LiveFeatures:
    """Features of images that are not in the feature store, encoded on ``device``."""
    if isinstance(features, LiveFeatures):
        return features
    vision = registry().create("vision", stage.vision)
    return LiveFeatures(load_encoder(vision, device, recipe.features.compute), features.fingerprint, device)


def _check_score(stage: TrainingStage, benchmarks: Sequence[Benchmark]) -> None:
    name = stage.settings.restore_best
    if not isinstance(name, str):
        return
    task = next(benchmark for benchmark in benchmarks if benchmark.name == name.partition(".")[0])
    if (names := score_names(task)) and name not in names:
        raise RecipeError(f"stage{stage.number}.restore_best: unknown score {name}", hint=suggest(name, names))
