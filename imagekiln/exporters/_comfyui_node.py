"""A node of ComfyUI that says a prompt with the text encoder beside this file. Needs nothing but what ComfyUI needs."""

import json
from pathlib import Path
from typing import Any

import torch


def _sizes(folder: Path) -> dict[str, Any]:
    path = folder / "sizes.json"
    sizes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return sizes


class Prompt:
    """Words as conditioning; what the denoiser's file was filled up to is filled up with zeros here."""

    CATEGORY = "conditioning"
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    folder = Path(__file__).parent
    loaded: Any = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {"multiline": True, "default": ""})}}

    @torch.no_grad()
    def encode(self, text: str) -> tuple[list[Any]]:
        sizes, tokenizer, encoder = self._parts()
        read = tokenizer(
            [text],
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        said = encoder(input_ids=read["input_ids"], output_hidden_states=True)
        words = said.hidden_states[-2] if sizes["before_last"] else said.last_hidden_state
        more: dict[str, Any] = {}
        if sizes["whole"]:
            more["pooled_output"] = _filled(said.text_embeds, sizes["whole"])
        return ([[_filled(words, sizes["words"]), more]],)

    @classmethod
    def _parts(cls) -> Any:
        if cls.loaded is None:
            import transformers

            cls.loaded = (
                _sizes(cls.folder),
                transformers.CLIPTokenizer.from_pretrained(cls.folder / "tokenizer"),
                transformers.CLIPTextModelWithProjection.from_pretrained(cls.folder / "text_encoder").eval(),
            )
        return cls.loaded


def _filled(numbers: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(numbers, (0, width - numbers.shape[-1]))


NODE_CLASS_MAPPINGS = {_sizes(Prompt.folder).get("node", "Prompt"): Prompt}
