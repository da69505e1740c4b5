"""Several models that differ by their adapters only, from one loaded base."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from toolkit.models import model
from toolkit.recipe.plan import Hardware
from toolkit.recipe.sections import Recipe


class Switched:
    """One loaded base that is any of several models: `with models.use(adapter)`."""

    def __init__(self, recipe: Recipe, hardware: Hardware, adapters: Sequence[Path]):
        self.model: Any = model.load_base(recipe, hardware)
        self.names = {path: f"model{i}" for i, path in enumerate(dict.fromkeys(adapters))}  # PEFT takes no dots
        for path, name in self.names.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(path), adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, str(path), adapter_name=name)
        self.model.eval()
        self.current: Path | None = None
        self._switch(None)

    @contextmanager
    def use(self, path: Path | None) -> Iterator[Any]:
        """The base with this adapter, or without any; what was in use before is so again afterwards."""
        before, self.current = self.current, path
        self._switch(path)
        try:
            yield self.model
        finally:
            self.current = before
            self._switch(before)

    def _switch(self, path: Path | None) -> None:
        if path is not None:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.names[path], inference_mode=True)
        elif self.names:
            self.model.base_model.disable_adapter_layers()
