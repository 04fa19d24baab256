from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    BitImageProcessorPil,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTMAEConfig,
    ViTModel,
)

from medllava.conversation import Turn
from medllava.errors import CheckpointError, ConfigError
from medllava.jsonl import write_json
from medllava.model import checkpoint, tiny
from medllava.model.__main__ import main
from medllava.model.answerer import Answerer
from medllava.model.pixels import tokens_per_image
from medllava.model.tower import blocks
from medllava.train.forward import vision_features

CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["Where is the gland? In the upper left."]


def clip_folder(folder: Path) -> Path:
    tokenizer = tiny.build_tokenizer(TEXTS, tiny.TokenizerSizes(vocab_size=300))
    vision = tiny.VisionSizes(hidden_size=32, intermediate_size=64, heads=2, layers=2)
    model: CLIPModel = tiny.build_clip(vision, tokenizer, projection_dim=16, text_layers=1, text_positions=16)
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=96).save_pretrained(folder)
    return folder


def siglip_folder(folder: Path) -> Path:
    text = SIZE | {"vocab_size": 50, "max_position_embeddings": 16}
    config = SiglipConfig(text_config=text, vision_config=SIZE | {"image_size": 90, "patch_size": 14})
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 90, "width": 90}).save_pretrained(folder)
    return folder


def encoder_folder(folder: Path, name: str) -> Path:
    """An encoder of another family, with the processor it is published with: pictures of 56 or 64 pixels."""
    dino = {key: value for key, value in SIZE.items() if key != "intermediate_size"} | {"image_size": 70}
    config = {
        "dinov2": lambda: Dinov2Config(**dino, patch_size=14),
        "registers": lambda: Dinov2WithRegistersConfig(**dino, patch_size=14, num_register_tokens=4),
        "dinov3": lambda: DINOv3ViTConfig(**SIZE, image_size=64, patch_size=16, num_register_tokens=4),
        "vit": lambda: ViTConfig(**SIZE, image_size=64, patch_size=16),
        "mae": lambda: ViTMAEConfig(**SIZE, image_size=64, patch_size=16),
    }[name]()
    # Phikon, a ViT, is published without the pooling layer.
    model = ViTModel(config, add_pooling_layer=False) if name == "vit" else AutoModel.from_config(config)
    model.save_pretrained(folder)
    side = 64 if config.patch_size == 16 else 56
    if name == "dinov3":  # its processor's class needs torchvision
        square = {"size": {"height": side, "width": side}, "image_mean": [0.4] * 3, "image_std": [0.2] * 3}
        kind = {"image_processor_type": "DINOv3ViTImageProcessorFast", "resample": 2}
        write_json(folder / "preprocessor_config.json", square | kind)
    else:
        crop = {"height": side, "width": side}
        BitImageProcessorPil(size={"shortest_edge": side + 8}, crop_size=crop).save_pretrained(folder)
    return folder


def qwen_folder(folder: Path, *, tied: bool, rows: int = 600) -> Path:
    """A Qwen3 whose embedding has more rows than its tokenizer has tokens, as the published ones have."""
    tokenizer = tiny.build_tokenizer(TEXTS, tiny.TokenizerSizes(vocab_size=300))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template = "<|im_end|>", None, CHATML
    config = Qwen3Config(
        **SIZE, num_key_value_heads=1, head_dim=16, vocab_size=rows, tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama_folder(folder: Path) -> Path:
    tokenizer = tiny.build_tokenizer(TEXTS, tiny.TokenizerSizes(vocab_size=300))
    # Without the token for pictures, as a language model that has never seen one: the vocabulary has to grow.
    rows = len(tokenizer)
    LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=rows, eos_token_id=3, pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def assembled(tower: Path, language: Path, out: Path, *rest: str) -> Any:
    command = ["assemble", "--vision-tower", str(tower), "--language", str(language), *rest, str(out)]
    assert main(command) == 0
    return checkpoint.load(out, device="cpu")


@pytest.mark.parametrize(("tower", "patches"), [(clip_folder, 16), (siglip_folder, 36)])
@pytest.mark.parametrize("tied", [True, False])
def test_both_parts_keep_their_weights_and_it_answers(
    tower: Callable[[Path], Path], patches: int, tied: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    eyes, words = tower(tmp_path / "tower"), qwen_folder(tmp_path / "words", tied=tied)
    loaded = assembled(eyes, words, tmp_path / "out")
    assert (loaded.manifest.kind, loaded.manifest.chat_format) == ("full", "template")
    assert tokens_per_image(loaded.processor) == patches
    model, language = loaded.model, Qwen3ForCausalLM.from_pretrained(words, dtype=torch.float32)
    for name, value in language.model.state_dict().items():
        assert torch.equal(value, model.model.language_model.state_dict()[name]), name
    assert torch.equal(language.lm_head.weight, model.lm_head.weight)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    family = CLIPModel if tower is clip_folder else SiglipModel
    seen = family.from_pretrained(eyes, dtype=torch.bfloat16).float().vision_model.state_dict()
    own = model.model.vision_tower.state_dict()
    for name, value in seen.items():
        assert any(torch.equal(value, own[key]) for key in (name, f"vision_model.{name}") if key in own), name
    question = [([Image.new("RGB", (50, 90))], [Turn(role="user", text="Where?")])]
    assert Answerer(loaded, "x").answer_batch(question, max_new_tokens=3)[0].completion_tokens
    # What stock classes compute from the folder is what we compute.
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=question[0][0], text="<image>Where?", return_tensors="pt")
    assert (inputs["input_ids"] == stock.config.image_token_index).sum() == patches
    assert torch.isfinite(stock(**inputs).logits).all()


@pytest.mark.parametrize(("name", "tokens"), [("dinov2", 16), ("registers", 20), ("dinov3", 20), ("vit", 16)])
def test_an_encoder_of_another_family_is_read_at_its_patches(name: str, tokens: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    eyes = encoder_folder(tmp_path / "tower", name)
    loaded = assembled(eyes, qwen_folder(tmp_path / "words", tied=True), tmp_path / "out")
    assert tokens_per_image(loaded.processor) == tokens
    tower = AutoModel.from_pretrained(eyes, dtype=torch.bfloat16).float().eval()
    own = loaded.model.model.vision_tower.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in tower.state_dict().items() if "pooler" not in key)
    assert len(blocks(loaded.model.model.vision_tower)) == 2
    # What training reads is what the stock class projects, and what the encoder itself says of its patches.
    answerer = Answerer(loaded, "x")
    picture = Image.effect_noise((50, 90), 80).convert("RGB")
    pixels = answerer.pixels([picture])
    with torch.inference_mode():
        features = vision_features(loaded.model, pixels)
        wanted = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        stock = loaded.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
        projected = loaded.model.model.multi_modal_projector(features)[0]
    assert torch.allclose(features, wanted, atol=1e-6)
    assert torch.allclose(projected, stock, atol=1e-6)
    turns = [Turn(role="user", text="Where?")]
    assert answerer.answer_batch([([picture], turns)], max_new_tokens=3)[0].completion_tokens
    looked = answerer.looker.look(answerer.looker.prepare([picture], turns, "There.", attention=True))
    assert looked.attention is not None
    stock_model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    inputs = AutoProcessor.from_pretrained(tmp_path / "out")(images=picture, text="<image>Where?", return_tensors="pt")
    assert (inputs["input_ids"] == stock_model.config.image_token_index).sum() == tokens
    assert torch.isfinite(stock_model(**inputs).logits).all()


def test_the_vocabulary_grows_by_the_token_of_pictures(tmp_path: Path) -> None:
    words = llama_folder(tmp_path / "words")
    tokenizer_file = words / "tokenizer.json"
    tokenizer_file.write_text(tokenizer_file.read_text().replace("<image>", "<imago>"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (words / name).is_file():
            (words / name).write_text((words / name).read_text().replace("<image>", "<imago>"))
    language = LlamaForCausalLM.from_pretrained(words)
    before = language.lm_head.weight.shape[0]
    loaded = assembled(clip_folder(tmp_path / "tower"), words, tmp_path / "out", "--chat-format", "vicuna_v1")
    assert loaded.model.lm_head.weight.shape[0] == before + 1
    assert loaded.model.config.image_token_id == before
    assert torch.equal(loaded.model.lm_head.weight[:before], language.lm_head.weight)
    assert torch.allclose(loaded.model.lm_head.weight[before], language.lm_head.weight.mean(0), atol=1e-6)
    assert loaded.manifest.chat_format == "vicuna_v1"


def test_the_projector_is_seeded(tmp_path: Path) -> None:
    parts = clip_folder(tmp_path / "tower"), llama_folder(tmp_path / "words")
    made = []
    for number, seed in enumerate("001"):
        loaded = assembled(*parts, tmp_path / str(number), "--chat-format", "vicuna_v1", "--seed", seed)
        made.append(loaded.model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_mistakes_are_told_and_leave_nothing(tmp_path: Path) -> None:
    tower, words = clip_folder(tmp_path / "tower"), llama_folder(tmp_path / "words")
    with pytest.raises(ConfigError, match="no chat template; add --chat-format"):
        assembled(tower, words, tmp_path / "out")
    with pytest.raises(CheckpointError, match="vision tower .*words: model_type is 'llama'"):
        assembled(words, words, tmp_path / "out", "--chat-format", "vicuna_v1")
    with pytest.raises(CheckpointError, match="tower: .*cannot be opened"):
        assembled(tower, tower, tmp_path / "out", "--chat-format", "vicuna_v1")
    with pytest.raises(ConfigError, match="--chat-format latin"):
        assembled(tower, words, tmp_path / "out", "--chat-format", "latin")
    mae = encoder_folder(tmp_path / "mae", "mae")
    with pytest.raises(CheckpointError, match=r"hidden state -2 of a picture of 64 x 64 .* at least 16 states"):
        assembled(mae, words, tmp_path / "out", "--chat-format", "vicuna_v1")
    timm = {"architecture": "vit_large_patch16_224", "num_features": 1024, "pretrained_cfg": {"input_size": [3, 8, 8]}}
    for name, file, content in (("timm", "config.json", timm), ("open_clip", "open_clip_config.json", {})):
        write_json(tmp_path / name / file, content)
        with pytest.raises(CheckpointError, match=f"in the format of {name}, which is not read; give an encoder in"):
            assembled(tmp_path / name, words, tmp_path / "out", "--chat-format", "vicuna_v1")
    assert not (tmp_path / "out").exists()
