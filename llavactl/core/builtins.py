"""The built-in plugin: what llavactl itself registers, through the hooks that a stranger's plugin uses."""

from __future__ import annotations

from llavactl.core.hookspecs import Register, hookimpl

_COMPONENTS = "llavactl.components"

NUMBERS = "1"
"""Incremented when a built-in component's results change; finished steps are then redone.

It is not llavactl's version: most releases change no result, and must not cause finished runs to be trained again.
"""

COMMANDS = {
    "recipes": "List, show, copy and check recipes.",
    "run": "Run all steps of a recipe.",
    "data": "Generate, inspect, check and filter training data.",
    "extract": "Extract vision features into the feature store.",
    "cache": "Inspect, verify and prune the feature stores.",
    "train": "Train one stage of a recipe.",
    "chat": "Chat with a model about images.",
    "eval": "Run a benchmark, or score stored answers.",
    "export": "Export a model to another format.",
    "components": "List the registered components and their plugins.",
    "plugins": "List and check the installed plugins.",
    "doctor": "Check packages, devices, disk space, network and plugins.",
}
"""The built-in commands in their usual order, with the first sentence of their help.

Each is the attribute ``command`` of a module in ``llavactl.cli``, which ``--help`` doesn't import.
"""


@hookimpl
def register_sources(register: Register) -> None:
    register(
        "llava-json",
        f"{_COMPONENTS}.sources.llava_json:LlavaJson",
        options=f"{_COMPONENTS}.sources.llava_json:LlavaJsonOptions",
        summary="LLaVA's records: JSON or JSONL with `image` and `conversations`",
    )
    register(
        "scienceqa",
        f"{_COMPONENTS}.sources.scienceqa:scienceqa",
        options=f"{_COMPONENTS}.sources.scienceqa:ScienceqaOptions",
        summary="ScienceQA's problems.json: reasons, then the answer",
    )
    register(
        "coco",
        f"{_COMPONENTS}.sources.coco:coco",
        options=f"{_COMPONENTS}.sources.coco:CocoOptions",
        summary="COCO's pictures with their captions and boxes",
    )
    register(
        "caps-boxes",
        f"{_COMPONENTS}.sources.caps_boxes:caps_boxes",
        options=f"{_COMPONENTS}.sources.caps_boxes:CapsBoxesOptions",
        summary="captions and boxes, a picture a record, as LLaVA's own JSONL has them",
    )
    register(
        "scenes",
        f"{_COMPONENTS}.sources.scenes:scenes",
        options=f"{_COMPONENTS}.sources.scenes:ScenesOptions",
        summary="drawn scenes of coloured shapes, with captions, boxes and exact questions",
    )


@hookimpl
def register_vision(register: Register) -> None:
    register(
        "clip",
        f"{_COMPONENTS}.vision.pretrained:TransformersVision",
        options=f"{_COMPONENTS}.vision.pretrained:ClipOptions",
        summary="any CLIPVisionModel, an id or a folder",
    )


@hookimpl
def register_connectors(register: Register) -> None:
    for name, summary in (
        ("linear", "one linear layer (LLaVA v1)"),
        ("mlp2x-gelu", "two linear layers with a GELU between (LLaVA v1.5)"),
    ):
        target = name.replace("-", "_")
        register(
            name,
            f"{_COMPONENTS}.connectors.projection:{target}",
            options=f"{_COMPONENTS}.connectors.projection:ProjectionOptions",
            summary=summary,
        )


@hookimpl
def register_languages(register: Register) -> None:
    register(
        "hf",
        f"{_COMPONENTS}.languages.causal_lm:TransformersLanguage",
        options=f"{_COMPONENTS}.languages.causal_lm:TransformersLanguageOptions",
        summary="any causal language model of transformers with a fast tokenizer, an id or a folder",
    )


@hookimpl
def register_templates(register: Register) -> None:
    register("plain", f"{_COMPONENTS}.templates.plain:PlainTemplate", summary="image, caption, newline (stage 1)")
    for name, summary in (
        ("vicuna-v1", "USER: … ASSISTANT: … (LLaVA v1.5)"),
        ("llava-v1", "the same, its system sentence says human for user (LLaVA v1 on ScienceQA)"),
        ("vicuna-v0", "### Human: … ### Assistant: … (LLaVA v1)"),
        ("llama-2", "[INST] … [/INST] … (Llama 2 chat)"),
        ("chatml", "<|im_start|>user … <|im_end|>"),
    ):
        register(name, f"{_COMPONENTS}.templates.styles:{name.replace('-', '_')}", summary=summary)
    register(
        "tokenizer",
        f"{_COMPONENTS}.templates.tokenizer:TokenizerTemplate",
        options=f"{_COMPONENTS}.templates.jinja_template:TokenizerTemplateOptions",
        summary="the tokenizer's own chat template",
    )


@hookimpl
def register_teachers(register: Register) -> None:
    """Teachers that come with llavactl."""
    register(
        "rules",
        f"{_COMPONENTS}.teachers.rules:Rules",
        options=f"{_COMPONENTS}.teachers.rules:RulesOptions",
        summary="captions and boxes to conversations, details and reasoning by rules, without a network",
    )
    for name, module, attribute, summary in (
        (
            "openai",
            "openai_api",
            "OpenAI",
            "any OpenAI-style endpoint: OpenAI, vLLM, llama.cpp, Ollama, transformers serve",
        ),
        ("transformers", "local", "Transformers", "a language model in this process, an id or a folder"),
        ("replay", "replay", "Replay", "replies from a file, or kept by an earlier run"),
    ):
        where = f"{_COMPONENTS}.teachers.{module}"
        register(name, f"{where}:{attribute}", options=f"{where}:{attribute}Options", summary=summary)


@hookimpl
def register_tasks(register: Register) -> None:
    register(
        "scenes",
        f"{_COMPONENTS}.tasks.scenes:ScenesTask",
        options=f"{_COMPONENTS}.tasks.scenes:ScenesTaskOptions",
        summary="questions about drawn scenes never trained on",
    )
    for name, target, options, summary in (
        ("pope", "pope:Pope", "PopeOptions", "is an object in the picture? object hallucination, yes or no"),
        ("scienceqa", "scienceqa:Scienceqa", "ScienceqaTaskOptions", "multiple choice about science"),
        ("llava-bench", "llava_bench:LlavaBench", "LlavaBenchOptions", "in the wild: 60 open questions, judged"),
        ("llava-bench-coco", "llava_bench:LlavaBench", "LlavaBenchOptions", "90 open questions about COCO, judged"),
        (
            "judge-pairs",
            "judge_pairs:JudgePairs",
            "JudgePairsOptions",
            "whose answers are better? a judge says",
        ),
        ("spatial", "spatial:Spatial", "SpatialOptions", "minimal pairs of drawn scenes, each scored as a pair"),
        ("vqa", "vqa:Vqa", "VqaOptions", "short answers, held against those of ten people"),
        ("textvqa", "vqa:TextVqa", "TextVqaOptions", "short answers about text in pictures"),
        ("mme", "mme:Mme", "MmeOptions", "two yes-or-no questions a picture, in 14 categories"),
        ("multiple-choice", "multiple_choice:MultipleChoice", "MultipleChoiceOptions", "MMBench and its like"),
        ("chair", "chair:Chair", "ChairOptions", "objects that descriptions of COCO's pictures make up"),
    ):
        module = f"{_COMPONENTS}.tasks.{target.partition(':')[0]}"
        register(name, f"{_COMPONENTS}.tasks.{target}", options=f"{module}:{options}", summary=summary)


@hookimpl
def register_formats(register: Register) -> None:
    for name, target, summary in (
        ("hf", "hf:HfLlava", "LlavaForConditionalGeneration of transformers, with its processor"),
        (
            "peft",
            "peft_folder:PeftAdapter",
            "a LoRA adapter as peft loads it, beside the LLaVA of transformers it belongs to",
        ),
    ):
        register(name, f"{_COMPONENTS}.formats.{target}", summary=summary)
    original = f"{_COMPONENTS}.formats.llava:OriginalLlava"
    summary = "the original LLaVA's checkpoints: full, LoRA, or a bare mm_projector.bin"
    register("llava", original, options=f"{original}Options", summary=summary)


@hookimpl
def register_commands(register: Register) -> None:
    for name, summary in COMMANDS.items():
        register(name, f"llavactl.cli.{name}:command", summary=summary)


@hookimpl
def register_recipes(register: Register) -> None:
    for name, summary in (
        ("llava-v1-7b", "LLaVA v1: CLIP ViT-L/14 224, linear, Vicuna 7B, CC3M-595K then 158K instructions"),
        ("llava-v1-13b-scienceqa", "LLaVA v1 13B tuned on ScienceQA, 12 epochs of reasons and answers"),
        ("llava-v1.5-7b", "LLaVA v1.5: CLIP ViT-L/14 336, MLP, Vicuna v1.5 7B, LCS-558K then mix-665K"),
        ("llava-v1.5-13b", "LLaVA v1.5 with Vicuna v1.5 13B"),
        ("llava-v1.5-7b-lora", "LLaVA v1.5 7B with LoRA in stage 2"),
    ):
        register(name, f"llavactl:recipes/{name}.yaml", summary=summary)
