"""The built-in plugin: llavactl's own components, commands and recipes, registered through the public hooks."""

from __future__ import annotations

from llavactl.core.hookspecs import Register, hookimpl

_COMPONENTS = "llavactl.components"

RESULTS_VERSION = "1"
"""Incremented when the results of a built-in component change; finished steps are then run again.

Most releases don't change results and must not invalidate finished runs. Plugins may have the same attribute.
"""

COMMAND_GROUPS = {
    "Start": {
        "init": "Write a recipe for your data, models and memory.",
        "recipes": "List, show, copy and check recipes.",
        "run": "Run all steps of a recipe.",
    },
    "Data": {
        "data": "Generate, inspect, check and filter training data.",
    },
    "Features and training": {
        "extract": "Extract vision features into the feature store.",
        "cache": "Inspect, verify, prune and share the feature stores.",
        "train": "Train one stage of a recipe.",
        "sweep": "Run and compare variants of a recipe.",
    },
    "Use": {
        "chat": "Chat with a model about images.",
        "eval": "Run a benchmark, or score stored answers.",
        "export": "Export a model to another format.",
    },
    "Inspect": {
        "components": "List the registered components and their plugins.",
        "plugins": "List, check and create plugins.",
        "doctor": "Check packages, devices, disk space, network and plugins.",
    },
}
"""The built-in commands by group, in their usual order, with the first sentence of their help.

Each is the attribute ``command`` of a module in ``llavactl.cli``, which ``--help`` doesn't import.
"""

COMMANDS = {name: summary for group in COMMAND_GROUPS.values() for name, summary in group.items()}


@hookimpl
def register_sources(register: Register) -> None:
    register(
        "llava-json",
        f"{_COMPONENTS}.sources.llava_json:LlavaJson",
        options=f"{_COMPONENTS}.sources.llava_json:LlavaJsonOptions",
        summary="LLaVA records: JSON or JSONL with `image` and `conversations`",
    )
    register(
        "scienceqa",
        f"{_COMPONENTS}.sources.scienceqa:scienceqa",
        options=f"{_COMPONENTS}.sources.scienceqa:ScienceqaOptions",
        summary="ScienceQA's problems.json: explanation, then answer",
    )
    register(
        "coco",
        f"{_COMPONENTS}.sources.coco:coco",
        options=f"{_COMPONENTS}.sources.coco:CocoOptions",
        summary="COCO images with captions and boxes",
    )
    register(
        "caps-boxes",
        f"{_COMPONENTS}.sources.caps_boxes:caps_boxes",
        options=f"{_COMPONENTS}.sources.caps_boxes:CapsBoxesOptions",
        summary="captions and boxes, one image per record, in the JSONL format of LLaVA",
    )
    register(
        "image-folder",
        f"{_COMPONENTS}.sources.image_folder:ImageFolder",
        options=f"{_COMPONENTS}.sources.image_folder:ImageFolderOptions",
        summary="a folder of images with captions in text files beside them, or in a table such as metadata.csv",
    )
    register(
        "scenes",
        f"{_COMPONENTS}.sources.scenes:scenes",
        options=f"{_COMPONENTS}.sources.scenes:ScenesOptions",
        summary="synthetic scenes of colored shapes, with captions, boxes and exact questions",
    )


@hookimpl
def register_vision(register: Register) -> None:
    register(
        "clip",
        f"{_COMPONENTS}.vision.pretrained:TransformersVision",
        options=f"{_COMPONENTS}.vision.pretrained:ClipOptions",
        summary="CLIP, SigLIP, DINOv2 and similar vision models of transformers, by id or folder",
    )


@hookimpl
def register_connectors(register: Register) -> None:
    for name, summary in (
        ("linear", "one linear layer (LLaVA v1)"),
        ("mlp2x-gelu", "two linear layers with GELU between them (LLaVA v1.5)"),
    ):
        target = name.replace("-", "_")
        register(
            name,
            f"{_COMPONENTS}.connectors.projection:{target}",
            options=f"{_COMPONENTS}.connectors.projection:ProjectionOptions",
            summary=summary,
        )
    register(
        "cell-words",
        f"{_COMPONENTS}.connectors.cell_words:cell_words",
        options=f"{_COMPONENTS}.connectors.cell_words:CellWordsOptions",
        summary="a few tokens per cell of a coarse grid, for box alignment word by word",
    )


@hookimpl
def register_languages(register: Register) -> None:
    register(
        "hf",
        f"{_COMPONENTS}.languages.causal_lm:TransformersLanguage",
        options=f"{_COMPONENTS}.languages.causal_lm:TransformersLanguageOptions",
        summary="any causal language model of transformers with a fast tokenizer, by id or folder",
    )


@hookimpl
def register_templates(register: Register) -> None:
    register("plain", f"{_COMPONENTS}.templates.plain:PlainTemplate", summary="image, caption, newline (stage 1)")
    for name, summary in (
        ("vicuna-v1", "USER: … ASSISTANT: … (LLaVA v1.5)"),
        ("llava-v1", "vicuna-v1 with `human` instead of `user` in the system prompt (LLaVA v1 on ScienceQA)"),
        ("vicuna-v0", "### Human: … ### Assistant: … (LLaVA v1)"),
        ("llama-2", "[INST] … [/INST] … (Llama 2 chat)"),
        ("chatml", "<|im_start|>user … <|im_end|>"),
    ):
        register(name, f"{_COMPONENTS}.templates.styles:{name.replace('-', '_')}", summary=summary)
    register(
        "tokenizer",
        f"{_COMPONENTS}.templates.tokenizer:TokenizerTemplate",
        options=f"{_COMPONENTS}.templates.jinja_template:TokenizerTemplateOptions",
        summary="the chat template of the tokenizer",
    )


@hookimpl
def register_teachers(register: Register) -> None:
    register(
        "rules",
        f"{_COMPONENTS}.teachers.rules:Rules",
        options=f"{_COMPONENTS}.teachers.rules:RulesOptions",
        summary="conversation, detail and reasoning samples from captions and boxes by rules; offline",
    )
    for name, module, attribute, summary in (
        (
            "openai",
            "openai_api",
            "OpenAI",
            "any OpenAI-compatible endpoint: OpenAI, vLLM, llama.cpp, Ollama, transformers serve",
        ),
        ("transformers", "local", "Transformers", "a language model in this process, by id or folder"),
        ("replay", "replay", "Replay", "stored replies from a file or an earlier run"),
    ):
        where = f"{_COMPONENTS}.teachers.{module}"
        register(name, f"{where}:{attribute}", options=f"{where}:{attribute}Options", summary=summary)


@hookimpl
def register_tasks(register: Register) -> None:
    register(
        "scenes",
        f"{_COMPONENTS}.tasks.scenes:ScenesTask",
        options=f"{_COMPONENTS}.tasks.scenes:ScenesTaskOptions",
        summary="questions about synthetic scenes excluded from training",
    )
    for name, target, options, summary in (
        ("pope", "pope:Pope", "PopeOptions", "object hallucination: yes-no questions about objects in an image"),
        ("scienceqa", "scienceqa:Scienceqa", "ScienceqaTaskOptions", "multiple-choice science questions"),
        (
            "llava-bench",
            "llava_bench:LlavaBench",
            "LlavaBenchOptions",
            "60 open questions in the wild, judged",
        ),
        (
            "llava-bench-coco",
            "llava_bench:LlavaBench",
            "LlavaBenchOptions",
            "90 open questions about COCO, judged",
        ),
        (
            "judge-pairs",
            "judge_pairs:JudgePairs",
            "JudgePairsOptions",
            "two models' answers, compared by a judge",
        ),
        ("spatial", "spatial:Spatial", "SpatialOptions", "minimal pairs of synthetic scenes, scored per pair"),
        ("vqa", "vqa:Vqa", "VqaOptions", "VQAv2 and similar: short answers, compared with ten human answers"),
        ("textvqa", "vqa:TextVqa", "TextVqaOptions", "short answers about text in images"),
        ("mme", "mme:Mme", "MmeOptions", "two yes-no questions per image, in 14 categories"),
        (
            "multiple-choice",
            "multiple_choice:MultipleChoice",
            "MultipleChoiceOptions",
            "MMBench and similar",
        ),
        ("chair", "chair:Chair", "ChairOptions", "object hallucination in descriptions of COCO images"),
    ):
        module = f"{_COMPONENTS}.tasks.{target.partition(':')[0]}"
        register(name, f"{_COMPONENTS}.tasks.{target}", options=f"{module}:{options}", summary=summary)


@hookimpl
def register_formats(register: Register) -> None:
    for name, target, summary in (
        ("hf", "hf:HfLlava", "LlavaForConditionalGeneration of transformers, with processor"),
        (
            "peft",
            "peft_folder:PeftAdapter",
            "a LoRA adapter for peft, with its base model in format hf",
        ),
    ):
        register(name, f"{_COMPONENTS}.formats.{target}", summary=summary)
    original = f"{_COMPONENTS}.formats.llava:OriginalLlava"
    summary = "checkpoints of the original LLaVA code: full, LoRA, or only mm_projector.bin"
    register("llava", original, options=f"{original}Options", summary=summary)


@hookimpl
def register_commands(register: Register) -> None:
    for name, summary in COMMANDS.items():
        register(name, f"llavactl.cli.{name}:command", summary=summary)


@hookimpl
def register_optimizers(register: Register) -> None:
    register("adamw", f"{_COMPONENTS}.optimizers.adamw:AdamW", summary="AdamW for all weights")
    register(
        "muon",
        f"{_COMPONENTS}.optimizers.muon:Muon",
        summary="Muon for the matrices inside the language model, AdamW for all other weights",
    )


@hookimpl
def register_schedules(register: Register) -> None:
    decay = f"{_COMPONENTS}.schedules.decay"
    options = f"{decay}:DecayOptions"
    register("cosine", f"{decay}:Cosine", options=options, summary="cosine decay to 0 or a minimum")
    register("linear", f"{decay}:Linear", options=options, summary="linear decay to 0 or a minimum")
    register("constant", f"{decay}:Constant", summary="the peak learning rate after the warm-up")


@hookimpl
def register_recipes(register: Register) -> None:
    for name, summary in (
        ("llava-v1-7b", "LLaVA v1: CLIP ViT-L/14 224, linear, Vicuna 7B, CC3M-595K, then 158K instructions"),
        ("llava-v1-13b-scienceqa", "LLaVA v1 13B fine-tuned on ScienceQA, 12 epochs"),
        ("llava-v1.5-7b", "LLaVA v1.5: CLIP ViT-L/14 336, MLP, Vicuna v1.5 7B, LCS-558K, then mix-665K"),
        ("llava-v1.5-13b", "LLaVA v1.5 13B: as llava-v1.5-7b, with Vicuna v1.5 13B"),
        ("llava-v1.5-7b-lora", "LLaVA v1.5 7B with LoRA in stage 2"),
        ("llava-v1.5-7b-qlora", "LLaVA v1.5 7B with LoRA on a language model in 4 bits in stage 2, for 24 GB"),
    ):
        register(name, f"llavactl:recipes/{name}.yaml", summary=summary)
