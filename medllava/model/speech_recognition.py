"""Speech recognition with word times by a Whisper folder in Hugging Face format (never downloaded)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

from medllava.errors import CheckpointError

RATE = 16_000


class WordRecogniser:
    """A Whisper model on the best device here. Raises CheckpointError where the folder is none."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no such model folder; expected a Whisper model in Hugging Face format")
        try:
            if AutoConfig.from_pretrained(folder, local_files_only=True).model_type != "whisper":
                raise CheckpointError(f"{folder}: not a Whisper model")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = torch.float16 if device == "cuda" else torch.float32
            model: Any = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=dtype, local_files_only=True)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error
        if getattr(model.generation_config, "alignment_heads", None) is None:
            raise CheckpointError(
                f"{folder}: generation_config.json has no 'alignment_heads', which word times are computed from"
            )
        self._recognise: Any = pipeline(
            "automatic-speech-recognition", model=model, tokenizer=processor.tokenizer,
            feature_extractor=processor.feature_extractor, device=device,
        )

    def words(self, samples: npt.NDArray[np.float32]) -> list[tuple[str, float, float]]:
        """(word, start in seconds, end) in order of time, of at most 30 s of mono sound at 16 kHz."""
        length_s = len(samples) / RATE
        heard = self._recognise({"raw": samples, "sampling_rate": RATE}, return_timestamps="word")
        words: list[tuple[str, float, float]] = []
        last_s = 0.0
        for chunk in heard["chunks"]:
            start_s, end_s = chunk["timestamp"]
            # The last word of a window may lack its end.
            start_s = min(max(last_s if start_s is None else start_s, last_s), length_s)
            end_s = min(max(length_s if end_s is None else end_s, start_s), length_s)
            last_s = start_s
            if chunk["text"].strip():
                words.append((chunk["text"].strip(), round(start_s, 3), round(end_s, 3)))
        return words
