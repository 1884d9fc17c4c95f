"""The graph that ComfyUI opens for what a pretrained model learned: a model, what is added to it, words, a picture.

Its sampler and its steps are those of the recipe. Levels of noise: "karras" has those of `diffusion.samplers.sigmas`,
"normal" those of `diffusion.samplers.flow_sigmas`; where training ended in noise alone, "sgm_uniform" begins there.

Stable Diffusion 3 learned with `T5_TOKENS` tokens behind those of CLIP: what T5 says, or zeros. ComfyUI has as few as
77 of T5, and none without it. A node sets how many T5 is given; zeros come 77 at a time, so there are 231 and not 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagekiln.engine import bases
from imagekiln.exporters import _folder
from imagekiln.nets.adapters import Adapters, NewWord
from imagekiln.nets.pretrained import T5_TOKENS

FILE = "workflow.json"
CLIP_TOKENS = 77
"""Tokens that a node for words gives at a time."""

ANSWERS = {"eps": "eps", "v": "v_prediction", "x": "x0"}
"""What `ModelSamplingDiscrete` calls what a network answers."""


def write(family: Any, prompts: Sequence[str], path: Path, out: Path) -> str:
    """Write the graph for a file to `out`; how to use it, in Markdown."""
    _folder.write_json(out / FILE, graph(family, next(iter(prompts), ""), path))
    use = f"Copy `models/` into ComfyUI's folder and drop `{FILE}` on its window."
    if isinstance(family.tuned, Adapters | NewWord):
        use += " Choose the model it was learned from in *Load Checkpoint*."
    return use


def limits(base: Any) -> list[str]:
    """What the graph does not do as training did, and what others do not do without it; sentences."""
    if base.kind != "sd3":
        return []
    if len(base.encoders) > 2:
        return [
            f"It learned with {T5_TOKENS} tokens of T5, which the node *T5TokenizerOptions* of the workflow sets; "
            "without it ComfyUI takes fewer and draws something else."
        ]
    zeros = T5_TOKENS // CLIP_TOKENS * CLIP_TOKENS
    return [
        f"It learned with {T5_TOKENS} zeros behind the words, and ComfyUI's nodes can set {zeros} there, as the "
        "workflow does: its pictures are not quite those compared here. Without these nodes they differ more."
    ]


def graph(family: Any, prompt: str, path: Path) -> dict[str, Any]:
    """In the form of ComfyUI's API, which its window also opens: nodes by number, links as [node, output]."""
    nodes: dict[str, Any] = {}

    def node(kind: str, **given: Any) -> str:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": given}
        return str(len(nodes))

    sample, base, tuned = family.config.sample, family.base, family.tuned
    added = isinstance(tuned, Adapters | NewWord)
    known = f"{bases.called(base.folder)[0].split('/')[-1]}.safetensors" if added else path.name
    loaded = node("CheckpointLoaderSimple", ckpt_name=known)
    model, clip, vae = [loaded, 0], [loaded, 1], [loaded, 2]
    if isinstance(tuned, Adapters):
        strengths = {"strength_model": 1.0, "strength_clip": 1.0}
        changed = node("LoraLoader", model=model, clip=clip, lora_name=path.name, **strengths)
        model, clip = [changed, 0], [changed, 1]
    if isinstance(tuned, NewWord):
        prompt = prompt.replace(tuned.token, f"embedding:{path.stem}")
    betas, sampled = base.noise.betas, {"sampler_name": sample.sampler, "scheduler": "karras"}
    ending = betas is not None and float(betas[-1]) == 1
    if betas is None:
        model = [node("ModelSamplingSD3", model=model, shift=base.noise.shift), 0]
        sampled["scheduler"] = "normal"
    elif base.noise.target != "eps" or ending:
        model = [node("ModelSamplingDiscrete", model=model, sampling=ANSWERS[base.noise.target], zsnr=ending), 0]
        sampled["scheduler"] = "sgm_uniform" if ending else "karras"
    if base.kind == "sd3" and len(base.encoders) > 2:
        clip = [node("T5TokenizerOptions", clip=clip, min_padding=0, min_length=T5_TOKENS), 0]
    positive = [node("CLIPTextEncode", text=prompt, clip=clip), 0]
    negative = [node("CLIPTextEncode", text=sample.negative_prompt, clip=clip), 0]
    if base.silent_when_empty and not sample.negative_prompt:  # it learned zeros for the empty text
        negative = [node("ConditioningZeroOut", conditioning=negative), 0]
    if base.kind == "sd3" and len(base.encoders) < 3:
        zeros = behind = [node("ConditioningZeroOut", conditioning=negative), 0]
        for _ in range(T5_TOKENS // CLIP_TOKENS - 1):
            behind = [node("ConditioningConcat", conditioning_to=behind, conditioning_from=zeros), 0]
        positive, negative = (
            [node("ConditioningConcat", conditioning_to=words, conditioning_from=behind), 0]
            for words in (positive, negative)
        )
    _, rows, columns = family.picture_shape
    empty = "EmptyLatentImage" if betas is not None else "EmptySD3LatentImage"
    start = [node(empty, width=columns, height=rows, batch_size=1), 0]
    drawing = {"seed": 0, "steps": sample.steps, "cfg": sample.guidance, "denoise": 1.0} | sampled
    words = {"positive": positive, "negative": negative}
    latents = [node("KSampler", model=model, latent_image=start, **words, **drawing), 0]
    images = [node("VAEDecode", samples=latents, vae=vae), 0]
    node("SaveImage", images=images, filename_prefix=path.stem)
    return nodes
