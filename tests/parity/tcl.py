"""Runners for the fixtures of TCL: official tensors in, ours compared with the official ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor

from lexiseg.encoders.clip import build_clip, value_path_block, vit_tokens
from lexiseg.foreign import ForeignCheckpoint
from lexiseg.layers.pamr import DILATIONS, local_std, pamr, pamr_affinity
from lexiseg.methods.tcl.checkpoint import import_checkpoint, our_name
from lexiseg.methods.tcl.decoder import ChannelNorm, GatedDecoder
from lexiseg.methods.tcl.inference import masks_of_pictures, pad_to_patches
from lexiseg.methods.tcl.loss import area, feature_level, image_level, pooled, total_variation
from lexiseg.methods.tcl.masks import SimToMask, hard_mask, pixel_text_cosines, unit
from lexiseg.methods.tcl.model import TCL
from lexiseg.methods.tcl.module import losses
from lexiseg.methods.tcl.settings import LossSettings
from parity.fixtures import close, part


def run_pamr(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_pamr: refined masks, and the statistics behind them, per setting."""
    tolerance, image = description["tolerance"], tensors["image"]
    for tag, config in description["config"].items():
        # "samesize" is described in words: the default settings, the mask at the size of the picture.
        given = config if isinstance(config, dict) else {"num_iter": 10, "dilations": DILATIONS}
        mask, dilations = tensors.get(f"{tag}.mask", tensors["mask"]), given["dilations"]
        close(pamr(image, mask, iterations=given["num_iter"], dilations=dilations), tensors[f"{tag}.out"], tolerance)
        if f"{tag}.std" in tensors:
            close(local_std(image, dilations=dilations), tensors[f"{tag}.std"], tolerance)
        affinity = pamr_affinity(image, dilations=dilations)
        if f"{tag}.affinity" in tensors:
            close(affinity, tensors[f"{tag}.affinity"], tolerance)
        if f"{tag}.affinity_sub" in tensors:
            close(affinity[:1, :, ::4, ::4], tensors[f"{tag}.affinity_sub"], tolerance)


def decoder_of(state: Mapping[str, Tensor], *, width: int, stages: int, units: int, kernel: int) -> GatedDecoder:
    """Our decoder with the tensors of an official one."""
    decoder = GatedDecoder(width, stages=stages, units=units, kernel=kernel)
    ours = {}
    for name, value in state.items():
        _, stage, official, *rest = name.split(".")
        ours[
            f"stages.{stage}.{('conv', 'conv2').index(official)}.{'gate' if rest[0] == 'gate' else '.'.join(rest)}"
        ] = value
    decoder.load_state_dict(ours)
    return decoder


@torch.inference_mode()
def run_decoder(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_decoder: the variants, and one that was just made."""
    tolerance = description["tolerance"]
    fresh = tensors["zero_gate.in"]
    close(GatedDecoder(fresh.shape[1])(fresh), tensors["zero_gate.out"], tolerance)
    for tag, config in description["config"].items():
        if tag == "common":
            continue
        sizes = {"width": config["C"], "stages": config["n_layers"], "kernel": config["kernel_size"]}
        decoder = decoder_of(part(tensors, f"{tag}.state."), units=2 if config["double"] else 1, **sizes)
        close(decoder(tensors[f"{tag}.in"]), tensors[f"{tag}.out"], tolerance)


def run_losses(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_losses: values and gradients."""
    tolerance, config = description["tolerance"], description["config"]

    def leaf(name: str) -> Tensor:
        return tensors[name].clone().requires_grad_()

    image, scale = leaf("infonce.image_emb"), leaf("infonce.logit_scale")
    loss = image_level(image, tensors["infonce.text_emb"], scale)
    loss.backward()
    close(loss.detach(), tensors["infonce.loss"], tolerance)
    close(image.grad, tensors["infonce.grad_image_emb"], tolerance)  # type: ignore[arg-type]
    close(scale.grad, tensors["infonce.grad_logit_scale"], tolerance)  # type: ignore[arg-type]
    clamped = image_level(image, tensors["infonce.text_emb"], tensors["infonce_clamped.logit_scale"])
    close(clamped.detach(), tensors["infonce_clamped.loss"], tolerance)

    embedding, mask, scale = leaf("tclf.spatial_emb"), leaf("tclf.mask"), leaf("tclf.logit_scale")
    close(pooled(mask, embedding).detach(), tensors["tclf.pooled"], tolerance)
    loss = feature_level(mask, embedding, tensors["tclf.text_emb"], scale)
    loss.backward()
    close(loss.detach(), tensors["tclf.loss"], tolerance)
    close(embedding.grad, tensors["tclf.grad_spatial_emb"], tolerance)  # type: ignore[arg-type]
    close(mask.grad, tensors["tclf.grad_mask"], tolerance)  # type: ignore[arg-type]
    close(scale.grad, tensors["tclf.grad_logit_scale"], tolerance)  # type: ignore[arg-type]

    priors = {"positive": config["area_prior_pos"], "negative": config["area_prior_neg"]}
    for value, name in zip(area(tensors["area.mask_all"], **priors), ("area.pos", "area.neg"), strict=True):
        close(value, tensors[name], tolerance)
    close(total_variation(tensors["tclf.mask"]), tensors["tv.mask"], tolerance)
    close(total_variation(tensors["tclf.spatial_emb"]), tensors["tv.image_emb"], tolerance)


def run_sim2mask(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_sim2mask: soft and hard masks with their gradients, and other temperatures."""
    tolerance, config = description["tolerance"], description["config"]
    to_mask = SimToMask(scale=config["init_w"], bias=config["init_b"])
    cosines = tensors["sim"].clone().requires_grad_()
    logits = to_mask(cosines)
    hard = hard_mask(logits, tensors["uniform_noise"], temperature=config["gumbel_tau"])
    for what, mask in (("soft", logits.sigmoid()), ("hard", hard)):
        close(mask.detach(), tensors[what], tolerance)
        found = torch.autograd.grad(
            (mask * tensors["probe"]).sum(), (cosines, to_mask.scale, to_mask.bias), retain_graph=True
        )
        for gradient, name in zip(found, ("sim", "w", "b"), strict=True):
            close(gradient, tensors[f"grad_{what}.{name}"], tolerance)
    close(hard_mask(logits, None).detach(), tensors["hard_deterministic"], tolerance)
    for name in tensors:
        if name.startswith("gumbel_soft_tau") and not name.endswith("uniform_noise"):
            temperature, noise = float(name.removeprefix("gumbel_soft_tau")), tensors[f"{name}.uniform_noise"]
            # The hard mask's gradient is that of this soft one, so the soft one's own slope shows it.
            (slope,) = torch.autograd.grad(
                hard_mask(logits, noise, temperature=temperature).sum(), logits, retain_graph=True
            )
            soft = tensors[name]
            close(slope, soft * (1 - soft) / temperature, tolerance)
            close(hard_mask(logits, noise, temperature=temperature).detach(), (soft > 0.5).float(), tolerance)


@torch.inference_mode()
def run_maskclip_visual(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_maskclip_visual: all tokens of square and oblong pictures, with and without the last block's attention."""
    tolerance, visual = description["tolerance"], visual_of(part(tensors, "state.visual."), description["config"])
    for tag in ("square", "rect"):
        tokens, _, _ = vit_tokens(visual, tensors[f"{tag}.image"], antialias=False)
        for block in visual.transformer.resblocks[:-1]:
            tokens = block(tokens)
        last = visual.transformer.resblocks[-1]
        plain = visual.ln_post(last(tokens)) @ visual.proj
        dense = visual.ln_post(value_path_block(last, tokens)) @ visual.proj
        close(plain, tensors[f"{tag}.dense_plain"], tolerance)
        close(dense, tensors[f"{tag}.dense_maskclip"], tolerance)
        close(plain[:, 0], tensors[f"{tag}.cls"], tolerance)
        if tag == "square":  # the size that the tower was made for
            close(visual(tensors[f"{tag}.image"]), tensors[f"{tag}.cls"], tolerance)


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The clip.json of a fixture's CLIP."""
    vision = {
        "layers": config["vision_layers"],
        "width": config["vision_width"],
        "head_width": config["vision_width"] // config["vision_heads"],
        "patch_size": config["vision_patch_size"],
        "image_size": config["image_resolution"],
    }
    text = {
        "context_length": config["context_length"],
        "vocab_size": config["vocab_size"],
        "width": config["transformer_width"],
        "heads": config["transformer_heads"],
        "layers": config["transformer_layers"],
    }
    model = {"embed_dim": config["embed_dim"], "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    return {"kind": "open_clip", "model": model}


def visual_of(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
    """The image tower of open_clip with the fixture's tensors."""
    visual: Any = build_clip(clip_config(config), source="the fixture").visual
    visual.load_state_dict(dict(state))
    return visual.eval()


@torch.inference_mode()
def run_epsilons(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_epsilons: values so small that the epsilons decide."""
    tolerance, config = description["tolerance"], description["config"]
    for size in ("tiny", "small"):
        image, text = tensors[f"infonce_{size}.image_emb"], tensors[f"infonce_{size}.text_emb"]
        close(unit(image), tensors[f"cosine_{size}"], tolerance)
        close(image_level(image, text, torch.tensor(-math.log(0.07))), tensors[f"infonce_{size}.loss"], tolerance)
        close(pooled(tensors[f"pool_{size}.mask"], tensors["pool.spatial_emb"]), tensors[f"pool_{size}.out"], tolerance)
        norm = ChannelNorm(len(tensors["ln2d.weight"]), eps=config["ln_eps"])
        norm.load_state_dict({"weight": tensors["ln2d.weight"], "bias": tensors["ln2d.bias"]})
        close(norm(tensors[f"ln2d_{size}.in"]), tensors[f"ln2d_{size}.out"], tolerance)
    given = config["pamr_flat"]
    refined = pamr(
        tensors["pamr_flat.image"],
        tensors["pamr_flat.mask"],
        iterations=given["num_iter"],
        dilations=given["dilations"],
    )
    close(refined, tensors["pamr_flat.out"], tolerance)


# ---- the whole model, through the importer that users have -------------------------------------------------------


def model_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[TCL, Any]:
    """Our network, and the CLIP it stands on, of a fixture's state dict."""
    state = part(tensors, "state.")
    imported = import_checkpoint(ForeignCheckpoint(file="fixture.pth", sha256="", tensors=state), {})
    assert imported.unexpected == ()
    assert imported.clip is not None
    clip: Any = build_clip(clip_config(config["clip"]), source="the fixture")
    clip.load_state_dict({name: value.float() for name, value in imported.clip.items()})
    settings = imported.config["model"]
    model = TCL(clip.visual, **{key: settings[key] for key in ("stages", "units", "kernel")})
    assert model.load_state_dict(dict(imported.tensors), strict=False).unexpected_keys == []
    return model, clip


def losses_of(model: TCL, clip: Any, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weighted losses by their official names."""
    settings = LossSettings(
        image=config["tcl_w"],
        feature=config["tcl_w"],
        area=config["area_w"],
        positive_prior=0.4,
        negative_prior=0.0,
        smooth=config["tv_w"],
        mask_temperature=config["sim2mask"]["tau"],
    )
    with torch.no_grad():
        text = clip.encode_text(tensors["text_tokens"])
    own = torch.arange(len(text))
    noise = tensors["uniform_noise"][own, own, None]
    found = losses(model, tensors["image"], text, noise=noise, rank=0, settings=settings)
    return {official: found[ours] for official, ours in OFFICIAL_LOSSES.items()}


OFFICIAL_LOSSES = {
    "tcli_loss": "image",
    "tclf_loss": "feature",
    "area_loss": "area_positive",
    "neg_area_loss": "area_negative",
    "tv_img_loss": "smooth_embedding",
    "tv_mask_loss": "smooth_masks",
}


def run_forward(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_model_forward: what the frozen CLIP gives, the masks, and every loss."""
    tolerance, config = description["tolerance"], description["config"]
    model, clip = model_of(tensors, config)
    images, count = tensors["image"], len(tensors["image"])
    found = losses_of(model, clip, tensors, config)
    for name, value in found.items():
        close(value.detach(), tensors[f"ret.{name}"], tolerance)
    close(torch.stack(list(found.values())).sum().detach(), tensors["total_loss"], tolerance)
    with torch.inference_mode():
        text = clip.encode_text(tensors["text_tokens"])
        close(text, tensors["text_emb"], tolerance)
        close(clip.visual(images), tensors["clip_global_emb"], tolerance)
        tokens, grid = model.tokens(images)
        close(tokens.transpose(0, 1), tensors["image_feat_LND"], tolerance)
        last = value_path_block(model.visual.transformer.resblocks[-1], tokens)[:, 1:]
        close(last.transpose(1, 2).unflatten(2, grid), tensors["clip_dense_prehead"], tolerance)
        embedding = model.embed(images)
        close(embedding, tensors["masker.image_emb"], tolerance)
        logits = model.grounder.mask_logits(embedding, text)
        soft, own = logits.sigmoid(), torch.eye(count, dtype=torch.bool)
        close(soft, tensors["masker.soft_all"], tolerance)
        close(hard_mask(logits, None)[own][:, None], tensors["masker.pos_deterministic"], tolerance)
        close(soft[own][:, None], tensors["ret.mask"], tolerance)
        close(soft[~own].reshape(count, count - 1, *soft.shape[2:]), tensors["ret.neg_mask"], tolerance)


def run_gradients(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_model_grads: of the total loss, for all that the second phase trains."""
    model, clip = model_of(tensors, description["config"])
    torch.stack(list(losses_of(model, clip, tensors, description["config"]).values())).sum().backward()
    expected = part(tensors, "grad.")
    ours = {our_name(name): value for name, value in expected.items()}
    assert None not in ours
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == ours.keys()
    for name, value in ours.items():
        gradient = trained[str(name)]
        assert gradient is not None, name
        close(gradient, value, description["tolerance"])


@torch.inference_mode()
def run_inference(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_inference: masks with and without PAMR and knowledge branch, of sides that fit the patches and do not."""
    tolerance = description["tolerance"]
    model, clip = model_of(tensors, description["config"])
    texts = tensors["text_tokens"]
    embedded = clip.encode_text(texts.flatten(0, 1)).unflatten(0, texts.shape[:2])
    text = torch.nn.functional.normalize(embedded.mean(dim=1), dim=1)
    close(text, tensors["text_embedding"], tolerance)
    for tag in ("aligned", "padded"):
        image = tensors[f"{tag}.image"]
        padded, _ = pad_to_patches(image, model.visual.patch_size)
        cosines = pixel_text_cosines(model.embed(padded), tensors["text_embedding"])
        close(cosines, tensors[f"{tag}.simmap"], tolerance)
        for iterations in (0, 1):
            for weight in (0.0, 0.3):
                found = masks_of_pictures(
                    model,
                    image,
                    tensors["text_embedding"],
                    iterations=iterations * description["config"]["pamr"]["num_iter"],
                    knowledge_weight=weight,
                )
                close(found, tensors[f"{tag}.mask_pamr{iterations}_kp{weight}"], tolerance)


def run_tokenizer(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """tcl_tokenizer: captions as the official code cuts them."""
    assert torch.equal(open_clip.SimpleTokenizer(context_length=77)(description["strings"]), tensors["tokens"])


# Fixtures without weights of their own -> the one whose network they are of.
NEEDS = {r"tcl_(model_grads|inference)(.*)": r"tcl_model_forward\2"}
RUNNERS = {
    r"tcl_model_forward.*": run_forward,
    r"tcl_model_grads.*": run_gradients,
    r"tcl_inference.*": run_inference,
    r"tcl_tokenizer.*": run_tokenizer,
    r"tcl_pamr.*": run_pamr,
    r"tcl_decoder.*": run_decoder,
    r"tcl_losses.*": run_losses,
    r"tcl_sim2mask.*": run_sim2mask,
    r"tcl_maskclip_visual.*": run_maskclip_visual,
    r"tcl_epsilons.*": run_epsilons,
}
