"""Pretrained Stable Diffusion 1, 2, XL and 3 from folders in the layout of diffusers: networks, words, noise.

    1, 2  U-Net; words are the last state of one CLIP text encoder
    XL    U-Net, told sizes too; words are the states before the last layer of two encoders side by side, and the whole
          text is what the second one makes of it (Podell et al. 2023, arXiv:2307.01952)
    3     transformer; words are those of two encoders side by side, filled up with zeros, and behind them those of T5,
          or zeros where it is absent; the whole text is that of both (Esser et al. 2024, arXiv:2403.03206)

Only safetensors and JSON are read, never pickles or code, and nothing is fetched. The networks stay as they are: what
is learned is added from outside (`imagekiln.nets.adapters`), by hooks that ask `Pretrained.added`.

Shapes: B texts or pictures, L tokens a text, W numbers a token, P numbers a text.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from imagekiln.core import sent
from imagekiln.errors import RecipeError
from imagekiln.nets.clip_text import BYTES, MARKS, Encoded, TextEncoder
from imagekiln.nets.conditioned import hasten
from imagekiln.nets.libraries import diffusers, quietly, transformers

T5_TOKENS = 256
"""Tokens of the third encoder, as the stock pipeline has them, also where it is absent."""

REMEMBERED_BYTES = 1 << 30
"""Main memory for encodings of texts, where encoders do not change: of 4,500 texts for Stable Diffusion 1, of 1,700 for
XL and for 3 without T5, of 196 with it."""

RANDOM = "random:"
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
}
"""Classes of diffusers, by layout."""

_ENCODERS = {"CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"}
_TOKENIZERS = {"CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"}


class Words(NamedTuple):
    """What encoders say of texts: states_BLW of every token, whole_BP of the text; None where no network asks."""

    states_BLW: Tensor
    whole_BP: Tensor | None = None


Said = TypeVar("Said", Words, Encoded)


class Memory:
    """What encoders that do not change say of texts, asked once while there is room in main memory.

    What came first stays: of texts that come round in turn, those that stay are found more often than those that the
    next ones replace.
    """

    def __init__(self) -> None:
        self.kept: dict[bytes, Any] = {}
        self.num_bytes = 0

    @torch.no_grad()
    def said(self, tokens_BL: Tensor, encode: Callable[[Tensor], Said]) -> Said:
        """What `encode` makes of tokens, on their device.

        Every text is encoded alone: what is remembered must not depend on its first neighbours.
        """
        keys = [row.numpy().tobytes() for row in tokens_BL.cpu()]
        found: dict[bytes, Said] = {}
        for place, key in enumerate(keys):
            if key not in found:
                found[key] = self.kept.get(key) or self._first(key, encode(tokens_BL[place : place + 1]))
        columns = zip(*(found[key] for key in keys), strict=True)
        parts = [None if column[0] is None else sent(torch.cat(column), tokens_BL.device) for column in columns]
        return type(found[keys[0]])._make(parts)

    def _first(self, key: bytes, said: Said) -> Said:
        kept = type(said)._make(None if part is None else part.cpu() for part in said)
        size = sum(part.nbytes for part in kept if part is not None)
        if self.num_bytes + size <= REMEMBERED_BYTES:
            self.kept[key] = kept
            self.num_bytes += size
        return kept


Target = Literal["v", "x", "eps"]


class Noise(NamedTuple):
    """The noise a network was trained with: betas of its steps, None for a flow; what it answers; a flow's shift."""

    betas: Tensor | None
    target: Target
    shift: float = 1.0


class Pretrained:
    """A pretrained model: `denoiser`, `encoders` with their `tokenizers`, `noise`; frozen, shared by copies.

    folder: as `save_pretrained` of diffusers' pipelines writes it; "random:sd1", "random:sdxl" and "random:sd3" are
    tiny networks of these layouts with random weights, to try things out with. channels: of random ones.

    Raises `RecipeError` where the folder is something else, and `UsageError` without diffusers and transformers.

    >>> model = Pretrained("random:sdxl", channels=4)
    >>> model.words(model.read(["a cat"])).states_BLW.shape
    torch.Size([1, 16, 64])
    """

    def __init__(self, folder: str, channels: int = 4) -> None:
        self.folder = folder
        parts = _random(folder, channels) if folder.startswith(RANDOM) else _opened(folder)
        self.kind: str = parts["kind"]
        self.noise: Noise = parts["noise"]
        self.silent_when_empty: bool = parts["silent_when_empty"]
        self.denoiser: Any = parts["denoiser"].eval().requires_grad_(False)
        hasten(self.denoiser)
        self.encoders: list[Any] = [encoder.eval().requires_grad_(False) for encoder in parts["encoders"]]
        self.tokenizers: list[Any] = parts["tokenizers"]
        self.added: Mapping[str, Any] = {}
        """What hooks add to layers, by the layer's key; set before a network is used."""
        self.memory = Memory()
        self._empty = self.read([""])[0]

    def __deepcopy__(self, memo: Any) -> Pretrained:
        return self  # it does not change

    @property
    def channels(self) -> int:
        """Channels of the latents it draws."""
        return int(self.denoiser.config.in_channels)

    def networks(self) -> dict[str, Any]:
        """The networks by name: "denoiser", "text", "text_2", "text_3"."""
        names = [f"text_{place + 1}" if place else "text" for place in range(len(self.encoders))]
        return {"denoiser": self.denoiser, **dict(zip(names, self.encoders, strict=True))}

    def move(self, device: torch.device) -> None:
        """To a device, if it is not there."""
        if next(self.denoiser.parameters()).device != device or next(self.encoders[0].parameters()).device != device:
            for network in self.networks().values():
                network.to(device)

    # -- words --------------------------------------------------------------------------------------------------------

    def read(self, captions: Sequence[str]) -> Tensor:
        """tokens_BL int64 on the CPU: those of every encoder in turn."""
        parts = []
        for tokenizer, length in zip(self.tokenizers, self._lengths(), strict=True):
            told = [several(tokenizer, caption) for caption in captions]
            read = tokenizer(told, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            parts.append(read["input_ids"])
        return torch.cat(parts, 1)

    def cuts(self, caption: str) -> bool:
        """Whether `read` leaves out the end of this caption for one of the encoders."""
        each = zip(self.tokenizers, self._lengths(), strict=True)
        return any(len(one(several(one, caption), verbose=False)["input_ids"]) > length for one, length in each)

    def words(self, tokens_BL: Tensor, encoders: Sequence[Any] = (), learning: bool = False) -> Words:
        """What the encoders say of tokens as `read` makes them.

        encoders: used in the place of its own. learning: they change, so that nothing is remembered.
        """
        networks = list(encoders) or self.encoders
        if learning:
            return self._filled(self._encoded(tokens_BL, networks))
        return self._filled(self.memory.said(tokens_BL, lambda tokens_1L: self._encoded(tokens_1L, networks)))

    def _encoded(self, tokens_BL: Tensor, networks: Sequence[Any]) -> Words:
        self.move(tokens_BL.device)
        parts = tokens_BL.split(self._lengths(), 1)
        if self.kind == "sd1":
            return Words(networks[0](parts[0]).last_hidden_state)
        said = [network(ids, output_hidden_states=True) for network, ids in zip(networks[:2], parts, strict=False)]
        states = torch.cat([one.hidden_states[-2] for one in said], -1)
        if self.kind == "sdxl":
            return self._silenced(tokens_BL, Words(states, said[1].text_embeds))
        if len(networks) > 2:
            third = networks[2](parts[2]).last_hidden_state
            states = torch.cat([nn.functional.pad(states, (0, third.shape[-1] - states.shape[-1])), third], 1)
        return Words(states, torch.cat([one.text_embeds for one in said], -1))

    def _filled(self, words: Words) -> Words:
        """Zeros in the place of the third encoder of Stable Diffusion 3, where it is absent."""
        if self.kind != "sd3" or len(self.encoders) > 2:
            return words
        wider = self.denoiser.config.joint_attention_dim - words.states_BLW.shape[-1]
        return words._replace(states_BLW=nn.functional.pad(words.states_BLW, (0, wider, 0, T5_TOKENS)))

    def _silenced(self, tokens_BL: Tensor, words: Words) -> Words:
        """Zeros for the empty text, where the model was trained so."""
        if not self.silent_when_empty or words.whole_BP is None:
            return words
        spoken_B1 = (tokens_BL != self._empty.to(tokens_BL.device)).any(1, keepdim=True)
        return Words(words.states_BLW * spoken_B1[:, :, None], words.whole_BP * spoken_B1)

    def _lengths(self) -> list[int]:
        return [T5_TOKENS if place == 2 else int(t.model_max_length) for place, t in enumerate(self.tokenizers)]

    # -- pictures -----------------------------------------------------------------------------------------------------

    def fits(self, rows: int, columns: int) -> bool:
        """Whether the denoiser takes latents of so many rows and columns; a transformer has a table of places."""
        config = self.networks()["denoiser"].config
        if self.kind != "sd3":
            return True
        patch = config.patch_size
        return rows % patch == columns % patch == 0 and max(rows, columns) <= patch * config.pos_embed_max_size

    def answer(self, net: Any, z_BCHW: Tensor, time_B: Tensor, words: Words, size: tuple[int, int]) -> Tensor:
        """What a denoiser of this layout answers, of the shape of z.

        time_B: of its own steps. size: rows and columns of the pictures, in pixels.
        """
        self.move(z_BCHW.device)
        if self.kind == "sd3":
            answer: Tensor = net(
                z_BCHW, encoder_hidden_states=words.states_BLW, pooled_projections=words.whole_BP, timestep=time_B
            ).sample
            return answer
        more: dict[str, Any] = {}
        if self.kind == "sdxl":  # the picture's size, where it was cut, and the size that is wanted
            sizes = z_BCHW.new_tensor([*size, 0, 0, *size]).expand(len(z_BCHW), -1)
            more["added_cond_kwargs"] = {"text_embeds": words.whole_BP, "time_ids": sizes}
        told: Tensor = net(z_BCHW, time_B, encoder_hidden_states=words.states_BLW, **more).sample
        return told


def several(tokenizer: Any, caption: str) -> str:
    """A caption in which a word of several new tokens, such as "<cup>", stands as all of them: "<cup> <cup>_1"."""
    for token in tokenizer.get_added_vocab():
        rows = [token]
        while f"{token}_{len(rows)}" in tokenizer.get_added_vocab():
            rows.append(f"{token}_{len(rows)}")
        if len(rows) > 1 and token in caption:
            caption = caption.replace(token, " ".join(rows))
    return caption


def fingerprint(folder: str) -> str:
    """Hash of the files of a pretrained model: it tells models apart, quickly."""
    if folder.startswith(RANDOM):
        return folder
    root = Path(folder).expanduser()
    return hash_of_files(root, [*sorted(root.glob("**/*.json")), *sorted(root.glob("**/*.safetensors"))])


def hash_of_files(root: Path, files: Iterable[Path]) -> str:
    """Hash of names, sizes, beginnings and ends of files below a folder."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)}:{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


# -- files ------------------------------------------------------------------------------------------------------------


def _opened(folder: str) -> dict[str, Any]:
    root = Path(folder).expanduser()
    index = _index(root, folder)
    kind = next(kind for kind, name in PIPELINES.items() if name == index["_class_name"])
    library, models = diffusers(), transformers()
    place = "transformer" if kind == "sd3" else "unet"
    denoiser = getattr(library, "SD3Transformer2DModel" if kind == "sd3" else "UNet2DConditionModel")
    encoders, tokenizers = [], []
    for number in ("", "_2", "_3"):
        encoder, reader = (index.get(f"{part}{number}") or [None, None] for part in ("text_encoder", "tokenizer"))
        if encoder[1] is None or reader[1] is None:
            continue
        if encoder[1] not in _ENCODERS or reader[1] not in _TOKENIZERS:
            raise RecipeError(
                f"family.base = {folder!r}: its text encoder is a {encoder[1]} with a {reader[1]}; expected one of "
                f"{', '.join(sorted(_ENCODERS))}."
            )
        encoders.append(weights(getattr(models, encoder[1]), root / f"text_encoder{number}").float())
        tokenizers.append(
            getattr(models, reader[1]).from_pretrained(root / f"tokenizer{number}", local_files_only=True)
        )
    return {
        "kind": kind,
        "denoiser": _in_memory(weights(denoiser, root / place).float()),
        "encoders": encoders,
        "tokenizers": tokenizers,
        "noise": noise_of(_json(root / "scheduler" / "scheduler_config.json"), kind),
        "silent_when_empty": kind == "sdxl" and index.get("force_zeros_for_empty_prompt", True),
    }


def _index(root: Path, folder: str) -> dict[str, Any]:
    if not folder:
        raise RecipeError("family.base: it is missing. It names the folder of the pretrained model to learn from.")
    if not (root / "model_index.json").is_file():
        what = found_at(root, "no whole model")
        raise RecipeError(
            f"family.base = {folder!r} {what}. Expected a folder with a model_index.json, as diffusers writes it, one "
            ".safetensors file of a whole model, or OWNER/NAME@COMMIT of the hub."
        )
    index = _json(root / "model_index.json")
    if index.get("_class_name") not in PIPELINES.values():
        known = ", ".join(PIPELINES.values())
        raise RecipeError(f"family.base = {folder!r} holds a {index.get('_class_name')}; expected one of {known}.")
    return index


def found_at(root: Path, missed: str) -> str:
    """What stands where a folder with something in it was expected."""
    held = f"holds {missed}" if root.is_dir() else "does not exist"
    return "is one file, and here only folders are read" if root.is_file() else held


def _in_memory(network: Any) -> Any:
    """The network with weights of its own: those that are read from a file's pages as they are needed would stay in
    memory beside what training makes of them."""
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    return network


def weights(kind: Any, folder: Path, setting: str = "family.base", **options: Any) -> Any:
    """What `kind.from_pretrained` makes of a folder.

    setting: that named the folder. Raises `RecipeError` where no safetensors are there, or of another network.
    """
    if not any(folder.glob("*.safetensors")):
        held = "weights as pickles, which can run any code" if any(folder.glob("*.bin")) else "no weights"
        raise RecipeError(
            f"{setting}: {folder} holds {held}. Expected safetensors, as save_pretrained of diffusers writes them."
        )
    try:
        with quietly():
            return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise RecipeError(f"{setting}: {folder} cannot be read as a {kind.__name__} ({error}).") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"family.base: {path} cannot be read ({error}).") from error
    return values


def noise_of(config: Mapping[str, Any], kind: str) -> Noise:
    """The noise of a scheduler's config.

    Raises:
        RecipeError: betas or answers of a kind that is not known here.

    >>> noise_of({"beta_start": 0.1, "beta_end": 0.4, "num_train_timesteps": 2, "beta_schedule": "linear"}, "sd1").betas
    tensor([0.1000, 0.4000], dtype=torch.float64)
    """
    if kind == "sd3":
        return Noise(None, "v", float(config.get("shift", 1.0)))
    targets: dict[str, Target] = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
    asked, schedule = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
    steps = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif schedule == "linear":
        betas = torch.linspace(first, last, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    else:
        raise RecipeError(f"family.base: its scheduler has beta_schedule = {schedule!r}; linear ones are known here.")
    if asked not in targets:
        raise RecipeError(f"family.base: its scheduler has prediction_type = {asked!r}; expected {', '.join(targets)}.")
    return Noise(_ending_in_noise(betas) if config.get("rescale_betas_zero_snr") else betas, targets[asked])


def _ending_in_noise(betas: Tensor) -> Tensor:
    """Betas after whose last step no signal is left, sqrt(abar) shifted and stretched for it: algorithm 1 of Lin et al.
    2024 (arXiv:2305.08891)."""
    signal = (1 - betas).cumprod(0).sqrt()
    first, last = signal[0], signal[-1]
    kept = ((signal - last) * first / (first - last)).square()
    return 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])


# -- random weights ---------------------------------------------------------------------------------------------------


def random_parts(kind: str, channels: int = 4) -> dict[str, Any]:
    """Tiny networks with random weights under the names that diffusers' pipelines give them, the same ones every time.

    kind: "sd1", "sdxl" or "sd3" (without T5). channels: of latents.
    """
    library, models = diffusers(), transformers()
    vocabulary = BYTES + MARKS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = TextEncoder(width=32, layers=2, context=16, vocabulary=vocabulary)
        config = reader.clip.config
        first: Any = models.CLIPTextModel(config) if kind != "sd3" else reader.clip
        parts: dict[str, Any] = {"text_encoder": first, "tokenizer": copy.deepcopy(reader.tokenizer())}
        if kind != "sd1":
            parts["text_encoder_2"] = models.CLIPTextModelWithProjection(config)
            parts["tokenizer_2"] = copy.deepcopy(reader.tokenizer())
        if kind == "sd3":
            parts["transformer"] = library.SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=channels,
                out_channels=channels,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                caption_projection_dim=32,
                joint_attention_dim=64,
                pooled_projection_dim=64,
                pos_embed_max_size=16,
            )
            return parts
        more: dict[str, Any] = {}
        if kind == "sdxl":
            more = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 32,
            }
        parts["unet"] = library.UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32 if kind == "sd1" else 64,
            attention_head_dim=8,
            **more,
        )
    return parts


RANDOM_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def _random(folder: str, channels: int) -> dict[str, Any]:
    kind = folder.removeprefix(RANDOM)
    if kind not in PIPELINES:
        raise RecipeError(f"family.base = {folder!r}: expected random:sd1, random:sdxl or random:sd3.")
    parts = random_parts(kind, channels)
    numbers = ("", "_2") if kind != "sd1" else ("",)
    return {
        "kind": kind,
        "denoiser": parts["transformer" if kind == "sd3" else "unet"],
        "encoders": [parts[f"text_encoder{number}"] for number in numbers],
        "tokenizers": [parts[f"tokenizer{number}"] for number in numbers],
        "noise": noise_of({"shift": 3.0} if kind == "sd3" else RANDOM_BETAS, kind),
        "silent_when_empty": kind == "sdxl",
    }
