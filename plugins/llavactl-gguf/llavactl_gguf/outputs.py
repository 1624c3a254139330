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

PRECISION = ("q8_0", "bf16", "f16", "f32")
"""Types of matrices, from the least precise."""

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

    def __init__(self, model: Path, mmproj: Path, context: int) -> None:
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
        context_settings = self.lib.llama_context_default_params()
        context_settings.n_ctx = context_settings.n_batch = context_settings.n_ubatch = context
        context_settings.type_k = context_settings.type_v = F32
        context_settings.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = self._not_null(self.lib.llama_init_from_model(self.model, context_settings), model)
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
        """Ids, logits, image embeddings and greedy answer of a prompt with ``<image>`` for each image."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        ids: list[int] = []
        logits: list[np.ndarray] = []
        embeddings: list[np.ndarray] = []
        for chunk in self.chunks(text, images):
            if isinstance(chunk, list):
                logits.append(self._decode(len(ids), tokens=chunk))
                ids += chunk
            else:
                logits.append(self._decode(len(ids), embeddings=chunk))
                ids += [IMAGE] * len(chunk)
                embeddings.append(chunk)
        outputs = {"ids": np.array(ids), "logits": np.concatenate(logits)}
        if embeddings:
            outputs["embeddings"] = np.stack(embeddings)
        answer: list[int] = []
        last = outputs["logits"][-1]
        while len(answer) < max_new_tokens:
            answer.append(int(last.argmax()))
            if self.lib.llama_vocab_is_eog(self.vocabulary, answer[-1]):
                break
            (last,) = self._decode(len(ids) + len(answer) - 1, tokens=answer[-1:])
        return {**outputs, "said": np.array(answer)}

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

    def _decode(
        self, position: int, *, tokens: list[int] | None = None, embeddings: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits [T, V] after appending tokens or embeddings [T, D] to the cache, which holds ``position`` tokens."""
        given = tokens if tokens is not None else embeddings
        assert given is not None
        batch = self.lib.llama_batch_init(len(given), 0 if embeddings is None else embeddings.shape[1], 1)
        batch.n_tokens = len(given)
        for at in range(len(given)):
            if tokens is not None:
                batch.token[at] = tokens[at]
            batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = position + at, 1, 0, 1
        if embeddings is not None:
            self.ffi.memmove(batch.embd, embeddings.tobytes(), embeddings.nbytes)
        if status := self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"llama.cpp can't decode a prompt (status {status})")
        self.lib.llama_batch_free(batch)
        return self._array(self.lib.llama_get_logits(self.context), (len(given), self.tokens))

    def _array(self, pointer: Any, shape: tuple[int, int]) -> np.ndarray:
        """A copy of ``shape`` float32 values at ``pointer``."""
        buffer = self.ffi.buffer(pointer, 4 * shape[0] * shape[1])
        return np.frombuffer(buffer, np.float32).reshape(shape).copy()


def stated(folder: Path, model: Path, mmproj: Path) -> dict[str, Any]:
    """End tokens, and what is known to differ: the least precise type that was rounded to, and the class token."""
    record = json.loads((folder / "llavactl_export.json").read_text(encoding="utf-8"))
    settings = metadata(mmproj)
    # llama.cpp computes GELU in float16, also with weights in float32.
    rounded = {"f16", _matrix_type(mmproj)} - {"f32"} | {_matrix_type(model)} - {*EXACT[record["precision"]]}
    statement: dict[str, Any] = {"known_differences": [], "rounding": min(rounded, key=PRECISION.index)}
    if settings.get("llavactl.vision.class_token") == "last":
        tokens = (settings["clip.vision.image_size"] // settings["clip.vision.patch_size"]) ** 2
        statement["known_differences"] = [
            "The first patch of an image is left out, and the class token is its last token."
        ]
        statement["tokens"] = [*range(1, tokens), None]
    ends = [metadata(model).get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {**statement, "eos": [token for token in ends if token is not None]}


def metadata(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file."""
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def as_square(image: Image.Image, settings: dict[str, Any]) -> Image.Image:
    """``image`` as the square that the vision encoder was trained with; llama.cpp resizes it as in training."""
    size, how = settings["clip.vision.image_size"], settings["llavactl.vision.image"]
    width, height = image.size
    if how == "pad":
        side, color = max(image.size), tuple(int(255 * mean) for mean in settings["clip.vision.image_mean"])
        padded = Image.new("RGB", (side, side), color)
        padded.paste(image, ((side - width) // 2, (side - height) // 2))
        return padded
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
    """The last part of the version of these packages is llama.cpp's build number."""
    number = version(package)
    return f"llama.cpp b{number.rpartition('.')[2]} ({package} {number})"


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
    llama, settings = LlamaCpp(model, mmproj, 4096), metadata(mmproj)
    outputs: dict[str, np.ndarray] = {}
    for index, prompt in enumerate(document["prompts"]):
        images = [as_square(Image.open(name).convert("RGB"), settings) for name in prompt["images"]]
        run = llama.run(prompt["text"], images, document["max_new_tokens"])
        outputs |= {f"{index}.{name}": values for name, values in run.items()}
    statement = {"program": llama.program, **stated(folder, model, mmproj)}
    save_file(outputs, out, metadata={"stated": json.dumps(statement)})


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
