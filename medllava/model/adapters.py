"""Several LoRA checkpoints on one language model: one is switched on at a time, and brings its own projector along.

The weights of the language model are in memory once, however many adapters there are.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from medllava.errors import CheckpointError
from medllava.model import checkpoint
from medllava.model.checkpoint import ADAPTER_FILES, PROJECTOR_FILE, TOWER_FILE, Loaded
from medllava.model.tensors import assign, differences, read_tensors, refuse


class Adapters:
    """The adapters of ``base``, which was loaded from the folder ``source``. The base itself is None."""

    def __init__(self, base: Loaded, source: Path) -> None:
        self._base, self._source = base, source
        self._peft: Any = None
        self._on: str | None = None
        self._parts: dict[str | None, dict[str, Any]] = {None: self._own_parts()}

    def add(self, name: str, folder: Path) -> Loaded:
        """Put the folder's adapters beside the others, under ``name``; returns it as an open checkpoint, which is what
        :meth:`switch` makes of it. Raises CheckpointError."""
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        manifest, processor, stands_on = checkpoint.verify(folder)
        if manifest.kind != "lora":
            raise CheckpointError(f"{folder}: a {manifest.kind} checkpoint, no LoRA adapter; name it with --model-path")
        if Path(stands_on).resolve() != self._source.resolve():
            raise CheckpointError(f"{folder}: stands on {stands_on}, not on {self._source}")
        self.switch(None)
        tensors = read_tensors(folder / ADAPTER_FILES[1])
        try:
            config = LoraConfig.from_pretrained(str(folder))
            config.base_model_name_or_path = self._base.model.name_or_path
            with checkpoint.quiet_peft():
                if self._peft is None:
                    self._peft = get_peft_model(self._base.model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder / ADAPTER_FILES[0]}: cannot be used: {error}") from error
        expected = get_peft_model_state_dict(self._peft, adapter_name=name)
        refuse(str(folder / ADAPTER_FILES[1]), differences(expected, tensors))
        set_peft_model_state_dict(self._peft, tensors, adapter_name=name)
        self._peft.eval().base_model.disable_adapter_layers()
        parts = self._own_parts()
        files = {"multi_modal_projector": PROJECTOR_FILE}
        if manifest.tower_trained:
            files["vision_tower"] = TOWER_FILE
        for part, file in files.items():
            parts[part] = copy.deepcopy(parts[part])
            tensors = read_tensors(folder / file)
            assign(parts[part], tensors, folder / file, partly=part == "vision_tower")
        self._parts[name] = parts
        return Loaded(self._base.model, processor, manifest, str(stands_on))

    def switch(self, name: str | None) -> None:
        """Make the model that of ``name``; None is the base."""
        if name == self._on:
            return
        for part, module in self._parts[name].items():
            setattr(self._base.model.model, part, module)
        if name is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.base_model.set_adapter(name)
        self._on = name

    def _own_parts(self) -> dict[str, Any]:
        model = self._base.model.model
        return {"multi_modal_projector": model.multi_modal_projector, "vision_tower": model.vision_tower}
