"""Verification script of format ``gguf``: loads an export in llama.cpp and writes its outputs.

    python outputs.py FOLDER PROMPTS.json OUT.safetensors

It runs without llavactl; docs/reference/export.md#verification-script documents its input and output. It calls the C
functions of llama.cpp with the declarations of llama-cpp-py-sync, and computes in float32 on the CPU. If that package's
library can't be loaded (it needs glibc 2.38), it uses the one inside xllamacpp.
"""

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import GGUFReader
from PIL import Image
from safetensors.numpy import save_file

PROGRAM_MISSING = 69
"""The exit status if llama.cpp isn't installed; EX_UNAVAILABLE of sysexits.h."""

INSTALL = "verification needs llama.cpp: pip install 'llavactl-gguf[verify]'"
SAME_INTERFACE = ("0.11739", "2026.10.11549")
"""Versions of llama-cpp-py-sync, whose declarations are used, and of xllamacpp with the same structures in its library.

With others, the library would read wrong memory."""

LAST_CLASS_TOKEN = 11739
"""The latest build that was found to put the class token of CLIP last; see the README."""

GELU = "f16-gelu"
"""llama.cpp reads GELU from a table with float16 inputs and values, also if all weights are float32.

This changes image embeddings a tenth as much as weights in float16 do, so it has its own bound."""

PRECISION = ("q8_0", "bf16", "f16", GELU)
"""What values are rounded to, from the least precise."""

EXACT = {"float32": ("f32",), "bfloat16": ("f32", "bf16"), "float16": ("f32", "f16")}
"""The types that weights of each dtype are stored in without rounding."""

IMAGE = -1
"""The id at image positions."""

F32 = 0
"""``GGML_TYPE_F32``, also for keys and values in the cache."""


class LlamaCpp:
    """A language model and its projector in llama.cpp.

    Both files are read into memory that is released with the process.
    """

    def __init__(self, model: Path, mmproj: Path) -> None:
        self.ffi, self.lib, self.mtmd, self.program = libraries()
        self._silence = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", _log(self.ffi))
        for set_log in (self.lib.llama_log_set, self.mtmd.mtmd_log_set, self.mtmd.mtmd_helper_log_set):
            set_log(self._silence, self.ffi.NULL)
        self.lib.llama_backend_init()
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = False  # repacked weights are multiplied in other precisions
        self.model = self._not_null(self.lib.llama_model_load_from_file(str(model).encode(), settings), model)
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.tokens = self.lib.llama_vocab_n_tokens(self.vocabulary)
        projector_settings = self.mtmd.mtmd_context_params_default()
        projector_settings.use_gpu = projector_settings.warmup = projector_settings.print_timings = False
        projector_settings.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.projector = self._not_null(
            self.mtmd.mtmd_init_from_file(str(mmproj).encode(), self.model, projector_settings), mmproj
        )

    def _not_null(self, pointer: Any, file: Path) -> Any:
        if pointer == self.ffi.NULL:
            raise SystemExit(f"llama.cpp can't load {file.name}")
        return pointer

    def run(self, text: str, images: list[Image.Image], max_new_tokens: int) -> dict[str, np.ndarray]:
        """Ids, logits at text, image embeddings and greedy answer of a prompt with ``<image>`` for each image."""
        chunks = [*self.chunks(text, images)]
        context = self._context(sum(map(len, chunks)) + max_new_tokens)
        ids: list[int] = []
        logits: list[np.ndarray] = []
        for chunk in chunks:
            last = self._decode(context, len(ids), chunk)
            if isinstance(chunk, list):
                logits.append(last)
                ids += chunk
            else:
                ids += [IMAGE] * len(chunk)
        outputs = {"ids": np.array(ids), "logits": np.concatenate(logits)}
        if images:
            outputs["embeddings"] = np.stack([chunk for chunk in chunks if not isinstance(chunk, list)])
        answer: list[int] = []
        while len(answer) < max_new_tokens:
            answer.append(int(last[-1].argmax()))
            if self.lib.llama_vocab_is_eog(self.vocabulary, answer[-1]):
                break
            last = self._decode(context, len(ids) + len(answer) - 1, answer[-1:])
        self.lib.llama_free(context)
        return {**outputs, "said": np.array(answer)}

    def embeddings(self, images: list[Image.Image]) -> np.ndarray:
        """The embeddings [I, Q, D] of images as they are."""
        chunks = self.chunks("<image>" * len(images), images)
        return np.stack([chunk for chunk in chunks if not isinstance(chunk, list)])

    def _context(self, tokens: int) -> Any:
        """A context for a prompt and its answer: with the model's own size, a cache may not fit into memory."""
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens
        settings.type_k = settings.type_v = F32
        settings.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = self.lib.llama_init_from_model(self.model, settings)
        if context == self.ffi.NULL:
            raise SystemExit(f"llama.cpp can't create a context for {tokens} tokens")
        return context

    def chunks(self, text: str, images: list[Image.Image]) -> Iterator[list[int] | np.ndarray]:
        """The token ids between images and the embeddings [Q, D] of each image, as llama.cpp splits the prompt."""
        ffi, mtmd = self.ffi, self.mtmd
        marked = text.replace("<image>", ffi.string(mtmd.mtmd_get_marker(self.projector)).decode()).encode()
        buffer = ffi.new("char[]", marked)
        prompt = ffi.new("struct mtmd_input_text *", {"text": buffer, "text_len": len(marked)})
        prompt.add_special = prompt.parse_special = True
        bitmaps = [mtmd.mtmd_bitmap_init(image.width, image.height, image.tobytes()) for image in images]
        chunks = mtmd.mtmd_input_chunks_init()
        if mtmd.mtmd_tokenize(self.projector, chunks, prompt, ffi.new("mtmd_bitmap *[]", bitmaps), len(bitmaps)):
            raise SystemExit("llama.cpp can't tokenize a prompt")
        for index in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ffi.new("size_t *")
                tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, count)
                yield [tokens[at] for at in range(count[0])]
            else:
                if mtmd.mtmd_encode_chunk(self.projector, chunk):
                    raise SystemExit("llama.cpp can't encode an image")
                shape = mtmd.mtmd_input_chunk_get_n_tokens(chunk), self.lib.llama_model_n_embd_inp(self.model)
                yield self._array(mtmd.mtmd_get_output_embd(self.projector), shape)
        mtmd.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)

    def _decode(self, context: Any, position: int, chunk: list[int] | np.ndarray) -> np.ndarray:
        """Logits after appending tokens or embeddings [T, D] to the cache, which holds ``position`` tokens.

        Those of all tokens [T, V], but after embeddings only the last [1, V].
        """
        text, count = isinstance(chunk, list), len(chunk)
        batch = self.lib.llama_batch_init(count, 0 if isinstance(chunk, list) else chunk.shape[1], 1)
        batch.n_tokens = count
        for at in range(count):
            batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = position + at, 1, 0
            batch.logits[at] = text or at == count - 1
        if isinstance(chunk, list):
            for at, token in enumerate(chunk):
                batch.token[at] = token
        else:
            self.ffi.memmove(batch.embd, chunk.tobytes(), chunk.nbytes)
        if status := self.lib.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp can't decode a prompt (status {status})")
        self.lib.llama_batch_free(batch)
        return self._array(self.lib.llama_get_logits(context), (count if text else 1, self.tokens))

    def _array(self, pointer: Any, shape: tuple[int, int]) -> np.ndarray:
        """A copy of ``shape`` float32 values at ``pointer``."""
        buffer = self.ffi.buffer(pointer, 4 * shape[0] * shape[1])
        return np.frombuffer(buffer, np.float32).reshape(shape).copy()


def stated(folder: Path, model: Path, mmproj: Path) -> dict[str, Any]:
    """End tokens, and what is known to differ: the least precise type that was rounded to, and the class token."""
    record = json.loads((folder / "llavactl_export.json").read_text(encoding="utf-8"))
    settings = metadata(mmproj)
    rounded = {GELU, _matrix_type(mmproj)} - {"f32"} | {_matrix_type(model)} - {*EXACT[record["precision"]]}
    statement = {"known_differences": record["limitations"], "rounding": min(rounded, key=PRECISION.index)}
    statement["own_padding"] = settings["llavactl.vision.image"] == "pad"
    if settings.get("llavactl.vision.class_token") == "last":
        tokens = (settings["clip.vision.image_size"] // settings["clip.vision.patch_size"]) ** 2
        statement["tokens"] = [*range(1, tokens), None]
    ends = [metadata(model).get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {**statement, "eos": [token for token in ends if token is not None]}


def metadata(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file."""
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def as_square(image: Image.Image, settings: dict[str, Any]) -> Image.Image:
    """``image`` as the square of the vision encoder's size as in training; llama.cpp copies its pixels."""
    size, how = settings["clip.vision.image_size"], settings["llavactl.vision.image"]
    width, height = image.size
    if how == "pad":
        side, color = max(image.size), tuple(int(255 * mean) for mean in settings["clip.vision.image_mean"])
        padded = Image.new("RGB", (side, side), color)
        padded.paste(image, ((side - width) // 2, (side - height) // 2))
        image = padded
    if how == "crop":
        shortest = min(image.size)
        width, height = size * width // shortest, size * height // shortest
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), settings["llavactl.vision.resample"])
        return image.crop((left, top, left + size, top + size))
    return image.resize((size, size), settings["llavactl.vision.resample"])


def _matrix_type(file: Path) -> str:
    """The type in the name of ``file``."""
    return file.stem.rpartition("-")[2]


def libraries() -> tuple[Any, Any, Any, str]:
    """The C declarations, the libraries of language models and of projectors, and the program's name and build."""
    try:
        from llama_cpp_py_sync import _cffi_bindings as bindings
    except ImportError:
        _exit_missing(INSTALL)
    ffi = bindings.get_ffi()
    try:
        return ffi, bindings.get_lib(), bindings.get_mtmd_lib(), _program("llama-cpp-py-sync")
    except RuntimeError:
        pass  # it needs a newer glibc
    try:
        from xllamacpp import xllamacpp
    except ImportError:
        _exit_missing(f"{INSTALL}; the library in llama-cpp-py-sync can't be loaded here, that in xllamacpp may be")
    if (version("llama-cpp-py-sync"), version("xllamacpp")) != SAME_INTERFACE:
        _exit_missing(f"{INSTALL}; other versions of llama-cpp-py-sync and xllamacpp may differ in their C interfaces")
    library = ffi.dlopen(xllamacpp.__file__)
    return ffi, library, library, _program("xllamacpp")


def _exit_missing(message: str) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    raise SystemExit(PROGRAM_MISSING)


def _program(package: str) -> str:
    number = version(package)
    return f"llama.cpp b{_build(number)} ({package} {number})"


def _build(number: str) -> int:
    """llama.cpp's build number, the last part of the version ``number`` of these packages."""
    return int(number.rpartition(".")[2])


def refuse_build(program: str, mmproj: Path) -> None:
    """Exits if ``program`` is known to be a build that ``mmproj`` wasn't made for."""
    build = _build(program.removesuffix(")"))
    if metadata(mmproj).get("llavactl.vision.class_token") == "first" and build <= LAST_CLASS_TOKEN:
        _exit_missing(
            f"an export with for_build: cls-first can't be verified in {program}, which puts the class token of CLIP "
            "last; install a build that puts it first, or export for this one with for_build: cls-last"
        )


def _log(ffi: Any) -> Callable[[int, Any, Any], None]:
    """A log function that prints errors only."""

    def log(level: int, text: Any, _data: Any) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            sys.stderr.write(ffi.string(text).decode(errors="replace"))

    return log


def main(folder: Path, prompts: Path, out: Path) -> None:
    """Writes ids, image embeddings, logits and greedy answers of all prompts."""
    document = json.loads(prompts.read_text(encoding="utf-8"))
    ((model,), (mmproj,)) = (sorted(folder.glob(f"{name}-*.gguf")) for name in ("model", "mmproj"))
    llama, settings = LlamaCpp(model, mmproj), metadata(mmproj)
    refuse_build(llama.program, mmproj)
    outputs: dict[str, np.ndarray] = {}
    encoded: set[str] = set()
    for index, prompt in enumerate(document["prompts"]):
        images = [Image.open(name).convert("RGB") for name in prompt["images"]]
        run = llama.run(prompt["text"], [as_square(image, settings) for image in images], document["max_new_tokens"])
        if not encoded.issuperset(prompt["images"]):
            run["unprepared"] = llama.embeddings(images)
            encoded.update(prompt["images"])
        outputs |= {f"{index}.{name}": values for name, values in run.items()}
    statement = {"program": llama.program, **stated(folder, model, mmproj)}
    save_file(outputs, out, metadata={"stated": json.dumps(statement)})


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
